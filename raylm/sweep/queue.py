"""Hands Tune the trials that are not over, then new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.experiment.config_parser import _create_trial_from_spec, _make_parser
from ray.tune.search.search_algorithm import SearchAlgorithm

from raylm.sweep.record import NotSaved, Record, Trial
from raylm.sweep.schedule import Recorded
from raylm.sweep.space import Points


class Trials(NotSaved, SearchAlgorithm):
    """The trials of a sweep, by ids that stay when it goes on: trial_00000, trial_00001, ..."""

    def __init__(
        self,
        points: Points,
        record: Record,
        scheduler: Recorded,
        *,
        together: int,
        values: Callable[[Trial], Sequence[float]],
        stopping: Callable[[], bool],
    ):
        self.points, self.record, self.scheduler = points, record, scheduler
        self.together, self.values, self.stopping = together, values, stopping
        self.waiting: list[RayTrial] = []
        """Trials that were begun before, and are to go on."""
        self.handed: list[RayTrial] = []
        for event in record.events:
            self._again(event)

    def _again(self, event: dict[str, Any]) -> None:
        """Ask and tell where points come from what it was asked and told before, so that it goes on from there."""
        match event:
            case {"begun": trial_id}:
                self.points.draw(trial_id)
            case {"over": trial_id}:
                self._tell(trial_id)

    def _tell(self, trial_id: str) -> None:
        trial = self.record.trials[trial_id]
        failed = trial.status == "failed" or not trial.results
        self.points.tell(trial_id, None if failed else self.values(trial))

    @property
    def total_samples(self) -> int:
        return self.points.total

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def add_configurations(self, experiments: Any) -> None:
        """Tune's experiment: what all trials have in common."""
        self.spec = experiments[0].spec
        made = {trial_id: self._made(trial_id, trial.settings) for trial_id, trial in self.record.trials.items()}
        self.scheduler.replay(made)
        self.waiting = [trial for trial_id, trial in made.items() if not self.record.trials[trial_id].is_over]

    def _made(self, trial_id: str, settings: dict[str, Any]) -> RayTrial:
        spec = {**self.spec, "config": dict(settings)}
        return _create_trial_from_spec(spec, _make_parser(), trial_id=trial_id, experiment_tag=trial_id)

    def next_trial(self) -> RayTrial | None:
        busy = sum(trial.status in (RayTrial.PENDING, RayTrial.RUNNING) for trial in self.handed)
        if busy >= self.together or self.is_finished():
            return None
        if self.waiting:
            trial = self.waiting.pop(0)
        else:
            trial_id = f"trial_{len(self.record.trials):05d}"
            settings = self.points.draw(trial_id)
            self.record.begin(trial_id, settings)
            trial = self._made(trial_id, settings)
        self.handed.append(trial)
        return trial

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if self.record.trials[trial_id].is_over:
            self._tell(trial_id)

    def is_finished(self) -> bool:
        done = not self.waiting and len(self.record.trials) >= self.points.total
        return self._finished or done or self.stopping()
