"""Files under `storage`, on this machine or on any file system that pyarrow reaches.

A path is a local one or a URI: s3://bucket/runs, gs://…, hdfs://…, and what fsspec knows where that is installed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from raylm.errors import StorageError

PIECE = 2**22
"""Bytes that are copied at a time."""


class Stored(NamedTuple):
    """What a file is known by."""

    size: int
    sha256: str


def is_remote(path: str) -> bool:
    return "://" in path


def file_system(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path inside it) of a URI; one client for all files of a host or bucket."""
    scheme, _, rest = uri.partition("://")
    host, _, inner = rest.partition("/")
    system, root = _file_system(f"{scheme}://{host}/")
    if root is None:
        return system, system.handler.fs._strip_protocol(uri)
    return system, f"{root.rstrip('/')}/{inner}".rstrip("/")


@lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[Any, str | None]:
    """(pyarrow file system, its path) of scheme://host/; the path is None where fsspec stands behind it."""
    import pyarrow
    import pyarrow.fs

    try:
        return pyarrow.fs.FileSystem.from_uri(root)
    except pyarrow.ArrowInvalid:
        import fsspec  # type: ignore[import-untyped]

        system, _ = fsspec.core.url_to_fs(root)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), None


def read(path: str) -> bytes | None:
    """A file's content; None if it is not there."""
    try:
        with reading(path) as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def reading(path: str) -> Iterator[Any]:
    """A file that is there, open for reading."""
    if is_remote(path):
        system, inner = file_system(path)
        with system.open_input_stream(inner) as stream:
            yield stream
    else:
        with open(path, "rb") as stream:
            yield stream


def write(path: str, content: Any, scratch: str | None = None) -> None:
    """A file that is there entirely or not at all. Where that takes a partial one, it lies in `scratch`, or beside."""
    directory, _, name = path.rpartition("/")
    partial = f"{scratch or directory}/{name if scratch is None else ''}.{uuid.uuid4().hex}.partial"
    if not is_remote(path):
        for file in (partial, path):
            os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
        return
    system, inner = file_system(path)
    if system.type_name in ("s3", "gcs"):  # an object appears when it is complete
        partial = path
    else:
        for file in (partial, path):
            system.create_dir(file_system(file)[1].rpartition("/")[0], recursive=True)
    with system.open_output_stream(file_system(partial)[1]) as stream:
        stream.write(content)
    if partial != path:
        system.move(file_system(partial)[1], inner)


def upload(file: Path, path: str) -> Stored:
    """Copy a file of this machine to a path, on disk when this returns. StorageError if there is no room for it."""
    digest = hashlib.sha256()
    size = file.stat().st_size
    with _told(path, size):
        if is_remote(path):
            system, inner = file_system(path)
            if system.type_name not in ("s3", "gcs"):
                system.create_dir(inner.rpartition("/")[0], recursive=True)
            target = system.open_output_stream(inner)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            target = open(path, "wb")  # noqa: SIM115 - closed below
        with target, file.open("rb") as source:
            while piece := source.read(PIECE):
                digest.update(piece)
                target.write(piece)
            if not is_remote(path):
                target.flush()
                os.fsync(target.fileno())
    return Stored(size, digest.hexdigest())


def download(path: str, file: Path) -> None:
    """Copy a file to this machine."""
    with reading(path) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, PIECE)


def fault(path: str, expected: Stored) -> str | None:
    """How a file differs from what it is known by: `missing`, `3 of 7 bytes`; None if it does not."""
    digest, size = hashlib.sha256(), 0
    try:
        with reading(path) as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
                size += len(piece)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return str(error)
    if size != expected.size:
        return f"{size:,} of {expected.size:,} bytes"
    return None if digest.hexdigest() == expected.sha256 else "not the bytes that were written"


def names(path: str) -> list[str]:
    """The names in a directory, sorted; none if it is not there."""
    if not is_remote(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    from pyarrow.fs import FileSelector

    system, inner = file_system(path)
    found = system.get_file_info(FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in found)


def remove_file(path: str) -> None:
    """A file, if it is there."""
    try:
        if is_remote(path):
            system, inner = file_system(path)
            system.delete_file(inner)
        else:
            os.remove(path)
    except FileNotFoundError:
        pass


def remove(path: str) -> None:
    """A directory and what is in it, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return
    system, inner = file_system(path)
    if names(path):
        system.delete_dir(inner)


def check(storage: str) -> None:
    """Write a file and remove it again; StorageError, naming the setting, if that cannot be done."""
    path = f"{storage}/.raylm-{uuid.uuid4().hex}"
    try:
        write(path, b"raylm")
        remove_file(path)
    except Exception as error:  # pyarrow's, fsspec's and the cloud's own errors
        problem = str(error).strip().split("\n")[0]
        raise StorageError(
            f"storage={storage} cannot be written: {problem}; give a place that can, and its credentials", "storage"
        ) from error


@contextlib.contextmanager
def _told(path: str, needed: int) -> Iterator[None]:
    """A full disk by its path, and how much was needed and is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = "" if is_remote(path) else f", {shutil.disk_usage(os.path.dirname(path)).free:,} are free"
        raise StorageError(
            f"{path}: no room for {needed:,} bytes{free}; make room and run the same command again", path
        ) from error
