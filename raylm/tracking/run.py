"""A run: parameters, metrics, tags and artifacts are logged to it by a command and its workers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raylm import storage, timeline
from raylm.config import TrackingConfig
from raylm.errors import StorageUnavailable
from raylm.tracking import comparison, journal, models, system, uploader
from raylm.tracking.failures import display_uri
from raylm.tracking.upload import SWEEP_TAG

logger = logging.getLogger(__name__)

TRIAL_TAG, ATTEMPTS_TAG, JOB_TAG = "raylm.trial", "raylm.attempts", "raylm.ray_job"
SOURCE_TAG, COMMIT_TAG = "mlflow.source.name", "mlflow.source.git.commit"  # MLflow's own
PARAMETERS_TAG, TOKENS_TAG = "raylm.model_parameters", "raylm.tokens"
"""The size of the model, and the training tokens of the budget."""
PASSES_TAG = "raylm.passes."
"""How often a training repeats a source of a mixture; the name of the source stands behind it."""
MEANING = (
    "tokens_per_parameter",
    "tokens_per_parameter_without_embeddings",
    "weight_decay_timescale",
    "training_flops",
)
"""Parameters of a run that say what its settings mean; they follow from them."""
COSTS = ("evaluation_seconds", "saving_seconds", "peak_memory_bytes", "mfu")
"""What a training costs beside its steps, and how well these use the devices, as metrics below COST."""
COST = "cost/"
TASKS = "tasks/"
"""Below it are the metrics of the run's model on tasks of lm-eval."""
DESCRIPTION_TAG = "mlflow.note.content"  # MLflow's own

MAX_PARAMETER_LENGTH = 6000  # characters that MLflow takes
MODEL_SECONDS = 900.0
"""How long a command waits for a server that is storing a model."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Run:
    """One run, identified by the directory of its journal. Without a directory every call does nothing.

    No call but `log_model` and `upload` waits for MLflow, and none fails with it. A line that cannot be written to
    disk is kept and written with the next one.
    """

    directory: str = ""
    uri: str | None = field(default=None, repr=False)
    """MLflow; None uploads nothing."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until MLflow has been reached."""
        if not self.uri or not self.directory:
            return None
        return journal.uploaded_offsets(self.directory, display_uri(self.uri)).run_id

    @property
    def path(self) -> str | None:
        """The path of the page to open, below the address of MLflow; None until MLflow has been reached.

        The page of a sweep compares its trials.
        """
        if not self.uri or not self.directory:
            return None
        offsets = journal.uploaded_offsets(self.directory, display_uri(self.uri))
        if offsets.run_id is None or offsets.experiment_id is None:
            return None
        state = journal.run_state(self.directory)
        if state.comparison is not None:
            return comparison.comparison_path(offsets.experiment_id, state.run["name"])
        return comparison.run_path(offsets.experiment_id, offsets.run_id)

    # Logging -------------------------------------------------------------------------------------------------------

    def log_parameters(self, values: Mapping[str, Any]) -> None:
        """Log settings. One that is longer than 6000 characters, or has parts, is also a whole text artifact.

        MLflow never changes a parameter, so the tag resume.N.changed names those that the N-th resume has changed.
        """
        if not self.directory:
            return
        state = journal.run_state(self.directory)
        texts: dict[str, str] = {}
        for key, value in values.items():
            has_parts = isinstance(value, Mapping | list | tuple | set)
            text = json.dumps(value, default=str) if has_parts else str(value)
            if has_parts or len(text) > MAX_PARAMETER_LENGTH:
                self.log_text(text, f"parameters/{key}.{'json' if has_parts else 'txt'}")
            texts[key] = text if len(text) <= MAX_PARAMETER_LENGTH else text[: MAX_PARAMETER_LENGTH - 1] + "…"
        new = {key: text for key, text in texts.items() if key not in state.parameters}
        changed = {key: text for key, text in texts.items() if state.parameters.get(key, text) != text}
        if new:
            self._append({"parameters": new})
        if changed:
            changes = "; ".join(f"{key}: {state.parameters[key]} -> {text}" for key, text in changed.items())
            self.set_tags({f"resume.{state.starts - 1}.changed": changes})

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log one point of each metric. A step's first value stays. The journal keeps infinities, MLflow does not."""
        if not self.directory:
            return
        timeline.mark(f"step {step}: {', '.join(values)}")
        with self._unwritable_warned():
            journal.metric_writer(self.directory).add(values, step)

    def rewind(self, step: int) -> None:
        """Remove the points after a step from which the run resumes, because it will log them again."""
        if not self.directory:
            return
        with self._unwritable_warned():
            journal.metric_writer(self.directory).rewind(step)

    def log_system_metrics(self, step: int) -> None:
        """Log how busy this machine is, a point about every 10 seconds; called by the process that trains."""
        if self.directory:
            self.log_metrics(system.monitor(self.directory).metrics(), step)

    def metric_history(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) of every metric of the training's results, in order of steps, as the journal has them.

        Without metrics of the system and of costs, which differ each time.
        """
        history: dict[str, list[tuple[int, float]]] = {}
        for (name, step), value in self._points():
            if not name.startswith((system.PREFIX, COST)):
                history.setdefault(name, []).append((step, value))
        return history

    def figures(self) -> dict[str, Any]:
        """What the settings mean and what the training has cost so far: `MEANING` and `COSTS`, as the journal has them;
        None where nothing was logged."""
        parameters = journal.run_state(self.directory).parameters
        meaning = {name: float(parameters[name]) if name in parameters else None for name in MEANING}
        newest = {name.removeprefix(COST): value for (name, _), value in self._points() if name.startswith(COST)}
        if "peak_memory_bytes" in newest:
            newest["peak_memory_bytes"] = int(newest["peak_memory_bytes"])
        return {**meaning, **{name: newest.get(name) for name in COSTS}}

    def task_scores(self) -> dict[str, float]:
        """Task/metric -> its newest value; empty if the run's model was never scored on tasks."""
        return {name.removeprefix(TASKS): value for (name, _), value in self._points() if name.startswith(TASKS)}

    def _points(self) -> list[tuple[journal.MetricKey, float]]:
        """((name, step), value) of every metric, by name and step."""
        points: dict[journal.MetricKey, journal.MetricValue] = {}
        journal.apply_metrics(journal.json_lines(self.directory, journal.METRICS_FILE).read()[0], points)
        return [(key, value) for key, (value, _) in sorted(points.items())]

    def tags(self) -> dict[str, str]:
        """The tags, as the journal has them."""
        state = journal.run_state(self.directory)
        return {**state.run.get("tags", {}), **state.tags}

    def set_tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; a later value of a tag replaces the earlier one."""
        self._append({"tags": {key: str(value) for key, value in values.items()}})

    def describe(self, markdown: str) -> None:
        """Set the description on the run's page; a link to `tracking.COMPARISON` leads to the comparison of trials."""
        self.set_tags({DESCRIPTION_TAG: markdown})

    def log_comparison(self, score: str, history: str, settings: Sequence[str]) -> None:
        """Log what MLflow's page of a sweep compares its trials by: the metric `score` against these parameters.

        `history` is the metric of every evaluation.
        """
        compared = {"score": score, "history": history, "settings": list(settings)}
        if self.directory and journal.run_state(self.directory).comparison != compared:
            self._append({"comparison": compared})

    def log_dataset(self, name: str, *, digest: str, source: str, profile: Mapping[str, Any], context: str) -> None:
        """Log data that the run reads as one of MLflow's dataset inputs; once for a name and digest.

        `profile` describes it in numbers, `context` says what it is for: training, validation.
        """
        if self.directory and (name, digest) not in journal.run_state(self.directory).datasets:
            scheme = source.partition("://")[0] if "://" in source else "local"
            details = {"source": display_uri(source), "scheme": scheme, "profile": dict(profile), "context": context}
            self._append({"dataset": name, "digest": digest, **details})

    def log_text(self, text: str, name: str) -> None:
        """Log a text as an artifact file."""
        self._log_artifact({"text": text, "name": name})

    def log_file(self, path: str | Path, name: str) -> None:
        """Log a file as an artifact; a later file of the same name replaces it.

        It is copied under that name to the run's directory. What is there when it is uploaded goes to MLflow.
        """
        if not self.directory:
            return
        source, target = storage.absolute(path), f"{self.directory}/{name}"
        with storage.reading(source) as stream:
            content = stream.read()
        if source != target:
            storage.write(target, content)
        self._log_artifact({"file": hashlib.sha256(content).hexdigest(), "name": name})

    def log_model(self, directory: str | Path, section: TrackingConfig, step: int) -> None:
        """Log the model that the run has trained up to this step, and register it, if the section says so.

        `directory` is inside the run's. Unlike the other calls this one waits while MLflow is storing the model.
        """
        if not self.directory or not (section.log_model or section.register_as):
            return
        relative = str(directory).removeprefix(f"{self.directory}/")
        assert relative != str(directory), f"{directory} is not in {self.directory}"
        self._log_artifact({"model": relative, "name": models.NAME, "step": step, "register": section.register_as})
        deadline = time.monotonic() + MODEL_SECONDS
        while not self.upload(uploader.TIMEOUT_SECONDS):
            if self.upload_failed or time.monotonic() > deadline:
                logger.warning("the model is not in MLflow yet; upload it with: %s", sync_command(self))
                return

    def _log_artifact(self, record: Mapping[str, Any]) -> None:
        if self.directory and journal.run_state(self.directory).artifacts.get(record["name"]) != record:
            self._append(record)

    def _append(self, record: Mapping[str, Any]) -> None:
        if self.directory:
            with self._unwritable_warned():
                journal.json_lines(self.directory, journal.RUN_FILE).append(record, durable=True)

    @contextlib.contextmanager
    def _unwritable_warned(self) -> Iterator[None]:
        """Warn once if a line cannot be written. If the disk stays full, the checkpoints of the run fail, too."""
        try:
            yield
        except OSError as error:
            _warn_of_disk(self.directory, error.strerror)

    def flush(self) -> None:
        """Make what was logged survive a power cut, and the loss of the machine if the storage is remote.

        Called before a checkpoint is committed, because a run that resumes from it does not log earlier points again.
        """
        if self.directory:
            with self._unwritable_warned():
                journal.json_lines(self.directory, journal.METRICS_FILE).flush()

    # Status --------------------------------------------------------------------------------------------------------

    def finish(self, status: Status = "FINISHED") -> None:
        """Set the status of a run that finishes now."""
        self.flush()  # which closes the file: a sweep finishes many runs
        self._append({"status": status, "time": journal.now()})

    def finish_late(self, status: Status) -> None:
        """Set the status of a run whose own process was killed; its end is when it last logged something.

        A run that has finished keeps its end time.
        """
        if not self.directory:
            return
        with storage.reached(self.directory):
            state = journal.run_state(self.directory)
            metrics_file = journal.json_lines(self.directory, journal.METRICS_FILE)
            records = metrics_file.read()[0] if state.status == "RUNNING" else []
        if state.run and state.status != status:
            last = max([state.time, *(record["time"] for record in records if "time" in record)])
            self._append({"status": status, "time": last})

    def finish_if_running(self, status: Status) -> None:
        """Set the status of a run unless it has one."""
        if self.is_running:
            self.finish_late(status)

    @property
    def is_running(self) -> bool:
        """Whether it has started and not finished since, as far as its journal says."""
        with storage.reached(self.directory):
            return bool(self.directory) and journal.run_state(self.directory).status == "RUNNING"

    # Trials --------------------------------------------------------------------------------------------------------

    def start_trial(self, trial_id: str, directory: str | Path | None = None, *, uploads: bool = True) -> Run:
        """Start the child run of a trial, or resume the one that it has.

        `directory` is inside this run's, by default named after the trial. With uploads=False MLflow, whose import
        takes 2 s, is not needed in this process, and another process calls `upload_in_background`.
        """
        if not self.directory:
            return self
        path = str(directory or f"{self.directory}/{trial_id}")
        assert path.rpartition("/")[0] == self.directory, f"{path} is not in {self.directory}"
        parent, parent_tags = journal.run_state(self.directory), self.tags()
        origin = {key: parent_tags[key] for key in (SOURCE_TAG, COMMIT_TAG, JOB_TAG) if key in parent_tags}
        return start_run(
            Run(path, self.uri),
            experiment=parent.run["experiment"],
            metric=parent.run["metric"],
            name=trial_id,
            tags={TRIAL_TAG: trial_id, SWEEP_TAG: parent.run["name"], **origin},
            is_child=True,
            uploads=uploads,
        )

    def trial(self, trial_id: str) -> Run:
        """The child run of a trial that `start_trial` has started."""
        return Run(f"{self.directory}/{trial_id}", self.uri) if self.directory else self

    def trials(self) -> dict[str, Run]:
        """Trial id -> child run of every trial that has started."""
        runs: dict[str, Run] = {}
        with storage.reached(self.directory):
            for name in storage.names(self.directory) if self.directory else []:
                run = journal.run_state(f"{self.directory}/{name}").run
                if run.get("is_child"):
                    runs[run["tags"][TRIAL_TAG]] = Run(f"{self.directory}/{name}", self.uri)
        return runs

    # Uploading -----------------------------------------------------------------------------------------------------

    def upload_in_background(self) -> None:
        """Upload this run from this process, with all that will be logged to it; another process has started it."""
        if self.directory and self.uri is not None:
            uploader.get(self.uri).add(self.directory)

    def upload(self, timeout_seconds: float) -> bool:
        """Wait until this run and its trials are uploaded, at most so long; whether they are."""
        if not self.directory or self.uri is None:
            return True
        runs = [self, *self.trials().values()]
        return uploader.get(self.uri).upload([run.directory for run in runs], timeout_seconds)

    def pending(self) -> int:
        """Number of entries of this run's own journal that are not in MLflow, as far as is recorded beside it."""
        return uploader.get(self.uri).pending(self.directory) if self.uri and self.directory else 0

    @property
    def upload_failed(self) -> bool:
        """Whether the last attempt to upload failed."""
        return self.uri is not None and uploader.get(self.uri).failure is not None


def start_run(run: Run, *, uploads: bool = True, tags: Mapping[str, str], **attributes: Any) -> Run:
    """Create the run's journal, or mark its run as running again; `attributes` are those of journal.start."""
    tags = {**tags, ATTEMPTS_TAG: str(journal.run_state(run.directory).starts + 1)}
    try:
        journal.start(run.directory, display_uri(run.uri) if run.uri else None, tags=tags, **attributes)
    except OSError as error:
        raise StorageUnavailable(
            f"{run.directory}: the run's journal cannot be written there: {error.strerror}; once it can, or with "
            "storage set to a place that can be written, run the same command",
            where="storage",
        ) from error
    state = journal.run_state(run.directory)
    if not state.run:
        raise StorageUnavailable(
            f"{run.directory}: the run's journal was written and cannot be read back; run the same command again",
            run.directory,
        )
    recorded = {**state.run["tags"], **state.tags}
    changed = {key: value for key, value in tags.items() if recorded.get(key) != value}
    if changed:
        run.set_tags(changed)
    if uploads:
        run.upload_in_background()
    return run


def sync_command(run: Run) -> str:
    """The command that uploads what is pending."""
    return f"{sys.executable} -m raylm.sync {run.directory}"


@functools.cache
def _warn_of_disk(directory: str, problem: str) -> None:
    logger.warning("%s: metrics are kept in memory until they can be written: %s", directory, problem)
