"""python -m raylm.compare RUN RUN: runs side by side, and whether their numbers can be compared."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from json import dumps, loads
from typing import Annotated, Any

import typer

from raylm import cli
from raylm.config import WHOLE_SPLIT, Experiment
from raylm.errors import ConfigError, StorageError
from raylm.redaction import redacted
from raylm.report import located, there

ELSEWHERE = ("name", "storage", "tracking", "tune")
"""Sections that change nothing about a run."""
SECRET = re.compile(r"(token|secret|password|key)$")
"""As in export/, which takes seconds to load: it needs torch."""


@dataclass(frozen=True)
class ComparedRun:
    """A run as it is compared. What is not known of it is None."""

    name: str
    experiment: Experiment
    perplexity: float | None
    bits_per_byte: float | None
    scored_on: str
    """The whole validation split, or only its first tokens."""
    scored_in: str
    """The arithmetic of the scores."""
    tokens: int | None
    """That it was trained on."""
    seconds: float | None
    """From its first logged step to its last, whatever it did meanwhile."""
    tokens_per_second: int | None
    """Of the steps between two logged ones, in the median: evaluations and stops do not count."""
    store: str | None
    """The fingerprint of its data."""

    @property
    def measure(self) -> str:
        from raylm import page

        return page.measure(self.experiment)

    @property
    def manifest(self) -> dict[str, Any]:
        """Of its token store; empty if that is gone."""
        from raylm import storage

        path = f"{self.experiment.storage}/tokens/{self.store}/manifest.json"
        return loads(storage.read(path) or b"{}") if self.store else {}

    def record(self) -> dict[str, Any]:
        return {
            self.measure.replace("-", "_"): self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "scored_on": self.scored_on if self.perplexity is not None else None,
            "scored_in": self.scored_in if self.perplexity is not None else None,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "data": self.store,
        }


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Directories, or names under runs/*/ here: a training run, a trial, a sweep (its best trial), a model "
            "that raylm trained.",
        ),
    ],
    json: cli.Json = False,
) -> cli.CommandResult:
    """Print runs side by side: scores, speed, data, settings that differ; warn of scores that cannot be compared."""
    if len(runs) < 2:
        raise ConfigError(f"there is nothing to compare {runs[0]} with; give two runs or more", "RUN")
    from raylm import tables

    sides = [summarize(run) for run in runs]
    settings = differing([side.experiment for side in sides])
    told = warnings(sides)
    records = [side.record() for side in sides]
    record = {
        "runs": [{"run": side.name, **each} for side, each in zip(sides, records, strict=True)],
        "settings": settings,
        "warnings": told,
    }
    names = list(dict.fromkeys(name for each in records for name in each))
    rows = {name.replace("_", " "): [each.get(name) for each in records] for name in names}
    view = tables.side_by_side([side.name for side in sides], {**rows, **settings})
    return cli.CommandResult(record, (view, *(f"\nwarning: {warning}" for warning in told)))


# A run, whatever it is -----------------------------------------------------------------------------------------------


def summarize(given: str) -> ComparedRun:
    """What is known of a run; StorageError if it is none."""
    from raylm import page, storage
    from raylm.tracking import journal

    directory = located(given)
    above, _, name = directory.rpartition("/")
    inside = storage.names(directory)
    if page.is_sweep(directory):
        return of_sweep(directory, None)
    if page.is_sweep(above):  # a trial, or the model of the best one
        return of_sweep(above, name if name.startswith("trial_") else None)
    if journal.RUN_FILE in inside:
        return of_training(directory)
    if name == "model" and journal.RUN_FILE in storage.names(above):
        return of_training(above)
    if "config.json" in inside:
        return of_model(directory, given)
    raise StorageError(f"{given} is no run, trial, sweep or model that raylm trained; {there(directory)}", given)


def of_sweep(directory: str, trial_id: str | None) -> ComparedRun:
    """A trial, by what trials are ranked by; or the best one, scored on the whole split if that was done."""
    from raylm import config, page

    found = page.read(directory)
    trials = {trial.trial_id: trial for trial in found.sweep.ranked}
    best = found.best
    if trial_id is None and best is not None:
        trial, scored = trials[best["trial_id"]], best
    elif trial_id in trials:
        trial = trials[trial_id]
        scored = {**found.scores(trial), "scored_on": found.ranked_on}
    else:
        raise StorageError(f"{directory}: {trial_id or 'the sweep'} has no score yet", directory)
    return ComparedRun(
        name=f"{directory.rpartition('/')[2]}/{trial.trial_id}",
        experiment=config.override(found.experiment, {**trial.settings, "tune.space": {}, "tune.points": []}),
        perplexity=scored["perplexity"],
        bits_per_byte=scored["bits_per_byte"],
        scored_on=scored["scored_on"],
        scored_in=found.experiment.eval.precision,
        tokens=trial.tokens,
        **pace(f"{directory}/{trial.trial_id}"),
        store=found.facts.parameters.get("store"),
    )


def of_training(directory: str) -> ComparedRun:
    """A training run; one that is not over has its best evaluation so far."""
    from raylm import page, storage, tracking
    from raylm.tracking import journal

    facts = journal.run_state(directory)
    experiment = page.experiment(directory, facts)
    measure = page.measure(experiment).replace("-", "_")
    result = loads(storage.read(f"{directory}/result.json") or b"{}")
    is_over = measure in result
    if not is_over:
        series = tracking.Run(directory).metric_history()
        evaluations = {name: dict(series.get(f"eval/{name}", ())) for name in (measure, "bits_per_byte")}
        best = min(evaluations[measure], key=lambda step: evaluations[measure][step], default=-1)  # before any: none
        trained = series.get("train/tokens")
        result = {name: steps.get(best) for name, steps in evaluations.items()}
        result["tokens"] = round(trained[-1][1]) if trained else None
    return ComparedRun(
        name=directory.rpartition("/")[2],
        experiment=experiment,
        perplexity=result[measure],
        bits_per_byte=result["bits_per_byte"],
        tokens=result["tokens"],
        **pace(directory),
        store=facts.parameters.get("store"),
        scored_on=result.get("scored_on", WHOLE_SPLIT) if is_over else page.ranked_on(experiment, facts),
        scored_in=experiment.eval.precision,
    )


def pace(directory: str) -> dict[str, Any]:
    """`seconds` and `tokens_per_second` of a run, by the times in its journal; None before there are two."""
    from raylm.tracking import journal

    points: dict[journal.MetricKey, journal.MetricValue] = {}
    journal.apply_metrics(journal.json_lines(directory, journal.METRICS_FILE).read()[0], points)
    told = sorted((time / 1000, tokens) for (name, _), (tokens, time) in points.items() if name == "train/tokens")
    spans = [(after[0] - before[0], after[1] - before[1]) for before, after in itertools.pairwise(told)]
    speeds = [tokens / seconds for seconds, tokens in spans if seconds > 0]
    return {
        "seconds": told[-1][0] - told[0][0] if len(told) > 1 else None,
        "tokens_per_second": round(statistics.median(speeds)) if speeds else None,
    }


def of_model(directory: str, given: str) -> ComparedRun:
    """A model that was exported, or a checkpoint."""
    from raylm import checkpoint

    found = checkpoint.locate(directory)
    experiment, record = checkpoint.read_experiment(found), checkpoint.read_record(found)
    if experiment is None:
        raise StorageError(f"{directory} was not trained by raylm: it holds no experiment.yaml", directory)
    return ComparedRun(
        name=given,
        experiment=experiment,
        perplexity=record.get("perplexity"),
        bits_per_byte=record.get("bits_per_byte"),
        tokens=record.get("tokens"),
        seconds=None,
        tokens_per_second=None,
        store=record["store"].rstrip("/").rpartition("/")[2] if "store" in record else None,
        scored_on=record.get("scored_on") or experiment.eval.scored_on,
        scored_in=record.get("scored_in") or experiment.eval.precision,
    )


# What differs --------------------------------------------------------------------------------------------------------


def differing(experiments: Sequence[Experiment]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each, of the settings that are not the same in all; None where there is none."""
    flat = [dict(_flat(experiment.model_dump(mode="json"))) for experiment in experiments]
    keys = dict.fromkeys(key for each in flat for key in each)
    found = {key: [each.get(key) for each in flat] for key in keys if not SECRET.search(key)}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif f"{prefix}{key}".partition(".")[0] not in ELSEWHERE:
            yield f"{prefix}{key}", redacted(value)


def warnings(sides: Sequence[ComparedRun]) -> list[str]:
    """Why which scores cannot be compared; none if all can."""
    told = []
    if len({side.measure for side in sides}) > 1:
        kinds = ", ".join(dict.fromkeys(side.measure for side in sides))
        told.append(f"the scores are of different kinds, which cannot be compared: {kinds}")
    if unknown := [side.name for side in sides if side.store is None]:
        told.append(f"nothing says on what text {', '.join(unknown)} was scored")
    if len({side.store for side in sides} - {None}) > 1 and (why := _other_tokens(sides)):
        told.append(why)
    if len({side.scored_on for side in sides if side.perplexity is not None}) > 1:
        told.append(
            "the scores are of other parts of the validation split; raylm evaluate MODEL scores the whole of it"
        )
    if len({side.scored_in for side in sides if side.perplexity is not None}) > 1:
        told.append(
            "the scores are of different arithmetic; raylm evaluate MODEL eval.precision=float32 makes them alike"
        )
    return told


def _other_tokens(sides: Sequence[ComparedRun]) -> str | None:
    """What follows from token stores that are not the same; None if their validation tokens are."""
    manifests = [side.manifest for side in sides]
    if all(manifests):
        texts = {tuple(each["validation"][what] for what in ("documents", "bytes")) for each in manifests}
        tokenizers = {dumps(each["tokenizer"]["files"], sort_keys=True) for each in manifests}
        same_text, same_tokenizer = len(texts) == 1, len(tokenizers) == 1
    else:  # a store that is gone: by the settings, and the same settings gave other tokens
        same_text = len({side.experiment.corpus.model_dump_json() for side in sides}) == 1
        chosen = {(side.experiment.tokenizer.model_dump_json(), side.experiment.model.path) for side in sides}
        same_tokenizer, same_text = len(chosen) == 1, same_text and len(chosen) > 1
    if not same_text:
        return (
            "the validation texts differ, so that neither perplexity nor bits per byte can be compared; raylm evaluate "
            "MODEL --text FILE scores any model on the same text"
        )
    if not same_tokenizer and any(each["validation"].get("unknown_tokens") for each in manifests if each):
        return (
            "the tokenizers differ, and of the validation text some tokens are unknown to one of them, so that neither "
            "perplexity nor bits per byte can be compared"
        )
    if not same_tokenizer:
        return "the tokenizers differ, so that perplexities are of other tokens: compare bits per byte"
    return None


def main() -> None:
    cli.run(compare)


if __name__ == "__main__":
    from raylm.compare import main  # by its real name, so that Ray ships functions by reference

    main()
