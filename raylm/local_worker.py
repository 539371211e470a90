"""A process on this machine for the only worker of a run, without Ray.

It starts before the command knows its task, and before the command itself imports PyTorch and transformers. It imports
what a training needs meanwhile; nothing of Ray, with which the first step would come 1.5 s later (benchmarks/start.py).
The process always ends with the command.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any

import cloudpickle

from raylm import console, timeline
from raylm.config import ClusterConfig, is_local
from raylm.errors import RaylmError, TrainingError, WorkerFailed

WORKER_ENVIRONMENT = {
    # glibc returns big buffers to the kernel at every step and requests them again. Keeping them makes training on
    # CPUs 1.16 to 1.37 times as fast, with identical losses.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
    # Each trial of a sweep runs in a new thread, to which glibc gives its own arena, whose memory later trials cannot
    # use: 36 trials of 8 million parameters took 4.6 GB in one process, and 0.9 GB with one arena for all.
    "MALLOC_ARENA_MAX": "1",
    # Threads of torch wait for each other several hundred times per step. By default they spin, and compete for CPUs if
    # anything else runs: two threads of a GPT-2 of 4 x 256 made 144 tokens/s on two busy cores (load 12 to 20), one
    # made 1,052, two that sleep 1,631. On an idle machine steps were no slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

TRAINER = "raylm.training.trainer"
"""Its import takes 5 s."""

MAY_PASS = (OSError, RuntimeError)
"""Exceptions of a worker that may not recur in another attempt: storage and networks fail for a while, and torch raises
RuntimeError for a failed GPU and for a lost rank."""

LESS_MEMORY = "lower train.micro_batch_tokens, eval.batch_tokens or the size of the model"

CLEARING_SECONDS = 10.0
"""How long a process may take to end after its answer."""

_started: list[LocalWorker] = []
"""The process of `start_worker_early`, which `local_worker` takes."""


class LocalWorker:
    """Another Python process on this machine, with one GPU at most, that waits for a call."""

    def __init__(self, load: str):
        self._connection, theirs = Pipe()
        self._answered = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - the output of the process
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()", str(theirs.fileno()), load],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env={
                    **os.environ,
                    **WORKER_ENVIRONMENT,
                    "CUDA_VISIBLE_DEVICES": gpu,
                    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                },
                start_new_session=True,  # Ctrl-C reaches the command, which asks for a checkpoint first
            )

    def call(self, function: Callable[[Any], Any], task: Any) -> Any:
        """Call the function with the task in the process; its progress goes to the task's channel.

        WorkerFailed if the process dies or raises one of MAY_PASS, TrainingError for any other exception that is not
        raylm's; both name a file with the output of the process.
        """
        channel, is_asked = task.channel, False
        self._directory = str(getattr(task, "directory", ""))
        self._send((function, dataclasses.replace(task, channel=None)))
        while True:
            if channel is not None and not is_asked and channel.is_stopping():
                is_asked = True
                self._send("stop")
            try:
                if not self._connection.poll(0.2):
                    continue
                kind, value = self._connection.recv()
            except (EOFError, ConnectionError):
                raise self._death() from None
            self._answered = kind in ("returned", "raised", "failed", "failed for now")
            if kind == "returned":
                return value
            if kind == "raised":
                raise value
            if kind == "failed":
                raise TrainingError(*self._described(f"failed: {value}"))
            if kind == "failed for now":
                raise WorkerFailed(*self._described(f"failed: {value}"))
            if channel is not None:
                getattr(channel, kind)(value)

    def end(self) -> None:
        """End the process, at once unless it has answered and is cleaning up."""
        try:
            self._process.wait(CLEARING_SECONDS if self._answered else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        self._log.close()

    def _send(self, what: Any) -> None:
        with contextlib.suppress(ConnectionError):  # `call` finds out how it died
            self._connection.send_bytes(cloudpickle.dumps(what))

    def _death(self) -> WorkerFailed:
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return WorkerFailed(
                f"worker 0 was killed, most likely because the machine ran out of memory; {LESS_MEMORY}"
            )
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        return WorkerFailed(*self._described(f"ended with {how}"))

    def _described(self, how: str) -> tuple[str, str]:
        """How the process ended, and the file with its output."""
        self._log.seek(0)
        directory = self._directory if os.path.isdir(self._directory) else None  # else in the temporary directory
        with tempfile.NamedTemporaryFile(prefix="raylm-worker-", suffix=".log", dir=directory, delete=False) as kept:
            kept.write(self._log.read())
        return f"worker 0 {how}; {kept.name} has its output", kept.name


class _WorkerPipe:
    """The progress channel inside of the process."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()  # checkpoints are saved in a thread
        self._stopping = threading.Event()
        self.calls: queue.Queue[bytes] = queue.Queue()

    def send(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def advance(self, value: float) -> None:
        self.send("advance", value)

    def say(self, message: str) -> None:
        self.send("say", message)

    def report(self, figures: dict[str, float]) -> None:
        self.send("report", figures)

    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def listen(self) -> None:
        """Receive the call and the request to stop; end the process with the command."""
        try:
            self.calls.put(self._connection.recv_bytes())
            self._connection.recv_bytes()
            self._stopping.set()
            self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(1)


def serve() -> None:
    """The main function of the process: executes one call."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a service manager also sends it to the command
    timeline.start("worker")
    wire = _WorkerPipe(Connection(int(sys.argv[1])))
    threading.Thread(target=wire.listen, daemon=True).start()
    with timeline.phase("import what a training needs"), console.importing():
        importlib.import_module(sys.argv[2])
        gc.freeze()  # or the collector looks twice at 800,000 objects that stay, 0.3 s each time
    try:
        function, task = pickle.loads(wire.calls.get())  # from the command, which started this process
        answer = "returned", function(dataclasses.replace(task, channel=wire))
    except RaylmError as error:
        answer = "raised", error
    except Exception as error:
        traceback.print_exc()
        last = str(error).strip().split("\n")[-1]
        answer = "failed for now" if isinstance(error, MAY_PASS) else "failed", f"{type(error).__name__}: {last}"
    wire.send(*answer)


def is_alone(section: ClusterConfig) -> bool:
    """Whether a run has one worker, on this machine."""
    return section.most_workers == 1 and is_local(section)


def start_worker_early(load: str = TRAINER) -> None:
    """Start the process of the next `local_worker`, unless it has started; it imports a module meanwhile."""
    if not _started:
        _started.append(LocalWorker(load))


@contextlib.contextmanager
def local_worker(load: str = TRAINER) -> Iterator[LocalWorker]:
    """The process that was started early, or a new one; it ends with the context."""
    found = _started.pop() if _started else LocalWorker(load)
    try:
        yield found
    finally:
        found.end()
