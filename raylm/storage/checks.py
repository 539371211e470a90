"""Whether `storage` can be read and written, found out before a command starts its work."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Callable

from raylm.errors import ConfigError, StorageError
from raylm.storage.file_systems import is_remote
from raylm.storage.files import names, read, remove_file, write
from raylm.storage.retries import once, reason

ANSWER_SECONDS = 8.0
"""How long `storage` may take to answer when a command starts."""

CREDENTIALS_OR_OPTIONS = re.compile(r"://[^/@]*:[^@]*@|\?")
"""name:password@, where the password may contain a slash, and ?option=…"""

_requests: list[threading.Thread] = []
"""Threads with a request that a server may never answer."""

JOB_DIRECTORY = "/runtime_resources/working_dir_files/"
"""In the path of the directory in which Ray runs a job that was submitted with files."""


def check_stays(key: str, place: str) -> None:
    """ConfigError naming the setting `key` if its place is in the directory that Ray removes after this job."""
    if JOB_DIRECTORY in place:
        raise ConfigError(
            f"{key}={place}: the directory in which Ray runs this job, and removes it with all in it; give an absolute "
            "path or an address, which is there after the job, too",
            key,
        )


def look(storage: str) -> None:
    """List the directory of the setting `storage`; an error that names it if that fails or takes too long."""
    _in_time(lambda: names(storage), storage, "read")


def check(storage: str) -> None:
    """Write a file to `storage` and remove it; an error that names it if that fails, takes too long, or will be lost
    with the job."""
    check_stays("storage", storage)
    _in_time(lambda: remove_file(mark(storage)), storage, "written")


def mark(storage: str) -> str:
    """Write a new file to `storage` that other nodes should see; its path."""
    path = f"{storage}/.raylm-{uuid.uuid4().hex}"
    write(path, b"raylm")
    return path


def unusable(marked: str) -> str | None:
    """Why this process cannot read the file `marked` and write another beside it; None if it can."""
    try:
        if read(marked) is None:
            return "not the same directory"
        beside = f"{marked}-{uuid.uuid4().hex}"
        write(beside, b"raylm")
        remove_file(beside)
    except Exception as error:  # pyarrow's, fsspec's and the cloud's own
        return reason(error)
    return None


def _in_time(access: Callable[[], object], storage: str, done: str) -> None:
    if is_remote(storage) and CREDENTIALS_OR_OPTIONS.search(storage):
        raise ConfigError(
            "storage must come without credentials and options, because it is written down in many places; give them "
            "in the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL",
            "storage",
        )
    failures: list[Exception] = []

    def run() -> None:
        try:
            with once():
                access()
        except Exception as error:  # pyarrow's, fsspec's and the cloud's own
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)  # a server that does not answer can keep it for minutes
    _requests.append(thread)
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


def is_waiting() -> bool:
    """Whether a request to a server has not been answered yet."""
    return any(thread.is_alive() for thread in _requests)
