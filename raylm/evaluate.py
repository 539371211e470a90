"""python -m raylm.evaluate MODEL: perplexity and bits per byte of a checkpoint or any Hugging Face model directory."""

from __future__ import annotations

import math
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylm import cli, console
from raylm.config import BlocksConfig, ObjectiveConfig, parse_setting
from raylm.errors import ConfigError, DataError, StorageError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerFast

    from raylm.config import Experiment
    from raylm.tokens import Encoded, Split

Text = Annotated[
    list[str] | None, typer.Option("--text", help="Score these files, directories or globs. May be repeated.")
]
Lines = Annotated[
    Path | None,
    typer.Option("--documents", metavar="FILE", help="Write the figures of every document, a line of JSON each."),
]


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    settings: cli.Settings = None,
    text: Text = None,
    documents: Lines = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Score a model: on --text, on the sets of eval.paths, or on the validation split it was trained with.

    The number depends on the model and the text alone, not on batch size, workers or training block size.
    """
    from raylm import checkpoint, cluster, tables, tokenizer

    given = dict(map(parse_setting, settings or []))
    directory = checkpoint.locate(model, given.get("model.gguf_file")).resolve()
    experiment = cli.experiment(
        config or checkpoint.experiment_file(directory), [*its_own(directory, config), *(settings or [])], print_config
    )
    check_settings(experiment, directory, model)
    resources = cluster.planned_resources(experiment.cluster)
    if documents is not None:
        check_writable(documents)
    from raylm import objective, perplexity, storage
    from raylm import model as models
    from raylm.training import launch

    configuration = models.pretrained_configuration(experiment.model)
    perplexity.context_of(experiment.eval, models.context(configuration), experiment.blocks.block_size)
    known = tokenizer_of(experiment)
    prefix = tokenizer.frame(known, experiment.tokenizer.prefix).prefix
    is_masked = experiment.objective.is_masked or models.is_masked(configuration)
    measure = experiment.eval.measure(masked=is_masked)
    if is_masked:
        objective.check_settings(ObjectiveConfig(kind="masked"), BlocksConfig(), known)
    found, sets = what_is_scored(directory, experiment, text or [])
    if dry_run:
        counts = {name: len(numbers) for name, numbers in sets.items()}
        shown = {f"documents of {name}": count for name, count in counts.items()}
        return cli.CommandResult({"model": model, "sets": counts}, tables.key_values({"model": model, **shown}))
    here = str(directory)
    with console.task("Scoring", "tokens") as progress:
        if resources is not None and resources.num_workers == 1:
            rows = launch.score(here, found, experiment, None, progress, as_given=True)
        else:
            with cluster.connect(experiment.cluster) as connected:
                where = model if storage.is_remote(model) else here
                rows = launch.score(where, found, experiment, connected, progress, as_given=True)
    unknown = tokenizer.unknown_id(known)
    scored = Scored(rows, found, sets, measure, unknown, keywords=bool(experiment.objective.keywords))
    token = None if prefix is None else known.convert_ids_to_tokens(prefix)
    record = {"model": model, "prefix": token, "scored_in": experiment.eval.precision, **scored.record()}
    if record["nll"] is None:
        raise StorageError(
            f"{model}: the likelihood of the text is not a finite number: the model has diverged or is damaged", model
        )
    if documents is not None:
        write_lines(documents, scored.lines())
    return cli.CommandResult(record, view(record))


def its_own(directory: Path, config: Path | None) -> list[str]:
    """Settings of the model that is there, in place of those by which a model was made or shall be.

    Of the file's section tokenizer what is about documents stays: prefix, and end-of-text token unless the file is the
    model's own, whose tokenizer has it. What lies beside a model does not say that its code may run.
    """
    from raylm import checkpoint
    from raylm.config import load

    file = config or checkpoint.experiment_file(directory)
    kept: dict[str, Any] = {}
    if file is not None:
        told = load(file).tokenizer
        kept = {"prefix": told.prefix, "eos_token": told.eos_token if config is not None else None}
    return ["cluster={}", "tune={}", f"model={dumps({'path': str(directory)})}", f"tokenizer={dumps(kept)}"]


def check_settings(experiment: Experiment, directory: Path, model: str) -> None:
    """ConfigError for settings that say what the argument says."""
    if experiment.model.path != str(directory):
        key = "model.config" if experiment.model.config is not None else "model.path"
        raise ConfigError(f"{key}: the model that is scored is the argument, {model}; leave the setting out", key)
    if experiment.tokenizer.train is not None:
        raise ConfigError("tokenizer.train: a trained model has a tokenizer; give tokenizer.path", "tokenizer.train")


def tokenizer_of(experiment: Experiment) -> PreTrainedTokenizerFast:
    """The tokenizer of the model that is scored."""
    from raylm import tokenizer

    key = "tokenizer.path" if experiment.tokenizer.path else "MODEL"
    return tokenizer.load_section(tokenizer.choose(experiment.tokenizer, experiment.model), key)


def what_is_scored(
    directory: Path, experiment: Experiment, text: list[str]
) -> tuple[Encoded | Split, dict[str, range]]:
    """The documents of all sets one after the other, and which of them are whose."""
    from raylm import prepare, tokens

    if text:
        corpora = {"text": prepare.evaluation_corpus(text, experiment.corpus, "--text")}
        keys = {"text": "--text"}
    else:
        corpora = prepare.evaluation_corpora(experiment)
        keys = {name: experiment.eval.key(name) for name in corpora}
    if not corpora:
        split = validation(directory)
        return split, {"validation": range(len(split))}
    documents = tokens.Encoded()
    sets = {}
    for name, corpus in corpora.items():
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer_of(experiment).save_pretrained(scratch)
            found = tokens.encode_files(corpus, scratch)
        if not any(len(found[index]) for index in range(len(found))):
            raise prepare.nothing_to_score(keys[name], corpus.paths)
        sets[name] = range(len(documents), len(documents) + len(found))
        documents.extend(found)
    return documents, sets


def validation(directory: Path) -> Split:
    """The validation split that a model was trained with; an error that says what else to score if there is none."""
    from raylm import checkpoint, tokens

    store = checkpoint.read_record(directory).get("store")
    if store is None:
        raise ConfigError(
            f"{directory} was not trained by raylm, so nothing says what to score; give --text FILE", "--text"
        )
    if tokens.damage(store) is None:
        raise DataError(f"{directory} was trained with the token store {store}, which is gone; give --text FILE", store)
    split = tokens.open_store(store).validation
    if not split.num_tokens:
        raise DataError(f"the validation split of {store} is empty; give --text FILE", "--text")
    return split


class Scored:
    """The rows of perplexity.score_documents, and what they are of."""

    def __init__(
        self,
        rows: np.ndarray,
        documents: Encoded | Split,
        sets: dict[str, range],
        measure: str,
        unknown_id: int | None,
        keywords: bool,
    ):
        self.rows, self.documents, self.sets = rows, documents, sets
        self.measure = measure
        """What the figure is called."""
        self.unknown_tokens = [
            0 if unknown_id is None else int((documents[number] == unknown_id).sum())
            for number in range(len(documents))
        ]
        """Of each document."""
        self.keywords = keywords
        """Whether keywords were looked for."""

    def figures(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Of these documents together. Every nll is summed, in nats; None stands for what is no finite number."""
        from raylm.perplexity import Score

        score = Score.of(self.rows[list(numbers)])
        found = {
            self.measure: _finite(score.perplexity),
            "bits_per_byte": _finite(score.bits_per_byte),
            "nll": _finite(score.nll),
            "tokens": score.tokens,
            "bytes": score.bytes,
            "unknown_tokens": sum(self.unknown_tokens[number] for number in numbers),
        }
        if not self.keywords:
            return found
        of_keywords = {
            self.measure: _finite(score.keyword_perplexity),
            "nll": _finite(score.keyword_nll),
            "tokens": score.keyword_tokens,
        }
        return {**found, "keywords": of_keywords}

    def record(self) -> dict[str, Any]:
        """All together, and each set; of a set, each source."""
        from raylm.tokens import incomparable

        sets = {}
        for name, numbers in self.sets.items():
            sources: dict[str, list[int]] = {}
            for number in numbers:
                sources.setdefault(self.documents.document_source(number), []).append(number)
            of_sources = {source: self.figures(some) for source, some in sources.items()}
            sets[name] = {**self.figures(list(numbers)), "documents": len(numbers), "sources": of_sources}
        total = self.figures(range(len(self.rows)))
        return {**total, "incomparable": incomparable(total["unknown_tokens"], total["tokens"]), "sets": sets}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Each document. Its id is the 16 digits that `b2sum -l 64` tells of its text."""
        for name, numbers in self.sets.items():
            for number in numbers:
                yield {
                    "set": name,
                    "source": self.documents.document_source(number),
                    "document": f"{self.documents.document_id(number):016x}",
                    **self.figures([number]),
                }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def view(record: dict[str, Any]) -> tuple[Any, ...]:
    """The figures of all, and a table of sets and sources where there are several."""
    from raylm import tables

    texts = [source for found in record["sets"].values() for source in found["sources"]]
    what = "the validation split" if "validation" in record["sets"] else ", ".join(dict.fromkeys(texts))
    total = {name: value for name, value in record.items() if name not in ("model", "sets", "keywords")}
    total = {"model": record["model"], "text": what, **total, "nll": round(record["nll"])}
    total["unknown_tokens"] = total["unknown_tokens"] or None
    of_keywords = {f"{name}_of_keywords": value for name, value in record.get("keywords", {}).items()}
    rows: list[tuple[str, dict[str, Any]]] = []
    several = len(record["sets"]) > 1
    for name, found in record["sets"].items():
        rows += [(name, found)] if several else []
        if len(found["sources"]) > 1:
            rows += [(f"{'  ' * several}{source}", each) for source, each in found["sources"].items()]
    facts = tables.key_values({**total, **of_keywords})
    return (facts, "", tables.scores([*rows, ("total", record)])) if rows else (facts,)


def check_writable(path: Path) -> None:
    """StorageError, before anything is scored, if no file can be written there."""
    problem = "it is a directory" if path.is_dir() else None
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise StorageError(
            f"--documents {path}: {problem}; give a file in a directory that can be written to", "--documents"
        )


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A line of JSON each, in a file that is there entirely or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.writelines(dumps(line) + "\n" for line in lines)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"--documents {path}: {error.strerror or error}", "--documents") from error
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    cli.run(evaluate)


if __name__ == "__main__":
    from raylm.evaluate import main  # by its real name, so that Ray ships functions by reference

    main()
