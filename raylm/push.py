"""python -m raylm.push MODEL REPO_ID: a trained model, with a card that says what it is, to the Hugging Face Hub.

What is sent is a plain Hugging Face directory: weights as safetensors, configuration, tokenizer, README.md (the card)
and experiment.yaml. What is not listed here stays: optimizer, random states, whatever is pickled, where things lay.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from raylm import cli
from raylm.config import Experiment, dump, get
from raylm.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from raylm.tokens import Store

    Files = dict[str, Path | bytes]  # name in the repository -> the file that is sent, or its content

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip

WHOSE = ("storage", "cluster.address", "tracking.uri", "tracking.experiment")
"""Settings of the machine and not of the model: they are sent as their defaults."""
PLACE = re.compile(r"(^|[._])(paths?|file|dir|uri)$|(^|\.)(arguments|config)(\.|$)")
"""The keys of an experiment and of a model's configuration whose values are places, or may be: those of free mappings.
The others stay as they are: a keyword or a pattern may well start with a slash."""
SECRET = re.compile(r"(token|secret|password|key)$")
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def push(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    repo_id: Annotated[str, typer.Argument(help="Where it goes on the Hub: NAMESPACE/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and those you let in see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder only; send nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep what is sent in this new or empty directory.")
    ] = None,
    json: cli.Json = False,
) -> cli.Answer:
    """Send a model, its tokenizer and a model card to the Hugging Face Hub, as one commit.

    The token is that of HF_TOKEN or of hf auth login.

    To edit the card first: write it with --dry-run --out DIR, edit DIR/README.md, and push DIR.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from raylm import checkpoint, report

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"REPO_ID {repo_id!r}: {error}", where="REPO_ID") from None
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new or an empty directory", where="--out")
    directory = checkpoint.check(model)
    files = model_files(directory)
    num_parameters = parameters(directory, files)
    experiment = checkpoint.read_experiment(directory)
    if experiment is not None:
        experiment = published(experiment)
        files[checkpoint.EXPERIMENT] = dump(experiment).encode()
    if left := sorted({path.name for path in directory.iterdir()} - {*files, CARD}):
        cli.console.print(f"not sent: {', '.join(left)}", soft_wrap=True, markup=False)
    hub = connect(None if dry_run else token(repo_id))
    if dry_run:
        repo, url = repo_id, f"{hub.endpoint}/{repo_id}"
        out = out or Path(tempfile.mkdtemp(prefix="raylm-push-"))
    else:
        repo, url = create(hub, repo_id, private)
    files[CARD] = card(directory, repo, experiment, num_parameters)
    if out is not None:
        write(files, out)
    if not dry_run:
        send(hub, repo, files)
    record = {"repo": repo, "url": url, "files": sorted(files), "dry_run": dry_run}
    if out is not None:
        record["folder"] = str(out.resolve())
    sizes = {name: f"{size(content):,} bytes" for name, content in sorted(files.items())}
    where = {"folder": record.get("folder"), "would go to" if dry_run else "sent to": url}
    return cli.Answer(record, report.facts({**where, **sizes}))


# What is sent --------------------------------------------------------------------------------------------------------


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


def size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def write(files: Files, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
    except OSError as error:
        raise StorageError(f"--out {folder}: {error.strerror or error}", where="--out") from None


# The card ------------------------------------------------------------------------------------------------------------


def card(directory: Path, repo: str, experiment: Experiment | None, num_parameters: int) -> bytes:
    """README.md: the one beside the model, as it is, else one made of what raylm knows. `experiment` is published."""
    from huggingface_hub import ModelCard, ModelCardData

    from raylm import checkpoint

    if (directory / CARD).exists():
        return (directory / CARD).read_bytes()
    made = json.loads((directory / "config.json").read_bytes())
    masked = any(name.endswith("ForMaskedLM") for name in made.get("architectures") or ())
    record = checkpoint.read_record(directory)
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
        f"# {repo.split('/')[-1]}",
        f"{summary}.",
        *_loading(repo, masked),
    ]
    if experiment and "perplexity" in record:
        parts += _scores(record, experiment, store, masked)
    if store:
        parts += _data(store)
    if experiment:
        parts += _settings(experiment, record)
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")).encode()


def _store(record: Mapping[str, Any]) -> Store | None:
    """The token store of a model, for its ledger."""
    from raylm import tokens

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
        else ("text-generation", "AutoModelForCausalLM", '"Once upon a time"')
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
    from raylm import corpus

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


def _settings(experiment: Experiment, record: Mapping[str, Any]) -> list[str]:
    from raylm import report, train

    shown = {key: get(experiment, key) for key in (*train.PARAMETERS, "train.max_tokens", "train.num_epochs")}
    if experiment.model.config is not None:
        shown |= {f"model.config.{name}": value for name, value in experiment.model.config.items()}
    rows = [(_code(key), _code(report.figure(value))) for key, value in shown.items() if value is not None]
    if "step" in record:
        rows.append(("optimizer steps of these weights", report.figure(record["step"])))
    return [
        "## Settings",
        _table(("setting", "value"), rows),
        "All of them are in [experiment.yaml](experiment.yaml), where local paths are left as their names: "
        "`raylm train --config experiment.yaml corpus.paths=...` trains such a model again.",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """The text as it is in a cell of a table: a bar would end the cell, a backtick the text."""
    return f"`{text}`".replace("|", "\\|") if "`" not in text else text.replace("|", "\\|")


# The Hub -------------------------------------------------------------------------------------------------------------

REFUSALS = {
    401: "the Hub does not know the token; run hf auth login again, or set HF_TOKEN to one that is valid",
    403: "the token may not write there; use one with write access",
    404: "there is no such repository or namespace, or the token does not see it",
}


def token(repo: str) -> str:
    """The user's own, from the environment or the Hub's login; it is asked for nowhere else."""
    from huggingface_hub import get_token

    with _failures(repo, None):
        found = get_token()
    if found is None:
        raise ConfigError("no token for the Hub; run hf auth login, or set HF_TOKEN in the environment", "HF_TOKEN")
    return found


def connect(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token or False)


def create(hub: HfApi, repo_id: str, private: bool) -> tuple[str, str]:
    """The full name and the address of the repository, which may be there already."""
    with _failures(repo_id, hub):
        created = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not hub.repo_info(created.repo_id).private
    if public:
        raise ConfigError(
            f"{created.repo_id} is there already and is public, which --private does not change; make it private at "
            f"{created.url}/settings, or push without --private",
            where="--private",
        )
    return created.repo_id, created.url


def send(hub: HfApi, repo: str, files: Files) -> None:
    """One commit: the repository holds the whole model or, if that fails, what it held before."""
    from huggingface_hub import CommitOperationAdd

    for name, content in files.items():
        if not name.endswith(".safetensors"):
            text = content if isinstance(content, bytes) else content.read_bytes()
            if str(hub.token).encode() in text:
                raise ConfigError(f"{name} has your Hub token in it; take it out first", where=name)
    total = sum(size(content) for content in files.values())
    cli.console.print(f"sending {len(files)} files, {total / 1e6:.1f} MB, to {repo} …", soft_wrap=True)
    with _failures(repo, hub):
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(files.items())
        ]
        hub.create_commit(repo, operations, commit_message="Model, tokenizer and card, by raylm push")


@contextlib.contextmanager
def _failures(repo: str, hub: HfApi | None) -> Iterator[None]:
    """What the Hub refuses, and a Hub out of reach, as StorageError: it names the repository and never the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # of huggingface_hub, its HTTP client or its upload library: no common class
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if refusal is not None:
            status, why = refusal.response.status_code, refusal.server_message or "no reason given"
            said = f"{REFUSALS.get(status, 'the Hub refused it')} ({status}: {why})"
        else:
            said = f"cannot be sent: {error or type(error).__name__}"
        if hub is not None and hub.token:
            said = said.replace(str(hub.token), "***")  # a server may tell what it was sent
        raise StorageError(f"{repo}: {' '.join(said.split())[:500]}", where=repo) from None


def main() -> None:
    cli.run(push)


if __name__ == "__main__":
    from raylm.push import main  # by its real name, so that Ray ships functions by reference

    main()
