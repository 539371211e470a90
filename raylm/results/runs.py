"""Runs and sweeps found by their directory or, below the default storage, by their name."""

from __future__ import annotations

import os

from raylm import storage
from raylm.config import DEFAULT_STORAGE
from raylm.errors import StorageError
from raylm.sweep.record import EVENTS

MOST_NAMES = 10
"""Names that an error suggests at most."""


def find(run: str) -> str:
    """The directory of a run or sweep, given as a directory or by its name; StorageError if there is none."""
    if storage.is_remote(run):
        return run.rstrip("/")
    if os.path.isdir(run):
        return os.path.abspath(run)
    matches = [directory for directory in _runs_below(DEFAULT_STORAGE) if directory.rpartition("/")[2] == run]
    if len(matches) > 1:
        raise StorageError(f"{run} is the name of {' and of '.join(matches)}; give the directory", run)
    if not matches:
        suggestion = suggestions(DEFAULT_STORAGE)
        raise StorageError(f"{run} is no directory, and no name under {DEFAULT_STORAGE}/*/ here; {suggestion}", run)
    return os.path.abspath(matches[0])


def find_sweep(sweep: str) -> str:
    """The directory of a sweep, given as a directory or by its name; StorageError if it is none."""
    directory = find(sweep)
    if not is_sweep(directory):
        raise StorageError(f"{sweep} is not a sweep; {suggestions(directory)}", sweep)
    return directory


def is_sweep(directory: str) -> bool:
    return EVENTS in storage.names(directory)


def suggestions(directory: str) -> str:
    """The end of an error: which sweep or run could have been meant by a directory that is none."""
    parent = directory.rpartition("/")[0]
    if is_sweep(parent):
        return f"did you mean {parent}?"
    names = [run.rpartition("/")[2] for run in _runs_below(directory)]
    if not names:
        return f"in {directory} there are no runs"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"in {directory} there are {', '.join(names[:MOST_NAMES])}{more}"


def _runs_below(directory: str) -> list[str]:
    """The directories of runs and sweeps in a directory or in one of its directories, the newest first."""
    inside = [f"{directory}/{name}" for name in storage.names(directory)]
    deeper = [f"{each}/{name}" for each in inside for name in storage.names(each)]
    runs = [run for run in (*inside, *deeper) if run.rpartition("/")[2].startswith(("train-", "tune-"))]
    return sorted(runs, key=lambda run: run.rpartition("/")[2].partition("-")[2], reverse=True)
