"""The queue from which Tune takes the trials to run: first the unfinished ones of the record, then new ones."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import HyperBandScheduler
from ray.tune.search.search_algorithm import SearchAlgorithm

from raylm import storage
from raylm.errors import StorageError
from raylm.sweep import requests
from raylm.sweep.record import SweepRecord, Trial, Unsaved
from raylm.sweep.schedule import RecordedScheduler
from raylm.sweep.space import Searcher

LOCAL_SECONDS, REMOTE_SECONDS = 0.5, 10.0
"""How often a sweep looks for requests of other commands; on remote storage each look is a request of its own."""


class TrialQueue(Unsaved, SearchAlgorithm):
    """The trials of a sweep. Their ids stay the same when it resumes: trial_00000, trial_00001, ..."""

    def __init__(
        self,
        points: Searcher,
        record: SweepRecord,
        scheduler: RecordedScheduler,
        *,
        together: int,
        values: Callable[[Trial], Sequence[float]],
        stopping: Callable[[], bool],
        again: Callable[[], Searcher] | None = None,
    ):
        """`again`: a new searcher, of the trials that other commands have added too."""
        self.points, self.record, self.scheduler = points, record, scheduler
        self.together, self.values, self.stopping, self.again = together, values, stopping, again
        self.unfinished: list[RayTrial] = []
        """Trials of the record that resume; those that are paused at a rung come first."""
        self.handed: list[RayTrial] = []
        self.told: set[str] = set()
        """Trials whose score was reported to the searcher."""
        self.unknown = record.lost()
        """Directories of trials whose lines in the record were lost; the searcher may now draw other settings."""
        self.looked = 0.0
        """When it last looked for requests, by time.monotonic."""
        self._replay()

    def _replay(self) -> None:
        for event in self.record.of(self.own):
            self._again(event)

    def take_requests(self) -> bool:
        """Take what other commands have asked for, if it is time to look; whether trials were added."""
        is_remote = storage.is_remote(self.record.directory)
        if time.monotonic() - self.looked < (REMOTE_SECONDS if is_remote else LOCAL_SECONDS):
            return False
        before, self.looked = self.record.requested, time.monotonic()
        with contextlib.suppress(StorageError, OSError):  # it looks again
            requests.take(self.record)
        if self.record.requested == before:
            return False
        self._search_again()
        return True

    def _search_again(self) -> None:
        """Have a new searcher, which knows the trials that it has not drawn itself."""
        if self.again is not None:
            self.points, self.told = self.again(), set()
            self._replay()

    @property
    def own(self) -> dict[str, Trial]:
        """The trials of the record that this queue runs. Repeats are run once they were chosen; those of an earlier end
        of the sweep wait until it has ended again."""
        trials = self.record.trials
        return trials if self.record.repeated is not None else {each.trial_id: each for each in self.record.searched}

    def _again(self, event: dict[str, Any]) -> None:
        """Show the searcher an event of the record, so that it continues from the state that it had."""
        match event:
            case {"added": trial_id, "settings": settings}:
                self.points.add(trial_id, {**self.record.given, **settings})
            case {"result": trial_id} | {"cooled": trial_id}:
                self._tell_at_rung(trial_id, event)
            case {"finished": trial_id}:
                self._tell_in_the_end(trial_id)

    def _tell_at_rung(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Report the score at the first rung, the only one that all trials have: most stay paused there to the end."""
        if self.scheduler.is_at_rung(result):
            results = self.record.trials[trial_id].results
            self._tell(trial_id, [each for each in results if each["tokens"] <= result["tokens"]])

    def _tell_in_the_end(self, trial_id: str) -> None:
        trial = self.record.trials[trial_id]
        self._tell(trial_id, trial.results if trial.status != "failed" else [])

    def _tell(self, trial_id: str, results: list[dict[str, Any]]) -> None:
        if trial_id not in self.told:
            self.told.add(trial_id)
            trial = replace(self.record.trials[trial_id], results=results)
            self.points.tell(trial_id, self.values(trial) if results else None)

    @property
    def total_samples(self) -> int:
        own = len(self.own)
        return max(self.points.total, own) + len(self.record.trials) - own  # tune.num_samples may be less than it was

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def add_configurations(self, experiments: Any) -> None:
        """Take Tune's experiment, which holds what all trials have in common, and bring back the recorded trials."""
        self.spec = experiments[0].spec
        for trial_id, trial in self.own.items():
            if trial_id in self.record.to_stop and trial.results and not trial.is_over:
                self.record.finish(trial_id, "stopped early", dropped=True)
        made = {trial_id: self._made(trial_id, trial.settings | trial.seeds) for trial_id, trial in self.own.items()}
        # Brackets in which all trials have ended can take no more: those of an extended sweep are new ones.
        ended = self.record.earlier if isinstance(self.scheduler.inner, HyperBandScheduler) else set()
        self.scheduler.replay({trial_id: trial for trial_id, trial in made.items() if trial_id not in ended})
        for trial_id, trial in self.own.items():
            if trial.is_over:  # by the replay, if the sweep was killed before it recorded the end
                self._tell_in_the_end(trial_id)
        self.unfinished = [each for trial_id, each in made.items() if not self.record.trials[trial_id].is_over]
        self.unfinished.sort(key=lambda each: each.status != RayTrial.PAUSED)

    def _made(self, trial_id: str, settings: dict[str, Any]) -> RayTrial:
        same = ("storage", "checkpoint_config", "max_failures", "trial_name_creator", "trial_dirname_creator")
        trial = RayTrial(
            self.spec["run"],
            config=dict(settings),
            trial_id=trial_id,
            experiment_tag=trial_id,
            placement_group_factory=self.spec["resources_per_trial"],
            **{name: self.spec[name] for name in same},
        )
        trial.init_local_path()  # or Tune fails at the end of a sweep, for a paused trial that never resumed
        return trial

    @property
    def busy(self) -> int:
        """Number of trials that are running or about to."""
        return sum(trial.status in (RayTrial.PENDING, RayTrial.RUNNING) for trial in self.handed)

    @property
    def is_full(self) -> bool:
        return self.busy >= self.together

    @property
    def has_more(self) -> bool:
        """Whether there are trials that Tune has not been given yet."""
        return bool(self.unfinished) or len(self.own) < self.points.total

    def next_trial(self) -> RayTrial | None:
        waits = bool(self.unfinished) and self.unfinished[0].status == RayTrial.PAUSED  # a paused trial takes no room
        if self.is_finished() or (self.is_full and not waits):
            return None
        if self.unfinished:
            trial = self.unfinished.pop(0)
        elif not self.has_more or self.scheduler.has_next:
            return None
        else:
            trial_id = self.record.free_id(self.unknown)
            settings = self.points.draw(trial_id)
            if requested := self.record.requested_settings[:1]:
                settings = {**settings, **requested[0]}
            self.record.add(trial_id, settings, is_requested=bool(requested))
            if requested:
                self._search_again()
            trial = self._made(trial_id, settings)
        self.handed.append(trial)
        return trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not self.record.trials[trial_id].is_over and "tokens" in result:
            self._tell_at_rung(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        if self.record.trials[trial_id].is_over:
            self._tell_in_the_end(trial_id)

    def is_finished(self) -> bool:
        """Whether no trial is left to start or resume. Tune then ends the processes that it keeps for reuse."""
        done = not self.has_more and not any(trial.status == RayTrial.PAUSED for trial in self.handed)
        return self._finished or done or self.stopping()
