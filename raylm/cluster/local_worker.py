"""A process of this machine for the one worker of a run, which needs no Ray.

It is begun before the command knows what there is to do, and imports meanwhile what a training needs: the first step
comes 10 to 12 s after the command, where it took 14 to 17 s as a task of a Ray that was begun as early
(benchmarks/start.py). It ends with the command, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from ray import cloudpickle

from raylm import console
from raylm.errors import RaylmError, TrainingError, WorkerFailed

WORKER_ENVIRONMENT = {
    # glibc gives big buffers back to the kernel at every step and asks for them again; keeping them is worth
    # 1.16 to 1.37 of training speed on CPUs, with identical losses.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
    # Each trial of a sweep runs in a new thread, which glibc gives an arena of its own, and what is kept there is of no
    # use to the next: 36 trials of 8 million parameters took 4.6 GB in one process, and 0.9 GB with one arena for all.
    "MALLOC_ARENA_MAX": "1",
    # Threads of torch wait for each other several hundred times a step. By default they spin meanwhile, and take their
    # CPUs from each other wherever something else runs: two threads of a GPT-2 of 4 x 256 made 144 tokens/s on two busy
    # cores (load 12 to 20), one made 1,052, two that sleep 1,631; steps that nothing disturbed were no slower.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}

TRAINER = "raylm.training.trainer"
"""What a training spends 5 s on to import."""

MAY_PASS = (OSError, RuntimeError)
"""What a worker may raise that the next attempt need not meet: storage and networks have their moments, and torch has a
RuntimeError for a GPU that fails and for a rank that has gone."""

LESS_MEMORY = "lower train.micro_batch_tokens, eval.batch_tokens or the size of the model"

CLEARING_SECONDS = 10.0
"""How long a process may take to end once it has given its answer."""

_begun: list[LocalWorker] = []
"""What `start_worker_early` has begun and nobody has asked for yet."""


class LocalWorker:
    """Another Python of this machine, with one GPU at most, that waits for something to do."""

    def __init__(self, load: str):
        self._connection, theirs = Pipe()
        self._answered = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - what the process says
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
                start_new_session=True,  # Ctrl-C is for the command, which asks for a checkpoint first
            )

    def call(self, function: Callable[[Any], Any], task: Any) -> Any:
        """What the function gives for the task there, whose channel is in touch with the task's own here.

        WorkerFailed if the process dies or raises what may pass, TrainingError for any other exception that is none of
        raylm's: it names the file with whatever the process has said.
        """
        channel, told = task.channel, False
        self._send((function, dataclasses.replace(task, channel=None)))
        while True:
            if channel is not None and not told and channel.is_stopping():
                told = True
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
                raise TrainingError(*self._told(f"failed: {value}"))
            if kind == "failed for now":
                raise WorkerFailed(*self._told(f"failed: {value}"))
            if channel is not None:
                getattr(channel, kind)(value)

    def end(self) -> None:
        """End it, at once unless it has given its answer and clears up."""
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
        return WorkerFailed(*self._told(f"ended with {how}"))

    def _told(self, how: str) -> tuple[str, str]:
        """How the process ended, and the file with all that it said."""
        self._log.seek(0)
        with tempfile.NamedTemporaryFile(prefix="raylm-worker-", suffix=".log", delete=False) as kept:
            kept.write(self._log.read())
        return f"worker 0 {how}; {kept.name} has all that it said", kept.name


class _WorkerPipe:
    """The channel of a worker in a process of its own."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()  # checkpoints are saved in a thread
        self._stopping = threading.Event()
        self.given: queue.Queue[bytes] = queue.Queue()
        """What there is to do."""

    def tell(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def advance(self, value: float) -> None:
        self.tell("advance", value)

    def say(self, message: str) -> None:
        self.tell("say", message)

    def is_stopping(self) -> bool:
        return self._stopping.is_set()

    def listen(self) -> None:
        """Hear what there is to do, and that it shall stop; end where nobody is left to do it for."""
        try:
            self.given.put(self._connection.recv_bytes())
            self._connection.recv_bytes()
            self._stopping.set()
            self._connection.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(1)


def serve() -> None:
    """What a LocalWorker executes: one call."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as that of a service manager, for the command too
    wire = _WorkerPipe(Connection(int(sys.argv[1])))
    threading.Thread(target=wire.listen, daemon=True).start()
    with console.importing():
        importlib.import_module(sys.argv[2])
    try:
        function, task = pickle.loads(wire.given.get())  # of the command, which has begun this process
        answer = "returned", function(dataclasses.replace(task, channel=wire))
    except RaylmError as error:
        answer = "raised", error
    except Exception as error:
        traceback.print_exc()
        last = str(error).strip().split("\n")[-1]
        answer = "failed for now" if isinstance(error, MAY_PASS) else "failed", f"{type(error).__name__}: {last}"
    wire.tell(*answer)


def start_worker_early(load: str = TRAINER) -> None:
    """Begin the process that the next `local_worker` will be, which imports a module meanwhile."""
    _begun.append(LocalWorker(load))


@contextlib.contextmanager
def local_worker(load: str = TRAINER) -> Iterator[LocalWorker]:
    """The process that was begun, or a new one; it ends at the end."""
    found = _begun.pop() if _begun else LocalWorker(load)
    try:
        yield found
    finally:
        found.end()
