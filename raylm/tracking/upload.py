"""The upload of one journal to its run in MLflow.

Nothing is uploaded twice. Offsets are recorded once MLflow has answered; where the outcome is in doubt, because a
process was killed or a call failed, MLflow is asked. A point that is sent twice all the same is stored once: MLflow's
tables have run, name, step, value and time as a key, and the journal keeps all of them.
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
from typing import Any

from raylm import storage
from raylm.tracking import comparison, journal, models
from raylm.tracking.failures import Busy, Deleted, NotStored, display_uri, kind
from raylm.tracking.journal import MetricKey, MetricValue, RunState, UploadedOffsets
from raylm.tracking.server import Server

PARENT_TAG = "mlflow.parentRunId"  # MLflow's own tag: its page nests runs by it
CONTEXT_TAG = "mlflow.data.context"
SWEEP_TAG = "raylm.sweep"
"""The name of the sweep that a trial belongs to."""
JOURNAL_TAG = "raylm.journal"
"""The journal's id, by which its run is found if MLflow's id was not recorded."""

MAX_METRICS, MAX_OTHERS = 1000, 100  # that MLflow takes in a call
MAX_PAUSE_SECONDS = 30.0
"""Between two checks of a remote journal that does not grow, such as a paused trial's."""

MAX_TAG_LENGTH = 5000  # characters; MLflow 3 takes 8000, older servers 5000


class Upload:
    """A journal, and how much of it MLflow has."""

    def __init__(self, directory: str, server: Server, run_id_of: Callable[[str], str]):
        """`run_id_of`: directory of the parent's journal -> MLflow's id of the parent's run."""
        self.directory = directory
        self.server = server
        self.is_finished = False
        """Whether nothing more is expected."""
        self._run_id_of = run_id_of
        self._uploaded_sizes: tuple[int, int] | None = None
        """journal.sizes when everything was uploaded."""
        self._check_soon = True
        self._pause = 0.0
        self._next_check = 0.0
        """In seconds by time.monotonic."""
        self._continue_from(self._recorded_offsets())

    def check_soon(self) -> None:
        """Check the journal in the next round, because it may have grown."""
        self._check_soon = True

    @property
    def is_due(self) -> bool:
        """Whether it is time to check the journal: where it is remote, a check is a request."""
        return self._check_soon or time.monotonic() >= self._next_check

    def _continue_from(self, offsets: UploadedOffsets) -> None:
        self._offsets = offsets
        self._end = offsets.metrics
        self._unsent: dict[MetricKey, MetricValue] = {}
        self._stored: set[MetricKey] | None = None  # the points that MLflow has; None: MLflow has to be asked
        self._status: tuple[str, int] | None = None  # of the run in MLflow, and since when, if known

    def _recorded_offsets(self) -> UploadedOffsets:
        return journal.uploaded_offsets(self.directory, display_uri(self.server.uri))

    def _record(self, **changes: Any) -> None:
        changed = replace(self._offsets, **changes)
        if changed != self._offsets:
            journal.write_uploaded_offsets(self.directory, changed)
            self._offsets = changed

    def run(self) -> None:
        """Upload whatever is pending. Busy if another process is doing so."""
        was_asked_for, self._check_soon, self._next_check = self._check_soon, False, 0.0
        sizes = journal.sizes(self.directory)
        is_idle = sizes == self._uploaded_sizes and not was_asked_for
        if sizes != self._uploaded_sizes:
            self._upload()
            self._uploaded_sizes = sizes
        if storage.is_remote(self.directory):
            self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS) if is_idle else journal.REWRITE_SECONDS
            self._next_check = time.monotonic() + self._pause

    def _upload(self) -> None:
        try:
            with self._locked():
                if journal.has_grown(self.directory, self._offsets):
                    run_id = self._find_or_create_run()
                    self._upload_metrics(run_id)
                    self._upload_entries(run_id)
                    self._upload_artifacts(run_id)
                has_ended = journal.run_state(self.directory).status != "RUNNING"
                self.is_finished = has_ended and not journal.pending(self.directory, self._offsets)
        except FileNotFoundError:  # the run's directory was removed
            self.is_finished = True
        except Deleted:
            self._record(**journal.end_offsets(self.directory))
            raise
        except Exception as error:
            self._stored = None
            if kind(error) == "missing":  # this is another store than the one that had the run
                self.server.forget_experiments()
                self._record(run_id=None, experiment_id=None, entries=0, artifacts=0, metrics=0)
                self._continue_from(self._offsets)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with journal.lock(self.directory) as is_ours:
            if not is_ours:
                raise Busy
            if (recorded := self._recorded_offsets()) != self._offsets:  # another process has uploaded meanwhile
                self._continue_from(recorded)
            yield

    def run_id(self) -> str:
        """MLflow's id of this journal's run, which is created if it does not exist. Busy as `run`."""
        with self._locked():
            return self._find_or_create_run()

    def _find_or_create_run(self) -> str:
        if self._offsets.run_id is not None and self._offsets.experiment_id is not None:
            return self._offsets.run_id
        from mlflow.entities import ViewType

        run = journal.run_state(self.directory).run
        experiment_id = self.server.experiment_id(run["experiment"], run["metric"])
        existing = self.server.client.search_runs(
            [experiment_id], f"tags.`{JOURNAL_TAG}` = '{run['id']}'", ViewType.ALL, max_results=1
        )
        if existing:
            run_id = existing[0].info.run_id
        else:
            tags = {**run["tags"], JOURNAL_TAG: run["id"], **self._parent_tag(run["is_child"])}
            run_id = self.server.client.create_run(experiment_id, run["time"], tags, run["name"]).info.run_id
            self._stored, self._status = set(), ("RUNNING", run["time"])
        self._record(run_id=run_id, experiment_id=experiment_id)
        return run_id

    def _parent_tag(self, is_child: bool) -> dict[str, str]:
        """The tag that names the parent's run; empty if there is no parent, or its journal was removed."""
        parent = self.directory.rpartition("/")[0]
        if not is_child or not journal.run_state(parent).run:
            return {}
        return {PARENT_TAG: self._run_id_of(parent)}

    def _upload_metrics(self, run_id: str) -> None:
        from mlflow.entities import Metric

        records, end = journal.json_lines(self.directory, journal.METRICS_FILE).read(self._end)
        self._end = end
        journal.apply_metrics(records, self._unsent)
        if self._unsent and self._stored is None:
            self._stored = self._stored_points(run_id)
        stored = self._stored or set()
        points = [
            Metric(name, value, time, step)
            for (name, step), (value, time) in self._unsent.items()
            if (name, step) not in stored and math.isfinite(value)  # MLflow turns infinity into 1.8e308
        ]
        for start in range(0, len(points), MAX_METRICS):
            self._log_batch(self.server.client.log_batch, run_id, metrics=points[start : start + MAX_METRICS])
        stored.update(self._unsent)
        self._unsent.clear()
        self._record(metrics=end)

    def _stored_points(self, run_id: str) -> set[MetricKey]:
        """The points that MLflow has. Deleted if the run is among MLflow's deleted ones."""
        client = self.server.client
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "deleted":
            raise Deleted(f"run {run_id} is deleted")
        return {(name, point.step) for name in run.data.metrics for point in client.get_metric_history(run_id, name)}

    def _upload_entries(self, run_id: str) -> None:
        """Parameters, tags, datasets, the view that compares trials, and status."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        client = self.server.client
        records, end = journal.json_lines(self.directory, journal.RUN_FILE).read(self._offsets.entries)
        state = RunState().add(records)
        params = [Param(key, value) for key, value in state.parameters.items()]
        experiment_id = self._offsets.experiment_id
        assert experiment_id is not None, "known since the run was found"
        run = journal.run_state(self.directory).run
        link = comparison.comparison_path(experiment_id, run["name"])
        tags = [
            RunTag(key, value.replace(f"({comparison.LINK})", f"({link})")[:MAX_TAG_LENGTH])
            for key, value in state.tags.items()
        ]
        datasets = []
        for (name, digest), record in state.datasets.items():
            source, profile = json.dumps({"uri": record["source"]}), json.dumps(record["profile"])
            dataset = Dataset(name, digest, record["scheme"], source, profile=profile)
            datasets.append(DatasetInput(dataset, [InputTag(CONTEXT_TAG, record["context"])]))
        for start in range(0, len(params), MAX_OTHERS):
            self._log_batch(client.log_batch, run_id, params=params[start : start + MAX_OTHERS])
        for start in range(0, len(tags), MAX_OTHERS):
            self._log_batch(client.log_batch, run_id, tags=tags[start : start + MAX_OTHERS])
        if datasets:  # MLflow itself skips those it has
            self._log_batch(client.log_inputs, run_id, datasets=datasets)
        if state.comparison is not None:
            trials = f"tags.`{SWEEP_TAG}` = '{run['name']}'"
            view = comparison.view_state(trials=trials, **state.comparison)
            try:
                client.set_experiment_tag(experiment_id, f"{comparison.VIEW_TAG}{run['name']}", view)
            except Exception as error:
                if kind(error) != "refused":
                    raise
                self.server.warn(error)
        if state.status is not None and (state.status, state.time) != self._status:
            if state.status == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            else:  # each finish has its own time: a trial that was paused and resumed has two
                client.set_terminated(run_id, state.status, state.time)
            self._status = state.status, state.time
        self._record(entries=end)

    def _upload_artifacts(self, run_id: str) -> None:
        records, end = journal.json_lines(self.directory, journal.RUN_FILE).read(self._offsets.artifacts)
        for name, record in RunState().add(records).artifacts.items():
            try:
                if "text" in record:
                    self.server.client.log_text(run_id, record["text"], name)
                elif "file" in record:
                    self._upload_file(run_id, name)
                else:
                    self._upload_metrics(run_id)  # those logged since: MLflow links them to the model
                    models.log(self.server.client, run_id, self.directory, record)
            except Exception as error:
                if kind(error) == "refused":
                    self.server.warn(error)
                    continue
                raise NotStored(name, error) from error
        self._record(artifacts=end)

    def _upload_file(self, run_id: str, name: str) -> None:
        """Upload a file as it is now; one that was removed is skipped."""
        content = storage.read(f"{self.directory}/{name}")
        if content is None:
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch, os.path.basename(name))
            copy.write_bytes(content)
            self.server.client.log_artifact(run_id, str(copy), os.path.dirname(name) or None)

    def _log_batch(self, log: Callable[..., None], run_id: str, **entries: list[Any]) -> None:
        """Log a batch; if it is refused, each half by itself, so that only an entry that MLflow never takes is lost."""
        try:
            log(run_id, **entries)
        except Exception as error:
            if kind(error) != "refused":
                raise
            self._stored_points(run_id)  # Deleted, if that is why
            ((kind_of_entry, batch),) = entries.items()
            if len(batch) == 1:
                self.server.warn(error)
                return
            middle = len(batch) // 2
            self._log_batch(log, run_id, **{kind_of_entry: batch[:middle]})
            self._log_batch(log, run_id, **{kind_of_entry: batch[middle:]})
