"""Asynchronous successive halving: every trial pauses at a rung, and the best are promoted whenever there is room.

    rungs, in tokens    81,920     245,760     of 737,280, with an eta of 3
    trial_00000         130 pauses
    trial_00001         120 ---->  101 pauses  the best of 3 results at its rung: floor(3 / 3) = 1 is promoted
    trial_00002         150 pauses             there is room and no trial to promote, so a new trial starts

This is algorithm 2 of Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (arXiv:1810.05934). Ray's
ASHAScheduler only stops trials: the first trials of a sweep find no others at their rungs and train to the end, however
bad they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler

from raylm import document_scores, statistics
from raylm.budget import Budget
from raylm.document_scores import DocumentScores
from raylm.sweep.record import Place, evaluated_in


def rungs(budget: Budget, grace_tokens: int, eta: float, cooldown: float | None = None) -> list[int]:
    """Training tokens at which trials pause: grace_tokens, eta times as many, and so on, each in whole saves.

    A trial resumes from the save at its rung, so no step is trained twice. No rung is less than one save before the
    end, because a pause there would save almost nothing. With `cooldown`, tune.scheduler.cooldown, none is in the decay
    at the end of the training, nor so late that its cooldown would end later.
    """
    between = budget.save_every * budget.batch_tokens
    last: float = budget.tokens - between
    if cooldown is not None:
        stable = (budget.steps - budget.decay_steps) * budget.batch_tokens
        last = min(last, stable, budget.tokens / (1 + cooldown))
    found, rung = [], max(1, round(grace_tokens / between)) * between
    while rung <= last:
        found.append(rung)
        rung = max(rung + between, round(rung * eta / between) * between)
    return found


class Ties:
    """Whether a trial is not worse than another one, by the documents of two evaluations.

    It is not worse if the 95 % interval of their difference, paired by document, reaches zero. The interval decides,
    not the ranking's test of signs, because that takes 1.3 s for 10,000 documents, while Tune and all trials wait.
    """

    def __init__(self, directory: str):
        self.directory = directory
        self._known: dict[tuple[Place, Place], bool] = {}

    def __call__(self, one: Place, other: Place) -> bool:
        """Whether the documents do not show that the trial of one evaluation is worse than that of the other; False if
        their scores were not kept or they are too few to tell."""
        if (one, other) not in self._known:
            scores, others = (document_scores.read(f"{self.directory}/{place}", step) for place, step in (one, other))
            self._known[one, other] = scores is not None and others is not None and self._is_not_worse(scores, others)
        return self._known[one, other]

    def _is_not_worse(self, own: DocumentScores, other: DocumentScores) -> bool:
        if own.documents != other.documents:
            return False
        low, _ = statistics.interval(own.nll - other.nll, own.tokens)
        return math.isfinite(low) and low <= 0


class Asha(FIFOScheduler):
    """Trials pause at rungs. The best floor(n / eta) of n results at a rung are promoted, those of the highest first.

    A new trial starts only when no paused one can be promoted. At the end, when no trial runs, can be promoted or is
    still to start, the paused ones are stopped. But until one trial has completed, the best of the highest rung is
    promoted instead, so that even a sweep of fewer than eta trials trains one with the whole budget. Equal scores rank
    in the order of their reports; NaN ranks last.

    With `ties`, a paused trial that is not worse than the last of the best of its rung, or than the best if n is less
    than eta, resumes while there is room: when a place is free, no trial can be promoted by its rank and no new one is
    left to start. At most, all trials are then trained with the whole budget.

    With `cooldown`, trials are compared by the reports of their cooldowns; see training.cooldown.
    """

    def __init__(
        self, rungs: list[int], eta: float, metric: str, ties: Ties | None = None, cooldown: float | None = None
    ):
        super().__init__()
        self.rungs, self.eta, self.ties, self.cooldown = rungs, eta, ties, cooldown
        self._metric = metric
        self.scores: list[dict[str, float]] = [{} for _ in rungs]
        """For each rung: trial id -> score of each trial that has reached it. Lower is better."""
        self.waiting: dict[str, int] = {}
        """Paused trial -> the number of its rung."""
        self.places: list[dict[str, Place]] = [{} for _ in rungs]
        """For each rung: trial id -> its evaluation there."""
        self.has_one = False
        """Whether a trial has completed."""

    def stages(self, trials: int, budget_tokens: int) -> list[tuple[int, int]]:
        """(tokens, number of trials that train up to there) for each rung and the budget: one in eta is promoted."""
        found = []
        for tokens in [*self.rungs, budget_tokens]:
            found.append((tokens, trials))
            trials = max(1, math.floor(trials / self.eta))
        return found

    def expected_tokens(self, trials: int, budget_tokens: int) -> int:
        """Training tokens of all trials together, according to `stages`."""
        total = before = 0
        cooldowns = [*self.cooldown_tokens, 0]  # none at the end
        for (tokens, count), cooldown in zip(self.stages(trials, budget_tokens), cooldowns, strict=True):
            total += count * (tokens - before + cooldown)
            before = tokens
        return total

    @property
    def cooldown_tokens(self) -> list[int]:
        """Training tokens of the cooldown at each rung; 0 without cooldowns."""
        return [round(rung * (self.cooldown or 0)) for rung in self.rungs]

    def cooldowns(self, budget: Budget) -> dict[int, int]:
        """The step of a trial at each rung, and the number of steps of its cooldown there; empty without `cooldown`.

        `budget` is the trial's, whose steps may have other sizes than those of the sweep.
        """
        if self.cooldown is None:
            return {}
        steps = [math.ceil(rung / budget.batch_tokens) for rung in self.rungs]
        return {step: max(1, round(step * self.cooldown)) for step in steps}

    def compares(self, result: Mapping[str, Any]) -> bool:
        """Whether trials are compared by a result at a rung: if they have cooldowns, by these alone."""
        return self.cooldown is None or "cooldown_step" in result

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        if not self.compares(result):
            return self.CONTINUE
        score = result[self._metric]
        reached = [number for number, rung in enumerate(self.rungs) if rung <= result["tokens"]]
        new = [number for number in reached if trial.trial_id not in self.scores[number]]
        for number in new:
            self.scores[number][trial.trial_id] = math.inf if math.isnan(score) else score
            self.places[number][trial.trial_id] = evaluated_in(trial.trial_id, result)
        if not new or result["tokens"] >= result["budget_tokens"]:
            return self.CONTINUE
        self.waiting[trial.trial_id] = new[-1]
        if self.next_up() != trial.trial_id:
            return self.PAUSE
        self.promote(trial.trial_id)  # a pause would only free the room that it takes itself
        return self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        self.has_one = True

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        self.waiting.pop(trial.trial_id, None)

    on_trial_error = on_trial_remove

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """The trial to promote, if there is room; the caller then calls `promote`. Tune starts new trials by itself."""
        queue = tune_controller.search_alg
        if not self.waiting or queue.is_full:
            return None
        chosen = self.next_up() or (self._next_tie() if not queue.has_more else None)
        trials = {trial.trial_id: trial for trial in tune_controller.get_trials()}
        if chosen is None and not queue.busy and not queue.has_more:
            if not self.has_one:
                chosen = self._best(max(self.waiting.values()), len(self.scores[0]))[0]
            for trial_id in [] if chosen else list(self.waiting):
                tune_controller.stop_trial(trials[trial_id])
        # Pausing takes Tune a moment. A trial that is promoted before would be paused afterwards.
        return trials[chosen] if chosen and trials[chosen].status == RayTrial.PAUSED else None

    def next_up(self) -> str | None:
        """The trial to promote next; None if no trial can be promoted."""
        for number in reversed(range(len(self.rungs))):
            if best := self._best(number, math.floor(len(self.scores[number]) / self.eta)):
                return best[0]
        return None

    def _next_tie(self) -> str | None:
        """The trial to promote though it is not among the best of its rung; None if there is none."""
        if self.ties is None:
            return None
        for number in reversed(range(len(self.rungs))):
            scores, places = self.scores[number], self.places[number]
            ranked = sorted(scores, key=scores.__getitem__)
            among = math.floor(len(scores) / self.eta)
            for name in ranked[among:]:
                last = ranked[max(0, among - 1)]
                if self.waiting.get(name) == number and self.ties(places[name], places[last]):
                    return name
        return None

    def promote(self, trial_id: str) -> None:
        del self.waiting[trial_id]

    def _best(self, number: int, most: int) -> list[str]:
        """Of the `most` best trials of a rung those that are paused there, the best first."""
        scores = self.scores[number]
        return [name for name in sorted(scores, key=scores.__getitem__)[:most] if self.waiting.get(name) == number]

    def debug_string(self) -> str:
        return f"{len(self.waiting)} trials are paused at rungs"
