"""A checkpoint as the ranks make it together: each uploads what it wrote, then the first one says that all is there."""

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
"""In a checkpoint: what the Trainer forgets, as the loss since it was last logged."""


class CheckpointWriter:
    """The checkpoints of one run, as one of its ranks sees them. Every rank calls `commit` at the same steps."""

    def __init__(self, task: TrainTask, session: Session, scratch: Path, say: Callable[[str], None]):
        self.task, self.session, self.scratch, self.say = task, session, scratch, say
        self.failed: Exception | None = None
        """Why this rank could not write its part on its own machine; it is told to the others by `commit`."""
        self.missed = 0
        """Checkpoints in a row that could not be committed."""

    @property
    def series(self) -> CheckpointManager:
        return self.task.checkpoints

    def describe(self, local: Path, record: dict[str, Any], progress: dict[str, Any]) -> None:
        """Say beside the first rank's part what the checkpoint is."""
        if self.session.rank != 0 or self.failed is not None:
            return
        try:
            checkpoint.describe(local, self.task.experiment, record)
            (local / PROGRESS).write_text(json.dumps(progress) + "\n", encoding="utf-8")
        except OSError as error:
            self.failed = error

    def commit(self, step: int, local: Path, *, best: int | None, is_last_chance: bool) -> bool:
        """Make a checkpoint of every rank's `local`, which is removed; whether it is there now. Remove older ones.

        One that cannot be made is told of, and training goes on; StorageError for all ranks if it is the second in a
        row, the last chance, or of a disk that is full, which does not empty itself.
        """
        problem = self._committed(step, local, best)
        shutil.rmtree(local, ignore_errors=True)
        if problem is None:
            self.missed = 0
            return True
        self.missed += 1
        if self.session.rank == 0:
            with contextlib.suppress(Exception):  # what is left of it has no manifest, and is no checkpoint
                self.series.discard(step)
        if self.missed == 2 or is_last_chance or isinstance(problem, StorageFull):
            raise CollectiveError(self._cannot(step, problem))
        self.say(f"the checkpoint of step {step:,} could not be written ({problem}); training until the next one")
        return False

    def _committed(self, step: int, local: Path, best: int | None) -> Exception | None:
        """What went wrong on any rank, if anything."""
        problem, self.failed = self.failed, None
        if self.session.rank == 0 and problem is None:
            _, problem = _tried(lambda: self.series.discard(step))  # what a run that was killed may have left of it
        gathered(self.session, None)
        files: dict[str, storage.Stored] = {}
        if problem is None:
            files, problem = _tried(lambda: self.series.upload(step, local))
        found = gathered(self.session, (files, problem))
        problem = next((each for _, each in found if each is not None), None)
        if problem is None and self.session.rank == 0:
            self.task.run.flush()  # a run that goes on from here makes the points before it no more
            whole = {name: stored for uploaded, _ in found for name, stored in uploaded.items()}
            _, problem = _tried(lambda: self.series.commit(step, whole))
            if problem is None:
                keep = self.task.experiment.train.keep_checkpoints
                _, left = _tried(lambda: self.series.prune(keep, [best]))
                if left is not None:  # there are more than need be, until the next save
                    self.say(f"older checkpoints could not be removed: {left}")
        return gathered(self.session, problem)[0] or problem

    def _cannot(self, step: int, problem: Exception) -> StorageError:
        if isinstance(problem, StorageError):
            return problem
        disk = shutil.disk_usage(self.scratch)
        room = f"; {disk.free:,} bytes are free in {self.scratch}" if disk.free < disk.total / 50 else ""
        return StorageError(
            f"{self.series.path(step)} cannot be written: {type(problem).__name__}: {problem}{room}; "
            "once it can, the same command resumes from the last checkpoint",
            self.series.path(step),
        )


def _tried(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What an act on storage gives, or why it fails: every rank is to hear of it, before any of them ends."""
    try:
        return act(), None
    except Exception as error:  # storage has tried again what may be well the next time
        return {}, error
