"""What a sweep starts from beside its space: settings to try first, and the trials of earlier sweeps.

    <sweep>/start.json    {"points": [{"train.learning_rate": 0.002}],
                           "observations": [{"settings": {"train.learning_rate": 0.001}, "score": 93.9}],
                           "notes": ["train.learning_rate=0.002 (Step Law, ..."]}

It is decided once and stored with the sweep, so that a sweep that resumes draws the same settings.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from raylm import storage

FILE = "start.json"


@dataclass(frozen=True)
class Observation:
    """A trial of an earlier sweep."""

    settings: dict[str, Any]
    score: float


@dataclass(frozen=True)
class Start:
    """What a sweep starts from."""

    points: tuple[dict[str, Any], ...] = ()
    """Settings to try first."""
    observations: tuple[Observation, ...] = ()
    """Trials of earlier sweeps that the searcher learns from."""
    notes: tuple[str, ...] = ()
    """A sentence about each suggested value and each earlier sweep."""

    def write(self, directory: str) -> None:
        with storage.reached(directory):
            storage.write(f"{directory}/{FILE}", (json.dumps(asdict(self), indent=1) + "\n").encode())


def read(directory: str) -> Start | None:
    """What the sweep in a directory has started from; None if that is not decided yet."""
    written = storage.read(f"{directory}/{FILE}")
    if written is None:
        return None
    found = json.loads(written)
    observations = tuple(Observation(**each) for each in found["observations"])
    return Start(tuple(found["points"]), observations, tuple(found["notes"]))
