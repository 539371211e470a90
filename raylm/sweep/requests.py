"""What other commands ask of a sweep: a file for each request, which the sweep takes once.

    <sweep>/requests/20261130-041500-3fa2.json    {"stop": "trial_00003"}
                                                  {"add": 2, "settings": {"train.learning_rate": 0.003}}

Only the command that works on a sweep writes its record. It records a request under the name of its file before it
removes the file, so a sweep that is killed in between does not take it twice, and one that resumes does the same again.
A sweep that no command works on takes its requests when it resumes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from raylm import runs, storage
from raylm.sweep.record import SweepRecord

FOLDER = "requests"


def stop_trial(directory: str, trial_id: str) -> None:
    """Ask for a trial to stop at its next evaluation."""
    _write(directory, {"stop": trial_id})


def add_trials(directory: str, count: int, settings: Mapping[str, Any]) -> None:
    """Ask for so many more trials, the first of them with these settings."""
    _write(directory, {"add": count, "settings": dict(settings)})


def _write(directory: str, request: dict[str, Any]) -> None:
    with storage.reached(directory):
        name = runs.new_name("request").removeprefix("request-")
        storage.write(f"{directory}/{FOLDER}/{name}.json", json.dumps(request).encode())


def pending(record: SweepRecord) -> dict[str, dict[str, Any]]:
    """Name -> request, of those that the sweep has not taken, the oldest first."""
    place = f"{record.directory}/{FOLDER}"
    files = [name for name in storage.names(place) if name.endswith(".json")]
    new = {name: storage.read(f"{place}/{name}") for name in files if name not in record.requests}
    return {name: json.loads(content) for name, content in new.items() if content}


def take(record: SweepRecord) -> None:
    """Record the requests that are new, and remove their files."""
    for name, request in pending(record).items():
        record.request(name, request)
    for name in storage.names(f"{record.directory}/{FOLDER}"):
        if name in record.requests:
            storage.remove_file(f"{record.directory}/{FOLDER}/{name}")
