"""What has happened in a sweep, on disk before anything is done about it: a file of lines that only grow.

    <sweep>/events.jsonl  {"added": "trial_00003", "settings": {"train.learning_rate": 0.003}}
                          {"started": "trial_00003"}                     a process works on it, again after each loss
                          {"result": "trial_00003", "tokens": 81920, "perplexity": 130.5, ...}       an evaluation
                          {"promoted": "trial_00003"}                    it waited at a rung, and resumes
                          {"changed": "trial_00003", "settings": {...}, "donor": "trial_00001", "tokens": 81920}
                          {"finished": "trial_00003", "status": "stopped early", "failure": null}
                          {"spent": 12.5}                                the sweep has run for so many more seconds

Read again in their order the lines are all that a searcher and a scheduler have seen, so that both can be brought back
to where they stood. Tune's own files of a sweep are written every 10 s at best, and without the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from raylm.errors import StorageUnavailable
from raylm.tracking import journal

EVENTS = "events.jsonl"

Status = Literal["running", "completed", "stopped early", "failed"]

Event = dict[str, Any]


@dataclass
class Trial:
    """A trial, as far as it is known."""

    trial_id: str
    settings: dict[str, Any]
    """Swept dotted key -> value."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """One an evaluation, in order: step, tokens, perplexity, bits_per_byte, best_perplexity, seconds, ..."""
    status: Status = "running"
    failure: str | None = None
    wrong_setting: str | None = None
    """Which setting the failure is about, if it is one that cannot be used."""
    attempts: int = 0
    """How often a process began to work on it."""

    @property
    def is_over(self) -> bool:
        return self.status != "running"

    @property
    def best_tokens(self) -> int | None:
        """Tokens that it was trained on when its score was best."""
        best = self.results[-1].get("best_step") if self.results else None
        return next((result["tokens"] for result in self.results if result["step"] == best), None)

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on, up to its last evaluation."""
        return self.results[-1]["tokens"] if self.results else 0


class SweepRecord:
    """The record of one sweep: what it says already, and what is added to it."""

    def __init__(self, directory: str):
        self.directory = directory
        self._log = journal.json_lines(directory, EVENTS)
        self.events: list[Event] = self._log.read()[0]
        """Those that were there."""
        self.trials: dict[str, Trial] = {}
        """By trial id, in the order in which they were added."""
        self.seconds = 0.0
        """How long commands have worked on the sweep before."""
        self.problem: StorageUnavailable | None = None
        """Why the last lines could not be written; they wait for the next."""
        self.outage: StorageUnavailable | None = None
        """Why a trial could not be run to its end: its storage failed. It is to resume, and the sweep ends."""
        for event in self.events:
            self._apply(event)

    def changes(self, trial_id: str) -> list[Event]:
        """What a population has made of a trial so far."""
        return [event for event in self.events if event.get("changed") == trial_id]

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        self._add({"added": trial_id, "settings": dict(settings)})

    def start(self, trial_id: str) -> None:
        self._add({"started": trial_id})

    def result(self, trial_id: str, metrics: Mapping[str, Any]) -> None:
        self._add({"result": trial_id, **metrics})

    def promote(self, trial_id: str) -> None:
        self._add({"promoted": trial_id})

    def change(self, trial_id: str, settings: Mapping[str, Any], donor: str, tokens: int) -> None:
        """Its population has it resume from the donor's checkpoint after these tokens, with settings of its own."""
        self._add({"changed": trial_id, "settings": dict(settings), "donor": donor, "tokens": tokens})

    def finish(
        self, trial_id: str, status: Status, failure: str | None = None, wrong_setting: str | None = None
    ) -> None:
        about = {} if wrong_setting is None else {"wrong_setting": wrong_setting}
        self._add({"finished": trial_id, "status": status, "failure": failure, **about})

    def spend(self, seconds: float) -> None:
        self._add({"spent": round(seconds, 3)})

    def _add(self, event: Event) -> None:
        """StorageUnavailable where lines can be written neither at once nor with the next one."""
        before, self.problem = self.problem, None
        try:
            # A trial reads there how its population has changed it, on another machine maybe.
            self._log.append(event, durable="finished" in event or "changed" in event or before is not None)
        except OSError as error:
            self.problem = StorageUnavailable(
                f"{self._log.path} cannot be written: {error.strerror}; once it can, the same command resumes",
                self.directory,
            )
            if before is not None:
                raise self.problem from error
        self._apply(event)

    def _apply(self, event: Event) -> None:
        match event:
            case {"added": trial_id, "settings": settings}:
                self.trials[trial_id] = Trial(trial_id, settings)
            case {"started": trial_id}:
                self.trials[trial_id].attempts += 1
            case {"result": trial_id, **metrics}:
                self.trials[trial_id].results.append(metrics)
            case {"changed": trial_id, "settings": settings, "tokens": tokens}:
                trial = self.trials[trial_id]
                trial.settings = settings
                trial.results = [result for result in trial.results if result["tokens"] <= tokens]
            case {"finished": trial_id, "status": status, "failure": failure}:
                trial = self.trials[trial_id]
                trial.status, trial.failure, trial.wrong_setting = status, failure, event.get("wrong_setting")
            case {"spent": seconds}:
                self.seconds += seconds


class Unsaved:
    """For what is given to Tune, which saves it beside its own files; those are never read here."""

    def __reduce__(self) -> tuple:
        return object, ()


def read(directory: str) -> dict[str, Trial]:
    """The trials of a sweep by their ids, in the order in which they were added; none if it is not a sweep."""
    return SweepRecord(directory).trials
