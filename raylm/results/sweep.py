"""A sweep, in any state, read back from its directory: its experiment, trials, scores and best trial."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from raylm import config, tracking
from raylm.config import WHOLE_SPLIT, Experiment
from raylm.console import command, counted, label
from raylm.errors import StorageError
from raylm.results import runs
from raylm.results.figures import SweepData
from raylm.results.significance import Standing
from raylm.results.trial_table import WEIGHED, TrialRow
from raylm.runs import is_locked, result_of
from raylm.sweep.record import EVENTS, Status, SweepRecord, Trial
from raylm.tracking import journal

EXPERIMENT = "experiment.yaml"


@dataclass(frozen=True)
class BestTrial:
    """The best trial of a sweep.

    Once the sweep has finished, its scores are those on the whole validation split, if that was affordable.
    """

    trial_id: str
    perplexity: float
    """The score, of the kind that the experiment measures."""
    bits_per_byte: float
    checkpoint: str | None
    """The exported model; None while the sweep has not finished."""
    scored_on: str
    settings: Mapping[str, Any]
    """Swept dotted key -> value."""

    def record(self, measure: str) -> dict[str, Any]:
        """The best trial for --json; the key of the score is its name."""
        return {
            "trial_id": self.trial_id,
            measure: self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "checkpoint": self.checkpoint,
            "scored_on": self.scored_on,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class SweepResults:
    """A sweep in any state."""

    directory: str
    experiment: Experiment
    state: journal.RunState
    """What the sweep has logged to MLflow."""
    data: SweepData
    """The trials with their ranking, as figures draw them."""
    seconds: float
    """Run time of all commands that worked on the sweep and have ended."""
    result: dict[str, Any]
    """result.json; empty while the sweep has not finished."""

    @property
    def name(self) -> str:
        return self.directory.rpartition("/")[2]

    @property
    def measure(self) -> str:
        """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
        return self.experiment.measure

    @property
    def best(self) -> BestTrial | None:
        """The best trial; None before any has a score."""
        if not self.data.scored:
            return None
        trial = self.data.ranked[0]
        final = self.result.get("best")
        if final is None:
            scores = self.scores(trial)
            return BestTrial(
                trial.trial_id,
                **scores,
                checkpoint=None,
                scored_on=scored_on(self.experiment, self.state.parameters),
                settings=trial.settings,
            )
        return BestTrial(
            trial.trial_id,
            final[self.measure],
            final["bits_per_byte"],
            final["checkpoint"],
            scored_on=final.get("scored_on", WHOLE_SPLIT),
            settings=trial.settings,
        )

    def scores(self, trial: Trial) -> dict[str, Any]:
        """perplexity and bits_per_byte on the tokens by which trials are ranked; None if the trial has no score."""
        last = trial.results[-1] if self.data.score(trial) is not None else {}
        return {name: last.get(f"best_{name}") for name in ("perplexity", "bits_per_byte")}

    @property
    def trials(self) -> list[TrialRow]:
        """A row for each trial, the best first; a failed trial has the reason and no score."""
        records = {record["trial_id"]: record for record in self.result.get("trials", [])}
        return [self._row(trial, records.get(trial.trial_id, {})) for trial in self.data.ranked]

    def _row(self, trial: Trial, record: Mapping[str, Any]) -> TrialRow:
        """A trial's row; `record` is the trial in result.json."""
        return TrialRow(
            trial_id=trial.trial_id,
            status=trial.status,
            **self.scores(trial),
            tokens=trial.tokens,
            settings=trial.settings,
            weighted_nll=trial.results[-1].get("best_weighted_nll") if trial.results else None,
            best_tokens=trial.best_tokens,
            last_perplexity=trial.last_perplexity,
            cooldown_tokens=trial.cooldown_tokens,
            weighed={name: record[name] for name in WEIGHED if name in record and "pareto" in record},
            pareto=record.get("pareto"),
            failure=trial.failure,
            repeat=repeat_command(self.directory, trial),
            **measured(self.directory, trial),
            checkpoint=record.get("checkpoint"),
            mlflow_run_id=record.get("mlflow_run_id"),
            repeat_of=trial.repeat_of,
            seeds=trial.seeds,
            standing=Standing.from_record(record, self.measure),
        )


def repeat_command(directory: str, trial: Trial) -> str:
    """The command that trains with the settings of a sweep's trial again."""
    settings = [f"{key}={json.dumps(value)}" for key, value in {**trial.settings, **trial.seeds}.items()]
    return command("train", "--config", f"{directory}/{EXPERIMENT}", *settings)


def measured(directory: str, trial: Trial) -> dict[str, Any]:
    """parameters, seconds and best_step of a sweep's trial, what its settings mean, what it cost, and its metrics on
    tasks; None where unknown."""
    run = tracking.Run(f"{directory}/{trial.trial_id}")
    size = run.tags().get(tracking.PARAMETERS_TAG)
    last = trial.results[-1] if trial.results else {}
    return {
        "parameters": None if size is None else int(size),
        "seconds": last.get("seconds"),
        "best_step": last.get("best_step"),
        **run.figures(),
        **({"tasks": scores} if (scores := run.task_scores()) else {}),
    }


def sources(results: SweepResults) -> dict[str, dict[str, tuple[float | None, str | None]]]:
    """Trial id -> name of a source or evaluation set -> (its score in the trial's best evaluation, and how often the
    training repeats it as a source of a mixture; None where unknown)."""
    sections, found = results.experiment, {}
    named = () if sections.corpus.validation_paths else sections.corpus.source_names
    parts = {name: f"validation/{name}/{results.measure}" for name in named}
    for name in sections.eval.sets:
        parts[name if name not in named else f"{name} (evaluation set)"] = f"eval/{name}/{results.measure}"
    for trial in results.data.ranked if parts else ():
        training, best = trial.best_place(trial.results[-1]) if trial.results else (trial.trial_id, -1)
        history = tracking.Run(f"{results.directory}/{training}").metric_history()
        tags = tracking.Run(f"{results.directory}/{trial.trial_id}").tags()
        found[trial.trial_id] = {
            name: (dict(history.get(metric, ())).get(best), tags.get(f"{tracking.PASSES_TAG}{name}"))
            for name, metric in parts.items()
        }
    return found


def read(directory: str) -> SweepResults:
    """The sweep in a directory; StorageError if the directory is not a sweep."""
    if not runs.is_sweep(directory):
        raise StorageError(f"{directory} is not a sweep: it has no {EVENTS}", directory)
    state = journal.run_state(directory)
    experiment = read_experiment(directory, state)
    record = SweepRecord(directory)
    result = result_of(directory)
    trials = list(record.trials.values())
    if result:  # trials that were still running were stopped with the sweep
        trials = [trial if trial.is_over else replace(trial, status="stopped early") for trial in trials]
    elif not is_locked(directory):
        states: dict[bool, Status] = {True: "interrupted", False: "not started"}
        trials = [trial if trial.is_over else replace(trial, status=states[trial.attempts > 0]) for trial in trials]
    metric = experiment.tune.ranked_by
    data = SweepData(
        trials,
        budget_tokens=max([int(state.tags.get(tracking.TOKENS_TAG, 1)), *(trial.tokens for trial in trials)]),
        losses={trial.trial_id: _losses(f"{directory}/{trial.trial_id}") for trial in trials},
        samplers=_samplers(experiment),
        metric=metric,
        score_name=label(experiment.measure if metric == "perplexity" else metric),
    )
    return SweepResults(directory, experiment, state, data, record.seconds, result)


def read_experiment(directory: str, state: journal.RunState) -> Experiment:
    """The experiment in the journal of a run or sweep; StorageError if the run stopped before it was written."""
    artifact = state.artifacts.get(EXPERIMENT)
    if artifact is None:
        raise StorageError(f"{directory} was stopped before it started: its journal has no experiment", directory)
    return config.loads(artifact["text"], f"{directory}: its experiment")


def scored_on(experiment: Experiment, parameters: Mapping[str, Any]) -> str:
    """The text that evaluations during training score, in words. `parameters` are those of the run in MLflow."""
    return str(parameters.get("scored_on") or experiment.eval.scored_on)


def scored_on_with_size(experiment: Experiment, parameters: Mapping[str, Any]) -> str:
    """`scored_on` with the number of documents and tokens, if `parameters` have them."""
    text = scored_on(experiment, parameters)
    if "scored_documents" not in parameters:
        return text
    documents, tokens = (int(parameters[f"scored_{each}"]) for each in ("documents", "tokens"))
    return f"{text}: {counted(documents, scored_unit(experiment))}, {tokens:,} tokens"


def scored_unit(experiment: Experiment) -> str:
    """What is scored by itself: a document, or a passage of one."""
    is_split_by_passage = experiment.corpus.split_by == "passage" and not experiment.corpus.validation_paths
    return "passage" if is_split_by_passage else "document"


def _losses(directory: str) -> list[tuple[float, float]]:
    """(tokens, training loss) of each logged step of a trial."""
    series = tracking.Run(directory).metric_history()
    tokens = dict(series.get("train/tokens", ()))
    return [(tokens[step], loss) for step, loss in series.get("train/loss", ()) if step in tokens]


def _samplers(experiment: Experiment) -> dict[str, str]:
    """Swept key -> the name of its sampler, for keys with the same sampler in every inner space."""
    samplers: dict[str, set[str]] = {}
    for key, sampler in experiment.tune.space.items():
        for space in config.spaces(key, sampler) or [{key: sampler}]:
            for inner, value in space.items():
                samplers.setdefault(inner, set()).add(next(iter(value)) if config.is_sampler(value) else "choice")
    return {key: names.pop() for key, names in samplers.items() if len(names) == 1}
