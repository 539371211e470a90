"""Runs and sweeps, found by directory, name or experiment's name, and their states."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raylm import DEFAULT_STORAGE, runs, storage, tracking
from raylm.checkpoint.directory import MODEL_OR_ADAPTER
from raylm.console import command
from raylm.errors import StorageError, first_of
from raylm.sweep.record import EVENTS, SweepRecord
from raylm.tracking import journal

MOST_NAMES = 10
"""Most names that an error suggests."""


KINDS = ("train-", "tune-")
"""How the names of the directories of runs and of sweeps start."""


def place(names: Sequence[str], default: str) -> str:
    """The directory of a run, of an experiment's runs, or of a whole storage; `default` if no name is given."""
    storage.look(default)
    if not names:
        return default
    if len(names) > 1:
        raise StorageError(f"{' '.join(names)}: give one name or directory", names[1])
    for each in (names[0].rstrip("/"), f"{default.rstrip('/')}/{names[0]}"):
        if storage.names(each):
            return storage.absolute(each)
    raise StorageError(f"{names[0]} is neither a directory nor an experiment in {default}", names[0])


def find(run: str, kinds: tuple[str, ...] = KINDS) -> str:
    """The directory of a run or sweep; StorageError if there is none.

    `run` is a directory, a name, or the name of an experiment, whose newest run of `kinds` is taken.
    """
    if storage.is_remote(run):
        return run.rstrip("/")
    if os.path.isdir(run) and ({EVENTS, journal.RUN_FILE, *MODEL_OR_ADAPTER} & set(storage.names(run))):
        return os.path.abspath(run)
    matches = [directory for directory in _runs_below(DEFAULT_STORAGE) if directory.rpartition("/")[2] == run]
    if len(matches) > 1:
        raise StorageError(f"{run} is the name of {' and of '.join(matches)}; give the directory", run)
    runs = _runs_below(f"{DEFAULT_STORAGE}/{run}")
    matches += [directory for directory in runs if directory.rpartition("/")[2].startswith(kinds)]
    if matches:
        return os.path.abspath(matches[0])
    if os.path.isdir(run):  # the caller reports what it lacks
        return os.path.abspath(run)
    if runs:
        raise StorageError(f"{run} is not a sweep; {suggestions(f'{DEFAULT_STORAGE}/{run}', kinds)}", run)
    raise StorageError(
        f"{run} is no directory, no name under {DEFAULT_STORAGE}/*/ here, and no experiment there; "
        f"{suggestions(DEFAULT_STORAGE)}",
        run,
    )


def find_sweep(sweep: str) -> str:
    """The directory of a sweep, which is given as in `find`; StorageError if it is not a sweep."""
    directory = find(sweep, ("tune-",))
    if is_sweep(directory):
        return directory
    if directory.rpartition("/")[2].startswith("tune-") and journal.RUN_FILE in storage.names(directory):
        raise StorageError(
            f"{directory} has no trials yet: it was stopped before; the command that began it resumes", sweep
        )
    raise StorageError(f"{sweep} is not a sweep; {suggestions(directory, ('tune-',))}", sweep)


def is_sweep(directory: str) -> bool:
    return EVENTS in storage.names(directory)


def suggestions(directory: str, kinds: tuple[str, ...] = KINDS) -> str:
    """The end of an error: the sweeps or runs that the user may have meant."""
    parent = directory.rpartition("/")[0]
    if is_sweep(parent):
        return f"did you mean {parent}?"
    names = [name for run in _runs_below(directory) if (name := run.rpartition("/")[2]).startswith(kinds)]
    if not names:
        return f"in {directory} there are no {'runs' if kinds == KINDS else 'sweeps; raylm tune makes one'}"
    return f"in {directory} there are {first_of(names, MOST_NAMES)}"


def _runs_below(directory: str) -> list[str]:
    """The directories of runs and sweeps in a directory or in one of its directories, the newest first."""
    inside = [f"{directory}/{name}" for name in storage.names(directory)]
    deeper = [f"{each}/{name}" for each in inside for name in storage.names(each)]
    runs = [run for run in (*inside, *deeper) if run.rpartition("/")[2].startswith(("train-", "tune-"))]
    return sorted(runs, key=lambda run: run.rpartition("/")[2].partition("-")[2], reverse=True)


# Lists of runs -------------------------------------------------------------------------------------------------------


MEASURES = ("perplexity", "masked_perplexity", "pseudo_perplexity")
"""The names that the score of a run may have."""


@dataclass(frozen=True)
class ListedRun:
    """A run or sweep on disk."""

    directory: str
    kind: Literal["train", "tune"]
    state: Literal["running", "finished", "interrupted", "failed"]
    """Interrupted runs can resume. Storage without locks shows running ones as interrupted."""
    measure: str | None
    """What the score is called; None without one."""
    score: float | None
    """The best score so far, of a sweep that of its best trial."""
    tokens: int
    """Training tokens, of a sweep those of all trials."""
    num_bytes: int
    """On disk."""
    started: str
    """Start time, such as 2026-11-29 14:11."""
    resume: str | None
    """The command that resumes the run; None except for the newest interrupted run of an experiment."""
    error: str | None

    @property
    def name(self) -> str:
        return self.directory.rpartition("/")[2]

    @property
    def experiment(self) -> str:
        """The directory of all runs of its experiment."""
        return self.directory.rpartition("/")[0]

    def record(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


def listed(place: str) -> list[ListedRun]:
    """The runs and sweeps in a storage or an experiment's directory, or the one in the directory of a run."""
    place = place.rstrip("/")
    directories = [place] if storage.read(f"{place}/run.json") is not None else _runs_below(place)
    entries: list[ListedRun] = []
    resumed: set[tuple[str, str]] = set()
    for directory in directories:  # the newest first
        entry = _listed(directory, resumed)
        if entry is not None:
            entries.append(entry)
    return entries


def _listed(directory: str, resumed: set[tuple[str, str]]) -> ListedRun | None:
    """A run; None if the directory is not one. `resumed`: each (experiment, kind) whose newer run resumes."""
    if storage.read(f"{directory}/run.json") is None:
        return None
    parent, _, name = directory.rpartition("/")
    kind: Any = name.partition("-")[0]
    result = runs.result_of(directory)
    error = result.get("error")
    state: Any = "failed" if error else "finished" if result else "interrupted"
    if state == "interrupted" and runs.is_locked(directory):
        state = "running"
    resume = None
    if state == "interrupted" and (parent, kind) not in resumed:
        resumed.add((parent, kind))
        if "experiment.yaml" in storage.names(directory):
            resume = command(kind, "--config", f"{directory}/experiment.yaml")
    measure, score, tokens = _sweep_score(directory, result) if kind == "tune" else _score(directory, result)
    return ListedRun(
        directory, kind, state, measure, score, tokens, num_bytes(directory), _started(name), resume, error
    )


def _score(directory: str, result: dict[str, Any]) -> tuple[str | None, float | None, int]:
    """The name of a training's score, its best value, and the training tokens."""
    for measure in MEASURES:
        if measure in result:
            return measure, result[measure], result["tokens"]
    series = tracking.Run(directory).metric_history()
    trained = series.get("train/tokens")
    tokens = round(trained[-1][1]) if trained else 0
    for measure in MEASURES:  # step 0 is before training
        scores = [value for step, value in series.get(f"eval/{measure}", ()) if step]
        if scores:
            return measure, min(scores), tokens
    return None, None, tokens


def _sweep_score(directory: str, result: dict[str, Any]) -> tuple[str | None, float | None, int]:
    trials = SweepRecord(directory).trials.values()
    tokens = sum(trial.tokens for trial in trials)
    best = result.get("best", {})
    for measure in MEASURES:
        if measure in best:
            return measure, best[measure], tokens
    scores = [trial.results[-1]["best_perplexity"] for trial in trials if trial.results]
    return ("perplexity", min(scores), tokens) if scores else (None, None, tokens)


def _started(name: str) -> str:
    """The start time of a run, by its name."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.strptime(name.partition("-")[2][:15], "%Y%m%d-%H%M%S"))
    except ValueError:
        return ""


def num_bytes(directory: str) -> int:
    """Bytes of all files below a directory."""

    def act() -> int:
        if not storage.is_remote(directory):
            files = (os.path.join(place, name) for place, _, names in os.walk(directory) for name in names)
            return sum(os.lstat(file).st_size for file in files if os.path.lexists(file))
        from pyarrow.fs import FileSelector

        system, inner = storage.file_system(directory)
        infos = system.get_file_info(FileSelector(inner, recursive=True, allow_not_found=True))
        return sum(info.size or 0 for info in infos)

    return storage.retried(directory, act)
