"""One MLflow store or server: its client, its experiments, and messages about its failures."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
from typing import Any
from urllib.parse import urlsplit

from raylm import console
from raylm.redaction import redacted
from raylm.tracking.failures import CONNECTION_FAILURES, WRONG_HOST, Deleted, Unusable, display_uri, kind

logger = logging.getLogger(__name__)

EXPERIMENT_TAGS = {  # of an experiment that raylm creates: its page opens on the runs, not on traces of agents
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
}
METRIC_TAG = "mlflow.experiment.primaryMetric.name"

ENVIRONMENT = {  # defaults for this process; variables that the user has set stay
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds; MLflow's default is 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # MLflow's default, 7, takes 4 minutes a call: the upload thread retries
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Server:
    """One MLflow store or server, as this process knows it."""

    def __init__(self, uri: str):
        # MLflow logs each step of creating its database, and a traceback of every call that is retried here.
        for name, level in (("alembic", logging.WARNING), ("mlflow", logging.ERROR), ("mlflow.store", 100)):
            logging.getLogger(name).setLevel(level)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.uri = uri
        self._client: Any = None
        self._experiment_ids: dict[str, str] = {}
        self._warned_of: set[str] = set()

    @property
    def client(self) -> Any:
        """An MlflowClient."""
        if self._client is None:
            with console.importing():
                from mlflow import MlflowClient  # 2 s, in the thread that uploads

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    # Experiments ---------------------------------------------------------------------------------------------------

    def experiment_id(self, name: str, metric: str) -> str:
        """The id of the MLflow experiment of that name, which is created if it does not exist.

        MLflow's page of a new experiment compares the runs by `metric`.
        """
        if name not in self._experiment_ids:
            experiment = self.client.get_experiment_by_name(name)
            if experiment is not None and experiment.lifecycle_stage == "deleted":
                raise Deleted(f"its experiment {name} is deleted")
            self._experiment_ids[name] = (
                self._create_experiment(name, metric) if experiment is None else experiment.experiment_id
            )
        return self._experiment_ids[name]

    def _create_experiment(self, name: str, metric: str) -> str:
        artifacts = None
        if self.uri.startswith("sqlite:///"):  # MLflow's default is relative to the working directory
            artifacts = os.path.join(os.path.dirname(self.uri.removeprefix("sqlite:///")), "mlartifacts")
        try:
            return self.client.create_experiment(name, artifacts, {**EXPERIMENT_TAGS, METRIC_TAG: metric})
        except Exception:
            experiment = self.client.get_experiment_by_name(name)  # another process was faster
            if experiment is None:
                raise
            return experiment.experiment_id

    def forget_experiments(self) -> None:
        """Forget the experiment ids: the store was replaced by another one."""
        self._experiment_ids.clear()

    # Failures ------------------------------------------------------------------------------------------------------

    def check_file(self) -> None:
        """Unusable if SQLite cannot open the file of the URI: MLflow would try for minutes."""
        path = self.uri.removeprefix("sqlite:///")
        if path == self.uri or path == ":memory:":
            return
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA schema_version")
        except (OSError, sqlite3.DatabaseError) as error:
            if "locked" not in str(error):
                raise Unusable(str(error)) from error

    def is_permanent(self, error: Exception) -> bool:
        """Whether waiting cannot help: an unknown URI scheme, a missing driver, a deleted experiment."""
        if kind(error) in ("missing", "refused", "deleted") or type(error).__name__ == "InvalidUrlException":
            return True
        if isinstance(error, TimeoutError):
            return False
        is_busy = getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE" or "OperationalError" in repr(error)
        return not self.uri.startswith("http") and not is_busy

    def warn(self, error: Exception) -> None:
        """Log a failure, once for each kind."""
        failure = kind(error)
        if failure in self._warned_of:
            return
        self._warned_of.add(failure)
        is_retried = failure in (*CONNECTION_FAILURES, "not stored")
        later = "; training continues, missing data is uploaded later" if is_retried else ""
        logger.warning("%s%s", self.message(error), later)

    def message(self, error: Exception) -> str:
        """A failure in a sentence, with the way out."""
        server, reason = f"MLflow at {display_uri(self.uri)}", self.reason(error)
        return {
            "unreachable": f"{server} cannot be reached: {reason}",
            "denied": f"{server} refuses access: check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, in the environment",
            "wrong host": f"{server} answers {WRONG_HOST!r}: this name is not among those it accepts; start it with "
            f"--allowed-hosts {urlsplit(display_uri(self.uri)).netloc}",
            "not stored": f"{server} does not store artifacts: {reason}{getattr(error, 'remedy', '')}",
            "deleted": f"{server}: {reason}; nothing more is uploaded to it",
            "missing": f"{server} has lost a run or an experiment, which is created again: {reason}",
        }.get(kind(error), f"{server} refuses an entry: {reason}")

    def reason(self, error: Exception) -> str:
        """An error in a few words, without a secret."""
        text = str(error).strip()
        known = re.search(r"\[Errno -?\d+\] [\w ]+|timed out|too many \d+ error responses|error code \d+", text)
        if known:
            return known[0]
        text = redacted(text.replace(self.uri, display_uri(self.uri)))
        return re.split(r"\n|(?<=\w[.;]) ", text)[0].rstrip(".;") or type(error).__name__
