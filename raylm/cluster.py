"""Connect to Ray, and what a run may use of it: workers, CPUs, GPUs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylm.config import ClusterConfig
from raylm.errors import ConfigError, Interrupted

WORKER_ENVIRONMENT = {
    # glibc gives big buffers back to the kernel at every step and asks for them again; keeping them is worth
    # 1.16 to 1.37 of training speed on CPUs, with identical losses.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

DRIVER_ENVIRONMENT = {
    # A report of a worker group waits for the controller's next look at it: 2 s unless told.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@dataclass(frozen=True)
class Resources:
    """What a cluster has in all, in Ray's units, and what one worker of a run takes of it."""

    cpus: float
    gpus: float
    cpus_per_worker: float
    gpus_per_worker: float
    num_workers: int
    """The fewest, where cluster.num_workers is a range."""
    most_workers: int

    @property
    def per_worker(self) -> dict[str, float]:
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": self.cpus_per_worker, **gpus}

    def without(self, nodes: Collection[str]) -> Resources:
        """What the cluster has now but for these nodes, by their ids, which are there or gone already."""
        left = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in nodes]
        cpus, gpus = (sum(each.get(kind, 0) for each in left) for kind in ("CPU", "GPU"))
        return replace(self, cpus=cpus, gpus=gpus)

    @property
    def most_runs(self) -> int:
        """Runs of `num_workers` workers that fit side by side."""
        by_cpu = self.cpus / (self.cpus_per_worker * self.num_workers)
        by_gpu = self.gpus / (self.gpus_per_worker * self.num_workers) if self.gpus_per_worker else by_cpu
        return int(min(by_cpu, by_gpu) + 1e-6)


class _Board:
    """Between a command and its workers: how far they are, what they have to say, and whether they shall stop."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.said: list[str] = []
        self.stopping = False

    def put(self, value: float) -> None:
        self.value = value

    def say(self, message: str) -> None:
        self.said.append(message)

    def look(self) -> tuple[float | None, list[str]]:
        """The value, and what was said since the last look."""
        said, self.said = self.said, []
        return self.value, said

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping


Board = ray.remote(num_cpus=0)(_Board)


@contextlib.contextmanager
def watch(show: Callable[[float], None], say: Callable[[str], None]) -> Iterator[ray.actor.ActorHandle]:
    """A Board, looked at about twice a second; its workers are told to stop once the process is (`signals`)."""
    board = Board.remote()
    over = threading.Event()

    def look() -> None:
        value, messages = ray.get(board.look.remote())
        for message in messages:
            say(message)
        if value is not None:
            show(value)

    def watching() -> None:
        told = False
        while not over.wait(0.5):
            if stopped_by() is not None and not told:
                told = True
                board.stop.remote()
            look()

    watcher = threading.Thread(target=watching, daemon=True)
    watcher.start()
    try:
        yield board
    finally:
        over.set()
        watcher.join()
        look()  # what was said last
        ray.kill(board)


_asked: list[int] = []
"""Signals by which this process was asked to stop, inside of `signals`."""


def stopped_by() -> signal.Signals | None:
    """The signal that asked this process to stop, if one did."""
    return signal.Signals(_asked[0]) if _asked else None


def interruption(directory: str, how: str) -> BaseException:
    """What a command ends with that was asked to stop."""
    told = f"{directory}: {how}; the same command goes on from there"
    return KeyboardInterrupt(told) if stopped_by() == signal.SIGINT else Interrupted(told, directory)


@contextlib.contextmanager
def signals(say: Callable[[str], None]) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C do not end the process here, but are told to whoever asks `stopped_by`.

    A second Ctrl-C is one. In other threads than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        if _asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        _asked.append(number)
        say("Stopping after a checkpoint; Ctrl-C stops at once" if number == signal.SIGINT else "Stopping")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def is_local(section: ClusterConfig) -> bool:
    """Whether Ray will be started on this machine, for this command alone."""
    return section.address == "local" or not (section.address or os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def connect(section: ClusterConfig) -> Iterator[Resources]:
    """A connection to Ray for the duration of a command; a Ray that was started for it ends with it.

    Inside, worker output stays in Ray's own log files: a run reports through its metrics.
    """
    if ray.is_initialized():  # somebody else's, left as it is
        yield resources(section, ray.cluster_resources())
        return
    local = is_local(section)
    if local:
        resources(section, _this_machine())  # refuse before anything starts
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = "local" if local else (section.address or os.environ["RAY_ADDRESS"])
    try:
        ray.init(
            address=address,
            include_dashboard=False if local else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        problem = str(error).strip().split("\n")[0]
        raise ConfigError(f"cluster.address={address}: Ray cannot be reached: {problem}", "cluster.address") from error
    try:
        yield resources(section, ray.cluster_resources())
    finally:
        ray.shutdown()


ANSWER_SECONDS = 60.0
"""How long a node may take to start a process and call a function in it."""


def other_nodes() -> dict[str, str]:
    """Id -> address of the nodes that workers may run on, but for this process's own."""
    here = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and {"CPU", "GPU"} & node["Resources"].keys()
    }


def on_nodes(nodes: Collection[str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What a function gives on each of these nodes, by their ids; the error where it cannot be called."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node in nodes
    }
    until = time.monotonic() + ANSWER_SECONDS
    found: dict[str, Any] = {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer, timeout=max(0.0, until - time.monotonic()))
        except ray.exceptions.RayError as error:
            found[node] = error
    return found


def cpus_here() -> int:
    """CPUs that this process may use."""
    return int(_this_machine()["CPU"])


def plan(section: ClusterConfig) -> Resources | None:
    """The resources of a run on this machine, without starting Ray; None for a cluster elsewhere."""
    return resources(section, _this_machine()) if is_local(section) else None


def resources(section: ClusterConfig, total: dict[str, float]) -> Resources:
    """What the cluster has and a worker takes; ConfigError if the run can never fit."""
    use_gpu = section.use_gpu if section.use_gpu is not None else total.get("GPU", 0) > 0
    found = Resources(
        cpus=total.get("CPU", 0),
        gpus=total.get("GPU", 0),
        cpus_per_worker=section.cpus_per_worker,
        gpus_per_worker=section.gpus_per_worker if use_gpu else 0,
        num_workers=section.fewest_workers,
        most_workers=section.most_workers,
    )
    whole = float(found.gpus_per_worker).is_integer()
    if found.gpus_per_worker > 1 or (found.most_workers > 1 and not whole):
        raise ConfigError(
            f"cluster.gpus_per_worker must be 1, or a fraction with cluster.num_workers=1, got "
            f"{found.gpus_per_worker:g} with {workers(found.most_workers)}: a worker trains on one GPU",
            where="cluster.gpus_per_worker",
        )
    wanted_cpus = found.num_workers * found.cpus_per_worker
    wanted_gpus = found.num_workers * found.gpus_per_worker
    if wanted_cpus > found.cpus:
        raise ConfigError(
            f"cluster.num_workers x cluster.cpus_per_worker = {found.num_workers} x {found.cpus_per_worker:g} needs "
            f"{wanted_cpus:g} CPUs, the cluster has {found.cpus:g}; lower one of them",
            where="cluster.num_workers",
        )
    if wanted_gpus > found.gpus:
        raise ConfigError(
            f"cluster.num_workers x cluster.gpus_per_worker = {found.num_workers} x {found.gpus_per_worker:g} needs "
            f"{wanted_gpus:g} GPUs, the cluster has {found.gpus:g}; lower one of them, or set cluster.use_gpu=false",
            where="cluster.num_workers",
        )
    return found


def workers(number: int) -> str:
    """1 worker, 2 workers."""
    return f"{number} worker{'s' * (number != 1)}"


def _this_machine() -> dict[str, float]:
    """What `ray.init` will find here."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
    from ray._private.utils import get_num_cpus

    return {
        "CPU": get_num_cpus(),
        "GPU": NvidiaGPUAcceleratorManager.get_current_node_num_accelerators(),
    }
