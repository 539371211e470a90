"""What a published model directory holds, and the model card in it.

A plain Hugging Face directory: weights as safetensors, configuration, tokenizer, README.md (the card) and
experiment.yaml. What is not listed here stays behind: optimizer, random states, whatever is pickled. On the Hub the
experiment has its places by their names; `export` leaves it as it is, with raylm.json, since it stays on this machine.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from raylm import cli, corpus, storage, tokens
from raylm.checkpoint import OF_TRAINING, check, read_experiment, read_record
from raylm.checkpoint.directory import EXPERIMENT, RECORD
from raylm.config import Experiment, get
from raylm.errors import DataError, StorageError

if TYPE_CHECKING:
    from raylm.tokens import Store

Files = dict[str, Path | bytes]
"""Name in the published directory -> the file that is published, or its content."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip

SETTINGS = (
    "blocks.block_size",
    "blocks.packing",
    "objective.kind",
    "train.learning_rate",
    "train.warmup_steps",
    "train.weight_decay",
    "train.lr_scheduler_type",
    "train.batch_tokens",
    "train.seed",
    "cluster.num_workers",
)
"""What tells one training from another: in every card, and with every MLflow run as parameters."""

HERE = "."
"""What a card loads that lies beside its model on a disk: right wherever the directory is moved to."""
LOADS_HERE = re.compile(rb'(from_pretrained\(|model=)"\."')

WHOSE = ("storage", "cluster.address", "tracking.uri", "tracking.experiment")
"""Settings of the machine and not of the model: they are sent as their defaults."""
PLACE = re.compile(r"(^|[._])(paths?|file|dir|uri)$|(^|\.)(arguments|config)(\.|$)")
"""The keys of an experiment and of a model's configuration whose values are places, or may be: those of free mappings.
The others stay as they are: a keyword or a pattern may well start with a slash."""
SECRET = re.compile(r"(token|secret|password|key)$")
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


# What is published ---------------------------------------------------------------------------------------------------


def model_files(directory: Path) -> Files:
    """The model, generation config and tokenizer of a directory; StorageError if they are not whole."""
    try:
        names = [WEIGHTS]
        if (directory / INDEX).exists():
            names = [INDEX, *sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))]
        found = [name for name in CONFIGS if (directory / name).exists()]
        configs: dict[str, dict[str, Any]] = {name: dict(json.loads((directory / name).read_bytes())) for name in found}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{directory} has a configuration that is damaged: {error}", str(directory)) from None
    files: Files = {}
    for name in names:
        path = directory / name
        if not path.exists() or Path(name).name != name:
            pickled = next(directory.glob("*.bin"), None)
            hint = f" ({pickled.name} is pickled, and loading a pickle runs code in it)" if pickled else ""
            raise StorageError(
                f"{directory} holds no {name}{hint}; save the model there with save_pretrained", where=str(path)
            )
        files[name] = path
    for name in TOKENIZER:
        if (directory / name).exists():
            files[name] = directory / name
    if not any(name in files for name in TOKENIZER):
        raise StorageError(
            f"{directory} holds no tokenizer, and a model is of no use without; save it there with save_pretrained",
            where=str(directory),
        )
    if any("auto_map" in settings for settings in configs.values()):  # a model with code of its own
        files |= {file.name: file for file in directory.glob("*.py")}
    for name, settings in configs.items():
        shown = named(settings)  # older versions of transformers wrote down where a model was loaded from
        files[name] = directory / name if shown == settings else (json.dumps(shown, indent=2) + "\n").encode()
    return files


def parameters(directory: Path, files: Files) -> int:
    """How many numbers the weights are, by their headers; StorageError naming the file that is torn."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in (directory / name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(path, framework="np") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise StorageError(f"{path} cannot be loaded: {error}", where=str(path)) from None
    return count


def published(experiment: Experiment) -> Experiment:
    """The experiment without what is its owner's own affair: places by their names, the machine's settings left out."""
    tree = named(experiment.model_dump())
    for key in WHOSE:
        *parents, last = key.split(".")
        owner = tree
        for part in parents:
            owner = owner[part]
        if owner[last] is not None:  # tracking.uri: null means no tracking
            del owner[last]
    arguments = tree["train"]["arguments"]  # hub_token
    tree["train"]["arguments"] = {
        key: value for key, value in arguments.items() if not (isinstance(value, str) and SECRET.search(key))
    }
    return Experiment.model_validate(tree)


def named(value: Any, key: str = "") -> Any:
    """A tree of settings with the places in it by their names, ./name; `key` is that of a place, else empty."""
    if isinstance(value, Mapping):
        return {name: named(inner, name if PLACE.search(name) else key) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(named(inner, key) for inner in value)
    if not isinstance(value, str):
        return value
    shown = name_of(value) if key else value
    return CREDENTIALS.sub("", value) if shown == value else f"./{shown}"  # with ./ it is no Hub id


def name_of(place: str) -> str:
    """notes/**/*.md of /home/me/notes/**/*.md, books.jsonl of s3://bucket/books.jsonl; hub://… and Hub ids stay."""
    if re.match(r"python://|hub://\w", place) or not re.match(r"[/~]|\./|[\w+.:-]+://", place):
        return place
    if "://" in place:  # before an @ stand credentials, after a ? a signature
        path = place.rpartition("://")[2].split("?")[0].rpartition("@")[2]
    else:
        path = place
    parts = [part for part in path.split("/") if part not in ("", "~", ".")]
    glob = next((index for index, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return "/".join(parts[max(0, glob - 1) :]) or place


# The card ------------------------------------------------------------------------------------------------------------


def of(directory: Path, repo: str, experiment: Experiment | None, num_parameters: int) -> bytes:
    """README.md of a model that is loaded as `repo`: the one beside it, else one made of what raylm knows.

    `experiment` is published. Of the one beside it nothing is changed but that it loads `repo` where it says HERE.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if (directory / CARD).exists():
        return LOADS_HERE.sub(rb"\1" + json.dumps(repo).encode(), (directory / CARD).read_bytes())
    made = json.loads((directory / "config.json").read_bytes())
    masked = any(name.endswith("ForMaskedLM") for name in made.get("architectures") or ())
    record = read_record(directory)
    store = _store(record)
    base = experiment.model.path if experiment else None
    sources = [name_of(source["name"]) for source in store.manifest["sources"]] if store else []
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="fill-mask" if masked else "text-generation",
        tags=["raylm", *([made["model_type"]] if "model_type" in made else [])],
        base_model=base if base and not base.startswith("./") else None,
        datasets=[name.removeprefix("hub://").split("?")[0] for name in sources if name.startswith("hub://")] or None,
        metrics=["perplexity"] if "perplexity" in record else None,
    )
    summary = f"A {made.get('model_type', 'language')} model of {num_parameters:,} parameters"
    if experiment:
        origin = f"from {_code(name_of(base))}" if base else "from scratch"
        seen = f" on {record['tokens']:,} tokens" if "tokens" in record else ""
        summary += f", trained {origin}{seen} with raylm"
    parts = [
        f"# {experiment.name if experiment and repo == HERE else repo.split('/')[-1]}",
        f"{summary}.",
        *_loading(repo, masked),
    ]
    if experiment and "perplexity" in record:
        parts += _scores(record, experiment, store, masked)
    if store:
        parts += _data(store)
    if experiment:
        parts += _settings(experiment, record, repo)
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")).encode()


def _store(record: Mapping[str, Any]) -> Store | None:
    """The token store of a model, for its ledger."""
    if "store" not in record:
        return None
    try:
        return tokens.open_store(record["store"])
    except (DataError, OSError):
        where = escape(str(record["store"]))
        cli.console.print(
            f"[yellow]warning:[/] the token store {where} is not there, so the card does not tell of the data",
            soft_wrap=True,
        )
        return None


def _loading(repo: str, masked: bool) -> list[str]:
    task, auto, prompt = (
        ("fill-mask", "AutoModelForMaskedLM", 'f"Once upon a {use.tokenizer.mask_token}"')
        if masked
        else ("text-generation", "AutoModelForCausalLM", '"Once upon a time", max_new_tokens=20')
    )
    code = f"""\
```python
from transformers import {auto}, AutoTokenizer, pipeline

model = {auto}.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")

use = pipeline("{task}", model="{repo}")
print(use({prompt}))
```"""
    return ["## How to load it", code]


def _scores(record: Mapping[str, Any], experiment: Experiment, store: Store | None, masked: bool) -> list[str]:
    """The scores of raylm.json, and on what: the whole split, or with eval.max_tokens what stands first in it."""
    what = "the validation split"
    if store:
        split = store.manifest["validation"]
        what += f" ({split['documents']:,} documents, {split['tokens']:,} tokens, {split['bytes']:,} bytes)"
    if experiment.eval.max_tokens is not None:
        what = f"the first documents of {what}, up to {experiment.eval.max_tokens:,} tokens"
    held = f"{experiment.corpus.validation_fraction:g} of the documents, chosen by a hash of their text"
    if given := experiment.corpus.validation_paths:
        held = ", ".join(_code(name_of(path)) for path in given)
    stride = f"with {experiment.eval.stride:,} new tokens in each" if experiment.eval.stride else "that do not overlap"
    how = (
        "from the tokens around it"
        if masked
        else f"in windows of the model's context {stride}, with one end-of-text token in front of a document"
    )
    scores = {"pseudo-perplexity" if masked else "perplexity": "perplexity", "bits per byte": "bits_per_byte"}
    return [
        "## Scores",
        _table(("score", "value"), [(name, f"{record[key]:.4f}") for name, key in scores.items() if key in record]),
        f"On {what}: {held}. Every token of every document is scored exactly once, {how}. Perplexity is per token of "
        "this model's tokenizer; bits per byte compares models whose tokenizers differ.",
    ]


def _data(store: Store) -> list[str]:
    counted = ("documents", "tokens", "bytes")
    manifest, ledger = store.manifest, store.manifest["ledger"]
    sources = [(_code(name_of(row["name"])), *(f"{row[what]:,}" for what in counted)) for row in manifest["sources"]]
    splits = [(name, *(f"{manifest[name][what]:,}" for what in counted)) for name in ("train", "validation")]
    return [
        "## Data",
        _table(("source, what was kept of it", *counted), sources),
        _table(("split", *counted), splits),
        f"**{100 * corpus.kept_fraction(ledger):.2f}% of data after filtering**: {ledger.get('kept', 0):,} of "
        f"{ledger.get('documents', 0):,} documents that were read. What became of them:",
        _table(("what became of it", "documents or bytes"), [(name, f"{count:,}") for name, count in ledger.items()]),
    ]


def _settings(experiment: Experiment, record: Mapping[str, Any], repo: str) -> list[str]:
    shown = {key: get(experiment, key) for key in (*SETTINGS, "train.max_tokens", "train.num_epochs")}
    if experiment.model.config is not None:
        shown |= {f"model.config.{name}": value for name, value in experiment.model.config.items()}
    rows = [(_code(key), _code(cli.figure(value))) for key, value in shown.items() if value is not None]
    if "step" in record:
        rows.append(("optimizer steps of these weights", cli.figure(record["step"])))
    names = "" if repo == HERE else ", where local paths are left as their names"
    return [
        "## Settings",
        _table(("setting", "value"), rows),
        f"All of them are in [experiment.yaml](experiment.yaml){names}: "
        "`raylm train --config experiment.yaml corpus.paths=...` trains such a model again.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """The text as it is in a cell of a table: a bar would end the cell, a backtick the text."""
    return f"`{text}`".replace("|", "\\|") if "`" not in text else text.replace("|", "\\|")


# A plain directory ---------------------------------------------------------------------------------------------------


def export(checkpoint: str | Path, target: str | Path) -> str:
    """Write the plain Hugging Face directory of a trained checkpoint: model, tokenizer, card, experiment, raylm.json.

    Its place, in full. What stood there is replaced by a whole one or not at all. Weights are hard links where the file
    system has them, and copies elsewhere; the small files are copies, to be edited freely.
    """
    with storage.here(str(checkpoint), but_for=OF_TRAINING) as found:
        directory = check(found)
        experiment = read_experiment(directory)
        if experiment is None:
            raise StorageError(f"{checkpoint} was not trained by raylm: it holds no {EXPERIMENT}", str(checkpoint))
        files = model_files(directory)
        made = of(directory, HERE, published(experiment), parameters(directory, files))
        files |= {EXPERIMENT: directory / EXPERIMENT, RECORD: directory / RECORD, CARD: made}
        if storage.is_remote(str(target)):
            _send(files, str(target))
            return str(target)
        target = Path(target).resolve()
        with _replaced(target) as new:
            for name, content in files.items():
                if isinstance(content, bytes):
                    (new / name).write_bytes(content)
                elif name.endswith(".safetensors"):
                    _link(content, new / name)
                else:
                    shutil.copyfile(content, new / name)
        return str(target)


def _send(files: Files, target: str) -> None:
    """Where nothing can be renamed: config.json, without which a directory holds no model, is removed first and written
    last."""
    with storage.reached(target):
        there = storage.names(target)
        _check_replaceable(target, there and CARD not in there)
        storage.remove_file(f"{target}/config.json")
        storage.remove(target)
        for name in sorted(files, key=lambda name: name == "config.json"):
            content = files[name]
            if isinstance(content, bytes):
                storage.write(f"{target}/{name}", content)
            else:
                storage.upload(content, f"{target}/{name}")


def _check_replaceable(target: str | Path, is_other: object) -> None:
    if is_other:
        raise StorageError(f"{target} is there already and holds no exported model; move it away", where=str(target))


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A new directory that takes the place of `target` at the end; StorageError, and `target` as it was, on failure."""
    _check_replaceable(target, target.exists() and not (target / CARD).exists())
    new, old = (target.with_name(f".{target.name}-{secrets.token_hex(4)}") for _ in range(2))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        if old.exists():
            old.rename(target)
        problem = error.strerror or error
        raise StorageError(f"{target}: the model cannot be exported there: {problem}", where=str(target)) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, to)
