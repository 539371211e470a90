"""The communication of a command with its workers: progress, messages and the request to stop."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from raylm.errors import Interrupted


class ProgressChannel:
    """The progress of the workers, their messages, and whether they have to stop."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.said: list[str] = []
        self.reported: list[dict[str, float]] = []
        self.stopping = False

    def advance(self, value: float) -> None:
        self.value = value

    def say(self, message: str) -> None:
        self.said.append(message)

    def report(self, figures: dict[str, float]) -> None:
        self.reported.append(figures)

    def read(self) -> tuple[float | None, list[str], list[dict[str, float]]]:
        """The progress, and the messages and figures after the last read."""
        said, self.said = self.said, []
        reported, self.reported = self.reported, []
        return self.value, said, reported

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping


ANSWER_SECONDS = 10.0
"""How long a shared channel may take to answer: longer than its process takes to restart."""


class SharedProgressChannel:
    """A ProgressChannel for workers on all nodes: a Ray actor on the node of the command.

    Its process may be killed, for example by Ray's memory monitor, and is then restarted with an empty state. A
    training continues without its answers.
    """

    def __init__(self) -> None:
        import ray  # 0.5 s, which a ProgressChannel does without
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()  # else it would be lost with another node
        same_node = NodeAffinitySchedulingStrategy(here, soft=False)
        self.actor = (
            ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressChannel)
            .options(scheduling_strategy=same_node)
            .remote()
        )

    def advance(self, value: float) -> None:
        self.actor.advance.remote(value)

    def say(self, message: str) -> None:
        self.actor.say.remote(message)

    def report(self, figures: dict[str, float]) -> None:
        self.actor.report.remote(figures)

    def read(self) -> tuple[float | None, list[str], list[dict[str, float]]]:
        return self._answer(self.actor.read, (None, [], []))

    def stop(self) -> None:
        self.actor.stop.remote()

    def is_stopping(self) -> bool:
        return self._answer(self.actor.is_stopping, False)

    def end(self) -> None:
        """End its process."""
        import ray

        ray.kill(self.actor)

    def _answer(self, method: Any, otherwise: Any) -> Any:
        import ray

        try:
            return ray.get(method.remote(), timeout=ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return otherwise


@contextlib.contextmanager
def progress_channel(
    show: Callable[[float], None],
    say: Callable[[str], None],
    report: Callable[[dict[str, float]], None] = lambda _: None,
    stops: Callable[[], bool] = lambda: False,
) -> Iterator[ProgressChannel | SharedProgressChannel]:
    """A channel, shared if Ray is connected, and read about twice a second.

    The newest progress is shown, and messages and figures are passed on. Once this process is asked to stop
    (`handle_signals`) or `stops()` is true, the workers are asked to stop.
    """
    ray = sys.modules.get("ray")  # nothing is connected if it has not been imported
    channel = SharedProgressChannel() if ray is not None and ray.is_initialized() else ProgressChannel()
    ended = threading.Event()

    def forward() -> None:
        value, messages, reported = channel.read()
        for message in messages:
            say(message)
        for figures in reported:
            report(figures)
        if value is not None:
            show(value)

    def watch() -> None:
        while not ended.wait(0.5):
            if stop_signal() is not None or stops():
                channel.stop()  # each time: it may have been restarted
            forward()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield channel
    finally:
        ended.set()
        watcher.join()
        forward()  # the last messages
        if isinstance(channel, SharedProgressChannel):
            channel.end()


_asked: list[int] = []
"""Signals that asked this process to stop, inside `handle_signals`."""


def stop_signal() -> signal.Signals | None:
    """The signal that asked this process to stop, if one did."""
    return signal.Signals(_asked[0]) if _asked else None


def interruption(directory: str, how: str) -> BaseException:
    """The exception that ends a command that was asked to stop."""
    message = f"{directory}: {how}; the same command resumes"
    return KeyboardInterrupt(message) if stop_signal() == signal.SIGINT else Interrupted(message, directory)


@contextlib.contextmanager
def handle_signals(say: Callable[[str], None]) -> Iterator[None]:
    """A context in which SIGTERM and the first Ctrl-C do not end the process; `stop_signal` returns them.

    A second Ctrl-C raises KeyboardInterrupt. If the work finishes nevertheless, as in the last step of a training, the
    signal takes effect at the end. Does nothing outside of the main thread.
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
        asked = _asked.copy()
        _asked.clear()
    if asked:
        signal.raise_signal(asked[0])
