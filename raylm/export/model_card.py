"""The model card: what a model is, its scores and their text, how it was trained and how to load it."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import console, corpus, tokens
from raylm.checkpoint import read_record
from raylm.config import WHOLE_SPLIT, Experiment, get
from raylm.errors import DataError
from raylm.export.files import ADAPTER, Files, is_adapter, name_of, num_parameters
from raylm.summary import LOGGED

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from raylm.tokens import Store

logger = logging.getLogger(__name__)

CARD = "README.md"

HERE = "."
"""The path that a local card loads the model from, which stays valid when the directory is moved."""
LOADS_HERE = re.compile(rb'(from_pretrained\(|model=)"\."')


def build_card(
    directory: Path,
    repo: str,
    experiment: Experiment | None,
    files: Files,
    record: Mapping[str, Any] | None = None,
) -> bytes:
    """README.md of a model that is loaded as `repo`: the one in its directory, else a new one.

    `experiment` is the published one, `files` those that are published with it; `record` replaces raylm.json of the
    directory. An existing README.md changes only from HERE to `repo`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if (directory / CARD).exists():
        return LOADS_HERE.sub(rb"\1" + json.dumps(repo).encode(), (directory / CARD).read_bytes())
    file = directory / "config.json"  # an adapter that was exported has none
    configuration = json.loads(file.read_bytes()) if file.exists() else {}
    model_type = configuration.get("model_type")
    masked = any(name.endswith("ForMaskedLM") for name in configuration.get("architectures") or ())
    adapter = is_adapter(files)
    record = read_record(directory) if record is None else record
    store = _store(record)
    base = experiment.model.path if experiment else None
    sources = [name_of(source["name"]) for source in store.sources] if store else []
    task = "fill-mask" if masked else "text-generation"
    name = experiment.name if experiment and repo == HERE else repo.split("/")[-1]
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag=task,
        tags=["raylm", *(["lora"] if adapter else []), *([model_type] if model_type else [])],
        base_model=base if base and not base.startswith("./") else None,
        datasets=[name.removeprefix("hub://").split("?")[0] for name in sources if name.startswith("hub://")] or None,
        metrics=["perplexity"] if "perplexity" in record else None,
        model_name=name,
        eval_results=_eval_results(task, record, experiment, sources) if experiment else None,
    )
    kind = "LoRA adapter" if adapter else f"{model_type or 'language'} model"
    summary = f"A {kind} of {num_parameters(files):,} parameters"
    if experiment:
        origin = f"from {_code(name_of(base))}" if base else "from scratch"
        seen = f" on {record['tokens']:,} tokens" if "tokens" in record else ""
        summary += f", trained {origin}{seen} with raylm"
    parts = [
        f"# {name}",
        f"{summary}.",
        *_loading(repo, masked, adapter),
    ]
    if any(name.startswith(f"{ADAPTER}/") for name in files):
        parts.append(
            f"The directory [{ADAPTER}]({ADAPTER}) has the same training as an adapter, which peft loads over its "
            "base model."
        )
    if experiment and "perplexity" in record:
        parts += _scores(record, experiment, store)
    if store:
        parts += _data(store)
    if experiment:
        parts += _settings(experiment, record, repo)
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")).encode(errors="backslashreplace")


def _eval_results(
    task: str, record: Mapping[str, Any], experiment: Experiment, sources: Sequence[str]
) -> list[EvalResult] | None:
    """The scores as metadata, which the Hub searches and shows; None without scores."""
    from huggingface_hub import EvalResult

    def of_split(split: str, paths: Sequence[str], scores: Mapping[str, Any], score: str) -> list[EvalResult]:
        texts = [name_of(path) for path in paths] or list(sources)
        is_hub = len(texts) == 1 and texts[0].startswith("hub://")
        return [
            EvalResult(
                task_type=task,
                dataset_type=texts[0].removeprefix("hub://").split("?")[0] if is_hub else "text",
                dataset_name=", ".join(texts) or experiment.name,
                dataset_split=split,
                metric_type=metric,
                metric_value=round(scores[key], 4),
            )
            for metric, key in ((experiment.measure, score), ("bits_per_byte", "bits_per_byte"))
            if key in scores and math.isfinite(scores[key])
        ]

    section = experiment.corpus
    results = of_split("validation", section.validation_paths, record, "perplexity")
    results += of_split("test", section.test_paths, record.get("test", {}), experiment.measure)
    return results or None


def _store(record: Mapping[str, Any]) -> Store | None:
    """The token store that a model was trained on; None if it no longer exists."""
    if "store" not in record:
        return None
    try:
        return tokens.open_store(record["store"])
    except (DataError, OSError):
        logger.warning("token store %s not found; the model card omits the data section", record["store"])
        return None


def _loading(repo: str, masked: bool, adapter: bool) -> list[str]:
    task, auto, prompt = (
        ("fill-mask", "AutoModelForMaskedLM", 'f"Once upon a {use.tokenizer.mask_token}"')
        if masked
        else ("text-generation", "AutoModelForCausalLM", '"Once upon a time", max_new_tokens=20')
    )
    imports, loaded = f"from transformers import {auto}, AutoTokenizer, pipeline", f'model="{repo}"'
    if adapter:
        auto = "AutoPeftModel" if masked else "AutoPeftModelForCausalLM"
        imports = f"from peft import {auto}\nfrom transformers import AutoTokenizer, pipeline"
        loaded = "model=model, tokenizer=tokenizer"
    code = f"""\
```python
{imports}

model = {auto}.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")

use = pipeline("{task}", {loaded})
print(use({prompt}))
```"""
    return ["## How to load it", code]


def _prefix(record: Mapping[str, Any]) -> str:
    prefix = record.get("prefix")
    return f"the token {_code(prefix)}" if prefix else "nothing"


def _scores(record: Mapping[str, Any], experiment: Experiment, store: Store | None) -> list[str]:
    """The scores in raylm.json, and their text: the whole validation split, or the start of it."""
    what = record.get("scored_on") or experiment.eval.scored_on
    if store:
        split = store.manifest["validation"]
        of = "" if what == WHOLE_SPLIT else "of "
        unit = "passage" if corpus.counted_as(store.manifest["ledger"]) else "document"
        counted = console.counted(split["documents"], unit)
        what += f" ({of}{counted}, {split['tokens']:,} tokens, {split['bytes']:,} bytes)"
    units = "passages" if experiment.corpus.split_by == "passage" else "documents"
    held = f"{experiment.corpus.validation_fraction:g} of the {units}, chosen by a hash of their text"
    if given := experiment.corpus.validation_paths:
        held = ", ".join(_code(name_of(path)) for path in given)
    stride = f"with {experiment.eval.stride:,} new tokens in each" if experiment.eval.stride else "that do not overlap"
    how = {
        "perplexity": "Every token of every document is scored exactly once, in windows of the model's context "
        f"{stride}, with {_prefix(record)} in front of a document",
        "masked_perplexity": "A fixed 15 % of the tokens of every document are masked together, and predicted from all "
        "others",
        "pseudo_perplexity": "Every token of every document is masked by itself, and predicted from all others",
    }[experiment.measure]
    arithmetic = record.get("scored_in") or experiment.eval.precision
    scores = {console.label(experiment.measure): "perplexity", "bits per byte": "bits_per_byte"}
    why = store and tokens.incomparable(store.validation.unknown_tokens, store.validation.num_tokens)
    comparable = (
        f"this model's tokenizer. **Not to be compared with other models**: {why}."
        if why
        else "this model's tokenizer; bits per byte compares models whose tokenizers differ."
    )
    rows = [(name, f"{record[key]:.4f}") for name, key in scores.items() if key in record]
    test = record.get("test")
    if test is not None:
        rows.append((f"{console.label(experiment.measure)} on the test split", f"{test[experiment.measure]:.4f}"))
    return [
        "## Scores",
        _table(("score", "value"), rows),
        f"On {what}: {held}. {how}, in {arithmetic}. Perplexity is per token of {comparable}",
        *([f"{test['sentence'][0].upper()}{test['sentence'][1:]}."] if test is not None else []),
    ]


def _data(store: Store) -> list[str]:
    counted = ("documents", "tokens", "bytes")
    manifest, ledger = store.manifest, store.manifest["ledger"]
    sources = [(_code(name_of(row["name"])), *(f"{row[what]:,}" for what in counted)) for row in store.sources]
    splits = [(name, *(f"{manifest[name][what]:,}" for what in counted)) for name in store.splits]
    counted_as = corpus.counted_as(ledger)
    return [
        "## Data",
        _table(("source, what was kept of it", *counted), sources),
        _table(("split", *counted), splits),
        *([f"{counted_as[0].upper()}{counted_as[1:]}."] if counted_as else []),
        f"**{100 * corpus.kept_fraction(ledger):.2f}% of data after filtering**: {ledger.get('kept', 0):,} of "
        f"{ledger.get('documents', 0):,} documents that were read. Their outcomes:",
        _table(("outcome", "documents or bytes"), [(name, f"{count:,}") for name, count in ledger.items()]),
    ]


def _settings(experiment: Experiment, record: Mapping[str, Any], repo: str) -> list[str]:
    shown = {key: get(experiment, key) for key in (*LOGGED, "train.max_tokens", "train.num_epochs")}
    if experiment.model.config is not None:
        shown |= {f"model.config.{name}": value for name, value in experiment.model.config.items()}
    rows = [(_code(key), _code(console.format_number(value))) for key, value in shown.items() if value is not None]
    if "step" in record:
        rows.append(("optimizer steps of these weights", console.format_number(record["step"])))
    names = "" if repo == HERE else ", in which local paths are reduced to names"
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
    """The text as code in a cell of a table: a bar would end the cell, a backtick the code."""
    return f"`{text}`".replace("|", "\\|") if "`" not in text else text.replace("|", "\\|")
