"""A connection to Ray: on this machine alone, or to a cluster; and its nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylm import cli
from raylm.cluster.capacity import Resources, amount_of, capacity, resources, this_machine
from raylm.cluster.process import WORKER_ENVIRONMENT
from raylm.config import ClusterConfig
from raylm.errors import ConfigError

DRIVER_ENVIRONMENT = {
    # A report of a worker group waits for the controller's next look at it: 2 s unless told.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray begins a process for each CPU before it knows the environment they shall have, and has no use for them then.
    "RAY_prestart_worker_first_driver": "0",
}

_begun: list[Future] = []
"""What `ahead` has begun and `connect` has not waited for yet."""


def is_local(section: ClusterConfig) -> bool:
    """Whether Ray will be started on this machine, for this command alone."""
    return section.address == "local" or not (section.address or os.environ.get("RAY_ADDRESS"))


def plan(section: ClusterConfig) -> Resources | None:
    """The resources of a run on this machine, without starting Ray; None for a cluster elsewhere."""
    return resources(section, this_machine()) if is_local(section) else None


def alone(section: ClusterConfig) -> Resources | None:
    """The resources of a run's one worker on this machine, which needs no Ray; None of any other run."""
    found = plan(section)
    return found if found is not None and found.most_workers == 1 else None


@contextlib.contextmanager
def connect(section: ClusterConfig) -> Iterator[Resources]:
    """A connection to Ray for the duration of a command; a Ray that was started for it ends with it.

    Inside, worker output stays in Ray's own log files: a run reports through its metrics.
    """
    if not _begun and ray.is_initialized():  # somebody else's, left as it is
        yield _resources(section)
        return
    local = is_local(section)
    if local:
        resources(section, this_machine())  # refuse before anything starts
    address = "local" if local else (section.address or os.environ["RAY_ADDRESS"])
    try:
        begun = _begun.pop() if _begun else None
        what = "Starting Ray" if local else f"Connecting to Ray at {address}"
        with cli.waiting(what) if begun is None or not begun.done() else contextlib.nullcontext():
            begun.result() if begun is not None else _start(address)
    except Exception as error:  # Ray's have no class of their own
        problem = str(error).strip().split("\n")[0]
        what = "Ray does not start on this machine" if local else "Ray cannot be reached"
        raise ConfigError(f"cluster.address={address}: {what}: {problem}", "cluster.address") from error
    try:
        yield _resources(section)
    finally:
        ray.shutdown()


def ahead() -> None:
    """Start the Ray of this machine that `connect` will ask for, while this process does something else.

    If nobody ever connects, Ray ends with this process.
    """
    begun: Future[None] = Future()

    def start() -> None:
        try:
            _start("local")
            begun.set_result(None)
        except Exception as error:
            begun.set_exception(error)
        threading.Event().wait()  # Ray's processes end with the thread that has started them

    if not ray.is_initialized():
        _begun.append(begun)
        threading.Thread(target=start, daemon=True).start()


def _start(address: str) -> None:
    """ray.init, after which the process handles SIGTERM as before: Ray (2.60) puts a handler in place that ends it."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address=address,
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _resources(section: ClusterConfig) -> Resources:
    """Those of the cluster that is connected; nodes that will have to be added to it are told of."""
    found = resources(section, capacity(section))
    now = ray.cluster_resources()
    missing = {kind: wanted for kind, wanted in found.needed.items() if wanted > now.get(kind, 0)}
    for kind, wanted in missing.items():
        cli.say(f"{amount_of(wanted, kind)} are needed and the cluster has {now.get(kind, 0):g}: waiting for nodes")
    return found


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
