"""The schedulers of tune.scheduler and when a sweep stops. Time is in training tokens; rungs are at whole saves."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune import Checkpoint
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import (
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.stopper import Stopper

from raylm.budget import Budget
from raylm.config import MUTABLE, StopConfig, TuneConfig
from raylm.errors import StorageUnavailable
from raylm.sweep.asha import Asha, Ties, rungs
from raylm.sweep.record import Event, SweepRecord, Unsaved
from raylm.sweep.space import Space, domains

KEPT = (
    "step", "tokens", "perplexity", "bits_per_byte", "weighted_nll", "best_perplexity", "best_bits_per_byte",
    "best_weighted_nll", "best_step", "best_checkpoint", "best_cooldown", "budget_tokens", "seconds", "cooldown_step",
    "cooldown_tokens",
)  # fmt: skip
"""The metrics of a result that are recorded."""

EVALUATIONS = "evaluations"


def scheduler(section: TuneConfig, budget: Budget, metric: str, directory: str = "") -> TrialScheduler:
    """The trial scheduler of tune.scheduler. `directory` is that of the sweep, whose document scores tell ties."""
    chosen = section.scheduler
    between = budget.eval_every * budget.batch_tokens

    def whole(tokens: int | None) -> int:
        """Tokens in whole evaluations; an eighth of the budget by default."""
        return min(max(1, round((tokens or budget.tokens // 8) / between)) * between, budget.tokens)

    common: dict[str, Any] = {"time_attr": "tokens", "metric": metric, "mode": "min"}
    match chosen.kind:
        case "asha":
            grace_tokens = chosen.grace_tokens or budget.tokens // 8
            eta = chosen.reduction_factor
            ties = Ties(directory) if chosen.ties == "promote" else None
            return Asha(rungs(budget, grace_tokens, eta, chosen.cooldown), eta, metric, ties, chosen.cooldown)
        case "median":
            # Never pause a trial to wait for others to compare it with: starting it again costs more than that saves.
            return MedianStoppingRule(grace_period=whole(chosen.grace_tokens), min_time_slice=math.inf, **common)
        case "hyperband":
            # Its brackets start at one unit of time: an evaluation, not a token.
            common["time_attr"] = EVALUATIONS
            most = math.ceil(budget.tokens / between)
            return HyperBandScheduler(max_t=most, reduction_factor=chosen.reduction_factor, **common)
        case "pbt":
            return PopulationBasedTraining(
                perturbation_interval=whole(chosen.every_tokens),
                hyperparam_mutations=mutations(section.space),
                custom_explore_fn=functools.partial(inside, section.space),
                log_config=False,
                **common,
            )
    return FIFOScheduler()


def mutations(space: Space) -> dict[str, Any]:
    """Settings that a population changes: a choice to its neighbour, a number by a fifth; or the value is redrawn."""
    found = {key: sampler for key, sampler in space.items() if key in MUTABLE}
    ranges = domains(found)
    return {key: sampler.get("choice", ranges[key]) for key, sampler in found.items()}


def inside(space: Space, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that a population has changed, clipped to their ranges, which a change by a fifth may leave.

    Outside of its range a setting may mean something else, or nothing: warmup_steps below 1, adam_beta2 of 1.
    """
    for key in space.keys() & set(MUTABLE):
        ((kind, values),) = space[key].items()
        if kind == "choice":
            continue
        low, high = values[0], values[1] - 1 if kind.endswith("randint") else values[1]
        value = round(settings[key] / values[2]) * values[2] if kind == "quniform" else settings[key]
        settings[key] = min(max(value, low), high)
    return settings


class RecordedScheduler(Unsaved, TrialScheduler):
    """A scheduler that gets each result once, after it was recorded, and again by replay when the sweep resumes."""

    def __init__(self, inner: TrialScheduler, record: SweepRecord, budget: Budget, stopping: Callable[[], bool]):
        super().__init__()
        self.inner, self.record, self.stopping = inner, record, stopping
        self.budget = budget
        self.is_population = isinstance(inner, PopulationBasedTraining)
        self.asha = inner if isinstance(inner, Asha) else None
        self.added: set[str] = set()
        self.stopped: set[str] = set()
        """Trials that the inner scheduler has decided to stop."""

    @property
    def metric(self) -> str | None:
        return self.inner.metric

    @property
    def supports_buffered_results(self) -> bool:
        return False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return True

    # Called by Tune

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        if trial.trial_id not in self.added:
            self.added.add(trial.trial_id)
            self.inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        known = self.record.trials[trial.trial_id]
        if outage := result.get("outage"):
            self.record.outage = StorageUnavailable(outage, self.record.directory)
            return self.CONTINUE
        if (failure := result.get("failure")) and not known.is_over:
            self.record.finish(trial.trial_id, "failed", failure, result.get("wrong_setting"))
            self.inner.on_trial_remove(tune_controller, trial)
            return self.CONTINUE
        # Tune repeats the last result when a trial ends, and a trial that resumes repeats those after its checkpoint.
        if known.is_over or "tokens" not in result or known.has(result):
            return self.PAUSE if self.waits(trial.trial_id) else self.CONTINUE
        record = self.record.cool if "cooldown_step" in result else self.record.result
        record(trial.trial_id, {key: result[key] for key in KEPT if key in result})
        decide = self._in_population if self.is_population else self._decided
        decision = decide(tune_controller, trial, result)
        # One that is to stop pauses first: a scheduler is told that it has gone, and not that it has completed.
        is_to_stop = trial.trial_id in self.record.to_stop and not self._is_whole(trial)
        return self.PAUSE if is_to_stop and decision == self.CONTINUE else decision

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        known = self.record.trials[trial.trial_id]
        if known.is_over or (self.stopping() and trial.trial_id not in self.stopped and not self._is_whole(trial)):
            return  # it resumes with the sweep
        self._finish(trial)
        self.inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        if not self.record.trials[trial.trial_id].is_over and not self.stopping():
            self.record.finish(trial.trial_id, "stopped early", dropped=True)
            self.inner.on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        if trial.status == RayTrial.ERROR:  # Tune is about to start it again
            return
        if not self.record.trials[trial.trial_id].is_over:
            last = str(trial.get_error() or "its process was lost").strip().split("\n")[-1]
            self.record.finish(trial.trial_id, "failed", last)
            self.inner.on_trial_error(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        if self.stopping():
            for trial in tune_controller.get_trials():
                if trial.status == RayTrial.PAUSED:  # or Tune waits for it forever
                    tune_controller.stop_trial(trial)
            return None
        for trial in tune_controller.get_trials() if self.record.to_stop else []:
            if trial.trial_id in self.record.to_stop and trial.status == RayTrial.PAUSED:
                tune_controller.stop_trial(trial)
        chosen = self.inner.choose_trial_to_run(tune_controller)
        if self.asha is not None and chosen is not None:
            self.record.promote(chosen.trial_id)
            self.asha.promote(chosen.trial_id)
        return chosen

    def debug_string(self) -> str:
        return self.inner.debug_string()

    def _decided(self, tune_controller: Any, trial: RayTrial, result: Mapping[str, Any]) -> str:
        between = self.budget.eval_every * self.budget.batch_tokens
        decision = self.inner.on_trial_result(
            tune_controller, trial, {**result, EVALUATIONS: math.ceil(result["tokens"] / between)}
        )
        if decision == self.STOP:
            self.stopped.add(trial.trial_id)
        return decision

    def _finish(self, trial: RayTrial) -> None:
        if self._is_whole(trial):
            self.record.finish(trial.trial_id, "completed")
        else:
            self.record.finish(trial.trial_id, "stopped early", dropped=trial.trial_id in self.stopped)

    def _is_whole(self, trial: RayTrial) -> bool:
        known = self.record.trials[trial.trial_id]
        budget = known.results[-1].get("budget_tokens", self.budget.tokens) if known.results else self.budget.tokens
        return known.tokens >= budget  # with tune.ladder trials have budgets of their own

    # Rungs

    def waits(self, trial_id: str) -> bool:
        """Whether a trial is paused at a rung."""
        return self.asha is not None and trial_id in self.asha.waiting

    @property
    def has_next(self) -> bool:
        """Whether a paused trial is to be promoted before a new one starts."""
        return self.asha is not None and self.asha.next_up() is not None

    def is_at_rung(self, result: Mapping[str, Any]) -> bool:
        """Whether a trial is compared with all others by this result, or was before."""
        asha = self.asha
        return asha is not None and bool(asha.rungs) and result["tokens"] >= asha.rungs[0] and asha.compares(result)

    # A population

    def _in_population(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        if self._is_whole(trial):  # nothing is left to train with changed settings
            return self.CONTINUE
        settings = dict(trial.config)
        decision = self.inner.on_trial_result(_PbtController(tune_controller), trial, result)
        if trial.config != settings:
            donor = self.record.trials[trial.latest_checkpoint_result.checkpoint.path.split("/")[-2]]
            if donor.tokens >= self.budget.tokens:  # nothing is left to train with other settings
                trial.set_config(dict(donor.settings))
            self.record.change(trial.trial_id, trial.config, donor.trial_id, donor.tokens)
        return decision

    # Replay

    def replay(self, trials: Mapping[str, RayTrial]) -> None:
        """Replay the record's events to the scheduler. Unfinished trials are paused or pending afterwards.

        A population starts afresh from the trials as they are, because its changes are in the record already.
        """
        if not self.is_population:
            past = _ReplayController(self.inner)
            for event in self.record.of(trials):
                self._again(past, event, trials)
        for trial_id, trial in trials.items():
            if trial_id in self.stopped and not self.record.trials[trial_id].is_over:  # the sweep was killed first
                self._finish(trial)
            if not self.record.trials[trial_id].is_over:
                trial.set_status(RayTrial.PAUSED if self.waits(trial_id) else RayTrial.PENDING)

    def _again(self, past: _ReplayController, event: Event, trials: Mapping[str, RayTrial]) -> None:
        match event:
            case {"added": trial_id}:
                self.added.add(trial_id)
                self.inner.on_trial_add(past, trials[trial_id])
            case {"result": trial_id, **result} | {"cooled": trial_id, **result}:
                trial = trials[trial_id]
                trial.set_status(RayTrial.RUNNING)
                trial.update_last_result(result)
                if self._decided(past, trial, result) == self.PAUSE:
                    trial.set_status(RayTrial.PAUSED)
            case {"promoted": trial_id} if self.asha is not None:
                trials[trial_id].set_status(RayTrial.RUNNING)
                self.asha.promote(trial_id)
            case {"finished": trial_id, "status": status}:
                trial = trials[trial_id]
                if trial.status == RayTrial.TERMINATED:
                    return
                is_stopped = trial_id in self.record.to_stop and status == "stopped early"
                if status == "failed" or is_stopped or trial.status != RayTrial.RUNNING:
                    self.inner.on_trial_remove(past, trial)
                else:
                    self.inner.on_trial_complete(past, trial, trial.last_result)
                trial.set_status(RayTrial.TERMINATED)


class _ReplayController:
    """The part of Tune's controller that schedulers call, for the replay."""

    def __init__(self, inner: TrialScheduler):
        self.inner = inner

    def stop_trial(self, trial: RayTrial) -> None:
        self.inner.on_trial_remove(self, trial)
        trial.set_status(RayTrial.TERMINATED)


class _PbtController:
    """Tune's controller for a population: it takes the trials' own checkpoints instead of saving new ones."""

    def __init__(self, controller: Any):
        self.controller = controller

    def __getattr__(self, name: str) -> Any:
        return getattr(self.controller, name)

    def _schedule_trial_save(self, trial: RayTrial, result: Mapping[str, Any], **_: Any) -> Checkpoint:
        return Checkpoint(result["best_checkpoint"].rpartition("/")[0])  # their directory: this one may be pruned soon


class SweepStopper(Unsaved, Stopper):
    """Stops the whole sweep, as tune.stop says."""

    def __init__(self, section: StopConfig, record: SweepRecord, metric: str):
        self.section, self.record, self.metric = section, record, metric
        self.counted = time.monotonic()
        """The time, by time.monotonic, up to which the record has the seconds of the sweep."""

    def count(self) -> None:
        """Record the seconds that have passed, so that they still count after the command is killed."""
        passed, self.counted = time.monotonic() - self.counted, time.monotonic()
        self.record.spend(passed)

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        section, trials = self.section, self.record.trials.values()
        if section.seconds is not None:
            passed = time.monotonic() - self.counted
            if passed >= max(1.0, section.seconds / 1000):  # at most a thousand lines
                self.count()
                passed = 0.0
            if self.record.seconds + passed >= section.seconds:
                return True
        trained = sum(trial.tokens + trial.cooldown_tokens for trial in trials)
        if section.tokens is not None and trained >= section.tokens:
            return True
        best = min((trial.results[-1][self.metric] for trial in trials if trial.results), default=math.inf)
        return section.perplexity is not None and best <= section.perplexity
