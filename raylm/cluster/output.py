"""Ray's own output, in a file instead of on the terminal.

Ray's C++ core writes to descriptor 2, its loggers to sys.stderr, and errors of other processes are printed to
sys.stdout. raylm's messages, tracebacks and warnings go to sys.stderr, which in a command is not descriptor 2
(cli.run), so that the descriptor can be redirected.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from ray._private import worker
from ray._private.log import PlainRayHandler


class RayLog:
    """A file that receives Ray's output until `end`, which removes it unless an error names it."""

    def __init__(self) -> None:
        descriptor, self.path = tempfile.mkstemp(prefix="raylm-ray-", suffix=".log")
        self._file = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        self._is_named = False
        self._terminal = None if _is_descriptor_2(sys.stderr) else os.dup(2)
        if self._terminal is not None:
            os.dup2(descriptor, 2)
        self._emit, self._print = PlainRayHandler.emit, worker.print_to_stdstream
        PlainRayHandler.emit = lambda handler, record: self._add(handler.format(record))
        worker.print_to_stdstream = lambda data, ignore_prefix: self._add("\n".join(data["lines"]))
        atexit.register(self._remove)

    def named(self) -> str:
        """The end of an error's message that names the file; empty if Ray has written nothing."""
        if not os.path.getsize(self.path):
            return ""
        self._is_named = True
        return f"; {self.path} has the output of Ray"

    def end(self) -> None:
        PlainRayHandler.emit = self._emit
        worker.print_to_stdstream = self._print
        if self._terminal is not None:
            os.dup2(self._terminal, 2)
            os.close(self._terminal)
        self._file.close()
        self._remove()
        atexit.unregister(self._remove)

    def _add(self, text: str) -> None:
        with contextlib.suppress(ValueError):  # a late thread of Ray's, after the file was closed
            self._file.write(f"{text}\n")

    def _remove(self) -> None:
        if not self._is_named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def _is_descriptor_2(stream: Any) -> bool:
    try:
        return stream.fileno() == 2
    except (AttributeError, OSError):  # None, or a stream in memory
        return False


_log: RayLog | None = None


def start() -> RayLog:
    """The log of this process's Ray, which is started if necessary."""
    global _log
    _log = _log or RayLog()
    return _log


@contextlib.contextmanager
def to_file() -> Iterator[RayLog]:
    """A context with the log of this process's Ray, which ends with it."""
    global _log
    log = start()
    try:
        yield log
    finally:
        _log = None
        log.end()
