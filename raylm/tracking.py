"""MLflow: one run per training, one parent per sweep with a child per trial; or nothing at all.

A Run is an id, not a context: it travels to the worker that logs, and is ended by the process that began it, since a
killed worker ends nothing. Every call names its run: MLflow's "active run" is one per process and trials share theirs.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raylm.config import TrackingConfig
from raylm.errors import ConfigError

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT = "mlflow.parentRunId"  # MLflow's own tags, by which its page nests runs and names them
NAME = "mlflow.runName"
TRIAL = "raylm.trial"

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Run:
    """One MLflow run, or nothing if `uri` is None: then every call returns at once."""

    uri: str | None = None
    experiment_id: str = ""
    run_id: str | None = None

    def parameters(self, values: Mapping[str, Any]) -> None:
        if self.uri is not None:
            from mlflow.entities import Param

            pairs = [
                Param(key, str(value)[:6000]) for key, value in values.items()
            ]  # MLflow's limits: 6000 characters,
            for start in range(0, len(pairs), 100):  # 100 a call
                _client(self.uri).log_batch(self.run_id, params=pairs[start : start + 100])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Finite values only: MLflow stores infinity as 1.8e308, which no chart survives."""
        if self.uri is not None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            points = [Metric(key, float(value), now, step) for key, value in values.items() if math.isfinite(value)]
            _client(self.uri).log_batch(self.run_id, metrics=points)

    def tags(self, values: Mapping[str, Any]) -> None:
        if self.uri is not None:
            from mlflow.entities import RunTag

            _client(self.uri).log_batch(self.run_id, tags=[RunTag(key, str(value)) for key, value in values.items()])

    def text(self, text: str, name: str) -> None:
        """Keep a text as an artifact file."""
        if self.uri is not None:
            _client(self.uri).log_text(self.run_id, text, name)

    def end(self, status: Status = "FINISHED") -> None:
        if self.uri is not None:
            _client(self.uri).set_terminated(self.run_id, status=status)

    def end_if_running(self, status: Status) -> None:
        if self.uri is not None and _client(self.uri).get_run(self.run_id).info.status == "RUNNING":
            self.end(status)

    def child(self, trial_id: str) -> Run:
        """The run of a trial under this one: the one it had before, if it was interrupted, else a new one."""
        if self.uri is None:
            return self
        found = self.children().get(trial_id)
        if found is not None:
            _client(self.uri).update_run(found.run_id, status="RUNNING")
            return found
        return self._create({NAME: trial_id, PARENT: self.run_id, TRIAL: trial_id})

    def children(self) -> dict[str, Run]:
        """Trial id -> run of every trial that has begun."""
        if self.uri is None:
            return {}
        found: dict[str, Run] = {}
        token = None
        while True:
            page = _client(self.uri).search_runs(
                [self.experiment_id], f"tags.`{PARENT}` = '{self.run_id}'", page_token=token
            )
            for run in page:
                found[run.data.tags[TRIAL]] = Run(self.uri, self.experiment_id, run.info.run_id)
            token = page.token
            if not token:
                return found

    def _create(self, tags: Mapping[str, Any]) -> Run:
        created = _client(self.uri).create_run(
            self.experiment_id, tags={key: str(value) for key, value in tags.items()}, run_name=tags[NAME]
        )
        return Run(self.uri, self.experiment_id, created.info.run_id)


def start(section: TrackingConfig, *, experiment: str, name: str, tags: Mapping[str, Any]) -> Run:
    """A new run called `name` in the section's MLflow experiment, by default `experiment`."""
    if section.uri is None:
        return Run()
    try:
        experiment_id = _experiment_id(section.uri, section.experiment or experiment)
    except Exception as error:  # MLflow, SQLAlchemy and requests each have errors of their own
        raise ConfigError(
            f"tracking.uri={section.uri} cannot be used: {str(error).strip().splitlines()[0]}; "
            "give another, or tracking.uri=null to track nothing",
            where="tracking.uri",
        ) from error
    return Run(section.uri, experiment_id)._create({**tags, NAME: name})


def how_to_look(section: TrackingConfig) -> str | None:
    """The command that opens MLflow's page, or its address."""
    if section.uri is None:
        return None
    if section.uri.startswith("http"):
        return section.uri
    return f"{sys.executable} -m mlflow ui --backend-store-uri {section.uri}"


@functools.cache
def _client(uri: str) -> MlflowClient:
    # MLflow narrates the creation of its database, and draws bars for its artifacts.
    for noisy in ("alembic", "mlflow.store", "mlflow.tracking"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _experiment_id(uri: str, name: str) -> str:
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    artifacts = None
    if uri.startswith("sqlite:///"):  # else a directory wherever the command happened to run
        artifacts = os.path.join(os.path.dirname(uri.removeprefix("sqlite:///")), "mlartifacts")
    return client.create_experiment(name, artifact_location=artifacts)
