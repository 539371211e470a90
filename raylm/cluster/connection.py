"""A connection to Ray, on this machine or to a cluster, and the cluster's nodes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Any

import ray
import ray._private.utils as ray_utils
from ray._common.utils import get_default_system_temp_dir
from ray._private import ray_constants
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylm import console, scratch, timeline
from raylm.cluster import output
from raylm.cluster.address import has_token, reachable_address
from raylm.cluster.capacity import Resources, amount_of, capacity, cpus_here, planned_resources, resources
from raylm.config import Address, ClusterConfig, address_of
from raylm.errors import ConfigError, RaylmError, StorageFull, TrainingError
from raylm.local_worker import WORKER_ENVIRONMENT
from raylm.redaction import redacted

logger = logging.getLogger(__name__)

DRIVER_ENVIRONMENT = {
    # A report of a worker group waits for the controller's next poll: 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Ray starts a process for each CPU before it knows what for.
    "RAY_prestart_worker_first_driver": "0",
}

_starting: list[Future] = []
"""The start of Ray by `start_ray_early`, which `connect` waits for."""


def check_reachable(section: ClusterConfig) -> None:
    """ConfigError if `connect` would not reach the cluster. Loads and starts nothing."""
    elsewhere = address_of(section)
    if elsewhere is not None and not ray.is_initialized():
        with output.to_file():
            reachable_address(elsewhere)


@contextlib.contextmanager
def connect(section: ClusterConfig, *, trials: int = 1, decided: float | None = None) -> Iterator[Resources]:
    """A connection to Ray for the duration of a command. Ray is shut down afterwards if it was started for it.

    Ray's own messages go to a file, which an error names, and the output of workers to Ray's log files. `trials` and
    `decided` are those of `capacity.resources`.
    """
    if not _starting and ray.is_initialized():  # by the user: left as it is
        yield _resources(section, trials, decided)
        return
    elsewhere = address_of(section)
    if elsewhere is None:
        planned_resources(section)  # refuse before anything starts
    with output.to_file() as log:
        _connect(elsewhere, log)
        try:
            with _warning_without_worker():
                yield _resources(section, trials, decided)
        except Exception as error:
            if type(error) is TrainingError:
                raise TrainingError(error.message + log.named(), error.where) from error
            if not isinstance(error, RaylmError) and (named := log.named()):
                logger.info(named.removeprefix("; "))
            raise
        finally:
            if timeline.is_recorded():
                with contextlib.suppress(Exception):  # Ray may be what failed
                    timeline.add(ray.timeline())
            # Ray ends the process (exit 1, "the core worker has already been shutdown") if a thread, such as the one
            # that imports MLflow, frees objects of Ray Data while Ray shuts down.
            gc.collect()
            ray.shutdown()


def _connect(elsewhere: Address | None, log: output.RayLog) -> None:
    """Connect to a cluster, or start Ray on this machine unless `start_ray_early` has."""
    starting = _starting.pop() if _starting else None
    what = "Starting Ray" if elsewhere is None else f"Connecting to Ray at {elsewhere.value}"
    try:
        with console.waiting(what) if starting is None or not starting.done() else contextlib.nullcontext():
            if starting is not None:
                starting.result()
            else:  # by HOST:PORT: with `auto`, Ray requires a token if it finds one
                _start("local" if elsewhere is None else reachable_address(elsewhere))
        if threading.current_thread() is threading.main_thread():
            # Again, because Ray's core has installed its own handler, which aborts the process 3 s after the signal.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    except RaylmError:
        raise
    except Exception as error:  # Ray has no class for these errors
        named = elsewhere or Address("local", "cluster.address")
        what = "Ray cannot be reached" if elsewhere else "Ray does not start on this machine"
        raise ConfigError(f"{named}: {what}: {_problem(error)}{log.named()}", named.setting) from error


def _problem(error: Exception) -> str:
    """The first line of Ray's message; all lines if the first only announces the others."""
    lines = [line.strip() for line in str(error).strip().split("\n")]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def start_ray_early() -> None:
    """Start Ray on this machine in the background, for a later `connect`.

    Ray ends with this process if nothing connects.
    """
    starting: Future[None] = Future()

    def start() -> None:
        try:
            with timeline.phase("Starting Ray"):
                _start("local")
            starting.set_result(None)
        except Exception as error:
            starting.set_exception(error)
        threading.Event().wait()  # Ray's processes end with the thread that started them

    if not ray.is_initialized():
        output.start()
        _starting.append(starting)
        threading.Thread(target=start, daemon=True).start()


def _start(address: str) -> None:
    """Call ray.init. The process handles SIGTERM as before."""
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == "local":
        # In a command that was started by `uv run`, Ray would pack the working directory and start each worker by
        # `uv run`, in an environment without Ray. Ray reads the variable of this name once, when it is imported.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
        if not has_token():  # else Ray writes one to ~/.ray, readable by all, and fails if it cannot
            os.environ["RAY_AUTH_TOKEN"] = generate_new_authentication_token()
        if shutil.which("bash") is None:  # Ray would start every worker with it and wait forever
            os.environ["PATH"] = os.pathsep.join(filter(None, [os.environ.get("PATH"), os.defpath]))
        _check_session_directory(get_default_system_temp_dir())
    # Ray stores the command line in the cluster and in its logs, as UTF-8: it may contain a password, and file names of
    # any bytes.
    entrypoint = redacted(ray_utils.get_entrypoint_name().encode("utf-8", "backslashreplace").decode())
    ray_utils.get_entrypoint_name = lambda: entrypoint
    ray_utils.set_sigterm_handler = lambda handler: None  # Ray's (2.60) ends the process with exit code 15
    with _of_this_machine() if address == "local" else contextlib.nullcontext():
        ray.init(
            address=address,
            num_cpus=cpus_here() if address == "local" else None,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": WORKER_ENVIRONMENT} if address != "local" else None,
        )
    if address == "local":
        scratch.hold_session(ray._private.worker._global_node.get_session_dir_path())


SESSION_BYTES = 10_000_000
"""Room that Ray needs for its session: sockets and logs, 0.4 MB in a training and 8 MB in a long sweep (measured)."""

SOCKET = "/ray/session_2026-11-30_05-29-18_948061_4194304/sockets/plasma_store"
"""Ray's socket with the longest name, in its temporary directory."""

MOST_OF_A_SOCKET = 107
"""Bytes of a socket's path that Linux takes."""


def _check_session_directory(directory: str) -> None:
    """ConfigError or StorageFull if Ray cannot have its session in this directory.

    Without room its processes would not start, and it would wait for them.
    """
    most = MOST_OF_A_SOCKET - len(SOCKET)
    length = len(os.fsencode(os.path.abspath(directory)))
    if length > most:  # as temporary directories of jobs often are
        variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ConfigError(
            f"{variable}={directory} must be at most {most} bytes long, got {length}: Ray has sockets there, whose "
            "paths are limited; set RAY_TMPDIR to a shorter directory",
            variable,
        )
    with contextlib.suppress(OSError):  # Ray makes the directory
        free = shutil.disk_usage(directory).free
        if free < SESSION_BYTES:
            raise StorageFull(
                f"{directory} has {free:,} bytes free and Ray needs {SESSION_BYTES:,} there; make room, or set "
                "RAY_TMPDIR to another directory",
                directory,
            )


@contextlib.contextmanager
def _of_this_machine() -> Iterator[None]:
    """Ray started inside is for this command alone, and up in 4 s instead of 7.

    It listens on the loopback address, as it always does on macOS and Windows; on Linux it replaces 127.0.0.1 by an
    address that other machines reach, and some of its ports need no token. Its processes inherit the environment of
    workers: with a runtime environment Ray imports itself twice for each process, and the first task takes 2 s more.
    The node's agent has none of the modules that report to a dashboard, and for which Ray waits.
    """
    changed = {
        (ray_constants, "ENABLE_RAY_CLUSTER"): False,
        (ray_utils, "get_dashboard_dependency_error"): lambda: ImportError("a command has no dashboard"),
    }
    before = {(module, name): getattr(module, name) for module, name in changed}
    environment = {name: os.environ.get(name) for name in WORKER_ENVIRONMENT}
    for (module, name), value in changed.items():
        setattr(module, name, value)
    os.environ.update(WORKER_ENVIRONMENT)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
        for name, value in environment.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _resources(section: ClusterConfig, trials: int, decided: float | None) -> Resources:
    """The resources of a run on the connected cluster. Logs what the run has to wait for."""
    found = resources(section, *capacity(section), trials=trials, decided=decided)
    now, free = ray.cluster_resources(), ray.available_resources()
    for kind, wanted in found.needed.items():
        if wanted > now.get(kind, 0):
            logger.info(
                f"{amount_of(wanted, kind)} are needed and the cluster has {now.get(kind, 0):g}: waiting for nodes"
            )
        elif wanted > free.get(kind, 0):
            others = f"the cluster has {now[kind]:g}, {free.get(kind, 0):g} of them free"
            logger.info(f"{amount_of(wanted, kind)} are needed and {others}: waiting for other jobs to finish")
    return found


WORKER_SECONDS = 60.0
"""How long Ray's first worker process may take before a warning: 1 to 3 s are usual."""


@contextlib.contextmanager
def _warning_without_worker() -> Iterator[None]:
    """Warn if Ray has started no worker process after a minute, because all work would wait for one.

    The process that is started for this check also does the first work.
    """
    first = ray.remote(num_cpus=0, max_retries=0)(lambda: None).remote().future()

    def warn() -> None:
        if not first.done():
            logs = ray._private.worker._global_node.get_logs_dir_path()
            logger.warning(
                f"Ray has started no worker in {WORKER_SECONDS:g} s, and this waits for one; Ray's logs: {logs}"
            )

    timer = threading.Timer(WORKER_SECONDS, warn)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


ANSWER_SECONDS = 60.0
"""How long a node may take to start a process and call a function in it."""


def other_nodes() -> dict[str, str]:
    """Id -> address of the other nodes that workers may run on."""
    here = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != here and {"CPU", "GPU"} & node["Resources"].keys()
    }


def on_a_worker(resources: Resources, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process that has the resources of a worker."""
    return ray.get(ray.remote(function).options(**resources.options).remote(*arguments))


def on_nodes(nodes: Collection[str], function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """Id -> result of a function on each of these nodes, or the error of the call."""
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(*arguments)
        for node in nodes
    }
    deadline = time.monotonic() + ANSWER_SECONDS
    found: dict[str, Any] = {}
    for node, answer in asked.items():
        try:
            found[node] = ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            found[node] = error
    return found
