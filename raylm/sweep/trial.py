"""One trial: a training run with the sweep's settings over the experiment's, on the same tokens as every other.

With one worker per trial, the trial's own process is the worker (Ray Train's local mode) and is reused for the next
trial: 1.1 s of overhead per trial. The worker group that trials of several workers need takes 12.6 s.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raylm import budget, checkpoint, scratch, storage, summary, timeline, tokens
from raylm.cluster import Resources
from raylm.config import Experiment, dump, get, of_trial
from raylm.errors import ConfigError, RaylmError, StorageUnavailable, TrainingError
from raylm.sweep import schedule
from raylm.sweep.asha import Asha
from raylm.sweep.record import SweepRecord
from raylm.sweep.space import keys
from raylm.training import TrainTask, launch

WORST = {f"{of}{name}": math.inf for of in ("", "best_") for name in ("perplexity", "bits_per_byte", "weighted_nll")}


def run_trial(
    settings: dict[str, Any], *, template: TrainTask, resources: Resources, repeat_of: Mapping[str, str]
) -> None:
    """Train the template's run with these settings, and report an error as the trial's result.

    A `failure` ends the trial, and `wrong_setting` names the setting at fault, if there is one. After an `outage` of
    its storage the trial can resume. `repeat_of` is the trial that each repeat repeats; the seeds of a repeat are among
    its settings.
    """
    trial_id = tune.get_context().get_trial_id()
    kind = "failure"
    timeline.start("trials")
    try:
        with timeline.phase(trial_id):
            problem = _problem(trial_id, settings, template, resources, repeat_of.get(trial_id))
    except RaylmError as error:  # of its journal, or of the token store that all trials share
        kind, problem = "outage", error
    if problem is not None:
        about = {"wrong_setting": problem.where} if isinstance(problem, ConfigError) else {}
        tune.report({**WORST, "step": 0, "tokens": 0, kind: problem.message, **about})


def _problem(
    trial_id: str, settings: dict[str, Any], template: TrainTask, resources: Resources, repeat_of: str | None
) -> RaylmError | None:
    """The error of a trial whose training failed, which its journal records too; None if it did not fail."""
    directory = f"{template.directory}/{trial_id}"
    run = template.run.start_trial(trial_id, directory=directory, uploads=False)
    if repeat_of is not None:
        run.set_tags({"raylm.repeat_of": repeat_of})
    store = tokens.open_store(template.store)
    # The parameters are the sweep's, except for the swept ones, because MLflow compares runs by what differs.
    run.log_parameters({**summary.parameters(template.experiment, store), **_swept(template.experiment, settings)})
    scheduler = schedule.scheduler(template.experiment.tune, template.budget, "best_perplexity")
    try:
        experiment = of_trial(template.experiment, settings)
        planned = budget.for_store(experiment, store)
        summary.log_size(run, experiment, store, planned)
        run.log_text(dump(experiment), "experiment.yaml")
        summary.log_data(run, experiment, store)
        task = dataclasses.replace(
            template,
            experiment=experiment,
            budget=planned,
            run=run,
            directory=directory,
            name=trial_id,
            cooldowns=scheduler.cooldowns(planned) if isinstance(scheduler, Asha) and repeat_of is None else {},
        )
        if template.experiment.tune.scheduler.kind == "pbt":
            _settle(SweepRecord(template.directory).changes(trial_id), template, task)
        if resources.num_workers == 1:
            launch.fit_in_this_process(dataclasses.replace(task, session=TuneSession))
        else:
            launch.fit(task, resources, callbacks=[TuneReportCallback()])
    except StorageUnavailable:
        raise
    except Exception as error:
        cause = error if isinstance(error, RaylmError) else TrainingError(f"{type(error).__name__}: {error}")
        run.set_tags({"raylm.failure": cause.message})
        return cause
    return None


def _swept(experiment: Experiment, settings: dict[str, Any]) -> dict[str, Any]:
    """Every swept key, and the seeds of a repeat, with the trial's value, or the experiment's where the trial's inner
    space does not have it."""
    return {key: get(experiment, key) for key in keys(experiment.tune.space)} | settings


class TuneSession:
    """The training.Session of a trial whose only worker is its own process."""

    rank = 0
    world_size = 1

    def report(self, metrics: dict[str, Any]) -> None:
        tune.report(metrics)

    def lost_nodes(self) -> list[str]:
        return []


ADOPTED = "adopted.json"
"""A file in the directory of a population's trial: the change by which it got the checkpoints of another trial."""


def _settle(changes: list[dict[str, Any]], template: TrainTask, task: TrainTask) -> None:
    """Give a trial the checkpoints that the changes of its population lead to; safe to repeat at each start."""
    adopted = storage.read(f"{task.directory}/{ADOPTED}")
    if changes:
        if adopted != json.dumps(changes[-1]).encode():
            _adopt(changes[-1], template, task)
    elif adopted is not None:  # the record has lost the change, so these checkpoints are of other settings
        for step in reversed(task.checkpoints.steps()):
            task.checkpoints.discard(step)
        storage.remove_file(f"{task.directory}/{ADOPTED}")


def _adopt(change: dict[str, Any], template: TrainTask, task: TrainTask) -> None:
    """Replace the checkpoints of a trial by one of the donor's."""
    theirs = checkpoint.CheckpointManager(f"{template.directory}/{change['donor']}/checkpoints")
    step: int | None = change["tokens"] // task.budget.batch_tokens
    for attempt in range(3):  # the donor trains on, and may remove a checkpoint while it is copied
        if step is None or theirs.damage(step) is not None:
            step, _ = theirs.newest()
        assert step is not None, f"{change['donor']}: a trial that was compared has checkpoints"
        try:
            with scratch.directory("adopted") as directory:
                task.checkpoints.replace(theirs.fetch(step, Path(directory)), step)
            break
        except (OSError, RaylmError):
            if attempt == 2:
                raise
    storage.write(f"{task.directory}/{ADOPTED}", json.dumps(change).encode())
