"""Training and scoring on workers of Ray Train, or in one process: one of its own, or this very one.

A training begins again with less at once where memory ran out, and on what is left where a node is taken away.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray

from raylm import cli, cluster, loop, runs
from raylm.cluster import Resources
from raylm.config import Experiment
from raylm.errors import OutOfMemory, RaylmError, TrainingError
from raylm.loop import Job, Outcome
from raylm.perplexity import Documents


def fit(job: Job, resources: Resources, callbacks: Sequence[Any] = ()) -> Outcome:
    """Train until the end of the budget or a stop."""
    if cluster.alone(job.experiment.cluster) and not callbacks:
        return with_less(job, lambda: _in_process(job))
    while True:
        outcome = with_less(job, lambda: _in_group(job, resources, callbacks))
        if not (outcome.lost_nodes and resources.without(outcome.lost_nodes).most_runs):
            return outcome
        cli.say(f"a node is being taken away; going on without it from step {outcome.step:,}")


def fit_here(job: Job) -> Outcome:
    """Train in this process: a trial whose only worker is its own process."""
    return with_less(job, lambda: _alone(job))


def _alone(job: Job) -> Outcome:
    """In Ray Train's local mode."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    train = functools.partial(loop.train_loop_per_worker, job)
    return TorchTrainer(train, scaling_config=ScalingConfig(num_workers=0)).fit().return_value


def _in_process(job: Job) -> Outcome:
    """In another process of this machine, and in a new one where that dies."""
    left = job.experiment.cluster.max_failures
    while True:
        try:
            with cluster.process() as process:
                return process.call(_alone, job)
        except RaylmError as error:
            if not left:
                raise type(error)(error.message, error.where or job.directory) from error
            job.say(f"{error}; beginning again from the last checkpoint, {left} more times at most")
            left -= 1


def with_less(job: Job, train: Callable[[], Outcome]) -> Outcome:
    """What becomes of a training, begun again with smaller micro-batches where memory ran out; or why it failed."""
    while True:
        try:
            outcome = train()
            if outcome.error is None:
                return outcome
            raise outcome.error
        except OutOfMemory as error:
            if error.where != "train.micro_batch_tokens":  # there is nothing less
                raise
            job.say(error.message)


def _in_group(job: Job, resources: Resources, callbacks: Sequence[Any]) -> Outcome:
    train = functools.partial(loop.train_loop_per_worker, job)
    return _on_workers(train, resources, job.directory, job.experiment.cluster.max_failures, callbacks)


def score(
    directory: str,
    documents: Documents,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None = None,
) -> np.ndarray:
    """perplexity.score_documents of a saved model: in this process without `resources` of Ray, else on its workers."""
    job = loop.Scoring(
        directory,
        documents,
        experiment.eval,
        cpus=resources.cpus_per_worker if resources is not None else cluster.cpus_here(),
        use_gpu=experiment.cluster.use_gpu,
        keywords=experiment.objective.keywords,
        trust_remote_code=experiment.model.trust_remote_code,
    )
    if resources is None or (resources.num_workers == 1 and cluster.is_local(experiment.cluster)):
        alone = dataclasses.replace(job, cpus=cluster.cpus_here(), session=loop.Alone, progress=progress)
        return loop.score_loop_per_worker(alone)
    return _on_workers(functools.partial(loop.score_loop_per_worker, job), resources, directory)


def _on_workers(
    function: Callable[[], Any], resources: Resources, where: str, max_failures: int = 0, callbacks: Sequence[Any] = ()
) -> Any:
    """What a function returns on rank 0 of a group of workers.

    It has what it needs in itself, not from train_loop_config, which Ray's controller unpickles too: 4 s of imports.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # 0.8 s, and a lone worker trains without
    from ray.train.torch import TorchTrainer

    with _bookkeeping() as kept:
        trainer = TorchTrainer(
            function,
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers
                if resources.num_workers == resources.most_workers
                else (resources.num_workers, resources.most_workers),
                use_gpu=bool(resources.gpus_per_worker),
                resources_per_worker=dict(resources.per_worker),
                placement_strategy=resources.placement_strategy,
            ),
            run_config=RunConfig(
                **kept, failure_config=FailureConfig(max_failures=max_failures), callbacks=list(callbacks)
            ),
        )
        return _result(trainer, where)


@contextlib.contextmanager
def _bookkeeping() -> Iterator[dict[str, str]]:
    """Where Ray remembers what it knows of a worker group: nowhere for long, since it would go on with it.

    Not in `storage`: the checkpoints are ours, and a storage that fails would take the workers with it.
    """
    with tempfile.TemporaryDirectory(prefix="raylm-ray-") as directory:
        yield {"name": runs.named("attempt"), "storage_path": directory}


def _result(trainer: Any, where: str) -> Any:
    """What the workers' function returned on rank 0; what a worker raised, out of Ray's wrapping.

    Never in the main thread, where Ray would take Ctrl-C for itself and end the run without a checkpoint.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit().return_value)
        except BaseException as error:
            failures.append(error)

    if threading.current_thread() is threading.main_thread():
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)  # a signal is handled between two waits
    else:
        fit()
    if not failures:
        return results[0]
    if isinstance(failures[0], Exception):
        raise _cause(failures[0], where) from failures[0]
    raise failures[0]  # a trial that the scheduler stops


def _cause(error: Exception, where: str) -> Exception:
    """What a worker raised; raylm's own errors, of any rank, before the others': ranks die of each other's death."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        for seen in _unwrapped(failure):
            if isinstance(seen, RaylmError):
                return type(seen)(seen.message, seen.where)
    for rank, failure in failures.items():
        for seen in _unwrapped(failure):
            if isinstance(seen, ray.exceptions.OutOfMemoryError):  # of 50 lines, with every process of the node
                held = re.findall(r"actual memory used=([\d.]+GB)", str(seen))
                node = re.findall(r"[\d.]+GB used / [\d.]+GB limit", str(seen))
                return TrainingError(
                    f"worker {rank} was killed, for its node ran out of memory ({', '.join([*held[:1], *node])}); "
                    f"{cluster.LESS_MEMORY}",
                    where=where,
                )
    rank, cause = next(iter(failures.items()))
    last = str(cause).strip().split("\n")[-1]
    return TrainingError(f"worker {rank} failed: {type(cause).__name__}: {last}", where=where)


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """An error of Ray's, and those that are wrapped in it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = (
            getattr(seen, name, None) for name in ("cause", "base_exc", "controller_failure", "health_check_failure")
        )
        seen = next(filter(None, inner), seen.__cause__)
