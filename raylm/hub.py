"""Loading by path, from a local directory or by id from the Hugging Face Hub.

Whether the Hub answers is checked once, within seconds. If it does not, what was downloaded before is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache

from raylm.errors import RaylmError, first_line

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def loading(
    kind: type[RaylmError], key: str | None, path: str, *, gguf_file: str | None = None, or_file: bool = False
) -> Iterator[None]:
    """Inside, something is loaded from a path that the setting `key` gave; what goes wrong is raised in one line, as
    that kind of error. See `problem` for the other arguments."""
    why, where = problem(path, gguf_file=gguf_file, or_file=or_file), None
    if why is None:
        try:
            yield
            return
        except RaylmError as error:
            why, where = error.message, error.where
        except Exception as error:  # libraries raise many kinds of errors for a damaged file
            why = _reason(path, error)
    raise kind(f"{key}={path}: {why}" if key else f"{path}: {why}", where or key or path)


def problem(path: str, *, gguf_file: str | None = None, or_file: bool = False) -> str | None:
    """Why nothing can be loaded from a path, without opening any file; None if loading may succeed.

    `gguf_file` must be in the directory; with `or_file` the path may be a file.
    """
    if os.path.isfile(path):
        return None if or_file else f"it is a file; give the directory that it is in: {os.path.dirname(path) or '.'}"
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        if not is_id(path):
            return "there is no such directory"
        out_of_reach()  # before anything retries the Hub
        return None
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if gguf_file is not None and gguf_file not in names:
        there = ", ".join(sorted(name for name in names if name.endswith(".gguf"))) or "none"
        return f"there is no {gguf_file} in it; its GGUF files: {there}"
    return None if names else "the directory is empty"


def is_id(path: str) -> bool:
    """Whether a path can be an id on the Hub: NAME or OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


@lru_cache(maxsize=1)
def out_of_reach() -> str | None:
    """Why the Hub cannot be asked; None if it can.

    If it does not answer, huggingface_hub is put into offline mode, for this process and those it starts, because each
    file would be retried six times, for half a minute.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE=1 keeps it from being asked; unset that where there is a network"
    problem = _silence()
    if problem is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    logger.info(f"{constants.ENDPOINT} cannot be reached: {problem}; what was downloaded before is used")
    return "which cannot be reached; with HF_HUB_OFFLINE=1 it is not even tried"


def _silence() -> str | None:
    """Why the Hub does not answer within huggingface_hub's timeout; None if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            answers.put(None)
        except Exception as error:  # errors of the network, a proxy, a certificate
            answers.put(first_line(error))

    # In a thread, because a silent name server, or several silent addresses, take a multiple of the timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except queue.Empty:
        return f"no answer in {constants.HF_HUB_ETAG_TIMEOUT} s"


def _reason(path: str, error: Exception) -> str:
    """Why something could not be loaded from a path."""
    if not os.path.exists(path) and (why := out_of_reach()):
        return f"there is no such directory, and it is not in this machine's cache of the Hugging Face Hub, {why}"
    if os.path.isdir(path):
        for name in sorted(os.listdir(path)):
            if name.endswith(".json") and (why := _damage(os.path.join(path, name))):
                return f"{name} {why}"
    known = isinstance(error, (OSError, ValueError))  # their messages are sentences
    return first_line(error) if known else f"it cannot be loaded: {type(error).__name__}: {first_line(error)}"


def _damage(file: str) -> str | None:
    try:
        with open(file, encoding="utf-8") as stream:
            json.load(stream)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:
        return f"is damaged: {first_line(error)}"
    return None
