"""Writes checkpoints: each rank uploads its files, then rank 0 completes the checkpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylm import checkpoint, storage
from raylm.checkpoint import CheckpointManager
from raylm.errors import StorageError, StorageFull
from raylm.training.session import CollectiveError, Session, TrainTask, gathered

PROGRESS = "progress.json"
"""In a checkpoint: state that the Trainer does not save, such as the loss since it was last logged."""


class CheckpointWriter:
    """Writes the checkpoints of one rank. Every rank calls `commit` at the same steps."""

    def __init__(self, task: TrainTask, session: Session, scratch: Path, say: Callable[[str], None]):
        self.task, self.session, self.scratch, self.say = task, session, scratch, say
        self.failed: Exception | None = None
        """Why this rank could not write its files locally; `commit` tells the other ranks."""
        self.missed = 0
        """Checkpoints in a row that could not be committed."""

    @property
    def checkpoints(self) -> CheckpointManager:
        return self.task.checkpoints

    def describe(self, local: Path, record: dict[str, Any], progress: dict[str, Any]) -> None:
        """Add the description of the checkpoint to the files of rank 0."""
        if self.session.rank != 0 or self.failed is not None:
            return
        try:
            checkpoint.describe(local, self.task.experiment, record)
            (local / PROGRESS).write_text(json.dumps(progress) + "\n", encoding="utf-8")
        except OSError as error:
            self.failed = error

    def commit(self, step: int, local: Path, *, best: int | None, is_last_chance: bool) -> bool:
        """Make a checkpoint of every rank's `local`, which is removed; remove older ones. Whether that worked.

        If it did not, a message says so and training continues; StorageError on all ranks if it is the second failure
        in a row, the last chance, or a full disk.
        """
        problem = self._committed(step, local, best)
        shutil.rmtree(local, ignore_errors=True)
        if problem is None:
            self.missed = 0
            return True
        self.missed += 1
        if self.session.rank == 0:
            with contextlib.suppress(Exception):  # its rest has no manifest and is no checkpoint
                self.checkpoints.discard(step)
        if self.missed == 2 or is_last_chance or isinstance(problem, StorageFull):
            raise CollectiveError(self._cannot(step, problem))
        self.say(f"the checkpoint of step {step:,} could not be written ({problem}); training until the next one")
        return False

    def _committed(self, step: int, local: Path, best: int | None) -> Exception | None:
        """The error of any rank, if there is one."""
        problem, self.failed = self.failed, None
        if self.session.rank == 0 and problem is None:
            _, problem = _tried(lambda: self.checkpoints.discard(step))  # the rest that a killed run may have left
        gathered(self.session, None)
        files: dict[str, storage.Stored] = {}
        if problem is None:
            files, problem = _tried(lambda: self.checkpoints.upload(step, local))
        found = gathered(self.session, (files, problem))
        problem = next((each for _, each in found if each is not None), None)
        if problem is None and self.session.rank == 0:
            self.task.run.flush()  # a run that resumes from here does not log earlier points again
            whole = {name: stored for uploaded, _ in found for name, stored in uploaded.items()}
            _, problem = _tried(lambda: self.checkpoints.commit(step, whole))
            if problem is None:
                keep = self.task.experiment.train.keep_checkpoints
                _, left = _tried(lambda: self.checkpoints.prune(keep, [best]))
                if left is not None:  # they are kept until the next save
                    self.say(f"older checkpoints could not be removed: {left}")
        return gathered(self.session, problem)[0] or problem

    def _cannot(self, step: int, problem: Exception) -> StorageError:
        if isinstance(problem, StorageError):
            return problem
        disk = shutil.disk_usage(self.scratch)
        room = f"; {disk.free:,} bytes are free in {self.scratch}" if disk.free < disk.total / 50 else ""
        return StorageError(
            f"{self.checkpoints.path(step)} cannot be written: {type(problem).__name__}: {problem}{room}; "
            "once it can, the same command resumes from the last checkpoint",
            self.checkpoints.path(step),
        )


def _tried(access: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """The result of an access to storage, or its error, which every rank gets before any of them ends."""
    try:
        return access(), None
    except Exception as error:  # after its retries
        return {}, error
