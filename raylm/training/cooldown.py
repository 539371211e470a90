r"""Cooldowns: at a rung a branch of a trial decays its learning rate to zero, and its score is compared.

    the trial    ----------*----------*---------------------*----------------------.
                            \          \                     \                      \
    cooldowns                o          oo                    oooo                   its own decay at the end

A trial whose learning rate is at its peak scores worse than at the end of a shorter training, and the higher the rate
is, the more so. After a cooldown its score is that of a training of this length with its settings.

A cooldown is a training of its own that begins at a checkpoint of the trial. The trial resumes from the same
checkpoint, so it has the same bytes without its cooldowns.

    <trial>/checkpoints/step_00000040/
            cooldowns/step_00000040/checkpoints/step_00000044/    steps 41 to 44 of this cooldown
                                    result.json                   what it reports, once it is finished
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from raylm import checkpoint, storage, summary, tracking
from raylm.config import override
from raylm.tracking.run import start_run
from raylm.training.session import EVALUATED, Outcome, Session, TrainTask, better, gathered

RESULT = "result.json"


def train(task: TrainTask, session: Session, train_to_end: Callable[[TrainTask, Session], Outcome]) -> Outcome:
    """Train a trial to its end, and report the score of a cooldown at each step of task.cooldowns.

    `train_to_end` trains a task up to its last step, with neither.
    """
    for step in task.cooldowns:
        branch = _branch(task, step)
        metrics = _finished(branch, session)
        if metrics is None:
            trunk = train_to_end(dataclasses.replace(task, until=step), session)
            if trunk.stopped or trunk.step < step:  # train.patience may have ended it
                return trunk
            if session.rank == 0 and branch.run.directory:
                start_run(branch.run, name=f"cooldown at step {step}", tags={}, uploads=False)
            outcome = train_to_end(branch, _Silent(session))
            if outcome.stopped:
                return outcome
            metrics = _finish(task, trunk, branch, outcome, session)
        session.report(metrics)
        task = dataclasses.replace(task, best_cooldown=_best_cooldown(metrics))
        _prune(task, session, up_to=step)
    outcome = train_to_end(task, session)
    if outcome.best and not _best_cooldown(task.bests(outcome.best)):
        task = dataclasses.replace(task, best_cooldown={})
        _prune(task, session, up_to=task.budget.steps)
    return outcome


class _Silent:
    """The session of a cooldown, whose result the trial reports."""

    def __init__(self, session: Session):
        self.rank, self.world_size, self.lost_nodes = session.rank, session.world_size, session.lost_nodes

    def report(self, metrics: dict[str, Any]) -> None:
        pass


def _branch(task: TrainTask, step: int) -> TrainTask:
    """The task of a cooldown; its experiment is that of a training which ends there."""
    steps, section = task.cooldowns[step], task.experiment.train
    ends, warmup = step + steps, section.warmup_steps
    shorter = {
        "train.max_tokens": ends * task.budget.batch_tokens,
        "train.warmup_steps": warmup if warmup >= 1 else float(math.ceil(warmup * task.budget.steps)),
        "train.arguments.lr_scheduler_kwargs": {
            **(section.arguments.get("lr_scheduler_kwargs") or {}),
            "num_decay_steps": steps,
        },
    }
    place = checkpoint.cooldown_directory(task.directory, step)
    return dataclasses.replace(
        task,
        experiment=override(task.experiment, shorter),
        budget=dataclasses.replace(task.budget, steps=ends, decay_steps=steps, eval_every=ends, save_every=ends),
        run=tracking.Run(place) if task.run.directory else task.run,  # MLflow has the trial's alone
        directory=place,
        trunk=(task.directory, step),
        cooldowns={},
        best_cooldown={},
    )


def _finished(branch: TrainTask, session: Session) -> dict[str, Any] | None:
    """The metrics that a finished cooldown reports; None if it has not finished."""
    content = storage.read(f"{branch.directory}/{RESULT}") if session.rank == 0 else None
    return gathered(session, json.loads(content) if content is not None else None)[0]


def _finish(task: TrainTask, trunk: Outcome, branch: TrainTask, outcome: Outcome, session: Session) -> dict[str, Any]:
    """Write the metrics that a cooldown reports, log its score to the run of the trial, and return them."""
    (_, step), last = branch.trunk or ("", 0), outcome.last
    own = {**branch.bests(outcome.best), "best_cooldown": step}
    metrics = {
        **{name: last[name] for name in (*EVALUATED, "step") if name in last},
        **dataclasses.replace(task, best_cooldown=better(own, task.best_cooldown)).bests(trunk.best),
        "tokens": step * task.budget.batch_tokens,
        "budget_tokens": task.budget.tokens,
        "seconds": last["seconds"],
        "cooldown_step": step,
        "cooldown_tokens": (last["step"] - step) * task.budget.batch_tokens,
    }
    if session.rank == 0:
        branch.run.flush()
        storage.write(f"{branch.directory}/{RESULT}", json.dumps(metrics).encode())
        measure = task.experiment.measure
        task.run.log_metrics(summary.cooldown_metrics(measure, metrics), step)
        best = {name: metrics[f"best_{name}"] for name in EVALUATED if f"best_{name}" in metrics}
        task.run.log_metrics(summary.best_metrics(measure, best), last["step"])
    gathered(session, None)
    return metrics


def _best_cooldown(metrics: dict[str, Any]) -> dict[str, Any]:
    """The best_ metrics of a report if they are those of a cooldown; else empty."""
    if "best_cooldown" not in metrics:
        return {}
    return {name: value for name, value in metrics.items() if name.startswith("best_")}


def _prune(task: TrainTask, session: Session, *, up_to: int) -> None:
    """Remove the checkpoints of finished cooldowns but that of the best one, if it is the best of the whole trial."""
    if session.rank == 0:
        kept = task.best_cooldown.get("best_cooldown")
        for step in task.cooldowns:
            if step <= up_to and step != kept:
                storage.remove(f"{checkpoint.cooldown_directory(task.directory, step)}/checkpoints")
