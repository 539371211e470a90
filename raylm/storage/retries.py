"""Every access to storage is retried, because all of them can be repeated; what still fails is a StorageError."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from raylm.errors import RaylmError, StorageError, StorageUnavailable, first_line

RETRIES_SECONDS = (1.0, 3.0, 9.0)
"""How long to wait before each retry: remote storage may fail for some ten seconds."""

PAUSE_SECONDS = 30.0
"""For how long nothing is retried after a last retry failed: a command with many files has to end."""

Result = TypeVar("Result")

_waits: ContextVar[bool] = ContextVar("_waits", default=True)
_last_failure = -PAUSE_SECONDS
"""When a last retry failed, in seconds of time.monotonic."""


def retried(path: str, act: Callable[[], Result]) -> Result:
    """The result of an access to a path. FileNotFoundError, NotADirectoryError and NotImplementedError are raised as
    they are.

    StorageUnavailable if every retry fails, StorageError if none would help.
    """
    global _last_failure
    waits = RETRIES_SECONDS if _waits.get() and time.monotonic() - _last_failure >= PAUSE_SECONDS else ()
    for wait in (*waits, None):
        try:
            result = act()
        except (RaylmError, FileNotFoundError, NotADirectoryError, NotImplementedError, ImportError, ValueError):
            raise
        except (PermissionError, IsADirectoryError, FileExistsError) as error:
            raise StorageError(f"{path} cannot be reached: {reason(error)}", path) from error
        except Exception as error:  # pyarrow's, fsspec's and the cloud's own
            if wait is None:
                _last_failure = time.monotonic()
                raise StorageUnavailable(
                    f"{path} cannot be reached: {reason(error)}; once it can, the same command resumes", path
                ) from error
        else:
            _last_failure = -PAUSE_SECONDS
            return result
        time.sleep(wait)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Inside, nothing is retried: there is another chance soon, or a user waits for the answer."""
    token = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(token)


@contextlib.contextmanager
def reached(path: str) -> Iterator[None]:
    """Inside, any error of a file system is a StorageError that names the path."""
    try:
        yield
    except RaylmError:
        raise
    except Exception as error:  # pyarrow's, fsspec's and the cloud's own
        raise StorageError(f"{path} cannot be reached: {reason(error)}", path) from error


def reason(error: BaseException) -> str:
    """Why something failed, in the file system's words."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        return reason(error.__cause__)
    return first_line(error)
