"""Files and directories: read, write, copy, list, remove."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from raylm.errors import StorageFull
from raylm.storage.file_systems import OBJECT_STORES, absolute, file_system, is_remote
from raylm.storage.retries import reached, retried

CHUNK_BYTES = 2**22
"""Copied at a time."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Stored(NamedTuple):
    """The size and checksum of a file."""

    size: int
    sha256: str


def read(path: str) -> bytes | None:
    """The content of a file; None if it does not exist."""

    def act() -> bytes:
        with reading(path) as stream:
            content = stream.read()
            _check_whole(stream, len(content))
            return content

    try:
        return retried(path, act)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_part(path: str, offset: int, length: int) -> bytes:
    """A part of an existing file."""

    def act() -> bytes:
        with reading(path) as stream:
            stream.seek(offset)
            content = stream.read(length)
        if len(content) != length:
            raise OSError(f"{len(content):,} of {length:,} bytes were read")
        return content

    return retried(path, act)


@contextlib.contextmanager
def reading(path: str) -> Iterator[Any]:
    """An existing file, open for reading."""
    if is_remote(path):
        system, inner = file_system(path)
        with system.open_input_file(inner) as stream:
            yield stream
    else:
        with open(path, "rb") as stream:
            yield stream


def _check_whole(stream: Any, size: int) -> None:
    """OSError if a remote file was not read to its end."""
    if hasattr(stream, "size") and (whole := stream.size()) != size:
        raise OSError(f"{size:,} of {whole:,} bytes were read")


def write(path: str, content: Any, scratch: str | None = None) -> None:
    """Write a file atomically. A partial file, where one is needed, is written to `scratch` or beside the file."""
    retried(path, lambda: _write(path, content, scratch))


def _write(path: str, content: Any, scratch: str | None) -> None:
    path = absolute(path)
    directory, _, name = path.rpartition("/")
    partial = f"{scratch or directory}/{name if scratch is None else ''}.{uuid.uuid4().hex}.partial"
    size = memoryview(content).nbytes
    if not is_remote(path):
        with _describing_full_disk(path, size):
            for file in (partial, path):
                os.makedirs(os.path.dirname(file), exist_ok=True)
            with open(partial, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        return
    system, inner = file_system(path)
    if system.type_name in OBJECT_STORES:
        partial = path
    else:
        for file in (partial, path):
            system.create_dir(file_system(file)[1].rpartition("/")[0], recursive=True)
    with _describing_full_disk(path, size):
        with system.open_output_stream(file_system(partial)[1]) as stream:
            stream.write(content)
        _check_stored(system, file_system(partial)[1], size)
        if partial != path:
            system.move(file_system(partial)[1], inner)


def _check_stored(system: Any, inner: str, size: int) -> None:
    """OSError if a file system did not store all of what was just written."""
    if system.type_name not in OBJECT_STORES and (stored := system.get_file_info(inner).size) != size:
        raise OSError(f"{stored or 0:,} of {size:,} bytes were stored")


def upload(file: Path, path: str) -> Stored:
    """Copy a local file to a path, on disk when this returns; StorageFull if there is no room for it."""
    return retried(path, lambda: _upload(file, path))


def _upload(file: Path, path: str) -> Stored:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with _describing_full_disk(path, size):
        if is_remote(path):
            system, inner = file_system(path)
            if system.type_name not in OBJECT_STORES:
                system.create_dir(inner.rpartition("/")[0], recursive=True)
            target = system.open_output_stream(inner)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            target = open(path, "wb")  # noqa: SIM115 - closed below
        with target, file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
            if not is_remote(path):
                target.flush()
                os.fsync(target.fileno())
        if is_remote(path):
            _check_stored(system, inner, size)
    return Stored(size, digest.hexdigest())


def share(source: str, path: str, scratch: str) -> None:
    """Make an existing file also one at `path`, in the same storage: a hard link, or a copy where there are none; on
    remote storage a copy that the server makes. FileNotFoundError if the source has been removed; NotImplementedError
    if the server copies nothing.
    """
    partial = f"{scratch}/.{uuid.uuid4().hex}.partial"

    def act() -> None:
        for file in (partial, path):
            os.makedirs(os.path.dirname(file), exist_ok=True)
        try:
            os.link(source, partial)
        except FileNotFoundError:
            raise
        except OSError:  # of this file system, or it has as many links as it can have
            _upload(Path(source), partial)
        os.replace(partial, path)
        with contextlib.suppress(FileNotFoundError):  # it is still there if both were links of one file
            os.remove(partial)

    def act_remote() -> None:
        system, inner = file_system(path)
        theirs = file_system(source)[1]
        if system.get_file_info(theirs).size is None:
            raise FileNotFoundError(source)
        if system.type_name in OBJECT_STORES:
            system.copy_file(theirs, inner)
            return
        for file in (partial, path):
            system.create_dir(file_system(file)[1].rpartition("/")[0], recursive=True)
        system.copy_file(theirs, file_system(partial)[1])
        system.move(file_system(partial)[1], inner)

    retried(path, act_remote if is_remote(path) else act)


def download(path: str, file: Path) -> None:
    """Copy a file to a local one."""

    def act() -> None:
        try:
            with reading(path) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)
                _check_whole(source, target.tell())
        except FileNotFoundError as error:  # it was just listed
            raise OSError("it has been removed") from error

    retried(path, act)


def damage(path: str, expected: Stored) -> str | None:
    """How a file differs from what was written: `missing`, `3 of 7 bytes`; None if it does not.

    A difference is confirmed by a second read.
    """
    return _damage(path, expected) and _damage(path, expected)


def _damage(path: str, expected: Stored) -> str | None:
    def act() -> Stored:
        digest, size = hashlib.sha256(), 0
        with reading(path) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        return Stored(size, digest.hexdigest())

    try:
        found = retried(path, act)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if found.size != expected.size:
        return f"{found.size:,} of {expected.size:,} bytes"
    return None if found == expected else "not the bytes that were written"


@contextlib.contextmanager
def here(path: str, but_for: Sequence[str] = ()) -> Iterator[Path]:
    """The local directory itself, or a temporary copy of a remote one's files, also of those in directories in it,
    without those that match `but_for`."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="raylm-") as copy:
        with reached(path), ThreadPoolExecutor(8) as pool:
            wanted = [name for name in _files_below(path) if not any(fnmatch(name, pattern) for pattern in but_for)]
            for name in wanted:
                Path(copy, name).parent.mkdir(parents=True, exist_ok=True)
            list(pool.map(lambda name: download(f"{path}/{name}", Path(copy, name)), wanted))
        yield Path(copy)


def _files_below(path: str) -> list[str]:
    """The names of the files in a remote directory and, as weights/.metadata, of those in directories in it."""
    entries = _entries(path)
    inside = {info.base_name: _files_below(f"{path}/{info.base_name}") for info in entries if not info.is_file}
    return sorted(
        [info.base_name for info in entries if info.is_file]
        + [f"{folder}/{name}" for folder, names in inside.items() for name in names]
    )


def names(path: str) -> list[str]:
    """The names in a directory, sorted; none if it does not exist."""
    if is_remote(path):
        return sorted(info.base_name for info in _entries(path))
    return retried(path, lambda: sorted(os.listdir(path)) if os.path.isdir(path) else [])


def sizes(path: str) -> dict[str, int]:
    """Bytes of each file in a directory by its name, sorted; none if it does not exist."""
    if is_remote(path):
        return dict(sorted((info.base_name, info.size) for info in _entries(path) if info.is_file))

    def act() -> dict[str, int]:
        if not os.path.isdir(path):
            return {}
        return dict(sorted((entry.name, entry.stat().st_size) for entry in os.scandir(path) if entry.is_file()))

    return retried(path, act)


def _entries(path: str) -> list[Any]:
    from pyarrow.fs import FileSelector

    def act() -> list[Any]:
        system, inner = file_system(path)
        return list(system.get_file_info(FileSelector(inner, allow_not_found=True)))

    return retried(path, act)


def size(path: str) -> int:
    """Bytes of a file; 0 if it does not exist."""

    def act() -> int:
        if not is_remote(path):
            return os.stat(path).st_size
        system, inner = file_system(path)
        return system.get_file_info(inner).size or 0

    try:
        return retried(path, act)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def remove_file(path: str) -> None:
    """Remove a file if it exists."""

    def act() -> None:
        if is_remote(path):
            system, inner = file_system(path)
            system.delete_file(inner)
        else:
            os.remove(path)

    with contextlib.suppress(FileNotFoundError):
        retried(path, act)


def remove(path: str) -> None:
    """Remove a directory with its content if it exists."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return

    def act() -> None:
        system, inner = file_system(path)
        system.delete_dir(inner)

    with contextlib.suppress(FileNotFoundError):
        retried(path, act)


@contextlib.contextmanager
def _describing_full_disk(path: str, needed: int) -> Iterator[None]:
    """Inside, a full disk is a StorageFull that says how much was needed and how much is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = "" if is_remote(path) else f", {shutil.disk_usage(os.path.dirname(path)).free:,} are free"
        raise StorageFull(
            f"{path}: no room for {needed:,} bytes{free}; make room and run the same command again", path
        ) from error
