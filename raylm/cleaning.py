"""What is left behind and nobody needs: checkpoints of trials that lost, unused token stores, leftovers of commands.

Nothing of a run is removed that has not finished: it may be running, or resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raylm import scratch, storage, tokens
from raylm.errors import StorageError
from raylm.results import runs
from raylm.runs import result_of


@dataclass(frozen=True)
class Leftover:
    """A directory that can be removed."""

    path: str
    what: str
    num_bytes: int


def lost_checkpoints(sweep: str) -> list[Leftover]:
    """The checkpoints of the trials of a finished sweep but its best one; none of a sweep that has not finished.

    Without them these trials can neither be exported nor scored again; their curves, scores and settings stay.
    """
    result = result_of(sweep)
    best = result.get("best", {}).get("trial_id")
    if best is None:
        return []
    trials = [name for name in storage.names(sweep) if name.startswith("trial_") and name != best]
    places = [f"{sweep}/{trial}/{of}" for trial in trials for of in ("checkpoints", "cooldowns")]
    return [_leftover(place, "checkpoints of a trial that lost") for place in places if storage.names(place)]


def unused_stores(place: str) -> list[Leftover]:
    """The token stores of a storage that none of its runs was trained on.

    StorageError while a run has not finished: it may read stores that only its command knows, of evaluation sets.
    """
    listed = runs.listed(place)
    unfinished = [run for run in listed if run.state in ("running", "interrupted")]
    if unfinished:
        raise StorageError(
            f"{unfinished[0].directory} is {unfinished[0].state}, and may need any token store; finish it, or give "
            "it up with --resume never, before stores are removed",
            unfinished[0].directory,
        )
    used = {json.loads(storage.read(f"{run.directory}/run.json") or b"{}").get("tokens") for run in listed}
    stores = [f"{place.rstrip('/')}/tokens/{name}" for name in storage.names(f"{place.rstrip('/')}/tokens")]
    return [
        _leftover(store, "token store that no run was trained on")
        for store in stores
        if store.rpartition("/")[2] not in used and tokens.damage(store) is not None  # else it is being written
    ]


def leftovers(place: str, *, stores: bool = False) -> list[Leftover]:
    """What can be removed of the runs in a place, and of commands on this machine that were killed."""

    def found() -> Iterator[Leftover]:
        for run in runs.listed(place):
            if run.kind == "tune" and run.state == "finished":
                yield from lost_checkpoints(run.directory)
        if stores:
            yield from unused_stores(place)
        for path in scratch.abandoned():
            yield _leftover(path, "of a command that was killed or has ended")

    return list(found())


def remove(found: Sequence[Leftover]) -> int:
    """Remove them; bytes that are free again, without those of files that a token store left behind shares."""
    free = 0
    for leftover in found:
        free += leftover.num_bytes - _shared_bytes(leftover.path)
        storage.remove(leftover.path)
    return free


def _shared_bytes(path: str) -> int:
    """Bytes of the files below a local directory that are also elsewhere, as hard links."""
    if storage.is_remote(path):
        return 0
    files = (os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
    found = [os.lstat(file) for file in files if os.path.lexists(file)]
    return sum(status.st_size for status in found if status.st_nlink > 1)


def _leftover(path: str, what: str) -> Leftover:
    return Leftover(path, what, runs.num_bytes(path))
