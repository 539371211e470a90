"""Journals -> MLflow: a thread that ships what MLflow has not, and waits where MLflow cannot be reached.

Nothing is shipped twice. What MLflow has is noted once it has answered; where that is in doubt, since a process was
killed or a call failed, MLflow is asked. A point that was on its way all the same is stored once: MLflow's tables know
it by run, name, step, value and time, and all of these stand in the journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raylm import cli, storage
from raylm.tracking import journal, models
from raylm.tracking.journal import Facts, Note, Place, Point

PARENT = "mlflow.parentRunId"  # MLflow's own tag, by which its page nests runs
CONTEXT = "mlflow.data.context"
EXPERIMENT = {  # tags of an experiment that is made here: its page opens on the runs, and not on traces of agents
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
}
METRIC = "mlflow.experiment.primaryMetric.name"
JOURNAL = "raylm.journal"
"""The tag by which the run of a journal is found where its id was not noted."""

POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
MOST_METRICS, MOST_OTHERS = 1000, 100  # that MLflow takes in a call
LONGEST_TAG = 5000  # characters; MLflow 3 takes 8000, older servers 5000

ENVIRONMENT = {  # of this process, unless the user says otherwise
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",  # seconds, of 120
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # of 7, 4 minutes for a call: the thread has pauses of its own
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def kind(error: Exception) -> str:
    """What became of a call to MLflow: only what is `unreachable`, `denied` or `not stored` is worth another try."""
    if isinstance(error, _Deleted | _NotStored | models.Unfit):
        return {_Deleted: "deleted", _NotStored: "not stored", models.Unfit: "refused"}[type(error)]
    code = getattr(error, "error_code", None)
    answer = str(getattr(error, "json", ""))  # a proxy's own, of which MLflow knows no code
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED") or re.search(
        r"\b40[13]\b|unauthori[sz]ed|forbidden", answer, re.IGNORECASE
    ):
        return "denied"
    if code == "RESOURCE_DOES_NOT_EXIST":
        return "missing"
    if code in ("INVALID_PARAMETER_VALUE", "INVALID_STATE") or "error code 413" in str(error):
        return "refused"
    return "unreachable"


def shown(uri: str) -> str:
    """A URI without what may be secret in it: a password, in a web address a name too, and options."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite" or not parts.netloc:
        return uri
    user, _, host = parts.netloc.rpartition("@")
    name = user.partition(":")[0]
    kept = f"{name}@{host}" if name and not parts.scheme.startswith("http") else host
    return parts._replace(netloc=kept, query="", fragment="").geturl()


class Unusable(Exception):
    """A tracking URI that will never work."""


class _Busy(Exception):
    """Another process ships this journal."""


class _Deleted(Exception):
    """The run was deleted in MLflow."""


class _NotStored(Exception):
    """The artifact store, which is another service, did not take an artifact."""


class Server:
    """One MLflow store or server as this process knows it, and the thread that ships journals to it."""

    def __init__(self, uri: str):
        # MLflow narrates the creation of its database, and prints a traceback of whatever is tried again here.
        for name, level in (("alembic", logging.WARNING), ("mlflow", logging.ERROR), ("mlflow.store", 100)):
            logging.getLogger(name).setLevel(level)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401 - 2 s, here rather than in a thread beside the imports of the training

        self.uri = uri
        self.failure: Exception | None = None
        """Of the last round, since somebody began to wait."""
        self._client: Any = None
        self._experiments: dict[str, str] = {}
        self._wanted: tuple[str, str] | None = None
        """An experiment that is to be found before anything is shipped, and its metric."""
        self._refusal: Exception | None = None
        """Why it was not."""
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
        with self._changed:
            self._wanted, self._refusal = (experiment, metric), None
        self._await(lambda: self._wanted is None or self._refusal is not None, timeout_seconds)
        if self._wanted is None:
            return True
        refusal = self._refusal or TimeoutError(f"no answer within {timeout_seconds:g} s")
        self._wanted = None  # whoever ships asks for it again, and tells what else goes wrong
        if self._is_hopeless(refusal):
            raise Unusable(self.reason(refusal)) from refusal
        self.tell(refusal)
        return False

    def watch(self, directory: str) -> None:
        """Ship this journal, and what will be added to it."""
        with self._changed:
            self._shipments.setdefault(directory, Shipment(directory, self))

    def ship(self, directories: Sequence[str], timeout_seconds: float) -> bool:
        """Wait until nothing is left of these journals, at most so long; whether nothing is left."""
        for directory in directories:
            self.watch(directory)
        with self._changed:
            self.failure = None  # what went wrong before may be over
        return self._await(lambda: not any(self.left(directory) for directory in directories), timeout_seconds)

    def left(self, directory: str) -> int:
        """How many entries of a journal MLflow has not, as far as is noted."""
        return journal.left(directory, journal.note(directory, shown(self.uri)))

    def close(self, timeout_seconds: float) -> None:
        """Ship what can be shipped at once, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)

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
        place, why = f"MLflow at {shown(self.uri)}", self.reason(error)
        later = "the run goes on, and what MLflow has missed is shipped later"
        problem = {
            "unreachable": f"{place} cannot be reached: {why}; {later}",
            "denied": f"{place} refuses access: check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
            f"MLFLOW_TRACKING_PASSWORD, in the environment; {later}",
            "not stored": f"{place} does not store artifacts: {why}; {later}",
            "deleted": f"{place}: {why}; it gets no more",
            "missing": f"{place} has lost a run or an experiment, which is made anew: {why}",
        }.get(what, f"{place} refuses an entry: {why}")
        cli.console.print(f"warning: {problem}", style="yellow", markup=False, soft_wrap=True)

    def reason(self, error: Exception) -> str:
        """An error in a few words, without a secret."""
        text = str(error).strip()
        known = re.search(r"\[Errno -?\d+\] [\w ]+|timed out|too many \d+ error responses|error code \d+", text)
        if known:
            return known[0]
        text = re.sub(r"(://)[^/@\s]*@", r"\1", text.replace(self.uri, shown(self.uri)))
        return text.split("\n")[0][:300] or type(error).__name__

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
        if (wanted := self._wanted) is not None:
            try:
                self.experiment(*wanted)
                self._wanted = None
            except Exception as error:
                self._refusal = error  # of which connect tells
                return error
        with self._changed:
            shipments = list(self._shipments.values())
        for shipment in shipments:
            try:
                shipment.ship()
            except _Busy:
                continue
            except Exception as error:
                self.tell(error)
                failure = failure or error
                if kind(error) in ("unreachable", "denied"):
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
                raise _Deleted(f"its experiment {name} is deleted")
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


class Shipment:
    """A journal, and what MLflow has of it."""

    def __init__(self, directory: str, server: Server):
        self.directory = directory
        self.server = server
        self.is_over = False
        """Whether nothing more is expected."""
        self._begin(self._noted())

    def _begin(self, note: Note) -> None:
        """To go on from what is noted."""
        self._note = note
        self._end = note.metrics
        self._owed: dict[Place, Point] = {}
        self._known: set[Place] | None = None  # the points that MLflow has; None: it is to be asked
        self._status: str | None = None  # that the run has in MLflow, if known

    def _noted(self) -> Note:
        return journal.note(self.directory, shown(self.server.uri))

    def _write(self, **changes: Any) -> None:
        changed = replace(self._note, **changes)
        if changed != self._note:
            journal.write_note(self.directory, changed)
            self._note = changed

    def ship(self) -> None:
        """Ship whatever MLflow has not. _Busy if another process is at it."""
        try:
            with self._alone():
                if journal.has_grown(self.directory, self._note):
                    run_id = self.run_id()
                    self._metrics(run_id)
                    self._facts(run_id)
                    self._artifacts(run_id)
                ended = journal.facts(self.directory).status != "RUNNING"
                self.is_over = ended and not journal.left(self.directory, self._note)
        except FileNotFoundError:  # the run was removed
            self.is_over = True
        except _Deleted:
            self._write(**journal.ends(self.directory))
            raise
        except Exception as error:
            self._known = None
            if kind(error) == "missing":  # this is another store than the one that had the run
                self.server.forget()
                self._write(run_id=None, facts=0, artifacts=0, metrics=0)
                self._begin(self._note)
            raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with journal.alone(self.directory) as alone:
            if not alone:
                raise _Busy
            if (noted := self._noted()) != self._note:  # another process has shipped in between
                self._begin(noted)
            yield

    def run_id(self) -> str:
        """The run of this journal in MLflow, which is made if it is not there."""
        if self._note.run_id is not None:
            return self._note.run_id
        from mlflow.entities import ViewType

        about = journal.facts(self.directory).run
        experiment_id = self.server.experiment(about["experiment"], about["metric"])
        found = self.server.client.search_runs(
            [experiment_id], f"tags.`{JOURNAL}` = '{about['id']}'", ViewType.ALL, max_results=1
        )
        if found:
            run_id = found[0].info.run_id
        else:
            tags = {**about["tags"], JOURNAL: about["id"], **self._parent(about["is_child"])}
            run_id = self.server.client.create_run(experiment_id, about["time"], tags, about["name"]).info.run_id
            self._known, self._status = set(), "RUNNING"
        self._write(run_id=run_id)
        return run_id

    def _parent(self, is_child: bool) -> dict[str, str]:
        """The tag that names the parent's run; nothing if there is no parent, or its journal is gone."""
        directory = self.directory.rpartition("/")[0]
        if not is_child or not journal.facts(directory).run:
            return {}
        parent = self.server.shipment(directory)
        with parent._alone():
            return {PARENT: parent.run_id()}

    def _metrics(self, run_id: str) -> None:
        from mlflow.entities import Metric

        records, end = journal.log(self.directory, journal.METRICS).read(self._end)
        self._end = end
        journal.apply(records, self._owed)
        if self._owed and self._known is None:
            self._known = self._ask(run_id)
        known = self._known or set()
        points = [
            Metric(key, value, time, step)
            for (key, step), (value, time) in self._owed.items()
            if (key, step) not in known and math.isfinite(value)  # MLflow makes 1.8e308 of infinity
        ]
        for start in range(0, len(points), MOST_METRICS):
            self._send(self.server.client.log_batch, run_id, metrics=points[start : start + MOST_METRICS])
        known.update(self._owed)
        self._owed.clear()
        self._write(metrics=end)

    def _ask(self, run_id: str) -> set[Place]:
        """The points that MLflow has. _Deleted if it has the run among its deleted ones."""
        client = self.server.client
        found = client.get_run(run_id)
        if found.info.lifecycle_stage == "deleted":
            raise _Deleted(f"run {run_id} is deleted")
        return {(key, point.step) for key in found.data.metrics for point in client.get_metric_history(run_id, key)}

    def _facts(self, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        client = self.server.client
        records, end = journal.log(self.directory, journal.RUN).read(self._note.facts)
        told = Facts().add(records)
        params = [Param(key, value) for key, value in told.parameters.items()]
        tags = [RunTag(key, value[:LONGEST_TAG]) for key, value in told.tags.items()]
        datasets = []
        for (name, digest), one in told.datasets.items():
            source, profile = json.dumps({"uri": one["source"]}), json.dumps(one["profile"])
            dataset = Dataset(name, digest, one["scheme"], source, profile=profile)
            datasets.append(DatasetInput(dataset, [InputTag(CONTEXT, one["context"])]))
        for start in range(0, len(params), MOST_OTHERS):
            self._send(client.log_batch, run_id, params=params[start : start + MOST_OTHERS])
        for start in range(0, len(tags), MOST_OTHERS):
            self._send(client.log_batch, run_id, tags=tags[start : start + MOST_OTHERS])
        if datasets:  # of those that it has MLflow itself takes no second one
            self._send(client.log_inputs, run_id, datasets=datasets)
        if told.status not in (None, self._status):
            if told.status == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            else:
                client.set_terminated(run_id, told.status, told.time)
            self._status = told.status
        self._write(facts=end)

    def _artifacts(self, run_id: str) -> None:
        records, end = journal.log(self.directory, journal.RUN).read(self._note.artifacts)
        for name, record in Facts().add(records).artifacts.items():
            try:
                if "text" in record:
                    self.server.client.log_text(run_id, record["text"], name)
                elif "file" in record:
                    self._file(run_id, name)
                else:
                    self._metrics(run_id)  # those that were told between the two readings: the model has them too
                    models.log(self.server.client, run_id, self.directory, record)
            except Exception as error:
                if kind(error) == "refused":
                    self.server.tell(error)
                    continue
                raise _NotStored(f"{name}: {error}") from error
        self._write(artifacts=end)

    def _file(self, run_id: str, name: str) -> None:
        """A file as it is now; one that was removed is wanted no more."""
        content = storage.read(f"{self.directory}/{name}")
        if content is None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, os.path.basename(name))
            copy.write_bytes(content)
            self.server.client.log_artifact(run_id, str(copy), os.path.dirname(name) or None)

    def _send(self, log: Callable[..., None], run_id: str, **entries: list[Any]) -> None:
        """Log a batch; of one that is refused each half by itself, to leave out the entry that MLflow never takes."""
        try:
            log(run_id, **entries)
        except Exception as error:
            if kind(error) != "refused":
                raise
            self._ask(run_id)
            ((name, batch),) = entries.items()
            if len(batch) == 1:
                self.server.tell(error)
                return
            middle = len(batch) // 2
            self._send(log, run_id, **{name: batch[:middle]})
            self._send(log, run_id, **{name: batch[middle:]})


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
