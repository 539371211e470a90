"""A run, of which a command and its workers tell: parameters, points, tags, artifacts, trials, its end."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raylm import storage
from raylm.config import TrackingConfig
from raylm.errors import StorageUnavailable
from raylm.tracking import journal, mlflow, models, system
from raylm.tracking.failures import shown

logger = logging.getLogger(__name__)

TRIAL, SWEEP, ATTEMPTS, JOB = "raylm.trial", "raylm.sweep", "raylm.attempts", "raylm.ray_job"
SOURCE, COMMIT, NOTE = "mlflow.source.name", "mlflow.source.git.commit", "mlflow.note.content"  # MLflow's own tags

LONGEST_PARAMETER = 6000  # characters that MLflow takes
MODEL_SECONDS = 900.0
"""How long a command waits for a server that is taking a model."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Run:
    """One run, by the directory of its journal. Without a directory every call returns at once and keeps nothing.

    No call waits for MLflow or fails with it. A line that the disk does not take is written with the next one.
    """

    directory: str = ""
    uri: str | None = field(default=None, repr=False)
    """MLflow; None: nothing is shipped."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has been reached."""
        return journal.note(self.directory, shown(self.uri)).run_id if self.uri and self.directory else None

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Settings of the run. One of more than 6000 characters, or with parts, is an artifact too, and whole there.

        MLflow never changes a parameter it has: the tag resume.N.changed says what the N-th resume has changed.
        """
        if not self.directory:
            return
        known = journal.facts(self.directory)
        plain: dict[str, str] = {}
        for key, value in values.items():
            has_parts = isinstance(value, Mapping | list | tuple | set)
            text = json.dumps(value, default=str) if has_parts else str(value)
            if has_parts or len(text) > LONGEST_PARAMETER:
                self.text(text, f"parameters/{key}.{'json' if has_parts else 'txt'}")
            plain[key] = text if len(text) <= LONGEST_PARAMETER else text[: LONGEST_PARAMETER - 1] + "…"
        changed = {key: text for key, text in plain.items() if known.parameters.get(key, text) != text}
        new = {key: text for key, text in plain.items() if key not in known.parameters}
        if new:
            self._tell({"parameters": new})
        if changed:
            told = "; ".join(f"{key}: {known.parameters[key]} -> {text}" for key, text in changed.items())
            self.tags({f"resume.{known.starts - 1}.changed": told})

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of the run's curves, one for a key and step. The journal has infinities too, MLflow does not."""
        if not self.directory:
            return
        with self._kept():
            journal.metrics(self.directory).add(values, step)

    def rewind(self, step: int) -> None:
        """Take back the points after a step, from which the run goes on; it will make them again."""
        if not self.directory:
            return
        with self._kept():
            journal.metrics(self.directory).rewind(step)

    def system_metrics(self, step: int) -> None:
        """How busy this machine has been, a point about every 10 seconds: to be called by the process that trains."""
        if self.directory:
            self.metrics(system.monitor(self.directory).metrics(), step)

    def series(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every metric but the system's, by step, as the journal has them."""
        points: dict[journal.Place, journal.Point] = {}
        journal.apply(journal.log(self.directory, journal.METRICS).read()[0], points)
        found: dict[str, list[tuple[int, float]]] = {}
        for (key, step), (value, _) in sorted(points.items()):
            if not key.startswith(system.PREFIX):
                found.setdefault(key, []).append((step, value))
        return found

    def tags(self, values: Mapping[str, Any]) -> None:
        self._tell({"tags": {key: str(value) for key, value in values.items()}})

    def dataset(self, name: str, *, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """Tell of data that the run reads, one of MLflow's dataset inputs; once for a name and digest.

        `profile` is what there is to know of it, `context` what it is for: training, validation.
        """
        if self.directory and (name, digest) not in journal.facts(self.directory).datasets:
            scheme = source.partition("://")[0] if "://" in source else "local"
            about = {"source": shown(source), "scheme": scheme, "profile": dict(profile), "context": context}
            self._tell({"dataset": name, "digest": digest, **about})

    def text(self, text: str, name: str) -> None:
        """Keep a text as an artifact file."""
        self._artifact({"text": text, "name": name})

    def file(self, path: str | Path, name: str) -> None:
        """Keep a file as an artifact; a later one of the same name takes its place.

        It lies in the run's directory under that name then. MLflow gets it as it is there when it is shipped.
        """
        if not self.directory:
            return
        given, kept = storage.absolute(path), f"{self.directory}/{name}"
        with storage.reading(given) as stream:
            content = stream.read()
        if given != kept:
            storage.write(kept, content)
        self._artifact({"file": hashlib.sha256(content).hexdigest(), "name": name})

    def model(self, directory: str | Path, section: TrackingConfig, step: int, say: Callable[[str], None]) -> None:
        """Log a model of this run in MLflow, and register it, if the section says so.

        The model lies in a directory in this one's and was made at this step. Unlike all else this waits, as long as
        MLflow is taking it; else `say` how to do it later.
        """
        if not self.directory or not (section.log_model or section.register_as):
            return
        where = str(directory).removeprefix(f"{self.directory}/")
        assert where != str(directory), f"{directory} is not in {self.directory}"
        self._artifact({"model": where, "name": models.NAME, "step": step, "register": section.register_as})
        deadline = time.monotonic() + MODEL_SECONDS
        while not self.ship(mlflow.PATIENCE_SECONDS):
            if self.is_cut_off or time.monotonic() > deadline:
                say(f"MLflow has not got the model yet; to log it: {sync_command(self)}")
                return

    def end(self, status: Status = "FINISHED") -> None:
        self.flush()  # which closes the file: a sweep ends many runs
        self._tell({"status": status, "time": journal.now()})

    def end_late(self, status: Status) -> None:
        """End a run whose own process did not live to do so: when it told its last, not now.

        One that has ended keeps its time, whatever its status becomes.
        """
        if not self.directory:
            return
        with storage.reached(self.directory):
            known = journal.facts(self.directory)
            points = journal.log(self.directory, journal.METRICS).read()[0] if known.status == "RUNNING" else []
        if known.run and known.status != status:
            last = max([known.time, *(record["time"] for record in points if "time" in record)])
            self._tell({"status": status, "time": last})

    def end_if_running(self, status: Status) -> None:
        if self.is_running:
            self.end_late(status)

    @property
    def is_running(self) -> bool:
        """Whether it has begun and not ended since, as far as its journal says."""
        with storage.reached(self.directory):
            return bool(self.directory) and journal.facts(self.directory).status == "RUNNING"

    def child(self, trial_id: str, directory: str | Path | None = None, *, ships: bool = True) -> Run:
        """The run of a trial under this one: the one it had before, if it was interrupted, else a new one.

        Its directory is one in this one's, by default the one with the trial's name. A process that does not ship it
        needs no MLflow, whose import takes 2 s; another one is to `watch` it then.
        """
        if not self.directory:
            return self
        where = str(directory or f"{self.directory}/{trial_id}")
        assert where.rpartition("/")[0] == self.directory, f"{where} is not in {self.directory}"
        parent = journal.facts(self.directory)
        known = {**parent.run["tags"], **parent.tags}
        origin = {key: known[key] for key in (SOURCE, COMMIT, JOB) if key in known}
        return start_run(
            Run(where, self.uri),
            experiment=parent.run["experiment"],
            metric=parent.run["metric"],
            name=trial_id,
            tags={TRIAL: trial_id, SWEEP: parent.run["name"], **origin},
            is_child=True,
            ships=ships,
        )

    def trial(self, trial_id: str) -> Run:
        """The run of a trial under this one, which has begun by a call of `child`."""
        return Run(f"{self.directory}/{trial_id}", self.uri) if self.directory else self

    def watch(self) -> None:
        """Ship this run, which another process has begun, and what will be added to it, from this one."""
        if self.directory and self.uri is not None:
            mlflow.server(self.uri).watch(self.directory)

    def children(self) -> dict[str, Run]:
        """Trial id -> run of every trial that has begun."""
        found: dict[str, Run] = {}
        with storage.reached(self.directory):
            for name in storage.names(self.directory) if self.directory else []:
                about = journal.facts(f"{self.directory}/{name}").run
                if about.get("is_child"):
                    found[about["tags"][TRIAL]] = Run(f"{self.directory}/{name}", self.uri)
        return found

    def flush(self) -> None:
        """What was told so far outlives a power cut, and the machine if the storage is remote.

        To be called before a checkpoint is committed: a run that goes on from it makes the points before it no more.
        """
        if self.directory:
            with self._kept():
                journal.log(self.directory, journal.METRICS).flush()

    def left(self) -> int:
        """How many entries of this run's own journal MLflow has not, as far as is noted."""
        return mlflow.server(self.uri).left(self.directory) if self.uri and self.directory else 0

    @property
    def is_cut_off(self) -> bool:
        """Whether MLflow, when last tried, did not take what there was."""
        return self.uri is not None and mlflow.server(self.uri).failure is not None

    def ship(self, timeout_seconds: float) -> bool:
        """Wait until MLflow has all there is of this run and its children, at most so long; whether it has."""
        if not self.directory or self.uri is None:
            return True
        family = [self, *self.children().values()]
        return mlflow.server(self.uri).ship([run.directory for run in family], timeout_seconds)

    def _artifact(self, record: Mapping[str, Any]) -> None:
        if self.directory and journal.facts(self.directory).artifacts.get(record["name"]) != record:
            self._tell(record)

    def _tell(self, record: Mapping[str, Any]) -> None:
        if self.directory:
            with self._kept():
                journal.log(self.directory, journal.RUN).append(record, durable=True)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """A disk that is full is told of once: the checkpoints of the run will end it, or there is room again."""
        try:
            yield
        except OSError as error:
            _warn_of_disk(self.directory, error.strerror)


def start_run(run: Run, *, ships: bool = True, **about: Any) -> Run:
    """Write into the journal of a run that it begins, for the first time or once more, and what is known `about` it."""
    about["tags"] = {**about["tags"], ATTEMPTS: str(journal.facts(run.directory).starts + 1)}
    try:
        journal.begin(run.directory, shown(run.uri) if run.uri else None, **about)
    except OSError as error:
        raise StorageUnavailable(
            f"{run.directory}: the run's journal cannot be written there: {error.strerror}; once it can, or with "
            "storage set to a place that can be written, run the same command",
            where="storage",
        ) from error
    known = journal.facts(run.directory)
    if not known.run:
        raise StorageUnavailable(
            f"{run.directory}: the run's journal was written and is not there; run the same command again",
            run.directory,
        )
    there = {**known.run["tags"], **known.tags}
    changed = {key: value for key, value in about["tags"].items() if there.get(key) != value}
    if changed:
        run.tags(changed)
    if run.uri is not None and ships:
        mlflow.server(run.uri).watch(run.directory)
    return run


def sync_command(run: Run) -> str:
    """The command that ships what MLflow has not."""
    return f"{sys.executable} -m raylm.sync {run.directory}"


@functools.cache
def _warn_of_disk(directory: str, problem: str) -> None:
    logger.warning("%s: metrics wait in memory: %s", directory, problem)
