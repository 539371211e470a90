"""The score of a model on text: `raylm evaluate`."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm import (
    checkpoint,
    cluster,
    console,
    derived,
    document_scores,
    objective,
    perplexity,
    statistics,
    storage,
    tasks,
    tokenizer,
    tokens,
)
from raylm import config as config_files
from raylm import model as models
from raylm.config import BlocksConfig, Experiment, ObjectiveConfig
from raylm.document_scores import DocumentScores
from raylm.errors import ConfigError, DataError, StorageError
from raylm.perplexity import Score
from raylm.pipeline import evaluated_model
from raylm.pipeline.stores import nothing_to_score
from raylm.plan import evaluation_set, evaluation_sets
from raylm.results import tables
from raylm.tasks import TaskScore
from raylm.tokens import Encoded, Split
from raylm.training import launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from raylm.cluster import Resources


@dataclass(frozen=True)
class EvaluationPlan:
    """A model, and the documents that it is scored on."""

    model: str
    """The model as given: a directory, local or in object storage, or an id of the Hugging Face Hub."""
    directory: Path
    """The local directory of the model."""
    experiment: Experiment
    documents: Encoded | Split
    """The documents of all sets, concatenated."""
    sets: dict[str, range]
    """The documents of each set: evaluation sets, "text" or "validation"."""
    measure: str
    """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
    prefix: str | None
    """The token in front of every document."""
    unknown_id: int | None
    """Id of the tokenizer's unknown token."""
    resources: Resources | None
    """None if they are known only once Ray is connected."""
    tasks: tasks.ChosenTasks | None = None
    """Tasks of lm-eval."""

    def record(self) -> dict[str, Any]:
        """The plan for --json: how many documents each set has, and the tasks."""
        sets = {name: len(numbers) for name, numbers in self.sets.items()}
        return {"model": self.model, "sets": sets, **({"tasks": list(self.tasks.names)} if self.tasks else {})}


def resolve(
    model: str,
    directory: Path,
    experiment: Experiment,
    text: Sequence[str] = (),
    asked: Sequence[str] = (),
) -> EvaluationPlan:
    """The plan of an evaluation on `text` (paths), else on the sets of eval.paths, else on the validation split that
    the model was trained with; and on the tasks that were `asked` for. The text is read and encoded.

    With tasks, a model that raylm has not trained needs no text.
    """
    _check_settings(experiment, directory, model)
    if experiment.eval.precision == "auto":
        used = checkpoint.read_record(directory).get("scored_in", "float32")
        experiment = config_files.override(experiment, {"eval.precision": used})
    chosen = tasks.choose(asked) if asked else None
    experiment = derived.prefix(experiment).experiment
    resources = cluster.planned_resources(experiment.cluster)
    configuration = models.pretrained_configuration(experiment.model)
    perplexity.context_of(experiment.eval, models.context(configuration), experiment.blocks.block_size)
    own_tokenizer = _tokenizer_of(experiment)
    prefix = tokenizer.frame(own_tokenizer, experiment.tokenizer.prefix).prefix
    is_masked = experiment.objective.is_masked or models.is_masked(configuration)
    if is_masked:
        objective.check_settings(ObjectiveConfig(kind="masked"), BlocksConfig(), own_tokenizer)
        if chosen is not None:
            raise ConfigError(
                f"--tasks: {model} is a masked model, which has no likelihood of an answer; give a causal one",
                "--tasks",
            )
    if chosen is not None and not (text or experiment.eval.paths) and "store" not in checkpoint.read_record(directory):
        documents: Encoded | Split = tokens.Encoded()
        sets: dict[str, range] = {}
    else:
        documents, sets = _documents(directory, experiment, text)
    return EvaluationPlan(
        model=model,
        directory=directory,
        experiment=experiment,
        documents=documents,
        sets=sets,
        measure=experiment.eval.measure(masked=is_masked),
        prefix=None if prefix is None else own_tokenizer.convert_ids_to_tokens(prefix),
        unknown_id=tokenizer.unknown_id(own_tokenizer),
        resources=resources,
        tasks=chosen,
    )


def run(plan: EvaluationPlan) -> Evaluation:
    """Score the model; StorageError if the likelihood of the text is not a finite number. The metrics of tasks are
    logged to the run that has trained the model, if there is one."""
    with _workers(plan) as (where, resources):
        # Tasks first, because a mistake in a task file shows only now, and the text may take long.
        found = tasks.run(plan.tasks, _scored_on_tasks(plan, where, resources)) if plan.tasks is not None else {}
        rows = np.zeros((0, perplexity.BANDS))
        if plan.sets:
            with console.task("Scoring", "tokens") as progress:
                rows = launch.score(where, plan.documents, plan.experiment, resources, progress, as_given=True)
    result = Evaluation(plan, rows, found)
    if not math.isfinite(result.score.nll):
        raise StorageError(
            f"{plan.model}: the likelihood of the text is not a finite number: the model has diverged or is damaged",
            plan.model,
        )
    if found:
        evaluated_model.log(plan.model, plan.directory, found)
    return result


@contextlib.contextmanager
def _workers(plan: EvaluationPlan) -> Iterator[tuple[str, Resources | None]]:
    """Where workers load the model from, and Ray's workers; None if this process does the work."""
    if plan.resources is not None and plan.resources.num_workers == 1:
        yield str(plan.directory), None
    else:
        with cluster.connect(plan.experiment.cluster) as connected:
            yield plan.model if storage.is_remote(plan.model) else str(plan.directory), connected


def _scored_on_tasks(plan: EvaluationPlan, where: str, resources: Resources | None) -> tasks.Scored:
    experiment, known = plan.experiment, _tokenizer_of(plan.experiment)
    positions = models.context(models.pretrained_configuration(experiment.model))
    return tasks.Scored(
        place=where,
        directory=plan.directory,
        experiment=experiment,
        encode=lambda text: known(text, add_special_tokens=False)["input_ids"],
        frame=tokenizer.frame(known, experiment.tokenizer.prefix),
        context=perplexity.context_of(experiment.eval, positions, experiment.blocks.block_size),
        resources=resources,
    )


class Evaluation:
    """The score of a model on some documents, and on tasks."""

    def __init__(self, plan: EvaluationPlan, rows: np.ndarray, found: Mapping[str, TaskScore] = MappingProxyType({})):
        self.plan = plan
        self.tasks = dict(found)
        """The metrics of each task and group of tasks, by name; empty without tasks."""
        self.rows = rows
        """The result of perplexity.score_documents: float64 of shape (documents, 5)."""
        self.unknown_tokens = [
            0 if plan.unknown_id is None else _unknown(plan.documents, number, plan.unknown_id)
            for number in range(len(plan.documents))
        ]
        """Number of unknown tokens among those of each document that are scored."""

    @property
    def score(self) -> Score:
        """The score of all documents: perplexity, bits_per_byte, nll, tokens, bytes."""
        return Score.of(self.rows)

    @property
    def perplexity(self) -> float:
        """Perplexity per token of all documents."""
        return self.score.perplexity

    @property
    def perplexity_interval(self) -> statistics.Interval | None:
        """The 95 % interval of the perplexity; None for fewer than six documents."""
        scores = self.document_scores(range(len(self.rows)))
        return statistics.of_perplexity(scores.nll, scores.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.score.bits_per_byte

    @property
    def bits_per_byte_interval(self) -> statistics.Interval | None:
        scores = self.document_scores(range(len(self.rows)))
        return statistics.of_bits_per_byte(scores.nll, scores.bytes)

    def figures(self, numbers: Sequence[int]) -> dict[str, Any]:
        """The score of these documents, with no interval. nll is summed, in nats; None where a number is not finite."""
        score = Score.of(self.rows[list(numbers)])
        measure = self.plan.measure
        found = {
            measure: _finite(score.perplexity),
            "bits_per_byte": _finite(score.bits_per_byte),
            "nll": _finite(score.nll),
            "tokens": score.tokens,
            "bytes": score.bytes,
            "unknown_tokens": sum(self.unknown_tokens[number] for number in numbers),
        }
        if not self.plan.experiment.objective.keywords:
            return found
        of_keywords = {
            measure: _finite(score.keyword_perplexity),
            "nll": _finite(score.keyword_nll),
            "tokens": score.keyword_tokens,
        }
        return {**found, "keywords": of_keywords}

    def document_scores(self, numbers: Sequence[int]) -> DocumentScores:
        """The score of each of these documents; copies of a text are one document."""
        return DocumentScores.of_ids(
            self.rows[list(numbers)], [self.plan.documents.document_id(number) for number in numbers]
        )

    def figures_with_intervals(self, numbers: Sequence[int]) -> dict[str, Any]:
        """`figures` with the 95 % interval of each score, None for fewer than six documents: perplexity_low, ..."""
        found, measure = self.figures(numbers), self.plan.measure
        found |= document_scores.intervals(self.document_scores(numbers), measure)
        if "keywords" in found:
            of_keywords = DocumentScores.of_ids(
                self.rows[list(numbers)][:, [3, 4, 4]], [self.plan.documents.document_id(number) for number in numbers]
            )
            interval = statistics.of_perplexity(of_keywords.nll, of_keywords.tokens)
            found["keywords"] |= document_scores.ends(measure, interval)
        return found

    def record(self) -> dict[str, Any]:
        """All documents together, each set, and each source of a set; and tasks; for --json."""
        plan, sets = self.plan, {}
        of_tasks = {"tasks": {name: score.record() for name, score in self.tasks.items()}} if self.tasks else {}
        how = {"model": plan.model, "prefix": plan.prefix, "scored_in": plan.experiment.eval.precision}
        if not plan.sets:
            return {**how, **of_tasks}
        for name, numbers in plan.sets.items():
            sources: dict[str, list[int]] = {}
            for number in numbers:
                sources.setdefault(plan.documents.document_source(number), []).append(number)
            of_sources = {source: self.figures_with_intervals(some) for source, some in sources.items()}
            sets[name] = {**self.figures_with_intervals(numbers), "documents": len(numbers), "sources": of_sources}
        total = self.figures_with_intervals(range(len(self.rows)))
        return {
            **how,
            **total,
            "document_ids": self.document_scores(range(len(self.rows))).documents,
            "incomparable": tokens.incomparable(total["unknown_tokens"], total["tokens"]),
            "sets": sets,
            **of_tasks,
        }

    def documents(self) -> Iterator[dict[str, Any]]:
        """The score of each document, with all that `raylm compare` needs to pair it with that of another model. Its id
        is the 16 digits that `b2sum -l 64` prints for its text, unless only its answers are scored."""
        plan = self.plan
        model = plan.model if storage.is_remote(plan.model) else str(plan.directory)
        for name, numbers in plan.sets.items():
            for number in numbers:
                yield {
                    "model": model,
                    "scored_in": plan.experiment.eval.precision,
                    "set": name,
                    "source": plan.documents.document_source(number),
                    "document": f"{plan.documents.document_id(number):016x}",
                    **self.figures([number]),
                }

    def _repr_html_(self) -> str:
        record = self.record()
        parts = [tables.evaluations([*record["sets"].items(), ("total", record)])] if self.plan.sets else []
        parts += [tables.tasks(record["tasks"])] if self.tasks else []
        return "".join(map(console.as_html, parts))

    def __repr__(self) -> str:
        score = f"{self.plan.measure} {self.perplexity:.4g}" if self.plan.sets else ", ".join(self.tasks)
        return f"Evaluation({self.plan.model!r}: {score})"


def _unknown(documents: Encoded | Split, number: int, unknown_id: int) -> int:
    found, answers = documents[number] == unknown_id, documents.answers(number)
    return int((found if answers is None else found & answers).sum())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def settings_of(directory: Path, config: Path | None) -> list[str]:
    """Settings that load the model in the directory, instead of the file's model, tokenizer, cluster and tune.

    From the file's section tokenizer the prefix is kept, and the end-of-text token unless the file is the model's own,
    whose tokenizer has it. A file next to a model cannot allow the model's code to run.
    """
    file = config or checkpoint.experiment_file(directory)
    kept: dict[str, Any] = {}
    if file is not None:
        section = config_files.load(file).tokenizer
        kept = {"prefix": section.prefix, "eos_token": section.eos_token if config is not None else None}
    return ["cluster={}", "tune={}", f"model={json.dumps({'path': str(directory)})}", f"tokenizer={json.dumps(kept)}"]


def _check_settings(experiment: Experiment, directory: Path, model: str) -> None:
    """ConfigError for settings that name another model than the argument, or train a tokenizer."""
    if experiment.model.path != str(directory):
        key = "model.config" if experiment.model.config is not None else "model.path"
        raise ConfigError(f"{key}: the model that is scored is the argument, {model}; leave the setting out", key)
    if experiment.tokenizer.train is not None:
        raise ConfigError("tokenizer.train: a trained model has a tokenizer; give tokenizer.path", "tokenizer.train")


def _tokenizer_of(experiment: Experiment) -> PreTrainedTokenizerFast:
    """The tokenizer of the model that is scored."""
    key = "tokenizer.path" if experiment.tokenizer.path else "MODEL"
    return tokenizer.load_section(tokenizer.choose(experiment.tokenizer, experiment.model), key)


def _documents(
    directory: Path, experiment: Experiment, text: Sequence[str]
) -> tuple[Encoded | Split, dict[str, range]]:
    """The documents of all sets, concatenated, and the range of each set."""
    if text:
        found_sets = {"text": evaluation_set(text, experiment.corpus, "--text")}
    else:
        found_sets = evaluation_sets(experiment)
    if not found_sets:
        split = _validation(directory)
        return split, {"validation": range(len(split))}
    documents = tokens.Encoded()
    sets = {}
    for name, each in found_sets.items():
        with tempfile.TemporaryDirectory() as scratch:
            _tokenizer_of(experiment).save_pretrained(scratch)
            encoded = tokens.encode_files(each.corpus, each.sources, scratch)
        if not any(len(encoded[index]) for index in range(len(encoded))):
            raise nothing_to_score(each)
        sets[name] = range(len(documents), len(documents) + len(encoded))
        documents.extend(encoded)
    return documents, sets


def _validation(directory: Path) -> Split:
    """The validation split that a model was trained with; without one an error that says what else to score."""
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


def write_documents(result: Evaluation, path: Path) -> None:
    """Write the score of every document as a line of JSON, atomically."""
    lines = "".join(json.dumps(each) + "\n" for each in result.documents())
    try:
        storage.write(str(path), lines.encode())
    except StorageError as error:
        raise StorageError(f"--documents {path}: {error.message}", "--documents") from error
