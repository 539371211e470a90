"""Training and scoring on workers of Ray Train, in a process of its own, or in this process.

A training restarts from its last checkpoint: with smaller micro-batches if memory ran out, on the remaining nodes if
one is taken away, and as it was if a worker died. Failures are counted here alone: Ray Train (2.60) takes a death
during the start of a worker group for a failure of its controller, which ends the run, or does not count it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import psutil
import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raylm import cluster, runs, scratch, training
from raylm.cluster import Resources
from raylm.config import Experiment, ModelConfig, TokenizerConfig
from raylm.errors import OutOfMemory, RaylmError, TrainingError, WorkerFailed
from raylm.perplexity import Documents
from raylm.tokens import Store
from raylm.training import Outcome, ScoreTask, TrainTask

logger = logging.getLogger(__name__)

CLEARING_SECONDS = 60.0
"""How long the workers of a failed attempt may take to end: longer than Ray takes to declare a node dead."""

WAIT_SECONDS = 6 * 3600
"""How long a rank may wait for another one, unless train.arguments.ddp_timeout is set. In torch's own 30 minutes a rank
cannot write or verify a checkpoint of 100 GB at 50 MB/s. Ray Train notices a dead rank at once."""

Result = TypeVar("Result")


def fit(task: TrainTask, resources: Resources, callbacks: Sequence[Any] = ()) -> Outcome:
    """Train until the end of the budget or a stop."""

    def attempt() -> Outcome:
        if cluster.single_worker_resources(task.experiment.cluster) and not callbacks:
            return with_smaller_batches(task, lambda: _in_process(task))
        while True:
            outcome = with_smaller_batches(task, lambda: _in_group(task, resources, callbacks))
            if not outcome.lost_nodes or stopped() is not None:
                return outcome
            # A command ends if too few resources are left, and the same command resumes. A trial, which nobody
            # restarts, waits for other nodes.
            if not callbacks and not resources.without(outcome.lost_nodes).most_runs:
                return outcome
            task.say(f"a node is being taken away; resuming without it from step {outcome.step:,}")

    def stopped() -> Outcome | None:
        """The outcome if the training was asked to stop and has a checkpoint: no worker has to start for it."""
        if task.channel is None or not task.channel.is_stopping():
            return None
        step, _ = task.checkpoints.newest()
        return Outcome({}, step, stopped=True) if step is not None else None

    return _with_retries(attempt, task.experiment.cluster.max_failures, task.say, task.directory, stopped)


def _with_retries(
    attempt: Callable[[], Result],
    max_failures: int,
    say: Callable[[str], None],
    where: str,
    stopped: Callable[[], Result | None] = lambda: None,
) -> Result:
    """The result of an attempt that is repeated if a worker fails, at most `max_failures` times.

    After a failure the result of `stopped`, if it has one, replaces another attempt.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except (WorkerFailed, _UncountedFailure) as error:
            failures += isinstance(error, WorkerFailed)
            if (outcome := stopped()) is not None:
                return outcome
            if failures > max_failures:
                tried = f"tried {failures} times" if max_failures else "tried once"
                message = f"{error} ({tried}: cluster.max_failures={max_failures})"
                raise WorkerFailed(message, getattr(error, "where", None) or where) from error
            attempts = f", attempt {failures + 1} of at most {max_failures + 1}" if failures else ""
            say(f"{error}; starting again{attempts}")


class _UncountedFailure(Exception):
    """A failure that is not counted: nodes were taken away, or are not available yet."""


def fit_in_this_process(task: TrainTask) -> Outcome:
    """Train in this process: a trial whose only worker is its own process."""
    return with_smaller_batches(task, lambda: _in_local_mode(task))


def _in_local_mode(task: TrainTask) -> Outcome:
    """Train in Ray Train's local mode."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    train = functools.partial(training.train_loop_per_worker, task)
    return TorchTrainer(train, scaling_config=ScalingConfig(num_workers=0)).fit().return_value


def _in_process(task: TrainTask) -> Outcome:
    """Train in another process of this machine."""
    with cluster.local_worker() as process:
        return process.call(_in_local_mode, task)


def with_smaller_batches(task: TrainTask, train: Callable[[], Outcome]) -> Outcome:
    """The outcome of a training, restarted with smaller micro-batches each time memory runs out."""
    while True:
        try:
            outcome = train()
            if outcome.error is None:
                return outcome
            raise outcome.error
        except OutOfMemory as error:
            if error.where != "train.micro_batch_tokens":  # they cannot be smaller
                raise
            task.say(error.message)


def _in_group(task: TrainTask, resources: Resources, callbacks: Sequence[Any]) -> Outcome:
    train = functools.partial(training.train_loop_per_worker, task)
    return _on_workers(train, task.experiment, resources, task.directory, callbacks)


def score(
    directory: str,
    documents: Documents,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None = None,
    *,
    as_given: bool = False,
) -> np.ndarray:
    """perplexity.score_documents of a saved model: in this process if there are no `resources`, else on Ray's workers.

    It is loaded with the experiment's sections model and tokenizer if `as_given`, else as a trained model: a plain
    directory with its own tokenizer.
    """
    section, tokenizer = experiment.model, experiment.tokenizer
    if not as_given:
        section = ModelConfig(trust_remote_code=section.trust_remote_code)
        tokenizer = TokenizerConfig(prefix=tokenizer.prefix)
    task = training.ScoreTask(
        directory,
        documents,
        experiment.eval,
        cpus=resources.cpus_per_worker if resources is not None else cluster.cpus_here(),
        use_gpu=experiment.cluster.use_gpu,
        keywords=experiment.objective.keywords,
        loaded=section,
        tokenizer=tokenizer,
        masked=experiment.objective.is_masked,
    )
    return _scored(task, experiment, resources, progress)


def score_untrained(
    store: Store,
    experiment: Experiment,
    resources: Resources,
    progress: Callable[[float, float | None], None] | None = None,
) -> np.ndarray:
    """perplexity.score_documents of an experiment's model before its first step, as an evaluation scores it."""
    task = training.ScoreTask(
        "",
        store.validation,
        experiment.eval,
        cpus=resources.cpus_per_worker,
        use_gpu=experiment.cluster.use_gpu,
        keywords=experiment.objective.keywords,
        loaded=experiment.model,
        tokenizer=TokenizerConfig(prefix=experiment.tokenizer.prefix),
        max_tokens=experiment.eval.max_tokens,
        untrained=(experiment, store.path),
    )
    return _scored(task, experiment, resources, progress)


def _scored(
    task: ScoreTask,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None,
) -> np.ndarray:
    """What score_loop_per_worker gives, in this process where there is no need for others."""
    if resources is None or (resources.num_workers == 1 and cluster.is_local(experiment.cluster)):
        alone = dataclasses.replace(task, cpus=cluster.cpus_here(), session=training.SingleProcess, progress=progress)
        return training.score_loop_per_worker(alone)
    score = functools.partial(training.score_loop_per_worker, task)
    return _with_retries(
        lambda: _on_workers(score, experiment, resources, task.model),
        experiment.cluster.max_failures,
        logger.info,
        task.model,
    )


def _on_workers(
    function: Callable[[], Any],
    experiment: Experiment,
    resources: Resources,
    where: str,
    callbacks: Sequence[Any] = (),
) -> Any:
    """The result of a function on rank 0 of a worker group, of which nothing is left if the function fails.

    It carries its own arguments, because train_loop_config is unpickled by Ray's controller too: 4 s of imports.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # 0.8 s, and a lone worker trains without
    from ray.train.torch import TorchConfig, TorchTrainer

    _leftover_actors()  # by a trial's process that was killed
    with _ray_state() as kept:
        trainer = TorchTrainer(
            function,
            torch_config=TorchConfig(timeout_s=experiment.train.arguments.get("ddp_timeout", WAIT_SECONDS)),
            scaling_config=ScalingConfig(
                num_workers=resources.num_workers
                if resources.num_workers == resources.most_workers
                else (resources.num_workers, resources.most_workers),
                use_gpu=bool(resources.gpus_per_worker),
                resources_per_worker=dict(resources.per_worker),
                placement_strategy=resources.placement_strategy,
            ),
            run_config=RunConfig(
                **kept,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
                callbacks=list(callbacks),
            ),
        )
        return _result(trainer, where)


@contextlib.contextmanager
def _ray_state() -> Iterator[dict[str, str]]:
    """A temporary place for Ray's own state of a worker group, from which Ray would otherwise resume.

    Not in `storage`: if that failed, Ray would end the workers.
    """
    with scratch.directory("ray") as directory:
        yield {"name": runs.new_name("attempt"), "storage_path": directory}


def _result(trainer: Any, where: str) -> Any:
    """The result of the workers' function on rank 0; raises what a worker raised, without Ray's wrapping.

    Never fits in the main thread, where Ray would handle Ctrl-C itself and end the run without a checkpoint.
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
    if not isinstance(failures[0], Exception):
        raise failures[0]  # a trial that the scheduler stops
    _wait_for_leftovers()
    raise _cause(failures[0], where) from failures[0]


def _wait_for_leftovers() -> None:
    """Wait until no process of this process's worker groups is left."""
    deadline = time.monotonic() + CLEARING_SECONDS
    while left := _leftover_actors():
        if time.monotonic() > deadline:
            raise TrainingError(
                f"{len(left)} processes of a worker group that failed do not end, as process {left[0].pid} on "
                f"{left[0].address.ip_address}; end them, or they may write to its checkpoints"
            )
        time.sleep(0.1)


def _leftover_actors() -> list[Any]:
    """The actors that are left of this process's worker groups. Also frees their placement groups.

    Ray Train (2.60) leaves both if a worker dies while it loads the function, or if the controller dies. Workers live
    on for up to 3 s and could write to the checkpoints that the next attempt reads; a placement group, also that of a
    trial's dead controller, stays until the job ends. ray.util.state needs a dashboard to list them.
    """
    from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData

    state = ray._private.state.state._connect_and_get_accessor()
    context = ray.get_runtime_context()
    here, job = bytes.fromhex(context.get_worker_id()), ray.JobID.from_hex(context.get_job_id())
    actors = [ActorTableData.FromString(each) for each in state.get_actor_table(job, None)]
    controllers = [actor for actor in actors if actor.class_name == "TrainController"]
    ours = [actor for actor in controllers if actor.owner_address.worker_id == here]
    owners = {actor.actor_id for actor in controllers if actor in ours or actor.state == ActorTableData.DEAD}
    for group in map(PlacementGroupTableData.FromString, state.get_placement_group_table()):
        if group.creator_actor_id in owners and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    processes = {actor.address.worker_id for actor in ours}
    ours += [actor for actor in actors if actor.owner_address.worker_id in processes and not actor.is_detached]
    return [actor for actor in ours if actor.state != ActorTableData.DEAD or _runs_here(actor)]


def _runs_here(actor: Any) -> bool:
    """Whether an actor's process still runs on this node: Ray calls it dead up to 2 s before it ends."""
    if actor.address.node_id.hex() != ray.get_runtime_context().get_node_id():
        return False
    try:
        process = psutil.Process(actor.pid)
        return process.name().startswith("ray::") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _cause(error: Exception, where: str) -> Exception:
    """The error of a worker. raylm's own errors, of any rank, come first, because one rank's failure ends the others.

    WorkerFailed if another attempt may succeed, _UncountedFailure if this one does not count.
    """
    failures = getattr(error, "worker_failures", None) or {None: error}
    every = [(rank, seen) for rank, failure in failures.items() for seen in _unwrapped(failure)]
    for _, seen in every:
        if isinstance(seen, RaylmError):
            return type(seen)(seen.message, seen.where)
    for rank, seen in every:
        if isinstance(seen, ray.exceptions.OutOfMemoryError):  # of 50 lines, with every process of the node
            held = re.findall(r"actual memory used=([\d.]+GB)", str(seen))
            node = re.findall(r"[\d.]+GB used / [\d.]+GB limit", str(seen))
            return WorkerFailed(
                f"{_named(rank)} was killed, because its node ran out of memory ({', '.join([*held[:1], *node])}); "
                f"{cluster.LESS_MEMORY}",
                where=where,
            )
    for rank, seen in every:
        if death := _death(rank, seen, where):
            return death
    rank, cause = next(iter(failures.items()))
    last = str(cause).strip().split("\n")[-1]
    may_pass = all(any(isinstance(seen, cluster.MAY_PASS) for seen in _unwrapped(each)) for each in failures.values())
    kind = WorkerFailed if may_pass else TrainingError
    return kind(f"{_named(rank)} failed: {type(cause).__name__}: {last}", where=where)


def _death(rank: int | None, error: BaseException, where: str) -> Exception | None:
    """The error of a dead process, if Ray's error is about one."""
    from ray.train.v2._internal import exceptions as of_train

    if isinstance(error, of_train.WorkerGroupStartupTimeoutError):
        return _UncountedFailure(f"{cluster.plural_workers(error.num_workers)} had no room within a minute")
    if isinstance(error, of_train.WorkerGroupStartupFailedError):
        return WorkerFailed(f"a worker died while its group started; {_FOR_MEMORY}", where)
    if isinstance(error, of_train.WorkerHealthCheckTimeoutError):
        return WorkerFailed(f"{_named(rank)} gave no sign of life for minutes", where)
    if not isinstance(error, _DEATHS) or getattr(error, "actor_init_failed", False):
        return None
    if getattr(error, "preempted", False):
        return _UncountedFailure(f"{_named(rank)} died with its node, which was taken away")
    details = dict(re.findall(r"^\s*(class_name|pid|ip): (\S+)$", str(error), re.MULTILINE))
    classes = {"RayTrainWorker": "a worker", "TrainController": "Ray Train's controller"}
    name = _named(rank) if rank is not None else classes.get(details.get("class_name", ""), _named(None))
    place = f" (process {details['pid']} on {details['ip']})" if {"pid", "ip"} <= details.keys() else ""
    if "node has died" in str(error):
        return WorkerFailed(f"{name}{place} died with its node", where)
    return WorkerFailed(f"{name}{place} died; {_FOR_MEMORY}", where)


_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,  # with the process that held it
)

_FOR_MEMORY = f"if memory ran out, {cluster.LESS_MEMORY}"


def _named(rank: int | None) -> str:
    return "a process of the worker group" if rank is None else f"worker {rank}"


def _unwrapped(error: BaseException) -> Iterator[BaseException]:
    """An error of Ray's and the errors wrapped in it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = (getattr(seen, name, None) for name in ("cause", "controller_failure", "health_check_failure"))
        seen = next(filter(None, inner), seen.__cause__)
