"""Decisions in <storage>/decided/, under a hash of the settings that they depend on.

The same command finds them again later, on another node, or when the corpus has grown.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from raylm.config import Experiment

logger = logging.getLogger(__name__)

_pending: dict[str, str] = {}
"""Path -> content of the decisions of this process that `keep` has not written yet."""


def path(experiment: Experiment, name: str, given: Any, suffix: str) -> str:
    """The file of a decision that depends on the `given` settings."""
    digest = hashlib.blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=8).hexdigest()
    return f"{experiment.storage.rstrip('/')}/decided/{name}-{digest}.{suffix}"


def find(path: str) -> str | None:
    """The content of a decision; None if it has not been made."""
    from raylm import storage

    written = storage.read(path)
    return _pending.get(path) if written is None else written.decode()


def decide(path: str, content: str) -> None:
    """Make a decision. `keep` writes it."""
    _pending[path] = content


def keep() -> None:
    """Write down what was decided, once all else has been checked: an error leaves nothing behind."""
    from raylm import storage

    while _pending:
        path, content = _pending.popitem()
        storage.write(path, content.encode())
        if path.endswith(".yaml"):
            logger.info(f"These settings are in {path}, which --config takes")
