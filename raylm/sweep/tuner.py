"""Ray Tune runs the trials, without output or files of its own."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial as RayTrial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raylm import scratch
from raylm.cluster import Resources
from raylm.errors import StorageError
from raylm.sweep.queue import TrialQueue
from raylm.sweep.record import SweepRecord, Unsaved
from raylm.sweep.schedule import RecordedScheduler, SweepStopper
from raylm.sweep.trial import run_trial
from raylm.tracking import Run
from raylm.training import TrainTask

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's newer console output prints even at verbose=0
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's handler would finish a sweep at Ctrl-C as if it were complete
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard files: the record has their content
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # no saved state: a sweep resumes from the record
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that stops before its first evaluation has no metric
}


def run(
    trials: TrialQueue,
    task: TrainTask,
    resources: Resources,
    limits: SweepStopper,
    watcher: Watcher,
    *,
    together: int,
    on_added: Callable[[], None],
) -> None:
    """Run the remaining trials, each as `task` with its settings, at most `together` at a time.

    `on_added` is called when another command has added trials.
    """
    os.environ |= {**ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": str(together)}
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    _keep_credentials()
    repeat_of = {trial.trial_id: trial.repeat_of for trial in trials.record.trials.values() if trial.repeat_of}
    with scratch.directory("tune") as directory, _told(trials.record):
        tune.Tuner(
            tune.with_resources(
                tune.with_parameters(run_trial, template=task, resources=resources, repeat_of=repeat_of),
                _trial_resources(resources),
            ),
            tune_config=tune.TuneConfig(
                search_alg=trials,
                scheduler=trials.scheduler,
                num_samples=trials.total_samples,
                reuse_actors=resources.num_workers == 1,
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=directory,
                stop=limits,
                failure_config=tune.FailureConfig(max_failures=task.experiment.cluster.max_failures),
                callbacks=[watcher, _Requests(trials, on_added), _Silent()],
                verbose=0,
            ),
        ).fit()


class _Requests(Unsaved, tune.Callback):
    """Takes the requests of other commands."""

    def __init__(self, trials: TrialQueue, on_added: Callable[[], None]):
        self.trials, self.on_added = trials, on_added

    def on_step_end(self, iteration: int, trials: list, **_: Any) -> None:
        if self.trials.take_requests():
            self.on_added()


class _Silent(TrialProgressCallback):
    """Replaces Tune's own, which even at verbose=0 prints that a stopped trial has completed."""

    def _print(self, msg: str) -> None:
        pass


@contextlib.contextmanager
def _told(record: SweepRecord) -> Iterator[None]:
    """Raise the record's own error if it cannot be written: Tune raises a TuneError with its traceback as text."""
    try:
        yield
    except tune.TuneError as error:
        if record.problem is not None:
            raise record.problem from error
        raise


def _keep_credentials() -> None:
    """Have Tune send no AWS credentials to trials: Ray 2.60 writes them to its logs, and nodes have their own."""
    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def _trial_resources(resources: Resources) -> Any:
    """The resources of a trial's own process; the workers of a worker group have reservations of their own."""
    if resources.num_workers == 1:
        return tune.PlacementGroupFactory([dict(resources.per_worker)])
    return tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])  # one byte: Ray refuses to reserve nothing


class Watcher(Unsaved, tune.Callback):
    """Shows the progress of the trials, and frees the resources of each when it stops."""

    def __init__(
        self,
        scheduler: RecordedScheduler,
        parent: Run,
        show: Callable[..., None],
        stop: Callable[[], None],
        metric: str,
    ):
        self.scheduler, self.record, self.parent, self.metric = scheduler, scheduler.record, parent, metric
        self._show, self._stop = show, stop
        self.reserved: dict[str, str | None] = {}
        """Trial id -> placement group of the trial's workers, if it has a worker group."""
        self._running: dict[str, RayTrial] = {}
        for trial_id, trial in self.record.trials.items():
            if trial.attempts:  # else it has not started
                self.show(trial_id, runs=False)

    def on_trial_start(self, iteration: int, trials: list, trial: RayTrial, **_: Any) -> None:
        for each in trials:
            # Release the workers of paused or lost trials here. During the pause itself Train would start new ones.
            if each is trial or each.status == RayTrial.PAUSED:
                _release(self.reserved.pop(each.trial_id, None))
        self.record.start(trial.trial_id)
        self._running[trial.trial_id] = trial
        self.show(trial.trial_id)

    def on_trial_result(self, iteration: int, trials: list, trial: RayTrial, result: dict, **_: Any) -> None:
        self.reserved[trial.trial_id] = result.get("placement_group")
        if self.record.outage is not None:
            self._stop()  # the other trials save a checkpoint if they can
            return
        with contextlib.suppress(StorageError):  # the next result tries again
            self.parent.trial(trial.trial_id).upload_in_background()  # its journal exists by now
        self.show(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list, **_: Any) -> None:
        for trial_id in [name for name, trial in self._running.items() if trial.status == RayTrial.PAUSED]:
            self._end(trial_id)

    def on_trial_error(self, iteration: int, trials: list, trial: RayTrial, **_: Any) -> None:
        _release(self.reserved.pop(trial.trial_id, None))
        self._end(trial.trial_id)
        self.show(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list, trial: RayTrial, **_: Any) -> None:
        _release(self.reserved.pop(trial.trial_id, None))
        self._end(trial.trial_id)
        self.show(trial.trial_id)

    def _end(self, trial_id: str) -> None:
        """Finish the MLflow run of a finished or paused trial; it is RUNNING again when the trial resumes.

        The run of an interrupted trial stays RUNNING, because the trial resumes with the sweep.
        """
        with contextlib.suppress(StorageError):  # it is then finished with the sweep
            self._end_in_mlflow(trial_id, self._running.pop(trial_id, None))

    def _end_in_mlflow(self, trial_id: str, stopped: RayTrial | None) -> None:
        trial, run = self.record.trials[trial_id], self.parent.trial(trial_id)
        if stopped is None or not run.is_running:  # it was paused, maybe since before the sweep was killed
            if trial.is_over:
                run.finish_late("FAILED" if trial.status == "failed" else "FINISHED")
        elif trial.is_over or stopped.status == RayTrial.PAUSED:
            run.finish("FAILED" if trial.status == "failed" else "FINISHED")
        run.upload_in_background()

    def show(self, trial_id: str, runs: bool = True) -> None:
        trial = self.record.trials[trial_id]
        waits = not trial.is_over and (not runs or self.scheduler.waits(trial_id))
        self._show(
            trial_id,
            status="paused" if waits else trial.status,
            tokens=trial.tokens,
            perplexity=trial.results[-1][self.metric] if trial.results else None,
            settings=trial.settings,
            failure=trial.failure,
        )


def _release(placement_group: str | None) -> None:
    """Free what the workers of a stopped trial have reserved, or the next trial waits for it forever.

    Tune kills a trial and with it Train's controller. Train's cleaner for that case asks the dashboard whether the
    controller is alive, so without a dashboard it never frees anything (Ray 2.60).
    """
    if placement_group is not None:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(placement_group)))
