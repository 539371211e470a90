"""Files under `storage`, on this machine or on any file system that pyarrow reaches.

A path is a local one or a URI: s3://bucket/runs, gs://…, hdfs://…, and what fsspec knows where that is installed.
Credentials, and the address of a server that is not Amazon's, are those of the environment: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL.

Whatever fails is tried again, since all that is done here can be done twice; if it fails still, that is a
StorageUnavailable. A read that fails says nothing about the file: only one that is missing, of another size or of other
bytes than were written is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from raylm.errors import ConfigError, RaylmError, StorageError, StorageFull, StorageUnavailable, first_line

PIECE = 2**22
"""Bytes that are copied at a time."""

ANSWER_SECONDS = 8.0
"""How long `storage` may take to answer when a command begins."""

S3_ATTEMPTS = 3
"""Of a request, as in AWS's own tools. Each fails after 3 s where a server says nothing: pyarrow's default, 31 of them,
takes 100 s for a read and 290 s for a write."""

RETRIES_SECONDS = (1.0, 3.0, 9.0)
"""How long to wait before each further try: storage elsewhere has its moments, some of them ten seconds long."""

IN_VAIN_SECONDS = 30.0
"""How long nothing is waited for after the last try has failed too: a command has many files, and is to end."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

OBJECT_STORES = ("s3", "gcs")
"""Where an object appears when it is complete: they take all of it, or refuse it."""

NOT_IN_A_URI = re.compile(r"://[^/@]*:[^@]*@|\?")
"""name:password@, where the password may have a slash, and ?option=…"""


Result = TypeVar("Result")


class Stored(NamedTuple):
    """What a file is known by."""

    size: int
    sha256: str


_asked: list[threading.Thread] = []
"""Threads whose request a server may never answer."""


def is_waiting() -> bool:
    """Whether a request to a server has not been answered yet, as one to a server that is not there."""
    return any(thread.is_alive() for thread in _asked)


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
        system, path = pyarrow.fs.FileSystem.from_uri(root)
    except pyarrow.ArrowInvalid:
        import fsspec  # type: ignore[import-untyped]

        system, _ = fsspec.core.url_to_fs(root)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), None
    if system.type_name == "s3":
        _, (options,) = system.__reduce__()  # what the URI and the environment say; not all of it can stand in a URI
        options |= {
            "allow_delayed_open": True,  # a small file is one request, not three
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        }
        system = pyarrow.fs.S3FileSystem(**options)
    return system, path


def absolute(path: str | Path) -> str:
    """A path or URI that means the same in any directory."""
    return str(path) if is_remote(str(path)) else os.path.abspath(path)


# What fails is tried again --------------------------------------------------------------------------------------------

_waits: ContextVar[bool] = ContextVar("_waits", default=True)
_in_vain = -IN_VAIN_SECONDS
"""When the last of several tries failed, in seconds of time.monotonic."""


def retried(path: str, act: Callable[[], Result]) -> Result:
    """What an act on a path gives. FileNotFoundError and NotADirectoryError are answers, too.

    StorageUnavailable if it fails each time, StorageError if another try would end the same way.
    """
    global _in_vain
    waits = RETRIES_SECONDS if _waits.get() and time.monotonic() - _in_vain >= IN_VAIN_SECONDS else ()
    for wait in (*waits, None):
        try:
            result = act()
        except (RaylmError, FileNotFoundError, NotADirectoryError, ImportError, ValueError):
            raise
        except (PermissionError, IsADirectoryError, FileExistsError) as error:
            raise StorageError(f"{path} cannot be reached: {reason(error)}", path) from error
        except Exception as error:  # pyarrow's, fsspec's and the cloud's own
            if wait is None:
                _in_vain = time.monotonic()
                raise StorageUnavailable(
                    f"{path} cannot be reached: {reason(error)}; once it can, the same command resumes", path
                ) from error
        else:
            _in_vain = -IN_VAIN_SECONDS
            return result
        time.sleep(wait)
    raise AssertionError("unreachable")


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Inside, nothing is tried again: there is another chance soon, or somebody waits for the answer."""
    token = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(token)


# Files ---------------------------------------------------------------------------------------------------------------


def read(path: str) -> bytes | None:
    """A file's content; None if it is not there."""

    def act() -> bytes:
        with reading(path) as stream:
            content = stream.read()
            _check_whole(stream, len(content))
            return content

    try:
        return retried(path, act)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def reading(path: str) -> Iterator[Any]:
    """A file that is there, open for reading."""
    if is_remote(path):
        system, inner = file_system(path)
        with system.open_input_file(inner) as stream:
            yield stream
    else:
        with open(path, "rb") as stream:
            yield stream


def _check_whole(stream: Any, size: int) -> None:
    """OSError if not all of a remote file has come."""
    if hasattr(stream, "size") and (whole := stream.size()) != size:
        raise OSError(f"{size:,} of {whole:,} bytes have come")


def write(path: str, content: Any, scratch: str | None = None) -> None:
    """A file that is there entirely or not at all. Where that takes a partial one, it lies in `scratch`, or beside."""
    retried(path, lambda: _write(path, content, scratch))


def _write(path: str, content: Any, scratch: str | None) -> None:
    directory, _, name = path.rpartition("/")
    partial = f"{scratch or directory}/{name if scratch is None else ''}.{uuid.uuid4().hex}.partial"
    size = memoryview(content).nbytes
    if not is_remote(path):
        with _told(path, size):
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
    with _told(path, size):
        with system.open_output_stream(file_system(partial)[1]) as stream:
            stream.write(content)
        _check_stored(system, file_system(partial)[1], size)
        if partial != path:
            system.move(file_system(partial)[1], inner)


def _check_stored(system: Any, inner: str, size: int) -> None:
    """OSError if a file system has not all of what it has just taken."""
    if system.type_name not in OBJECT_STORES and (stored := system.get_file_info(inner).size) != size:
        raise OSError(f"{stored or 0:,} of {size:,} bytes are there")


def upload(file: Path, path: str) -> Stored:
    """Copy a file of this machine to a path, on disk when this returns. StorageFull if there is no room for it."""
    return retried(path, lambda: _upload(file, path))


def _upload(file: Path, path: str) -> Stored:
    digest = hashlib.sha256()
    size = file.stat().st_size
    with _told(path, size):
        if is_remote(path):
            system, inner = file_system(path)
            if system.type_name not in OBJECT_STORES:
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
        if is_remote(path):
            _check_stored(system, inner, size)
    return Stored(size, digest.hexdigest())


def download(path: str, file: Path) -> None:
    """Copy a file to this machine."""

    def act() -> None:
        try:
            with reading(path) as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, PIECE)
                _check_whole(source, target.tell())
        except FileNotFoundError as error:  # it was listed a moment ago
            raise OSError("it is not there any more") from error

    retried(path, act)


def fault(path: str, expected: Stored) -> str | None:
    """How a file differs from what it is known by: `missing`, `3 of 7 bytes`; None if it does not.

    It is looked at twice before it is said to differ.
    """
    return _fault(path, expected) and _fault(path, expected)


def _fault(path: str, expected: Stored) -> str | None:
    def act() -> Stored:
        digest, size = hashlib.sha256(), 0
        with reading(path) as stream:
            while piece := stream.read(PIECE):
                digest.update(piece)
                size += len(piece)
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
    """A directory on this machine: itself, or a copy of a remote one's files, which goes with the context.

    Files whose names match a pattern of `but_for` are not copied.
    """
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="raylm-") as copy:
        with reached(path), ThreadPoolExecutor(8) as pool:
            wanted = [name for name in sizes(path) if not any(fnmatch(name, pattern) for pattern in but_for)]
            list(pool.map(lambda name: download(f"{path}/{name}", Path(copy, name)), wanted))
        yield Path(copy)


def names(path: str) -> list[str]:
    """The names in a directory, sorted; none if it is not there."""
    if is_remote(path):
        return sorted(info.base_name for info in _inside(path))
    return retried(path, lambda: sorted(os.listdir(path)) if os.path.isdir(path) else [])


def sizes(path: str) -> dict[str, int]:
    """Bytes of each file in a directory by its name, sorted; none if it is not there."""
    if is_remote(path):
        return dict(sorted((info.base_name, info.size) for info in _inside(path) if info.is_file))

    def act() -> dict[str, int]:
        if not os.path.isdir(path):
            return {}
        return dict(sorted((entry.name, entry.stat().st_size) for entry in os.scandir(path) if entry.is_file()))

    return retried(path, act)


def _inside(path: str) -> list[Any]:
    from pyarrow.fs import FileSelector

    def act() -> list[Any]:
        system, inner = file_system(path)
        return list(system.get_file_info(FileSelector(inner, allow_not_found=True)))

    return retried(path, act)


def size(path: str) -> int:
    """Bytes of a file; 0 if it is not there."""

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
    """A file, if it is there."""

    def act() -> None:
        if is_remote(path):
            system, inner = file_system(path)
            system.delete_file(inner)
        else:
            os.remove(path)

    with contextlib.suppress(FileNotFoundError):
        retried(path, act)


def remove(path: str) -> None:
    """A directory and what is in it, if it is there."""
    if not is_remote(path):
        shutil.rmtree(path, ignore_errors=True)
        return

    def act() -> None:
        system, inner = file_system(path)
        system.delete_dir(inner)

    with contextlib.suppress(FileNotFoundError):
        retried(path, act)


# What a command finds out before it begins ---------------------------------------------------------------------------


OF_A_JOB = "/runtime_resources/working_dir_files/"
"""What is in the path of the directory in which Ray runs a job that was submitted with files."""


def check_stays(key: str, place: str) -> None:
    """ConfigError naming the setting if its place is in the directory of this job, which Ray removes after it."""
    if OF_A_JOB in place:
        raise ConfigError(
            f"{key}={place}: the directory in which Ray runs this job, and removes it with all in it; give an absolute "
            "path or an address, which is there after the job, too",
            key,
        )


def look(storage: str) -> None:
    """Read what is in the place that the setting names; an error that names it if that cannot be done in time."""
    _in_time(lambda: names(storage), storage, "read")


def check(storage: str) -> None:
    """Write a file there and remove it again; an error that names the setting if that cannot be done in time, or if
    the place does not stay."""
    check_stays("storage", storage)
    _in_time(lambda: remove_file(mark(storage)), storage, "written")


def mark(storage: str) -> str:
    """A new file there, for others to find."""
    path = f"{storage}/.raylm-{uuid.uuid4().hex}"
    write(path, b"raylm")
    return path


def unusable(marked: str) -> str | None:
    """Why this process can not read a mark and write beside it; None if it can."""
    try:
        if read(marked) is None:
            return "not the same directory"
        beside = f"{marked}-{uuid.uuid4().hex}"
        write(beside, b"raylm")
        remove_file(beside)
    except Exception as error:  # pyarrow's, fsspec's and the cloud's own
        return reason(error)
    return None


def _in_time(act: Callable[[], object], storage: str, done: str) -> None:
    if is_remote(storage) and NOT_IN_A_URI.search(storage):
        raise ConfigError(
            "storage must come without credentials and options, since it is written down in many places; give them in "
            "the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL",
            "storage",
        )
    failures: list[Exception] = []

    def acting() -> None:
        try:
            with once():
                act()
        except Exception as error:  # pyarrow's, fsspec's and the cloud's own
            failures.append(error)

    thread = threading.Thread(target=acting, daemon=True)  # a server that does not answer can keep it for minutes
    _asked.append(thread)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if thread.is_alive():
        problem = f"no answer in {ANSWER_SECONDS:g} seconds"
    elif failures:
        problem = reason(failures[0])
    else:
        return
    credentials = ", and its credentials in the environment" if is_remote(storage) else ""
    raise StorageError(
        f"storage={storage} cannot be {done}: {problem}; give a place that can{credentials}", "storage"
    ) from (failures[0] if failures else None)


@contextlib.contextmanager
def reached(path: str) -> Iterator[None]:
    """Inside, whatever a file system refuses is a StorageError that names the path."""
    try:
        yield
    except RaylmError:
        raise
    except Exception as error:  # pyarrow's, fsspec's and the cloud's own
        raise StorageError(f"{path} cannot be reached: {reason(error)}", path) from error


def reason(error: BaseException) -> str:
    """Why something failed, as the file system says it."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        return reason(error.__cause__)
    return first_line(error)


@contextlib.contextmanager
def _told(path: str, needed: int) -> Iterator[None]:
    """A full disk by its path, and how much was needed and is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = "" if is_remote(path) else f", {shutil.disk_usage(os.path.dirname(path)).free:,} are free"
        raise StorageFull(
            f"{path}: no room for {needed:,} bytes{free}; make room and run the same command again", path
        ) from error
