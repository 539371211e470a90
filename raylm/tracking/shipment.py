"""A journal -> its run in MLflow.

Nothing is shipped twice. What MLflow has is noted once it has answered; where that is in doubt, since a process was
killed or a call failed, MLflow is asked. A point that was on its way all the same is stored once: MLflow's tables know
it by run, name, step, value and time, and all of these stand in the journal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import storage
from raylm.tracking import journal, models
from raylm.tracking.failures import Busy, Deleted, NotStored, kind, shown
from raylm.tracking.journal import Place, Point, RunState, UploadedOffsets

if TYPE_CHECKING:
    from raylm.tracking.mlflow import Server

PARENT = "mlflow.parentRunId"  # MLflow's own tag, by which its page nests runs
CONTEXT = "mlflow.data.context"
JOURNAL = "raylm.journal"
"""The tag by which the run of a journal is found where its id was not noted."""

MOST_METRICS, MOST_OTHERS = 1000, 100  # that MLflow takes in a call
LONGEST_PAUSE_SECONDS = 30.0
"""Between two looks at a journal that does not grow, of a trial that waits."""

LONGEST_TAG = 5000  # characters; MLflow 3 takes 8000, older servers 5000


class Shipment:
    """A journal, and what MLflow has of it."""

    def __init__(self, directory: str, server: Server):
        self.directory = directory
        self.server = server
        self.is_over = False
        """Whether nothing more is expected."""
        self._shipped: tuple[int, int] | None = None
        """journal.sizes when MLflow had everything."""
        self._is_expected = True
        self._pause = 0.0
        self._next_look = 0.0
        """In seconds of time.monotonic, as the pause before it."""
        self._begin(self._noted())

    def expect(self) -> None:
        """There may be something new: look at once."""
        self._is_expected = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to look what is new: a look is a request where the journal is remote."""
        return self._is_expected or time.monotonic() >= self._next_look

    def _begin(self, note: UploadedOffsets) -> None:
        """To go on from what is noted."""
        self._note = note
        self._end = note.metrics
        self._owed: dict[Place, Point] = {}
        self._known: set[Place] | None = None  # the points that MLflow has; None: it is to be asked
        self._status: tuple[str, int] | None = None  # that the run has in MLflow, and since when, if known

    def _noted(self) -> UploadedOffsets:
        return journal.note(self.directory, shown(self.server.uri))

    def _write(self, **changes: Any) -> None:
        changed = replace(self._note, **changes)
        if changed != self._note:
            journal.write_note(self.directory, changed)
            self._note = changed

    def ship(self) -> None:
        """Ship whatever MLflow has not. Busy if another process is at it."""
        was_expected, self._is_expected, self._next_look = self._is_expected, False, 0.0
        sizes = journal.sizes(self.directory)
        is_idle = sizes == self._shipped and not was_expected
        if sizes != self._shipped:
            self._ship()
            self._shipped = sizes
        if storage.is_remote(self.directory):
            self._pause = min(2 * self._pause, LONGEST_PAUSE_SECONDS) if is_idle else journal.UPLOAD_SECONDS
            self._next_look = time.monotonic() + self._pause

    def _ship(self) -> None:
        try:
            with self._alone():
                if journal.has_grown(self.directory, self._note):
                    run_id = self.run_id()
                    self._metrics(run_id)
                    self._facts(run_id)
                    self._artifacts(run_id)
                ended = journal.facts(self.directory).status != "RUNNING"
                self.is_over = ended and not journal.pending(self.directory, self._note)
        except FileNotFoundError:  # the run was removed
            self.is_over = True
        except Deleted:
            self._write(**journal.end_offsets(self.directory))
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
        with journal.lock(self.directory) as alone:
            if not alone:
                raise Busy
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
            self._known, self._status = set(), ("RUNNING", about["time"])
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
        """The points that MLflow has. Deleted if it has the run among its deleted ones."""
        client = self.server.client
        found = client.get_run(run_id)
        if found.info.lifecycle_stage == "deleted":
            raise Deleted(f"run {run_id} is deleted")
        return {(key, point.step) for key in found.data.metrics for point in client.get_metric_history(run_id, key)}

    def _facts(self, run_id: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        client = self.server.client
        records, end = journal.log(self.directory, journal.RUN).read(self._note.facts)
        told = RunState().add(records)
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
        if told.status is not None and (told.status, told.time) != self._status:
            if told.status == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            else:  # with a time of its own each time: a trial that waited and went on ends twice
                client.set_terminated(run_id, told.status, told.time)
            self._status = told.status, told.time
        self._write(facts=end)

    def _artifacts(self, run_id: str) -> None:
        records, end = journal.log(self.directory, journal.RUN).read(self._note.artifacts)
        for name, record in RunState().add(records).artifacts.items():
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
                raise NotStored(name, error) from error
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
