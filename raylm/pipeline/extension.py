"""A sweep goes on with more trials: those of a larger tune.num_samples, of a longer grid, or asked for by a command."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raylm import console, runs, storage
from raylm import sweep as sweeps
from raylm.config import Experiment, spaces
from raylm.errors import ConfigError
from raylm.sweep import requests
from raylm.sweep.start import Start

if TYPE_CHECKING:
    from raylm.runs import ActiveRun
    from raylm.sweep import SweepRecord
    from raylm.sweep.space import Searcher

logger = logging.getLogger(__name__)


def has_more(experiment: Experiment, directory: str) -> bool:
    """Whether the experiment gives a sweep more trials than its record has."""
    record = sweeps.SweepRecord(directory)
    requested = sum(request.get("add", 0) for request in requests.pending(record).values())
    if searcher(experiment, record, requested).total <= len(record.searched):
        return False
    with_trials = _with_trials(experiment, record, _new_settings(experiment, directory), requested)
    return with_trials.total > len(record.searched)


def searcher(experiment: Experiment, record: SweepRecord, more: int = 0) -> Searcher:
    """The searcher of a sweep before any trial. It draws the trials of the experiment, those that other commands have
    added, and `more`."""
    section = experiment.tune
    samples = section.model_copy(update={"num_samples": section.num_samples + record.requested + more})
    start = sweeps.start.read(record.directory)
    if start is None:
        start = Start(section.points if section.points != "suggested" else ())
    return sweeps.searcher(samples, experiment.train.seed, start)


def _with_trials(experiment: Experiment, record: SweepRecord, new: Mapping[str, Any], more: int = 0) -> Searcher:
    """The searcher with the trials of the record; ConfigError if its space cannot have them. `new`: their settings of
    new keys."""
    found = searcher(experiment, record, more)
    for trial in record.searched:
        settings = {**new, **trial.settings}
        if experiment.tune.searcher.kind == "optuna" and not _has_place(experiment.tune.space, settings):
            raise ConfigError(
                f"tune.space: tune.searcher=optuna cannot place {trial.trial_id} in it, whose settings are {settings}; "
                "keep the earlier entries of every choice, or start another sweep with --resume never",
                where="tune.space",
            )
        found.add(trial.trial_id, settings)
    return found


def _new_settings(experiment: Experiment, directory: str) -> dict[str, Any]:
    """The settings that all trials of a sweep so far have of keys that its space did not have, if the experiment has
    them."""
    before = sweeps.keys(runs.started_with(directory).tune.space)
    settings = runs.flat_settings(experiment)
    new = [key for key in sweeps.keys(experiment.tune.space) if key not in before]
    return {key: settings[key] for key in new if key in settings}


def _has_place(space: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> bool:
    """Whether a space has a value for each of its keys in these settings, and each choice has theirs."""
    inner = {key for name, sampler in space.items() for each in spaces(name, sampler) or [] for key in each}
    plain = {key: sampler for key, sampler in space.items() if spaces(key, sampler) is None and key not in inner}
    known = all(settings.get(key) in sampler.get("choice", [settings.get(key)]) for key, sampler in plain.items())
    return known and all(settings.get(key) is not None for key in plain)


def resume(record: SweepRecord, experiment: Experiment, active: ActiveRun) -> None:
    """Say what is left of a sweep that has trials, and prepare its record if it has ended and more trials follow."""
    requests.take(record)
    if not record.trials:
        return
    finished = sum(trial.is_over for trial in record.trials.values())
    trials, left = console.counted(finished, "trial"), len(record.trials) - finished
    new = _new_settings(experiment, active.directory)
    total = _with_trials(experiment, record, new).total
    more = max(0, total - len(record.searched))
    is_finished = bool(runs.result_of(active.directory))
    has_ended = bool(more) and (is_finished or record.repeated is not None or bool(_dropped(record, experiment)))
    how = f"extended by {console.counted(more, 'trial')}" if has_ended else "resuming"
    logger.info(f"{active.directory}: {how}: {trials} finished, {left} in progress")
    for key, value in new.items():
        logger.info(f"tune.space.{key} is new: the earlier trials have {console.format_number(value)}")
    if new or has_ended:
        _extend(record, experiment, total, new)
    if active.state == "extended":
        active.reopen(experiment)


def extend_by_requests(record: SweepRecord, experiment: Experiment) -> bool:
    """Take what other commands have asked for since all trials had ended. Whether there are more trials to run."""
    requests.take(record)
    total = searcher(experiment, record).total
    if total <= len(record.searched):
        return False
    _extend(record, experiment, total, {})
    return True


def _dropped(record: SweepRecord, experiment: Experiment) -> list[str]:
    """The trials that asha stopped when no others were left. They resume if others follow."""
    is_asha = experiment.tune.scheduler.kind == "asha"
    trials = record.searched if is_asha else []
    return [trial.trial_id for trial in trials if trial.dropped and trial.trial_id not in record.to_stop]


def _extend(record: SweepRecord, experiment: Experiment, total: int, new: Mapping[str, Any]) -> None:
    """Prepare the record for more trials, `total` in all, and say what becomes of the earlier ones. `new`: their
    settings of new keys."""
    kind, more = experiment.tune.scheduler.kind, max(0, total - len(record.searched))
    dropped = _dropped(record, experiment) if more else []
    if dropped:
        logger.info(
            f"{console.counted(len(dropped), 'trial')} that asha had stopped wait at their rungs again: the best of "
            "them are promoted, now that there are more trials"
        )
        gone = [name for name in dropped if not storage.names(f"{record.directory}/{name}/checkpoints")]
        if gone:
            logger.info(
                f"The checkpoints of {len(gone)} of them were removed (tune.keep=best, or raylm clean): one that is "
                "promoted trains from its start again"
            )
    if more and kind == "hyperband":
        logger.info("tune.scheduler=hyperband: the new trials have brackets of their own; no earlier one resumes")
    if more and kind == "pbt":
        logger.info("tune.scheduler=pbt: the new trials are a population of their own; no earlier one takes part")
    record.extend(total, dropped, new)
