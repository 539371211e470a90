"""Between a command and its workers: how far they are, what they say, and whether they shall stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylm.errors import Interrupted


class ProgressChannel:
    """How far the workers are, what they have to say, and whether they shall stop."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.said: list[str] = []
        self.stopping = False

    def advance(self, value: float) -> None:
        self.value = value

    def say(self, message: str) -> None:
        self.said.append(message)

    def read(self) -> tuple[float | None, list[str]]:
        """The value, and what was said since the last look."""
        said, self.said = self.said, []
        return self.value, said

    def stop(self) -> None:
        self.stopping = True

    def is_stopping(self) -> bool:
        return self.stopping


ANSWER_SECONDS = 10.0
"""How long a shared channel may take to answer: longer than a process that begins anew."""


class SharedProgressChannel:
    """A Board that workers on all nodes are in touch with: an actor of Ray's, beside the command.

    Its process may be killed as any other, by Ray's memory monitor for one. It begins anew then, and knows nothing. A
    training does without one that gives no answer.
    """

    def __init__(self) -> None:
        here = ray.get_runtime_context().get_node_id()  # or it would go with another node that is lost
        beside = NodeAffinitySchedulingStrategy(here, soft=False)
        self.actor = (
            ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ProgressChannel)
            .options(scheduling_strategy=beside)
            .remote()
        )

    def advance(self, value: float) -> None:
        self.actor.advance.remote(value)

    def say(self, message: str) -> None:
        self.actor.say.remote(message)

    def read(self) -> tuple[float | None, list[str]]:
        return self._answer(self.actor.read, (None, []))

    def stop(self) -> None:
        self.actor.stop.remote()

    def is_stopping(self) -> bool:
        return self._answer(self.actor.is_stopping, False)

    def _answer(self, method: Any, otherwise: Any) -> Any:
        try:
            return ray.get(method.remote(), timeout=ANSWER_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return otherwise


@contextlib.contextmanager
def progress_channel(
    show: Callable[[float], None], say: Callable[[str], None]
) -> Iterator[ProgressChannel | SharedProgressChannel]:
    """A channel, shared if Ray is connected, and looked at about twice a second.

    Its workers are told to stop once the process is (`signals`).
    """
    channel = SharedProgressChannel() if ray.is_initialized() else ProgressChannel()
    over = threading.Event()

    def look() -> None:
        value, messages = channel.read()
        for message in messages:
            say(message)
        if value is not None:
            show(value)

    def watching() -> None:
        while not over.wait(0.5):
            if stop_signal() is not None:
                channel.stop()  # again and again: it may have begun anew
            look()

    watcher = threading.Thread(target=watching, daemon=True)
    watcher.start()
    try:
        yield channel
    finally:
        over.set()
        watcher.join()
        look()  # what was said last
        if isinstance(channel, SharedProgressChannel):
            ray.kill(channel.actor)


_asked: list[int] = []
"""Signals by which this process was asked to stop, inside of `signals`."""


def stop_signal() -> signal.Signals | None:
    """The signal that asked this process to stop, if one did."""
    return signal.Signals(_asked[0]) if _asked else None


def interruption(directory: str, how: str) -> BaseException:
    """What a command ends with that was asked to stop."""
    told = f"{directory}: {how}; the same command goes on from there"
    return KeyboardInterrupt(told) if stop_signal() == signal.SIGINT else Interrupted(told, directory)


@contextlib.contextmanager
def handle_signals(say: Callable[[str], None]) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C do not end the process here, but are told to whoever asks `stop_signal`.

    A second Ctrl-C is one. If what is inside ends in spite of being asked to stop, as in the last step of a training,
    the process is told then. In other threads than the main one nothing is changed.
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
