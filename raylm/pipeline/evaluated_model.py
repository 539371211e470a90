"""The model that `raylm evaluate` scores: where it is, and the run whose metrics its scores on tasks are."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from raylm import checkpoint, hub, runs, storage, tracking
from raylm.checkpoint.directory import MODEL_OR_ADAPTER
from raylm.errors import StorageError
from raylm.results import compared_run
from raylm.results.runs import is_sweep
from raylm.sweep.record import EVENTS
from raylm.tasks import TaskScore
from raylm.tracking import journal

logger = logging.getLogger(__name__)

NOT_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.gguf", "original/*"]
"""Files of a model on the Hub that are not downloaded: transformers prefers safetensors."""


def locate(model: str, gguf_file: str | None = None) -> tuple[str, Path]:
    """Where a model is, and its local directory. It is given as its directory, as a run, trial or sweep, whose best
    model it then is, or as an id of the Hub; ConfigError or StorageError if there is none."""
    place = _best_of_run(model) or model
    if place == model and not storage.is_remote(model) and not os.path.exists(model) and hub.is_id(model):
        place = _from_hub(model)
    return place, checkpoint.locate(place, gguf_file).resolve()


def _best_of_run(model: str) -> str | None:
    """The directory of the best model of a run, trial or sweep; None if it is something else."""
    if os.path.isfile(model) or (os.path.exists(model) and MODEL_OR_ADAPTER.intersection(storage.names(model))):
        return None
    try:
        best = compared_run.summarize(model).model
    except StorageError:
        if {journal.RUN_FILE, EVENTS}.intersection(storage.names(model)):  # a run without a score
            raise
        return None
    return best if best is not None and storage.names(best) else None


def _from_hub(model: str) -> str:
    from huggingface_hub import snapshot_download

    with hub.loading(StorageError, None, model):
        return snapshot_download(model, ignore_patterns=NOT_WEIGHTS)
    raise AssertionError("loading returns or raises")


def log(place: str, directory: Path, scores: Mapping[str, TaskScore]) -> None:
    """Log the metrics of tasks to the run that has trained the model, at the step of the model; of a sweep's best model
    to its trial, too. A model that is of no run has nowhere to log to."""
    metrics = {
        f"{tracking.TASKS}{name}/{metric}": value
        for name, score in scores.items()
        for metric, value in score.record().items()
        if isinstance(value, float)
    }
    run = _run_of(storage.absolute(place) if not storage.is_remote(place) else place)
    if run is None:
        return
    if runs.is_locked(run):
        logger.warning("%s still runs; the metrics of tasks are not logged to it", run)
        return
    trial = runs.result_of(run).get("best", {}).get("trial_id") if is_sweep(run) else None
    of_trial = [f"{run}/{trial}"] if trial is not None and storage.names(f"{run}/{trial}") else []
    for each in (run, *of_trial):
        tracked = tracking.Run(each, journal.run_state(each).uri)
        tracked.log_metrics(metrics, checkpoint.read_record(directory).get("step", 0))
        tracked.flush()
    tracking.wait_for_upload(tracking.Run(run, journal.run_state(run).uri))


def _run_of(place: str) -> str | None:
    """The directory of the run that has trained the model of a directory: <run>/model, <run>/checkpoints/<step>."""
    for _ in range(3):
        place = place.rpartition("/")[0]
        if journal.RUN_FILE in storage.names(place):
            return place
    return None
