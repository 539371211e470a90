"""What another terminal asks of a sweep: its trials as they are, that one stops, that there are more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from raylm import console, runs, storage, tracking
from raylm import sweep as sweeps
from raylm.config import Experiment, of_trial, override, parse_setting
from raylm.errors import ConfigError, RaylmError, StorageError, did_you_mean
from raylm.pipeline import extension
from raylm.results import live_table, trial_table
from raylm.results import runs as listing
from raylm.results.sweep import SweepResults, read
from raylm.results.trial_table import TrialRow
from raylm.sweep import requests
from raylm.sweep.record import EVENTS


def find(names: Sequence[str], experiment: Experiment) -> str:
    """The directory of a sweep: as it was named, else the newest of the experiment; StorageError if there is none."""
    if len(names) > 1:
        raise StorageError(f"{' '.join(names)}: give one sweep", names[1])
    if names:
        return listing.find_sweep(names[0])
    place = runs.directory_of(experiment)
    for name in reversed([name for name in storage.names(place) if name.startswith("tune-")]):
        if EVENTS in storage.names(f"{place}/{name}"):
            return f"{place}/{name}"
    raise StorageError(
        f"there is no sweep in {place}; name it, or give the --config, name and storage that it was started with", place
    )


@dataclass(frozen=True)
class SweepStatus:
    """A sweep as it is now."""

    directory: str
    state: str
    """running, finished, interrupted or failed."""
    summary: str
    """Trials by status, tokens and the best score, in a line."""
    measure: str
    trials: list[TrialRow]
    """Every trial that has started, the best first."""

    @property
    def view(self) -> tuple[Any, ...]:
        table = trial_table.RankedTable(self.trials, console.label(self.measure))
        return f"{self.directory}: {self.state}; {self.summary}", table

    def record(self) -> dict[str, Any]:
        trials = [row.record(self.measure) for row in self.trials]
        return {"sweep": self.directory, "state": self.state, "summary": self.summary, "trials": trials}


def status(directory: str) -> SweepStatus:
    """The trials of a sweep in any state, from its record on disk."""
    results, record = read(directory), sweeps.SweepRecord(directory)
    section, points = results.experiment.tune, extension.searcher(results.experiment, record)
    repeats = len(record.trials) - len(record.searched)
    total = max(points.total, len(record.searched)) + repeats
    of_all = sweeps.ladder.most_tokens(results.experiment, total)
    keys = sweeps.keys(section.space)
    table = live_table.LiveTable(results.data.budget_tokens, total, keys, results.measure, tokens_of_all=of_all)
    rows = [_as_it_is(results, row) for row in results.trials]
    for row in rows:
        table.update(row.trial_id, status=row.status, tokens=row.tokens, perplexity=row.perplexity)
    (listed,) = listing.listed(directory)
    interrupted = sum(row.status == "interrupted" for row in rows)
    summary = f"{interrupted} interrupted, {table.summary()}" if interrupted else table.summary()
    return SweepStatus(directory, listed.state, summary, results.measure, rows)


def _as_it_is(results: SweepResults, row: TrialRow) -> TrialRow:
    """A trial's row; one whose run in MLflow has ended though it has not is paused at a rung."""
    waits = row.status == "running" and not tracking.Run(f"{results.directory}/{row.trial_id}").is_running
    return replace(row, status="paused") if waits else row


def stop_trial(directory: str, trial_id: str) -> str:
    """Have a trial stop at its next evaluation; what becomes of that, in a line. ConfigError if it cannot."""
    where = f"--stop-trial {trial_id}"
    trial_id = f"trial_{trial_id}" if trial_id.isdigit() else trial_id
    trials = {row.trial_id: row for row in read(directory).trials}
    if trial_id not in trials:
        near = did_you_mean(trial_id, trials) or f"its trials are {', '.join(sorted(trials)) or 'still to start'}"
        raise ConfigError(f"{where}: {directory} has no such trial; {near}", where)
    row = trials[trial_id]
    if row.status not in ("running", "interrupted", "not started"):
        raise ConfigError(f"{where}: {directory}: {trial_id} is over: {row.status}", where)
    requests.stop_trial(directory, trial_id)
    return f"{directory}: {trial_id} stops at its next evaluation{_when(directory)}"


def add_trials(directory: str, count: int, given: Sequence[str]) -> str:
    """Have a sweep train more trials, the first of them with these settings; what becomes of that, in a line.
    ConfigError if its space cannot have them."""
    experiment = read(directory).experiment
    where, section = f"--add-trials {count}", experiment.tune
    if all("grid" in sampler for sampler in section.space.values()):
        raise ConfigError(
            f"{where}: tune.space of {directory} has only grids, of which each point is trained once; run its command "
            "with a longer grid instead, which extends it",
            where,
        )
    settings = dict(map(parse_setting, given))
    try:
        if settings:
            with_point = override(experiment, {"tune.points": [settings]})
            sweeps.searcher(with_point.tune, experiment.train.seed)  # Optuna knows the entries of its choices alone
            of_trial(experiment, settings)
    except RaylmError as error:
        raise ConfigError(f"{where}: {error.message}", where) from None
    requests.add_trials(directory, count, settings)
    return f"{directory}: {console.counted(count, 'trial')} more{_when(directory)}"


def _when(directory: str) -> str:
    """When a sweep takes a request: soon, unless no command works on it."""
    if runs.is_locked(directory):
        return ""
    again = console.command("tune", "--config", f"{directory}/{runs.EXPERIMENT}")
    known = (
        "once a command works on it" if storage.is_remote(directory) else "as soon as it resumes: none works on it now"
    )
    return f", {known}; {again}"
