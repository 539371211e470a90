"""One MLflow, store or server, and the thread that ships journals to it, and waits where it cannot be reached."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from raylm import console
from raylm.redaction import redacted
from raylm.tracking import journal
from raylm.tracking.failures import CUT_OFF, WRONG_HOST, Busy, Deleted, Unusable, kind, shown
from raylm.tracking.shipment import Shipment

logger = logging.getLogger(__name__)

EXPERIMENT = {  # tags of an experiment that is made here: its page opens on the runs, and not on traces of agents
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
}
METRIC = "mlflow.experiment.primaryMetric.name"

PATIENCE_SECONDS = 5.0
"""How long a command waits for a server before it goes on without."""
FAREWELL_SECONDS = 3.0
"""How long a process that ends waits for a server."""
POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0

ENVIRONMENT = {  # of this process, unless the user says otherwise
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds, of 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # of 7, 4 minutes for a call: the thread has pauses of its own
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class Server:
    """One MLflow store or server as this process knows it, and the thread that ships journals to it."""

    def __init__(self, uri: str):
        # MLflow narrates the creation of its database, and prints a traceback of whatever is tried again here.
        for name, level in (("alembic", logging.WARNING), ("mlflow", logging.ERROR), ("mlflow.store", 100)):
            logging.getLogger(name).setLevel(level)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with console.importing():
            import mlflow  # noqa: F401 - 2 s, here rather than in a thread beside the imports of the training

        self.uri = uri
        self.failure: Exception | None = None
        """Of the last round, since somebody began to wait."""
        self._client: Any = None
        self._experiments: dict[str, str] = {}
        self._question: Callable[[], object] | None = None
        """What is to be asked before anything is shipped."""
        self._refusal: Exception | None = None
        """Why it was not answered."""
        self._shipments: dict[str, Shipment] = {}
        self._changed = threading.Condition()
        self._urgent = self._closing = False
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="raylm-mlflow", daemon=True)
        self._thread.start()

    # What others call ----------------------------------------------------------------------------------------------

    def connect(self, experiment: str, metric: str, timeout_seconds: float) -> bool:
        """Whether the server answers in time. Unusable if it never will."""
        _check_file(self.uri)
        refusal = self._asked(lambda: self.experiment(experiment, metric), timeout_seconds)
        if refusal is None:
            return True
        if self._is_hopeless(refusal):
            raise Unusable(self.reason(refusal)) from refusal
        self.tell(refusal)  # whoever ships asks for it again, and tells what else goes wrong
        return False

    def problem(self, timeout_seconds: float) -> str | None:
        """Why the server does not answer in time, and the way out; None if it does."""
        refusal = self._asked(lambda: self.client.search_experiments(max_results=1), timeout_seconds)
        return None if refusal is None else self._told_of(refusal)

    def watch(self, directory: str) -> None:
        """Ship this journal, and what will be added to it."""
        with self._changed:
            if directory not in self._shipments:
                self._shipments[directory] = Shipment(directory, self)
            self._shipments[directory].expect()

    def ship(self, directories: Sequence[str], timeout_seconds: float) -> bool:
        """Wait until nothing is left of these journals, at most so long; whether nothing is left."""
        for directory in directories:
            self.watch(directory)
        with self._changed:
            self.failure = None  # what went wrong before may be over
        return self._await(lambda: not any(self.left(directory) for directory in directories), timeout_seconds)

    def left(self, directory: str) -> int:
        """How many entries of a journal MLflow has not, as far as is noted."""
        return journal.pending(directory, journal.note(directory, shown(self.uri)))

    def close(self, timeout_seconds: float) -> None:
        """Ship what can be shipped at once, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

    def _asked(self, question: Callable[[], object], timeout_seconds: float) -> Exception | None:
        """Why the server does not answer a question in time; None if it does."""
        with self._changed:
            self._question, self._refusal = question, None
        self._await(lambda: self._question is None or self._refusal is not None, timeout_seconds)
        if self._question is None:
            return None
        self._question = None
        return self._refusal or TimeoutError(f"no answer within {timeout_seconds:g} s")

    def _await(self, done: Callable[[], bool], timeout_seconds: float) -> bool:
        """Whether it is done in time, with the thread kept from pausing for longer than a second."""
        urge = time.monotonic()
        end = urge + timeout_seconds
        with self._changed:
            while not done():
                now = time.monotonic()
                if now >= end or self._closing:
                    return False
                if now >= urge:
                    urge = now + POLL_SECONDS
                    self._urgent = True
                    self._changed.notify_all()
                self._changed.wait(min(urge, end) - now)
        return True

    def tell(self, error: Exception) -> None:
        """Warn of a failure, once for each kind."""
        what = kind(error)
        if what in self._told:
            return
        self._told.add(what)
        later = "; the run goes on, and what MLflow has missed is shipped later"
        logger.warning("%s%s", self._told_of(error), later if what in (*CUT_OFF, "not stored") else "")

    def _told_of(self, error: Exception) -> str:
        """A failure in a sentence, with the way out."""
        place, why = f"MLflow at {shown(self.uri)}", self.reason(error)
        return {
            "unreachable": f"{place} cannot be reached: {why}",
            "denied": f"{place} refuses access: check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, in the environment",
            "wrong host": f"{place} answers {WRONG_HOST!r}: it does not know this name as its own; start it with "
            f"--allowed-hosts {urlsplit(shown(self.uri)).netloc}",
            "not stored": f"{place} does not store artifacts: {why}{getattr(error, 'remedy', '')}",
            "deleted": f"{place}: {why}; it gets no more",
            "missing": f"{place} has lost a run or an experiment, which is made anew: {why}",
        }.get(kind(error), f"{place} refuses an entry: {why}")

    def reason(self, error: Exception) -> str:
        """An error in a few words, without a secret."""
        text = str(error).strip()
        known = re.search(r"\[Errno -?\d+\] [\w ]+|timed out|too many \d+ error responses|error code \d+", text)
        if known:
            return known[0]
        text = redacted(text.replace(self.uri, shown(self.uri)))
        return re.split(r"\n|(?<=\w[.;]) ", text)[0].rstrip(".;") or type(error).__name__

    def _is_hopeless(self, error: Exception) -> bool:
        """Whether waiting cannot help: a scheme that MLflow does not know, a driver that is missing, a deleted name."""
        if kind(error) in ("missing", "refused", "deleted") or type(error).__name__ == "InvalidUrlException":
            return True
        if isinstance(error, TimeoutError):
            return False
        busy = getattr(error, "error_code", "") == "TEMPORARILY_UNAVAILABLE" or "OperationalError" in repr(error)
        return not self.uri.startswith("http") and not busy

    # What the thread does ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        pause = POLL_SECONDS
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._urgent or self._closing, pause)
                closing, self._urgent = self._closing, False
            failure = self._round()
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if failure else POLL_SECONDS
            with self._changed:
                self.failure = failure
                self._changed.notify_all()

    def _round(self) -> Exception | None:
        """Ship what is there; the first failure, if any."""
        failure: Exception | None = None
        if (question := self._question) is not None:
            try:
                question()
                self._question = None
            except Exception as error:
                self._refusal = error  # of which whoever asked tells
                return error
        with self._changed:
            shipments = [shipment for shipment in self._shipments.values() if shipment.is_due]
        for shipment in shipments:
            try:
                shipment.ship()
            except Busy:
                continue
            except Exception as error:
                self.tell(error)
                failure = failure or error
                if kind(error) in CUT_OFF:
                    break
            if shipment.is_over:
                with self._changed:
                    self._shipments.pop(shipment.directory, None)
        return failure

    @property
    def client(self) -> Any:
        if self._client is None:
            from mlflow import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
        return self._client

    def experiment_id(self, name: str) -> str | None:
        """The id of the MLflow experiment of that name, if it was asked for before."""
        return self._experiments.get(name)

    def experiment(self, name: str, metric: str) -> str:
        """The id of the MLflow experiment of that name; if it is not there it is made, to compare runs by a metric."""
        if name not in self._experiments:
            found = self.client.get_experiment_by_name(name)
            if found is not None and found.lifecycle_stage == "deleted":
                raise Deleted(f"its experiment {name} is deleted")
            if found is not None:
                self._experiments[name] = found.experiment_id
            else:
                self._experiments[name] = self._create_experiment(name, metric)
        return self._experiments[name]

    def _create_experiment(self, name: str, metric: str) -> str:
        artifacts = None
        if self.uri.startswith("sqlite:///"):  # else a directory wherever the command happened to run
            artifacts = os.path.join(os.path.dirname(self.uri.removeprefix("sqlite:///")), "mlartifacts")
        try:
            return self.client.create_experiment(name, artifacts, {**EXPERIMENT, METRIC: metric})
        except Exception:
            found = self.client.get_experiment_by_name(name)  # somebody else was faster
            if found is None:
                raise
            return found.experiment_id

    def forget(self) -> None:
        """The store was replaced by another: its experiments are not the ones that were found."""
        self._experiments.clear()

    def shipment(self, directory: str) -> Shipment:
        return self._shipments.get(directory) or Shipment(directory, self)


def _check_file(uri: str) -> None:
    """Unusable if SQLite cannot open the file of a uri: MLflow would try for minutes."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or path == ":memory:":
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.DatabaseError) as error:
        if "locked" not in str(error):
            raise Unusable(str(error)) from error


_servers: dict[tuple[int, str], Server] = {}


def server(uri: str) -> Server:
    """The one of this process: a fork has no threads."""
    key = os.getpid(), uri
    if key not in _servers:
        _servers[key] = Server(uri)
    return _servers[key]


@atexit.register
def _farewell() -> None:
    for (process, _), server in _servers.items():
        if process == os.getpid():
            server.close(FAREWELL_SECONDS)
