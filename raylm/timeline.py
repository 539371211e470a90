"""The phases of every process of a command, as a Chrome trace: `raylm train --timeline FILE`.

Processes on this machine find the directory of the recording in their environment, and append to a file of their own,
so that the phases of one that is killed are kept:

    <directory>/4711.jsonl      {"name": "Training", "ph": "B", "ts": 1764450000000000, "pid": 4711, "tid": 4711}

The phases are those that a command shows (`console`), those of its workers, and imports. Ray's tasks and actors come
from Ray itself, of all nodes. Without --timeline nothing is recorded or written.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylm.errors import ConfigError

logger = logging.getLogger(__name__)

VARIABLE = "RAYLM_TIMELINE"
"""The environment variable with the directory."""

_writing = threading.Lock()

SHORTEST_IMPORT_SECONDS = 0.02
"""Shorter imports are left out: a training imports some 6,000 modules."""


@contextlib.contextmanager
def recorded(file: Path) -> Iterator[None]:
    """Record this process and all that it starts; the trace is written to the file at the end, also after an error."""
    from raylm import scratch

    try:
        file.write_text("")
    except OSError as error:
        raise ConfigError(f"--timeline {file}: cannot be written: {error.strerror}", where="--timeline") from error
    with scratch.directory("timeline") as directory:
        os.environ[VARIABLE] = directory
        try:
            start("command")
            yield
        finally:
            del os.environ[VARIABLE]
            try:
                file.write_text(json.dumps({"traceEvents": _events(Path(directory))}) + "\n", encoding="utf-8")
            except OSError as error:  # the result of the command is worth more
                logger.warning(f"--timeline {file}: cannot be written: {error.strerror}")


def _events(directory: Path) -> list[dict[str, Any]]:
    """The events of all processes, without a line that a killed one has left half written."""
    found = []
    for path in directory.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def is_recorded() -> bool:
    return VARIABLE in os.environ


def start(process: str) -> None:
    """Name this process in the timeline, and record its imports from now on."""
    if not is_recorded():
        return
    _add("process_name", "M", args={"name": process})
    if builtins.__import__ is not _import:
        builtins.__import__ = _import
        if (age := _age()) is not None:
            _add("start of the process", "X", ts=_now() - age, dur=age)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Record what is done inside as a phase of this thread."""
    if not is_recorded():
        yield
        return
    _add(name, "B")
    try:
        yield
    finally:
        _add(name, "E")


def mark(what: str) -> None:
    """Record that something has happened."""
    if is_recorded():
        _add(what, "i", s="t")


def add(events: list[dict[str, Any]]) -> None:
    """Record what another program, such as Ray, has recorded as events of a Chrome trace."""
    if is_recorded():
        _write(events)


def _add(name: str, kind: str, **more: Any) -> None:
    _write([{"name": name, "ph": kind, "ts": _now(), "pid": os.getpid(), "tid": threading.get_native_id(), **more}])


def _write(events: list[dict[str, Any]]) -> None:
    lines = "".join(f"{json.dumps(event)}\n" for event in events)
    with (
        _writing,
        contextlib.suppress(OSError, KeyError),  # a directory of another machine, or the command has just ended
        open(f"{os.environ[VARIABLE]}/{os.getpid()}.jsonl", "a", encoding="utf-8") as file,
    ):
        file.write(lines)


def _now() -> int:
    """Microseconds, as in a Chrome trace; of the clock that Ray uses, too."""
    return time.time_ns() // 1000


def _age() -> int | None:
    """Microseconds for which this process has existed; None where the kernel does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return int((time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")) * 1e6)


_imported = builtins.__import__


def _import(name: str, *arguments: Any, **named: Any) -> Any:
    """The function `__import__`, which also records what took long."""
    started = _now()
    try:
        return _imported(name, *arguments, **named)
    finally:
        if (took := _now() - started) > SHORTEST_IMPORT_SECONDS * 1e6 and is_recorded():
            _add(f"import {name}", "X", ts=started, dur=took)
