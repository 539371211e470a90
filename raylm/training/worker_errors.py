"""The errors of a worker group, from those of Ray Train.

They tell a failure after which another attempt may succeed from an error that would recur. Ray is imported once there
is an error: `launch` imports this module also for a worker that does without Ray.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from raylm import console
from raylm.errors import RaylmError, TrainingError, WorkerFailed
from raylm.local_worker import LESS_MEMORY, MAY_PASS


class UncountedFailure(Exception):
    """A failure that is not counted: nodes were taken away, or are not available yet."""


def cause(error: Exception, where: str) -> Exception:
    """The error of a worker. raylm's own errors, of any rank, come first, because one rank's failure ends the others.

    WorkerFailed if another attempt may succeed, UncountedFailure if this one does not count.
    """
    from ray.exceptions import OutOfMemoryError

    failures = getattr(error, "worker_failures", None) or {None: error}
    every = [(rank, seen) for rank, failure in failures.items() for seen in _unwrapped(failure)]
    for _, seen in every:
        if isinstance(seen, RaylmError):
            return type(seen)(seen.message, seen.where)
    for rank, seen in every:
        if isinstance(seen, OutOfMemoryError):  # of 50 lines, with every process of the node
            held = re.findall(r"actual memory used=([\d.]+GB)", str(seen))
            node = re.findall(r"[\d.]+GB used / [\d.]+GB limit", str(seen))
            return WorkerFailed(
                f"{_named(rank)} was killed, because its node ran out of memory ({', '.join([*held[:1], *node])}); "
                f"{LESS_MEMORY}",
                where=where,
            )
    for rank, seen in every:
        if death := _death(rank, seen, where):
            return death
    rank, cause = next(iter(failures.items()))
    last = str(cause).strip().split("\n")[-1]
    may_pass = all(any(isinstance(seen, MAY_PASS) for seen in _unwrapped(each)) for each in failures.values())
    kind = WorkerFailed if may_pass else TrainingError
    return kind(f"{_named(rank)} failed: {type(cause).__name__}: {last}", where=where)


def _death(rank: int | None, error: BaseException, where: str) -> Exception | None:
    """The error of a dead process, if Ray's error is about one."""
    from ray import exceptions as of_ray
    from ray.train.v2._internal import exceptions as of_train

    if isinstance(error, of_train.WorkerGroupStartupTimeoutError):
        return UncountedFailure(f"{console.counted(error.num_workers, 'worker')} had no room within a minute")
    if isinstance(error, of_ray.ActorUnschedulableError):  # the node that this process is on, just gone
        return UncountedFailure("a node was taken away while the worker group started")
    if isinstance(error, of_train.WorkerGroupStartupFailedError):
        return WorkerFailed(f"a worker died while its group started; {_FOR_MEMORY}", where)
    if isinstance(error, of_train.WorkerHealthCheckTimeoutError):
        return WorkerFailed(f"{_named(rank)} gave no sign of life for minutes", where)
    # A lost object was lost with the process that held it.
    deaths = (of_ray.RayActorError, of_ray.WorkerCrashedError, of_ray.NodeDiedError, of_ray.ObjectLostError)
    if not isinstance(error, deaths) or getattr(error, "actor_init_failed", False):
        return None
    if getattr(error, "preempted", False):
        return UncountedFailure(f"{_named(rank)} died with its node, which was taken away")
    details = dict(re.findall(r"^\s*(class_name|pid|ip): (\S+)$", str(error), re.MULTILINE))
    classes = {"RayTrainWorker": "a worker", "TrainController": "Ray Train's controller"}
    name = _named(rank) if rank is not None else classes.get(details.get("class_name", ""), _named(None))
    place = f" (process {details['pid']} on {details['ip']})" if {"pid", "ip"} <= details.keys() else ""
    if "node has died" in str(error):
        return WorkerFailed(f"{name}{place} died with its node", where)
    return WorkerFailed(f"{name}{place} died; {_FOR_MEMORY}", where)


_FOR_MEMORY = f"if memory ran out, {LESS_MEMORY}"


def _named(rank: int | None) -> str:
    return "a process of the worker group" if rank is None else f"worker {rank}"


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """An error of Ray's and the errors wrapped in it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = (getattr(seen, name, None) for name in ("cause", "controller_failure", "health_check_failure"))
        seen = next(filter(None, inner), seen.__cause__)
