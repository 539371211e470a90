"""Directories in the system's temporary directory, which a later command removes if their process was killed.

    raylm-tune-4711-x3k9ab2_/    made by process 4711, which holds a lock on it for as long as it lives

A process id alone proves nothing: another container may share the directory. Where there are no locks nothing is
removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = re.compile(r"raylm-[a-z]+\d*-(\d+)-[^/]+")

SESSION_LOCK = "raylm-{process}.lock"
"""In a session folder of Ray's: it was started by this process of raylm, which holds a lock on the file."""

_held: list[int] = []
"""Descriptors of the sessions' locks, open until this process ends."""


@contextlib.contextmanager
def directory(kind: str) -> Iterator[str]:
    """A new directory, removed at the end."""
    path = tempfile.mkdtemp(prefix=f"raylm-{kind}-{os.getpid()}-")
    descriptor = _locked(path)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def hold_session(path: str) -> None:
    """Mark a session folder of Ray's as started by this process."""
    with contextlib.suppress(OSError):
        lock = Path(path, SESSION_LOCK.format(process=os.getpid()))
        lock.touch()
        if (descriptor := _locked(str(lock))) is not None:
            _held.append(descriptor)


def abandoned() -> list[str]:
    """Directories of this user's whose process is dead: raylm's own, and session folders of Ray that raylm started."""
    root = Path(tempfile.gettempdir())
    sessions = Path(os.environ.get("RAY_TMPDIR") or root, "ray").glob(f"session_*/{SESSION_LOCK.format(process='*')}")
    found = {path: (path, NAME.fullmatch(path.name)) for path in root.glob("raylm-*-*-*") if path.is_dir()}
    found |= {
        lock.parent: (lock, re.fullmatch(r"raylm-(\d+)\.lock", lock.name))
        for lock in sessions
        if not lock.parent.is_symlink()  # session_latest
    }
    return sorted(
        str(path) for path, (lock, name) in found.items() if name is not None and _is_dead(str(lock), int(name[1]))
    )


def clear() -> None:
    """Remove what is abandoned."""
    for path in abandoned():
        shutil.rmtree(path, ignore_errors=True)


def _is_dead(lock: str, process: int) -> bool:
    """Whether nobody holds the lock, and the process that took it is not there any more."""
    with contextlib.suppress(OSError):
        if os.lstat(lock).st_uid != os.getuid() or os.path.islink(lock):
            return False
        descriptor = _locked(lock)
        if descriptor is None:
            return False
        os.close(descriptor)
        return not _exists(process)
    return False


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _locked(path: str) -> int | None:
    """A descriptor that holds the lock of a file or directory; None if another process does, or there are no locks."""
    descriptor = os.open(path, os.O_RDONLY)  # not inherited by what this process starts
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
