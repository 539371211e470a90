"""The disk and the time that a training or a sweep will take, as far as they can be known before."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raylm import console, derived, runs, storage, tokens
from raylm.budget import Budget
from raylm.plan import Plan
from raylm.sweep.record import SweepRecord

logger = logging.getLogger(__name__)

OF_A_CHECKPOINT = 3
"""Sizes of the model in a checkpoint: its weights, and the two moments of Adam."""

UNKNOWN = "unknown until it has run a few steps: no finished run of this model is here to go by"
MEASURED = "measured here for a second"

SHAPE = ("model.", "blocks.", "objective.", "train.batch_tokens")
"""Settings that the speed of a training depends on."""


@dataclass(frozen=True)
class Estimate:
    """What a training or sweep will take."""

    store_bytes: int
    """The size of the token store; 0 if it exists."""
    checkpoint_bytes: int
    """The size of all checkpoints that are kept, at most."""
    model_bytes: int
    """The size of the exported model."""
    seconds: float | None
    """None if it is not known."""
    source: str
    """What the seconds are known from, or why they are not known."""

    @property
    def disk_bytes(self) -> int:
        return self.store_bytes + self.checkpoint_bytes + self.model_bytes

    def record(self) -> dict[str, Any]:
        return {"disk_bytes": self.disk_bytes, "seconds": self.seconds}

    def facts(self) -> dict[str, str]:
        """The lines of a plan."""
        parts = {"token store": self.store_bytes, "checkpoints": self.checkpoint_bytes, "model": self.model_bytes}
        of = ", ".join(f"{name} {console.format_size(size)}" for name, size in parts.items() if size)
        time = f"about {console.format_duration(self.seconds)} {self.source}" if self.seconds else self.source
        return {"disk": f"up to {console.format_size(self.disk_bytes)}: {of}", "time": time}


def training(plan: Plan, budget: Budget | None, *, measures: bool = False) -> Estimate:
    """The estimate of one training, by the speed of the newest finished one of the same model, or of a trial.

    Without any, the speed is measured here, if `measures` and if that takes a second or two.
    """
    seconds, source = None, UNKNOWN
    if budget is not None:
        name, speed = next(_speeds(plan), ("", 0.0))
        if not speed and measures:
            name, speed = MEASURED, _measured(plan) * plan.experiment.cluster.fewest_workers
        if speed:
            seconds = _seconds(plan, budget.tokens, speed)
            source = f"of training at {speed:,.0f} tokens/s, {name}"
    return _with_disk(plan, 1, seconds, source)


def _seconds(plan: Plan, num_tokens: int, speed: float) -> float:
    """The time of training on so many tokens at this speed, with the evaluations meanwhile as far as they are known."""
    return num_tokens / speed / (1 - (plan.prepared.evaluation_share if plan.prepared else 0.0))


def _measured(plan: Plan) -> float:
    """Training tokens a second of a worker on this machine, with what a run does besides steps.

    0 of a large model, or on a cluster elsewhere.
    """
    from raylm.derived import speed

    if plan.resources is None or plan.num_parameters > speed.MOST_PARAMETERS:
        return 0.0
    with console.waiting("Measuring how fast this machine trains"):
        threads = max(1, int(plan.resources.cpus_per_worker))
        masked = plan.experiment.objective.is_masked
        return speed.tokens_per_second(plan.model_config, masked=masked, threads=threads) / derived.OVERHEAD


def _speeds(plan: Plan) -> Iterator[tuple[str, float]]:
    """The speeds of finished runs, then of the longest trials of finished sweeps: whose it is, and tokens a second."""
    for run in _finished(plan, "train"):
        speed = runs.result_of(run).get("tokens_per_second")
        if speed:
            yield f"the speed of {run.rpartition('/')[2]}", speed
    for run in _finished(plan, "tune"):
        trials = [trial for trial in SweepRecord(run).trials.values() if trial.results and trial.tokens]
        if trials:
            longest = max(trials, key=lambda trial: trial.tokens)
            name = f"the speed of {longest.trial_id} of {run.rpartition('/')[2]}"
            yield name, longest.tokens / longest.results[-1]["seconds"]


def sweep(plan: Plan, trials: int, tokens_of_all: int | None) -> Estimate:
    """The estimate of so many trials, which train on `tokens_of_all` if early stopping saves as much as is expected.

    By the speed of the newest finished sweep of the same model; otherwise a trial's speed is measured here.
    """
    seconds, source = None, UNKNOWN
    if plan.experiment.sizes_follow_text:
        seconds, source = derived.SWEEP_SECONDS, "at most (its sizes were derived for that on this machine)"
    for run in _finished(plan, "tune"):
        record = SweepRecord(run)
        trained = sum(trial.tokens for trial in record.trials.values())
        if trained and record.seconds and tokens_of_all:
            seconds = tokens_of_all * record.seconds / trained
            source = f"at the {trained / record.seconds:,.0f} tokens/s of all trials of {run.rpartition('/')[2]}"
            break
    if seconds is None and tokens_of_all and plan.resources is not None and (speed := _measured(plan)):
        together = min(plan.resources.most_runs, plan.experiment.tune.max_concurrent_trials or trials, trials)
        seconds = derived.START_SECONDS + _seconds(plan, tokens_of_all, speed * plan.resources.num_workers * together)
        source = f"with {console.counted(together, 'trial')} at a time of {speed:,.0f} tokens/s, {MEASURED}"
    return _with_disk(plan, trials, seconds, source)


def _with_disk(plan: Plan, trials: int, seconds: float | None, source: str) -> Estimate:
    experiment = plan.experiment
    model_bytes = plan.num_parameters * {"float32": 4, "bfloat16": 2}[experiment.model.dtype]
    checkpoint = model_bytes * (OF_A_CHECKPOINT if experiment.model.lora is None else 1)
    kept = experiment.train.keep_checkpoints + 1  # and the best one, which may be that of a cooldown
    if plan.budget is not None:
        kept = min(kept, 1 + plan.budget.steps // min(plan.budget.eval_every, plan.budget.save_every))
    store = 0
    if not tokens.is_store(plan.tokens.store):
        bytes_per_id = 2 if plan.model_config.get_text_config().vocab_size <= 2**16 else 4
        store = round(plan.tokens.num_bytes / derived.BYTES_PER_TOKEN * bytes_per_id)
    return Estimate(store, trials * kept * checkpoint, model_bytes, seconds, source)


def _finished(plan: Plan, kind: str) -> Iterator[str]:
    """The directories of the finished runs of the same experiment and model, the newest first."""
    place = runs.directory_of(plan.experiment)
    now = {key: value for key, value in runs.flat_settings(plan.experiment).items() if key.startswith(SHAPE)}
    swept = plan.experiment.tune.space if kind == "tune" else {}
    for name in reversed([name for name in storage.names(place) if name.startswith(f"{kind}-")]):
        before = json.loads(storage.read(f"{place}/{name}/run.json") or b"{}")
        result = runs.result_of(f"{place}/{name}")
        alike = all(before.get(key) == value for key, value in now.items() if key not in swept)
        if result and "error" not in result and alike:
            yield f"{place}/{name}"


def say(estimated: Estimate) -> None:
    """Tell a command's user what it will take."""
    for what, amount in estimated.facts().items():
        logger.info(f"{what}: {amount}")
