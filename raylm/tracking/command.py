"""What commands do with runs: start them, find them, wait for their upload, and name the page to open."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from raylm import console, storage, timeline
from raylm.config import TrackingConfig
from raylm.errors import ConfigError, StorageError
from raylm.tracking import comparison, journal, uploader
from raylm.tracking.failures import Unusable, display_uri
from raylm.tracking.run import COMMIT_TAG, JOB_TAG, SOURCE_TAG, Run, start_run, sync_command

logger = logging.getLogger(__name__)

COMMAND_TAG = "raylm.command"
DEFAULT_ADDRESS = "http://127.0.0.1:5000"
"""The address of the server that `mlflow server` starts."""

UPLOAD_SECONDS = 60.0
"""How long a command waits at its end while an upload makes progress."""


def start(
    section: TrackingConfig,
    *,
    experiment: str,
    name: str,
    tags: Mapping[str, Any],
    directory: str | Path,
    metric: str = "best/eval_perplexity",
    waits: bool = True,
) -> Run:
    """Start the run that has its journal in `directory`: a new one called `name`, or the existing one, which resumes.

    It belongs to the section's MLflow experiment, by default `experiment`. MLflow's page of a new experiment compares
    the runs by `metric`. If a server does not answer within seconds there is a warning, and the run starts without it;
    a tracking.uri that can never work is a ConfigError.

    With waits=False MLflow, which takes 2 to 20 s, is opened beside the work of the caller: `problem_of` is then that
    ConfigError, and the caller calls `wait_until_open`.
    """
    experiment = section.experiment or experiment
    if section.uri is not None:
        check_uri(section.uri)
        storage.check_stays("tracking.uri", display_uri(section.uri))
    run = Run(storage.absolute(directory), section.uri)
    _opening.pop(run.directory, None)  # of an earlier start in this process
    opens_beside = not waits and section.uri is not None and section.uri.startswith(("sqlite:", "http://", "https://"))
    if opens_beside:
        _check_file(run)
    is_connected = section.uri is not None and not opens_beside and _connect(section.uri, experiment, metric)
    all_tags = {**_origin(tags.get(COMMAND_TAG)), **{key: str(value) for key, value in tags.items()}}
    start_run(run, experiment=experiment, metric=metric, name=name, tags=all_tags, is_child=False)
    if opens_beside:
        _open_beside(run, experiment, metric)
    if is_connected:
        run.upload(uploader.TIMEOUT_SECONDS)
    return run


_opening: dict[str, Future[None]] = {}
"""Directory of a run -> MLflow being opened for it by `start`."""


def _open_beside(run: Run, experiment: str, metric: str) -> None:
    """Have a thread open MLflow and create the run there."""
    opening = _opening[run.directory] = Future()

    def work() -> None:
        try:
            with timeline.phase("Opening MLflow"):
                if _connect(str(run.uri), experiment, metric, is_shown=False):
                    run.upload(uploader.TIMEOUT_SECONDS)
            opening.set_result(None)
        except Exception as error:
            opening.set_exception(error)

    threading.Thread(target=work, name="raylm-open", daemon=True).start()


def problem_of(run: Run) -> BaseException | None:
    """Why MLflow could not be opened for a run, as far as it is known; None if there is no reason."""
    opening = _opening.get(run.directory)
    return opening.exception() if opening is not None and opening.done() else None


def wait_until_open(run: Run) -> None:
    """Wait until MLflow is open, or does not answer in time; ConfigError if it never will."""
    if run.directory in _opening:
        _opening[run.directory].result()


def check_uri(uri: str) -> None:
    """ConfigError for a URI that cannot be an MLflow's: an empty one, localhost:5000, a directory."""
    is_address = "://" in uri or uri.startswith(("sqlite:", "databricks", "uc"))
    if not is_address and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
        raise _unusable(uri, "it is not the address of a server or a database")


def wait_for_upload(run: Run) -> None:
    """Wait at the end of a command while the upload makes progress; else warn with the command that completes it."""
    if run.uri is None or problem_of(run) is not None:
        return
    deadline = time.monotonic() + UPLOAD_SECONDS
    before = math.inf
    try:
        runs = [run, *run.trials().values()]
        while (pending := sum(each.pending() for each in runs)) < before and time.monotonic() < deadline:
            if run.upload(2 * uploader.TIMEOUT_SECONDS):
                return
            before = pending
    except (OSError, StorageError):  # without the storage the number of entries is unknown
        logger.warning("some entries are not in MLflow yet; upload them with: %s", sync_command(run))
    else:
        is_missing = (
            "1 entry is not in MLflow yet; upload it"
            if pending == 1
            else f"{pending:,} entries are not in MLflow yet; upload them"
        )
        logger.warning("%s with: %s", is_missing, sync_command(run))


def find_runs(directory: str | Path, uri: str | None = None) -> list[Run]:
    """Every run with a journal in or below a directory, parents first, for upload to `uri` or to its own MLflow."""
    root = storage.absolute(directory)
    if storage.is_remote(root):
        from pyarrow.fs import FileSelector

        system, inner = storage.file_system(root)
        infos = system.get_file_info(FileSelector(inner, allow_not_found=True, recursive=True))
        files = [root + info.path.removeprefix(inner) for info in infos if info.base_name == journal.RUN_FILE]
    else:
        files = [str(file) for file in Path(root).rglob(journal.RUN_FILE)]
    directories = sorted(file.rpartition("/")[0] for file in files)
    return [Run(directory, uri or journal.run_state(directory).uri) for directory in directories]


def newest(runs: Iterable[Run]) -> Run | None:
    """The training or sweep that was started last; None if there is none."""
    started = [(journal.run_state(run.directory).run, run) for run in runs]
    parents = [(attributes["time"], run) for attributes, run in started if attributes and not attributes["is_child"]]
    return max(parents, key=lambda pair: pair[0], default=(0, None))[1]


def problem(uri: str) -> str | None:
    """Why the MLflow of a uri cannot be used, and the way out; None if it can."""
    return uploader.get(uri).problem(uploader.TIMEOUT_SECONDS)


def how_to_open(uri: str | None, path: str | None, page: str) -> dict[str, str]:
    """Name -> command to run or address to open, in order, to see a page of MLflow, which is called `page`.

    For a server it is only the address; for a database the command that starts a server comes first. `path` is
    `Run.path`: None, before MLflow has been reached, leads to the list of experiments.
    """
    if uri is None:
        return {}
    path = path or f"#/experiments?{comparison.ML_PAGES}"
    if uri.startswith("http"):
        return {page: f"{display_uri(uri).rstrip('/')}/{path}"}
    command = f"{sys.executable} -m mlflow server --backend-store-uri {shlex.quote(display_uri(uri))}"
    return {"start MLflow": command, page: f"{DEFAULT_ADDRESS}/{path}"}


def _origin(command: str | None) -> dict[str, str]:
    """Tags that say where a run comes from: the command, the commit that is checked out here, the Ray job."""
    tags = {SOURCE_TAG: f"raylm {command}", "mlflow.source.type": "LOCAL"} if command else {}
    with contextlib.suppress(OSError):  # git is not installed
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        if git.returncode == 0:
            tags[COMMIT_TAG] = git.stdout.strip()
    if job := _ray_job():
        tags[JOB_TAG] = job
    return tags


def _ray_job() -> str | None:
    """The id under which this command was submitted to Ray, if it was."""
    job_config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return job_config.get("metadata", {}).get("job_submission_id")


def _check_file(run: Run) -> None:
    """ConfigError if MLflow is a file that cannot be opened."""
    try:
        uploader.get(str(run.uri)).server.check_file()
    except Unusable as error:
        raise _unusable(str(run.uri), str(error)) from error


def _connect(uri: str, experiment: str, metric: str, *, is_shown: bool = True) -> bool:
    uploads = uploader.get(uri)
    # MLflow creates a database in 4 s, on a busy machine in 20 s.
    timeout_seconds = 60.0 if uri.startswith("sqlite") else uploader.TIMEOUT_SECONDS
    is_slow = is_shown and not uploads.has_answered
    try:
        with console.waiting(f"Opening MLflow at {display_uri(uri)}") if is_slow else contextlib.nullcontext():
            return uploads.connect(experiment, metric, timeout_seconds)
    except Unusable as error:
        raise _unusable(uri, str(error)) from error


def _unusable(uri: str, reason: str) -> ConfigError:
    return ConfigError(
        f"tracking.uri={display_uri(uri)} cannot be used: {reason}; give sqlite:///FILE, or the address of a server "
        "(http://HOST:PORT) or of a database (postgresql, mysql or mssql); tracking.uri=null tracks nothing",
        where="tracking.uri",
    )
