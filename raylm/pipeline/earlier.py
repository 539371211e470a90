"""tune.prior_sweeps: the trials of earlier sweeps as observations, with which a searcher starts.

An observation must be what a trial of this sweep would have scored. So the sweep must have trained on the same token
store and scored the same text; and a trial must have the same budget and the same settings outside of tune.space, and
its score is taken at the tokens at which this sweep compares trials.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raylm import config, runs, summary
from raylm import sweep as sweeps
from raylm.config import SEEDS, Experiment, spaces
from raylm.errors import ConfigError, StorageError
from raylm.results import runs as found_runs
from raylm.results import sweep as results
from raylm.sweep.asha import Asha
from raylm.sweep.space import fits, keys
from raylm.sweep.start import Observation

if TYPE_CHECKING:
    from raylm.plan import Prepared
    from raylm.results.sweep import SweepResults
    from raylm.sweep import Trial

SETTING = "tune.prior_sweeps"

SCORED = ("store", "scored_on", "scored_documents", "scored_tokens", "scored_in", "prefix")
"""Parameters of a sweep without which its scores do not compare with those of another."""

FREE = (*runs.MUTABLE_ON_RESUME, *SEEDS, "name", "tune", "train.compile", "train.precision")
"""Settings that an earlier trial may have had otherwise: they do not change its score, or no more than by chance."""


def check(experiment: Experiment, fingerprint: str) -> None:
    """ConfigError if one of tune.prior_sweeps is no sweep, or one over another token store than this one."""
    for sweep in experiment.tune.prior_sweeps:
        _comparable(sweep, experiment, {"store": fingerprint})


def observations(prepared: Prepared) -> tuple[tuple[Observation, ...], tuple[str, ...]]:
    """The trials of tune.prior_sweeps that fit, and a sentence about each sweep: how many do, and why others do not."""
    experiment, found, notes = prepared.experiment, [], []
    parameters = summary.parameters(experiment, prepared.store)
    at = _compared_at(prepared)
    terms = _terms(experiment, experiment)
    for sweep in experiment.tune.prior_sweeps:
        earlier = _comparable(sweep, experiment, {key: parameters[key] for key in SCORED})
        trials = [trial for trial in earlier.data.trials if trial.repeat_of is None]
        reasons: Counter[str] = Counter()
        for trial in trials:
            observed = _observation(earlier, trial, experiment, terms, prepared.budget.tokens, at)
            if isinstance(observed, Observation):
                found.append(observed)
            else:
                reasons[observed] += 1
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        taken = f"{len(trials) - reasons.total()} of {len(trials)} trials of {earlier.name} are taken as observations"
        notes.append(f"{SETTING}: {taken}{f'; not {why}' if why else ''}")
    return tuple(found), tuple(notes)


def _comparable(sweep: str, experiment: Experiment, parameters: Mapping[str, Any]) -> SweepResults:
    """A sweep with these parameters; ConfigError naming the one that differs, or why it is none."""
    try:
        found = results.read(found_runs.find_sweep(sweep))
    except StorageError as error:
        raise ConfigError(f"{SETTING}: {error.message}", where=SETTING) from None
    then, now = found.experiment.tune, experiment.tune
    differences: list[tuple[str, Any, Any]] = [
        (key, found.state.parameters.get(key), value)
        for key, value in parameters.items()
        if str(found.state.parameters.get(key)) != str(value) and value != "auto"  # of a plan: not decided yet
    ]
    if then.ranked_by != now.ranked_by or then.weights != now.weights:
        differences.append(("tune.metric", then.metric, now.metric))
    if then.scheduler.cooldown != now.scheduler.cooldown:
        differences.append(("tune.scheduler.cooldown", then.scheduler.cooldown, now.scheduler.cooldown))
    if then.scheduler.kind == "pbt":
        differences.append(("tune.scheduler", "pbt, which changes settings during training", now.scheduler.kind))
    if not differences:
        return found
    key, before, value = differences[0]
    what = "token store" if key == "store" else key
    raise ConfigError(
        f"{SETTING}: the scores of {sweep} do not compare with those of this sweep: {what} {before} there, {value} "
        "here; leave it out",
        where=SETTING,
    )


def _compared_at(prepared: Prepared) -> int:
    """The training tokens at which the searcher of this sweep is told a trial's score."""
    section, budget = prepared.experiment.tune, prepared.budget
    scheduler = sweeps.scheduler(section, budget, f"best_{section.ranked_by}")
    rungs = scheduler.rungs if isinstance(scheduler, Asha) else []
    return min([*rungs, budget.tokens])


def _observation(
    earlier: SweepResults, trial: Trial, experiment: Experiment, terms: Mapping[str, Any], budget: int, at: int
) -> Observation | str:
    """A trial as an observation, or why it is none."""
    section = experiment.tune
    if not trial.is_over or trial.score(section.ranked_by) is None:
        return "without a final score"
    if trial.results[-1].get("budget_tokens", budget) != budget:
        return f"of another budget than {budget:,} tokens"
    until = next((number for number, result in enumerate(trial.results) if result["tokens"] >= at), None)
    if until is None and trial.status != "completed":
        return f"stopped before {at:,} tokens"
    then = config.of_trial(earlier.experiment, trial.settings)
    theirs = _terms(then, experiment)
    unlike = [key for key in {**terms, **theirs} if terms.get(key) != theirs.get(key)]
    if unlike:
        return f"with another {unlike[0]}"
    settings = _settings(then, experiment)
    if isinstance(settings, str):
        return f"outside of tune.space.{settings}"
    score = trial.results[-1 if until is None else until][f"best_{section.ranked_by}"]
    return Observation(settings, score) if math.isfinite(score) else "without a finite score"


def _terms(then: Experiment, experiment: Experiment) -> dict[str, Any]:
    """Every setting that must be the same, without those that the sweep draws."""
    free = (*FREE, *keys(experiment.tune.space))
    flat = runs.flat_settings(then)
    return {key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{each}.") for each in free)}


def _settings(then: Experiment, experiment: Experiment) -> dict[str, Any] | str:
    """The values of this sweep's settings in an earlier trial, or the entry of the space that cannot give one."""
    found: dict[str, Any] = {}
    for key, sampler in experiment.tune.space.items():
        inner_spaces = spaces(key, sampler) or [{key: sampler}]
        drawn = [{inner: config.get(then, inner) for inner in each} for each in inner_spaces]
        fitting = [
            values
            for each, values in zip(inner_spaces, drawn, strict=True)
            if all(fits(each[name], value) for name, value in values.items())
        ]
        if not fitting:
            return key
        found |= fitting[0]
    return found
