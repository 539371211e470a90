"""What is compared: a run, trial, sweep, model or evaluation, with its scores, tokens and speed read from storage."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from raylm import config, document_scores, storage, tracking
from raylm.checkpoint.directory import MODEL_OR_ADAPTER
from raylm.config import WHOLE_SPLIT, Experiment
from raylm.document_scores import DocumentScores
from raylm.errors import StorageError
from raylm.results import sweep as sweeps
from raylm.results.differences import Scored
from raylm.results.runs import MEASURES, find, is_sweep, suggestions
from raylm.runs import result_of
from raylm.tracking import journal


@dataclass(frozen=True)
class ComparedRun:
    """A run to compare, or an evaluation; None where a value is unknown."""

    name: str
    experiment: Experiment | None
    """None of an evaluation."""
    measure: str
    """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
    perplexity: float | None
    """The score, of the kind that the experiment measures."""
    bits_per_byte: float | None
    scored_on: str
    """The text that was scored, in words: the whole validation split, or its first tokens."""
    scored_in: str
    """The arithmetic of the scores, such as float32."""
    tokens: int | None
    """Training tokens."""
    seconds: float | None
    """Time from the first logged step to the last, including pauses."""
    tokens_per_second: int | None
    """Median speed between two logged steps, which excludes evaluations and pauses."""
    mfu: float | None
    """Model FLOPs utilization: the fraction of the devices' floating-point operations that training steps used."""
    store: str | None
    """The fingerprint of the token store."""
    scores: DocumentScores | None = field(default=None, compare=False)
    """The score of each document, of which `perplexity` is the mean; None if they were not kept."""
    unknown_tokens: int | None = None
    """Of the text of an evaluation; for a run see `manifest`."""
    model: str | None = None
    """The directory of the model that has these scores, which may be gone."""
    text_paths: tuple[str, ...] = ()
    """What an evaluation was given as --text; empty if it scored the validation split."""
    sources: tuple[str, ...] | None = None
    """Of an evaluation the source of each document of `scores`; of copies of a text that of the first."""

    @property
    def store_path(self) -> str | None:
        return f"{self.experiment.storage}/tokens/{self.store}" if self.experiment and self.store else None

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of the token store; empty if the store no longer exists."""
        return json.loads(storage.read(f"{self.store_path}/manifest.json") or b"{}") if self.store_path else {}

    @property
    def scored(self) -> Scored:
        """The model with the scores of its documents."""
        unknown = self.manifest.get("validation", {}).get("unknown_tokens") or self.unknown_tokens
        unit = sweeps.scored_unit(self.experiment) if self.experiment is not None else "document"
        return Scored(self.name, self.scores, self.measure, self.scored_in, knows_all=not unknown, unit=unit)

    def record(self) -> dict[str, Any]:
        """The compared values, by their names in --json."""
        return {
            self.measure: self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **document_scores.intervals(self.scores, self.measure),
            "scored_on": self.scored_on if self.perplexity is not None else None,
            "scored_in": self.scored_in if self.perplexity is not None else None,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "data": self.store,
        }


def summarize(run: str) -> ComparedRun:
    """A run, trial, sweep or model, given by directory or name, or the documents of an evaluation, given by file;
    StorageError if it is none of these."""
    if os.path.isfile(run):
        return of_evaluation(run)
    directory = find(run)
    parent, _, name = directory.rpartition("/")
    inside = storage.names(directory)
    if is_sweep(directory):
        return of_sweep(directory, None)
    if is_sweep(parent):  # a trial, or the model of the best one
        return of_sweep(parent, name if name.startswith("trial_") else None)
    if journal.RUN_FILE in inside:
        return of_training(directory)
    if name == "model" and journal.RUN_FILE in storage.names(parent):
        return of_training(parent)
    if MODEL_OR_ADAPTER.intersection(inside):
        return of_model(directory, run)
    raise StorageError(f"{run} is no run, trial, sweep or model that raylm trained; {suggestions(directory)}", run)


def of_sweep(directory: str, trial_id: str | None) -> ComparedRun:
    """A trial with the score by which trials are ranked.

    Without `trial_id` it is the best trial, with the score on the whole validation split if there is one.
    """
    results = sweeps.read(directory)
    trials = {trial.trial_id: trial for trial in results.data.ranked}
    best = results.best
    if trial_id is None and best is not None:
        trial, scored_on = trials[best.trial_id], best.scored_on
        scores: dict[str, Any] = {"perplexity": best.perplexity, "bits_per_byte": best.bits_per_byte}
    elif trial_id in trials:
        trial, scored_on = trials[trial_id], sweeps.scored_on(results.experiment, results.state.parameters)
        scores = results.scores(trial)
    else:
        raise StorageError(f"{directory}: {trial_id or 'the sweep'} has no score yet", directory)
    is_rescored = trial_id is None and scored_on == WHOLE_SPLIT and results.experiment.eval.max_tokens is not None
    training, step = trial.best_place(trial.results[-1])
    scores_of = (directory, "whole") if is_rescored else (f"{directory}/{training}", step)
    return ComparedRun(
        name=f"{results.name}/{trial.trial_id}",
        measure=results.measure,
        scores=document_scores.read(*scores_of),
        model=f"{directory}/model" if trial_id is None and results.result else trial.results[-1].get("best_checkpoint"),
        experiment=config.of_trial(results.experiment, trial.settings),
        **scores,
        scored_on=scored_on,
        scored_in=results.experiment.eval.precision,
        tokens=trial.tokens,
        **pace(f"{directory}/{trial.trial_id}"),
        mfu=tracking.Run(f"{directory}/{trial.trial_id}").figures()["mfu"],
        store=results.state.parameters.get("store"),
    )


def of_training(directory: str) -> ComparedRun:
    """A training run; one that has not finished has its best evaluation so far."""
    state = journal.run_state(directory)
    experiment = sweeps.read_experiment(directory, state)
    measure = experiment.measure
    result = result_of(directory)
    has_finished = measure in result
    if has_finished:
        scored_on = result.get("scored_on", WHOLE_SPLIT)
        is_rescored = scored_on == WHOLE_SPLIT and experiment.eval.max_tokens is not None
        kept: document_scores.Evaluated | None = "whole" if is_rescored else result.get("best_step")
    else:
        series = tracking.Run(directory).metric_history()
        evaluations = {
            name: {step: value for step, value in series.get(f"eval/{name}", ()) if step}  # 0 is before training
            for name in (measure, "bits_per_byte")
        }
        best = min(evaluations[measure], key=lambda step: evaluations[measure][step], default=None)
        trained = series.get("train/tokens")
        result = {name: None if best is None else steps.get(best) for name, steps in evaluations.items()}
        result["tokens"] = round(trained[-1][1]) if trained else None
        kept = best
        scored_on = sweeps.scored_on(experiment, state.parameters)
    return ComparedRun(
        name=directory.rpartition("/")[2],
        experiment=experiment,
        measure=measure,
        scores=None if kept is None else document_scores.read(directory, kept),
        model=f"{directory}/model" if has_finished else f"{directory}/checkpoints/step_{best or 0:08d}",
        perplexity=result[measure],
        bits_per_byte=result["bits_per_byte"],
        scored_on=scored_on,
        scored_in=experiment.eval.precision,
        tokens=result["tokens"],
        **pace(directory),
        mfu=tracking.Run(directory).figures()["mfu"],
        store=state.parameters.get("store"),
    )


def pace(directory: str) -> dict[str, Any]:
    """`seconds` and `tokens_per_second` of a run, from its journal; None before two steps are logged."""
    points: dict[journal.MetricKey, journal.MetricValue] = {}
    journal.apply_metrics(journal.json_lines(directory, journal.METRICS_FILE).read()[0], points)
    steps = sorted((time / 1000, tokens) for (name, _), (tokens, time) in points.items() if name == "train/tokens")
    spans = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(steps)]
    speeds = [tokens / seconds for seconds, tokens in spans if seconds > 0]
    return {
        "seconds": steps[-1][0] - steps[0][0] if len(steps) > 1 else None,
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
    }


def of_model(directory: str, name: str) -> ComparedRun:
    """An exported model, or a checkpoint."""
    from raylm import checkpoint  # imports torch

    local = checkpoint.locate(directory)
    experiment, record = checkpoint.read_experiment(local), checkpoint.read_record(local)
    if experiment is None:
        raise StorageError(f"{directory} was not trained by raylm: it holds no experiment.yaml", directory)
    run, inside, _ = directory.rpartition("/checkpoints/")
    return ComparedRun(
        name=name,
        experiment=experiment,
        measure=experiment.measure,
        model=directory,
        scores=document_scores.read(run, record["step"]) if inside and "step" in record else None,
        perplexity=record.get("perplexity"),
        bits_per_byte=record.get("bits_per_byte"),
        scored_on=record.get("scored_on") or experiment.eval.scored_on,
        scored_in=record.get("scored_in") or experiment.eval.precision,
        tokens=record.get("tokens"),
        seconds=None,
        tokens_per_second=None,
        mfu=None,
        store=record["store"].rstrip("/").rpartition("/")[2] if "store" in record else None,
    )


def of_evaluation(file: str) -> ComparedRun:
    """What `raylm evaluate --documents FILE` has written; StorageError if it is another file."""
    try:
        with open(file, encoding="utf-8") as opened:
            lines = [json.loads(line) for line in opened]
        (measure,) = [name for name in lines[0] if name in MEASURES]
        rows = np.array([[line["nll"], line["tokens"], line["bytes"], 0, 0] for line in lines], np.float64)
        ids = [int(line["document"], 16) for line in lines]
        scores = DocumentScores.of_ids(rows, ids)
        unknown = sum(line["unknown_tokens"] for line in lines)
        arithmetic, models = (sorted({line[name] for line in lines}) for name in ("scored_in", "model"))
        sources = [line["source"] for line in lines]
        is_validation = all(line["set"] == "validation" for line in lines)
    except (ValueError, KeyError, TypeError, IndexError):
        raise StorageError(f"{file} is no file that raylm evaluate MODEL --documents FILE writes", file) from None
    from raylm.perplexity import Score  # imports torch

    score = Score.of(rows)
    first, _ = document_scores.different(ids)
    return ComparedRun(
        name=file,
        experiment=None,
        measure=measure,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        scored_on=WHOLE_SPLIT if is_validation else ", ".join(dict.fromkeys(sources)),
        scored_in=", ".join(arithmetic),
        tokens=None,
        seconds=None,
        tokens_per_second=None,
        mfu=None,
        store=None,
        scores=scores,
        unknown_tokens=unknown,
        model=models[0],
        text_paths=() if is_validation else tuple(dict.fromkeys(sources)),
        sources=tuple(sources[number] for number in first),
    )
