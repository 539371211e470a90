"""How a command begins runs, waits for MLflow at its end, finds runs, and says where to look."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from raylm import console, storage
from raylm.config import TrackingConfig
from raylm.errors import ConfigError, StorageError
from raylm.tracking import journal, mlflow
from raylm.tracking.failures import Unusable, shown
from raylm.tracking.run import COMMIT, JOB, NOTE, SOURCE, Run, start_run, sync_command

SETTLE_SECONDS = 60.0
"""How long a command waits at its end for a server that takes what it gets."""


def start(
    section: TrackingConfig,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, Any],
    directory: str | Path,
    metric: str = "best/eval_perplexity",
) -> Run:
    """The run whose journal lies in `directory`: a new one called `name`, or the one that was there, which goes on.

    It belongs to the section's MLflow experiment, by default `experiment`; one that is made here compares its runs by
    `metric`. A server that does not answer is told of and waited for no longer than seconds; a tracking.uri that can
    never work is a ConfigError.
    """
    belongs = section.experiment or experiment
    if section.uri is not None:
        check(section.uri)
        storage.check_stays("tracking.uri", shown(section.uri))
    connected = section.uri is not None and _connect(section.uri, belongs, metric)
    run = Run(storage.absolute(directory), section.uri)
    told = {**_origin(tags.get("raylm.verb")), **{key: str(value) for key, value in tags.items()}}
    start_run(run, experiment=belongs, metric=metric, name=name, tags=told, is_child=False)
    if connected:
        run.ship(mlflow.PATIENCE_SECONDS)
    return run


def check(uri: str) -> None:
    """ConfigError for what is no address of an MLflow at all: none, localhost:5000, a directory."""
    is_address = "://" in uri or uri.startswith(("sqlite:", "databricks", "uc"))
    if not is_address and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise _unusable(uri, "it is not the address of a server or a database")


def settle(run: Run, say: Callable[[str], None]) -> None:
    """Wait at the end of a command for what MLflow has not, as long as it takes some; else `say` how to ship it."""
    if run.uri is None:
        return
    deadline = time.monotonic() + SETTLE_SECONDS
    left = math.inf
    try:
        family = [run, *run.children().values()]
        while (now_left := sum(one.left() for one in family)) < left and time.monotonic() < deadline:
            if run.ship(2 * mlflow.PATIENCE_SECONDS):
                return
            left = now_left
    except (OSError, StorageError):  # nobody can tell how many: the storage is gone
        say(f"MLflow has not got all entries yet; to ship them: {sync_command(run)}")
    else:
        say(f"MLflow has not got {now_left:,} entries yet; to ship them: {sync_command(run)}")


def runs(directory: str | Path, uri: str | None = None) -> list[Run]:
    """Every run whose journal lies in or below a directory, parents first; bound for `uri`, or where it belongs."""
    root = storage.absolute(directory)
    if storage.is_remote(root):
        from pyarrow.fs import FileSelector

        system, inner = storage.file_system(root)
        every = system.get_file_info(FileSelector(inner, allow_not_found=True, recursive=True))
        files = [root + info.path.removeprefix(inner) for info in every if info.base_name == journal.RUN]
    else:
        files = [str(file) for file in Path(root).rglob(journal.RUN)]
    found = sorted(file.rpartition("/")[0] for file in files)
    return [Run(where, uri or journal.facts(where).uri) for where in found]


def problem(uri: str) -> str | None:
    """Why the MLflow of a uri cannot be used, and the way out; None if it can."""
    return mlflow.server(uri).problem(mlflow.PATIENCE_SECONDS)


def how_to_look(section: TrackingConfig) -> str | None:
    """The command that opens MLflow's page, or its address."""
    if section.uri is None:
        return None
    if section.uri.startswith("http"):
        return shown(section.uri)
    return f"{sys.executable} -m mlflow ui --backend-store-uri {shown(section.uri)}"


def compare(run: Run) -> str | None:
    """Link the page that compares the trials of a sweep from the sweep's own page, as its description.

    Its address; a path below MLflow's where that is not known: of a database. None if MLflow has not got the trials.
    """
    if run.uri is None or not run.directory:
        return None
    experiment_id = mlflow.server(run.uri).experiment_id(journal.facts(run.directory).run["experiment"])
    trials = [child.run_id for child in run.children().values()]
    if experiment_id is None or not trials or None in trials:
        return None
    listed = [quote(json.dumps(ids, separators=(",", ":"))) for ids in (trials, [experiment_id])]
    # Without the last one MLflow 3 shows the side of its page that is about agents.
    path = f"#/compare-runs?runs={listed[0]}&experiments={listed[1]}&workflowType=machine_learning"
    run.tags({NOTE: f"[Compare the trials]({path})"})
    run.ship(mlflow.PATIENCE_SECONDS)
    return f"{shown(run.uri).rstrip('/')}/{path}" if run.uri.startswith("http") else f"/{path}"


def _origin(verb: str | None) -> dict[str, str]:
    """Tags that tell where a run is from: the command, the commit that is checked out here, the Ray job."""
    tags = {SOURCE: f"raylm {verb}", "mlflow.source.type": "LOCAL"} if verb else {}
    with contextlib.suppress(OSError):  # no git here
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            tags[COMMIT] = found.stdout.strip()
    if job := _ray_job():
        tags[JOB] = job
    return tags


def _ray_job() -> str | None:
    """The id under which this command was submitted to Ray, if it was."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return submitted.get("metadata", {}).get("job_submission_id")


def _connect(uri: str, experiment: str, metric: str) -> bool:
    try:
        # A new database takes MLflow 4 s, on a busy machine 20.
        with console.waiting(f"Opening MLflow at {shown(uri)}"):
            return mlflow.server(uri).connect(
                experiment, metric, 60 if uri.startswith("sqlite") else mlflow.PATIENCE_SECONDS
            )
    except Unusable as error:
        raise _unusable(uri, str(error)) from error


def _unusable(uri: str, why: str) -> ConfigError:
    return ConfigError(
        f"tracking.uri={shown(uri)} cannot be used: {why}; give sqlite:///FILE, or the address of a server "
        "(http://HOST:PORT) or of a database (postgresql, mysql or mssql); tracking.uri=null tracks nothing",
        where="tracking.uri",
    )
