"""What figures show: the trials of a sweep, their scores, and where their settings lie on an axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from raylm.console import format_number
from raylm.results.figures.primitives import Kind

if TYPE_CHECKING:
    from raylm.sweep import Trial

BINS = 5
"""Columns or rows of the heat map for a setting that is drawn from a range."""
ABOVE, BELOW = 1.1, -0.1
"""Places beyond the ends of an axis, for failed trials, values far away and settings that a trial does not have."""


@dataclass(frozen=True)
class Setting:
    """A swept setting, or the score, and how its values lie on an axis."""

    name: str
    values: tuple[Any, ...]
    """The values of the trials, sorted, each once, without those far away."""
    evenly_spaced: bool
    """Whether values stand equally far apart, whatever they are: they were chosen from a list, not from a range."""
    log: bool = False

    @staticmethod
    def of(name: str, values: Iterable[Any], sampler: str | None, scored: Iterable[Any] = ()) -> Setting:
        """The setting with these values; `sampler` is its sampler's name in tune.space, None if it has several.

        `scored` are the values of the trials with a score. A number that is further from these than they are from
        each other is far away: a learning rate of 1e6, tried and failed, would leave no room for the others.
        """
        unique = list(dict.fromkeys(hashable(value) for value in values))
        numeric = all(_is_number(value) for value in unique)
        unique.sort(key=None if numeric else str)
        few_integers = len(unique) <= BINS and all(isinstance(value, int) for value in unique)
        chosen = sampler in ("choice", "grid") or (sampler is None and few_integers)
        log = bool(sampler and sampler.startswith("log"))
        if chosen or not numeric or len(unique) < 2:
            return Setting(name, tuple(unique), evenly_spaced=True, log=log)
        ends = sorted(set(scored))
        if len(ends) > 1:
            low, high = (math.log(end) if log else end for end in (ends[0], ends[-1]))
            scaled = {value: math.log(value) if log else value for value in unique}
            unique = [value for value in unique if 2 * low - high <= scaled[value] <= 2 * high - low]
        return Setting(name, tuple(unique), evenly_spaced=False, log=log)

    @property
    def is_numeric(self) -> bool:
        return all(_is_number(value) for value in self.values)

    def place(self, value: Any) -> float:
        """The place on the axis, from 0 to 1; ABOVE or BELOW if the value is far away."""
        if self.evenly_spaced:
            return self.values.index(hashable(value)) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high, at = (math.log(each) if self.log else each for each in (self.values[0], self.values[-1], value))
        place = (at - low) / (high - low)
        return place if 0 <= place <= 1 else ABOVE if place > 1 else BELOW

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of both ends and of round numbers between them; of every value if evenly spaced."""
        if self.evenly_spaced:
            return [(self.place(value), format_number(value)) for value in self.values]
        ends = self.values[0], self.values[-1]
        inside = [value for value in ticks(*ends, self.log) if 0.06 < self.place(value) < 0.94]
        return [(self.place(value), format_number(value)) for value in (*ends, *inside)]

    def bins(self) -> list[str]:
        """The names of the columns or rows of a heat map: the values, or ranges of them."""
        if self.evenly_spaced:
            return [format_number(value) for value in self.values]
        low, high = (math.log(end) if self.log else end for end in (self.values[0], self.values[-1]))
        edges = [low + (high - low) * index / BINS for index in range(BINS + 1)]
        names = [f"{math.exp(edge) if self.log else edge:.2g}" for edge in edges]
        return [f"{left} to {right}" for left, right in itertools.pairwise(names)]

    def bin(self, value: Any) -> int | None:
        """The index of a value's bin; None if the value is far away."""
        if self.evenly_spaced:
            return self.values.index(hashable(value))
        place = self.place(value)
        return None if place in (ABOVE, BELOW) else min(int(place * BINS), BINS - 1)


@dataclass(frozen=True)
class SweepData:
    """The trials of a sweep, and what else must be known of it to rank and draw them."""

    trials: Sequence[Trial]
    budget_tokens: int
    """Training tokens of a trial that is not stopped early."""
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Trial id -> (tokens, training loss) of each logged step."""
    samplers: Mapping[str, str] = field(default_factory=dict)
    """Swept key -> the name of its sampler, of keys that have one."""
    metric: str = "perplexity"
    """The metric that ranks the trials: perplexity or bits_per_byte."""
    score_name: str = "perplexity"
    """The name of that metric for people: perplexity, pseudo-perplexity or bits per byte."""

    def score(self, trial: Trial) -> float | None:
        """The best value of the metric; None if the trial failed or has not been evaluated."""
        if trial.status == "failed" or not trial.results:
            return None
        value = trial.results[-1][f"best_{self.metric}"]
        return value if math.isfinite(value) else None

    @cached_property
    def scored(self) -> list[tuple[Trial, float]]:
        """The trials that have a score, the best first."""
        pairs = [(trial, score) for trial in self.trials if (score := self.score(trial)) is not None]
        return sorted(pairs, key=lambda pair: pair[1])

    @cached_property
    def ranked(self) -> list[Trial]:
        """All trials: the best first, those without a score last."""
        return [trial for trial, _ in self.scored] + [trial for trial in self.trials if self.score(trial) is None]

    def kind(self, trial: Trial) -> Kind:
        """How the trial's line or bar looks."""
        is_best = self.score(trial) is not None and trial is self.ranked[0]
        return "best" if is_best else trial.status

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Swept key -> its setting, in the order in which the trials had them."""
        scored = [trial for trial, _ in self.scored]

        def values(trials: Iterable[Trial], key: str) -> list[Any]:
            return [trial.settings[key] for trial in trials if key in trial.settings]

        return {
            key: Setting.of(short_name(key), values(self.trials, key), self.samplers.get(key), values(scored, key))
            for key in dict.fromkeys(key for trial in self.trials for key in trial.settings)
        }

    def about(self, trial: Trial) -> str:
        """Status, tokens, score and settings of a trial, one per line of text."""
        score = self.score(trial)
        lines = [f"{trial.trial_id}: {trial.status}", f"{trial.tokens:,} tokens"]
        lines += [f"{self.score_name} {score:.2f}"] if score is not None else []
        lines += [f"{short_name(key)} {format_number(value)}" for key, value in trial.settings.items()]
        return "\n".join(lines)


def short_name(key: str) -> str:
    """A dotted key without its section: learning_rate for train.learning_rate."""
    return key.partition(".")[2] or key


def ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers from low to high."""
    if low == high:
        return [low]
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            values = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
            if 2 <= len(values) <= 7:
                return values
        if len(values) > 7:
            return values[:: math.ceil(len(values) / 7)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(multiple for multiple in (1, 2, 5, 10) if (high - low) / (step * multiple) <= 6)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def hashable(value: Any) -> Any:
    """A value of YAML as one that can be a key: lists become tuples, mappings text."""
    return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, dict) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
