"""The record of a sweep: an append-only file of events, each on disk before anything is done about it.

    <sweep>/events.jsonl  {"added": "trial_00003", "settings": {"train.learning_rate": 0.003}}
                          {"started": "trial_00003"}                     a process trains it, once per attempt
                          {"result": "trial_00003", "tokens": 81920, "perplexity": 130.5, ...}       an evaluation
                          {"cooled": "trial_00003", "tokens": 81920, "perplexity": 121.3, ...}       a cooldown there
                          {"promoted": "trial_00003"}                    it was paused at a rung, and resumes
                          {"changed": "trial_00003", "settings": {...}, "donor": "trial_00001", "tokens": 81920}
                          {"finished": "trial_00003", "status": "stopped early", "failure": null, "dropped": true}
                          {"repeated": ["trial_00003", ...]}             all trials have ended, and these are repeated
                          {"added": "trial_00008", "settings": {...}, "repeat_of": "trial_00003", "seeds": {...}}
                          {"extended": 16, "reopened": ["trial_00003", ...], "settings": {"train.seed": 0}}
                                                                         it had ended, or its space has new keys, and
                                                                         now has so many trials; these were dropped, and
                                                                         are paused again; the trials so far have the
                                                                         settings of the new keys
                          {"request": "20261130-041500-3fa2.json", "stop": "trial_00003"}   taken: see requests
                          {"request": "20261130-041501-9c01.json", "add": 2, "settings": {...}}
                          {"spent": 12.5}                                the sweep has run for this many more seconds

Replaying the events brings searcher and scheduler back to their state, because they have seen nothing else. Tune
itself saves a sweep every 10 s at best, and without the scheduler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from raylm import checkpoint, storage
from raylm.errors import StorageUnavailable
from raylm.tracking import journal

EVENTS = "events.jsonl"

DURABLE = {"finished", "changed", "repeated", "extended", "request"}
"""Events that outlive a power cut; a change is read by its trial, maybe on another machine."""

Status = Literal["running", "interrupted", "not started", "completed", "stopped early", "failed"]
"""Read back, a trial that is not over is running only while a command works on the sweep."""

Event = dict[str, Any]


Place = tuple[str, int]
"""Where an evaluation is: the directory of its training, below the sweep's, and the step."""


def evaluated_in(trial_id: str, result: Mapping[str, Any]) -> Place:
    """Where the evaluation of a result is."""
    begins = result.get("cooldown_step")
    return trial_id if begins is None else checkpoint.cooldown_directory(trial_id, begins), result.get("step", 0)


@dataclass
class Trial:
    """A trial, as the events so far describe it."""

    trial_id: str
    settings: dict[str, Any]
    """Swept dotted key -> value."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """One per evaluation, in order: step, tokens, perplexity, bits_per_byte, best_perplexity, seconds, ... Best is the
    best so far, of cooldowns too."""
    status: Status = "running"
    dropped: bool = False
    """Whether the scheduler stopped it; a training may also stop early by itself, with train.patience."""
    failure: str | None = None
    wrong_setting: str | None = None
    """The setting that made it fail, if one did."""
    attempts: int = 0
    """How often a process started to train it."""
    repeat_of: str | None = None
    """The trial whose settings it repeats."""
    seeds: dict[str, int] = field(default_factory=dict)
    """The seeds of a repeat by their dotted keys; those of other trials are the experiment's."""
    cooldowns: list[dict[str, Any]] = field(default_factory=list)
    """The results of its cooldowns, in order: tokens are those of the trial where it begins, step is its last."""

    @property
    def is_over(self) -> bool:
        return self.status not in ("running", "interrupted", "not started")

    def score(self, metric: str) -> float | None:
        """Its best value of a metric; None if it failed or has no finite one."""
        if self.status == "failed" or not self.results:
            return None
        value = self.results[-1][f"best_{metric}"]
        return value if math.isfinite(value) else None

    @property
    def best_tokens(self) -> int | None:
        """Tokens that it had been trained on at its best score."""
        last = self.results[-1] if self.results else {}
        if (begins := last.get("best_cooldown")) is not None:
            cooled = (each for each in self.cooldowns if each["cooldown_step"] == begins)
            return next((each["tokens"] + each["cooldown_tokens"] for each in cooled), None)
        return next((result["tokens"] for result in self.results if result["step"] == last.get("best_step")), None)

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on, up to its last evaluation, without its cooldowns."""
        return self.results[-1]["tokens"] if self.results else 0

    @property
    def last_perplexity(self) -> float | None:
        """The perplexity of its last evaluation; that of the cooldown there, if it has one."""
        if self.cooldowns and self.cooldowns[-1]["tokens"] == self.tokens:
            return self.cooldowns[-1]["perplexity"]
        return self.results[-1].get("perplexity") if self.results else None

    @property
    def cooldown_tokens(self) -> int:
        """Tokens that its cooldowns were trained on."""
        return sum(each["cooldown_tokens"] for each in self.cooldowns)

    def has(self, result: Mapping[str, Any]) -> bool:
        """Whether this result, or a later one, is known. A trial that resumes reports again."""
        if (begins := result.get("cooldown_step")) is not None:
            return any(each["cooldown_step"] >= begins for each in self.cooldowns)
        return result["tokens"] <= self.tokens

    def best_place(self, result: Mapping[str, Any]) -> Place:
        """Where the evaluation is that was the best at one of its results."""
        return evaluated_in(self.trial_id, {"step": result["best_step"], "cooldown_step": result.get("best_cooldown")})


def by_rank(trials: Collection[Trial], metric: str) -> list[Trial]:
    """Trials in the order of a sweep's table. The one with the best score is first.

    Then come those that trained to their own end, by score, and those that were stopped before: those that got further
    are higher, because the scheduler has compared them at equal tokens. Trials without a score are last.
    """
    best = min((score for trial in trials if (score := trial.score(metric)) is not None), default=math.nan)

    def place(trial: Trial) -> tuple[float, float, float]:
        score = trial.score(metric)
        if score is None:
            return 2, 0, 0
        stopped_after = trial.tokens if trial.dropped or not trial.is_over else math.inf
        return 0 if score == best else 1, -stopped_after, score

    return sorted(trials, key=place)


class SweepRecord:
    """The record of one sweep: the events so far, and methods that add new ones."""

    def __init__(self, directory: str):
        self.directory = directory
        self._log = journal.json_lines(directory, EVENTS)
        self.events: list[Event] = self._log.read()[0]
        """The events so far."""
        self.trials: dict[str, Trial] = {}
        """By trial id, in the order in which they were added."""
        self.repeated: list[str] | None = None
        """The trials whose settings are repeated; None before it is known which."""
        self.earlier: set[str] = set()
        """The trials that the sweep had when it was last extended."""
        self.given: dict[str, Any] = {}
        """The settings that trials have which were added before their keys were added to the space."""
        self.requests: set[str] = set()
        """The names of the requests that were taken."""
        self.to_stop: set[str] = set()
        """The trials that are to stop at their next evaluation, as another command has asked."""
        self.requested = 0
        """How many trials other commands have added to tune.num_samples."""
        self.requested_settings: list[dict[str, Any]] = []
        """Settings that other commands have asked for; the next trials have them."""
        self.seconds = 0.0
        """How long the sweep has run, over all commands."""
        self.problem: StorageUnavailable | None = None
        """Why the last event could not be written; it is written with the next one."""
        self.outage: StorageUnavailable | None = None
        """The failure of the storage that made a trial stop. The sweep stops, and the trial resumes with it."""
        for event in self.events:
            self._apply(event)

    @property
    def searched(self) -> list[Trial]:
        """The trials that are no repeats."""
        return [trial for trial in self.trials.values() if trial.repeat_of is None]

    def of(self, trial_ids: Collection[str]) -> list[Event]:
        """The events of these trials, without the ends of those that were reopened later."""
        found: list[Event] = []
        for event in self.events:
            about = next(iter(event.values()))
            if "extended" in event:
                found = [each for each in found if each.get("finished") not in event["reopened"]]
            elif isinstance(about, str) and about in trial_ids:
                found.append(event)
        return found

    def changes(self, trial_id: str) -> list[Event]:
        """The changes of a trial by its population."""
        return [event for event in self.events if event.get("changed") == trial_id]

    def lost(self) -> list[str]:
        """Directories of trials whose lines in the record were lost."""
        names = (name for name in storage.names(self.directory) if name.startswith("trial_"))
        return sorted({*names} - self.trials.keys())

    def free_id(self, lost: Iterable[str]) -> str:
        """An id without a trial and without a directory, because a trial would resume from the checkpoints there."""
        numbers = itertools.count(len(self.trials))
        taken = {*self.trials, *lost}
        return next(trial_id for trial_id in map("trial_{:05d}".format, numbers) if trial_id not in taken)

    def add(self, trial_id: str, settings: Mapping[str, Any], *, is_requested: bool = False) -> None:
        """`is_requested`: the first of the requested settings are among its settings."""
        about = {"requested": True} if is_requested else {}
        self._add({"added": trial_id, "settings": dict(settings), **about})

    def request(self, name: str, request: Mapping[str, Any]) -> None:
        """Record that a request was taken, {"stop": trial id} or {"add": number of trials, "settings": {...}}."""
        self._add({"request": name, **request})

    def repeat(self, trial_ids: Sequence[str]) -> None:
        """Record that all trials have ended, and that the settings of these are repeated."""
        self._add({"repeated": [*trial_ids]})

    def extend(self, total: int, reopened: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Record that the sweep has ended and now has `total` trials without repeats. `reopened`: those that were
        dropped and are paused again. `settings`: those that all trials so far have of keys that are new in the space.
        """
        self._add({"extended": total, "reopened": [*reopened], "settings": dict(settings)})

    def add_repeat(self, trial_id: str, repeat_of: str, seeds: Mapping[str, int]) -> None:
        settings = dict(self.trials[repeat_of].settings)
        self._add({"added": trial_id, "settings": settings, "repeat_of": repeat_of, "seeds": dict(seeds)})

    def start(self, trial_id: str) -> None:
        self._add({"started": trial_id})

    def result(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        self._add({"result": trial_id, **metrics})

    def cool(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        """Record the result of a cooldown."""
        self._add({"cooled": trial_id, **metrics})

    def promote(self, trial_id: str) -> None:
        self._add({"promoted": trial_id})

    def change(self, trial_id: str, settings: Mapping[str, Any], donor: str, tokens: int) -> None:
        """Record that a trial resumes from the donor's checkpoint after these tokens, with new settings."""
        self._add({"changed": trial_id, "settings": dict(settings), "donor": donor, "tokens": tokens})

    def finish(
        self,
        trial_id: str,
        status: Status,
        failure: str | None = None,
        wrong_setting: str | None = None,
        *,
        dropped: bool = False,
    ) -> None:
        about: dict[str, Any] = {} if wrong_setting is None else {"wrong_setting": wrong_setting}
        about |= {"dropped": True} if dropped else {}
        self._add({"finished": trial_id, "status": status, "failure": failure, **about})

    def spend(self, seconds: float) -> None:
        self._add({"spent": round(seconds, 3)})

    def _add(self, event: Event) -> None:
        """StorageUnavailable if an event can be written neither at once nor with the next one."""
        before, self.problem = self.problem, None
        try:
            self._log.append(event, durable=not DURABLE.isdisjoint(event) or before is not None)
        except OSError as error:
            self.problem = StorageUnavailable(
                f"{self._log.path} cannot be written: {error.strerror}; once it can, the same command resumes",
                self.directory,
            )
            if before is not None:
                raise self.problem from error
        self.events.append(event)
        self._apply(event)

    def _apply(self, event: Event) -> None:
        match event:
            case {"added": trial_id, "settings": settings}:
                repeat_of, seeds = event.get("repeat_of"), event.get("seeds", {})
                self.trials[trial_id] = Trial(trial_id, settings, repeat_of=repeat_of, seeds=seeds)
                if event.get("requested"):
                    del self.requested_settings[0]
            case {"request": name, "stop": trial_id}:
                self.requests.add(name)
                self.to_stop.add(trial_id)
            case {"request": name, "add": count, "settings": settings}:
                self.requests.add(name)
                self.requested += count
                self.requested_settings += [settings] if settings else []
            case {"repeated": trial_ids}:
                self.repeated = trial_ids
            case {"extended": _, "reopened": trial_ids, "settings": settings}:
                self.repeated, self.earlier = None, {*self.trials}
                self.given |= settings
                for trial in self.trials.values():
                    trial.settings = {**settings, **trial.settings}
                for trial_id in trial_ids:
                    self.trials[trial_id].status, self.trials[trial_id].dropped = "running", False
            case {"started": trial_id}:
                self.trials[trial_id].attempts += 1
            case {"result": trial_id, **metrics}:
                self.trials[trial_id].results.append(metrics)
            case {"cooled": trial_id, **metrics}:
                trial = self.trials[trial_id]
                trial.cooldowns.append(metrics)
                if trial.results:  # what is the best of a trial changes by its cooldown
                    trial.results[-1] |= {name: metrics[name] for name in metrics if name.startswith("best_")}
            case {"changed": trial_id, "settings": settings, "tokens": tokens}:
                trial = self.trials[trial_id]
                trial.settings = settings
                trial.results = [result for result in trial.results if result["tokens"] <= tokens]
            case {"finished": trial_id, "status": status, "failure": failure}:
                trial = self.trials[trial_id]
                trial.status, trial.failure, trial.wrong_setting = status, failure, event.get("wrong_setting")
                trial.dropped = event.get("dropped", False)
            case {"spent": seconds}:
                self.seconds += seconds


class Unsaved:
    """An object that Tune pickles as nothing: raylm never reads the files in which Tune saves it."""

    def __reduce__(self) -> tuple:
        return object, ()


def read(directory: str) -> dict[str, Trial]:
    """Trial id -> trial of a sweep, in the order in which they were added; empty if it is not a sweep."""
    return SweepRecord(directory).trials
