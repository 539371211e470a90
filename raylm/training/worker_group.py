"""A worker group of Ray Train: a function on its workers, of which nothing is left if it fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import ray
from ray.core.generated.gcs_pb2 import ActorTableData, PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raylm import runs, scratch
from raylm.cluster import Resources
from raylm.config import Experiment
from raylm.errors import TrainingError
from raylm.training.worker_errors import cause

CLEARING_SECONDS = 300.0
"""How long the workers of a failed attempt may take to end: longer than Ray takes to declare a node dead. One
that imports PyTorch hears of its end only afterwards; with ten processes for each CPU that took more than a minute."""

WAIT_SECONDS = 6 * 3600
"""How long a rank may wait for another one, unless train.arguments.ddp_timeout is set. In torch's own 30 minutes a rank
cannot write or verify a checkpoint of 100 GB at 50 MB/s. Ray Train notices a dead rank at once."""


def run(
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
    from ray.train.torch import TorchTrainer

    from raylm.cluster.process_group import ProcessGroupConfig

    _free_leftover_resources()  # of a trial's process that was killed
    with _ray_state() as kept:
        trainer = TorchTrainer(
            function,
            torch_config=ProcessGroupConfig(experiment.train.arguments.get("ddp_timeout", WAIT_SECONDS)),
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
    raise cause(failures[0], where) from failures[0]


def _wait_for_leftovers() -> None:
    """Wait until no process of this process's worker groups is left, and free what they reserved."""
    deadline = time.monotonic() + CLEARING_SECONDS
    while left := _leftover_actors():
        _free_leftover_resources()
        if time.monotonic() > deadline:
            raise TrainingError(
                f"{len(left)} processes of a worker group that failed do not end, as process {left[0].pid} on "
                f"{left[0].address.ip_address}; end them, or they may write to its checkpoints"
            )
        time.sleep(0.1)
    _free_leftover_resources()


def _leftover_actors() -> list[Any]:
    """The actors that are left of this process's worker groups.

    Ray Train (2.60) leaves them if a worker dies while it loads the function, or if the controller dies. They live on
    for up to 3 s and could write to the checkpoints that the next attempt reads.
    """
    actors = _actors()
    ours = [actor for actor in _controllers(actors) if _is_ours(actor)]
    processes = {actor.address.worker_id for actor in ours}
    ours += [actor for actor in actors if actor.owner_address.worker_id in processes and not actor.is_detached]
    return [actor for actor in ours if actor.state != ActorTableData.DEAD or _runs_here(actor)]


def _free_leftover_resources() -> None:
    """Free the placement groups of this process's worker groups, and of all whose controller is dead.

    Ray Train (2.60) leaves them if a worker dies while it loads the function, or with the process of a trial; they
    stay until the job ends.
    """
    controllers = _controllers(_actors())
    owners = {actor.actor_id for actor in controllers if _is_ours(actor) or actor.state == ActorTableData.DEAD}
    for group in map(PlacementGroupTableData.FromString, _accessor().get_placement_group_table()):
        if group.creator_actor_id in owners and group.state != PlacementGroupTableData.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))


def _accessor() -> Any:
    """Ray's tables of actors and placement groups: ray.util.state needs a dashboard to list them."""
    return ray._private.state.state._connect_and_get_accessor()


def _actors() -> list[Any]:
    """The actors of this job."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return [ActorTableData.FromString(each) for each in _accessor().get_actor_table(job, None)]


def _controllers(actors: list[Any]) -> list[Any]:
    return [actor for actor in actors if actor.class_name == "TrainController"]


def _is_ours(controller: Any) -> bool:
    """Whether this process started the worker group of a controller."""
    return bool(controller.owner_address.worker_id == bytes.fromhex(ray.get_runtime_context().get_worker_id()))


def _runs_here(actor: Any) -> bool:
    """Whether an actor's process still runs on this node: Ray calls it dead up to 2 s before it ends."""
    if actor.address.node_id.hex() != ray.get_runtime_context().get_node_id():
        return False
    try:
        process = psutil.Process(actor.pid)
        return process.name().startswith("ray::") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
