"""A run or sweep from its start to its end: its directory and its run in MLflow."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from raylm import derived, runs, scratch, storage, summary, tracking
from raylm.errors import Interrupted, StorageError

if TYPE_CHECKING:
    from raylm.config import Experiment
    from raylm.runs import ActiveRun
    from raylm.tracking import Run


@contextlib.contextmanager
def started(
    experiment: Experiment,
    verb: Literal["train", "tune"],
    fingerprint: str,
    resume: runs.Resume,
    has_more: Callable[[str], bool] | None = None,
) -> Iterator[tuple[ActiveRun, Run]]:
    """Start or resume a run's directory and its MLflow run, which ends with the block: finished, failed or killed.

    `fingerprint`: that of its token store; `has_more`: see runs.start_or_resume. The runs in MLflow of abandoned
    directories end too. MLflow is opened beside what is done inside, which calls tracking.wait_until_open. The MLflow
    run of a sweep to which nothing is added stays as it is.
    """
    storage.check(experiment.storage)
    derived.keep()
    scratch.clear()
    active = runs.start_or_resume(experiment, verb, fingerprint, resume, has_more)
    if active.state == "finished":
        yield active, tracking.Run(active.directory, experiment.tracking.uri)
        return
    for directory in active.abandoned:
        abandoned = summary.start(experiment, directory, os.path.basename(directory), verb)
        _end_trials(abandoned)
        abandoned.finish_if_running("KILLED")
    tracked = summary.start(experiment, active.directory, active.name, verb, waits=False)
    status: tracking.Status = "FAILED"
    try:
        with active.logged():
            yield active, tracked
        status = "FINISHED"
    except (KeyboardInterrupt, Interrupted):
        status = "KILLED"
        raise
    finally:
        _end_trials(tracked)
        tracked.finish(status)
        tracking.wait_for_upload(tracked)


def _end_trials(tracked: Run) -> None:
    """End the runs in MLflow of a sweep's trials that have not ended."""
    with contextlib.suppress(StorageError):  # it has already ended the sweep
        for child in tracked.trials().values():
            child.finish_if_running("KILLED")
