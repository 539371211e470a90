"""What is drawn: the trials of a sweep, their scores, and their settings on an axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from raylm.console import format_number as number
from raylm.pictures.marks import Kind

if TYPE_CHECKING:
    from raylm.sweep import Trial

BINS = 5
"""Of a setting drawn from a range, in the heat map."""
ABOVE, BELOW = 1.1, -0.1
"""Places beyond the ends of an axis: of trials that failed, of values far away, of settings that a trial has not."""


@dataclass(frozen=True)
class Setting:
    """A swept setting, or the score, and how its values lie on an axis."""

    name: str
    values: tuple[Any, ...]
    """Those of the trials, each once, in order; but for those far away."""
    side_by_side: bool
    """The values stand as far from each other whatever they are: they were not drawn from a range."""
    log: bool = False

    @staticmethod
    def of(name: str, found: Iterable[Any], sampler: str | None, scored: Iterable[Any] = ()) -> Setting:
        """`sampler` is the name of the sampler in tune.space, None if the setting is drawn in another way.

        A number further from those of the trials with a score than these are from each other is far away: a learning
        rate of 1e6, tried and failed, would leave no room for the others.
        """
        values = list(dict.fromkeys(hashable(value) for value in found))
        numeric = all(_is_number(value) for value in values)
        values.sort(key=None if numeric else str)
        few = len(values) <= BINS and all(isinstance(value, int) for value in values)
        chosen = sampler in ("choice", "grid") or (sampler is None and few)
        log = bool(sampler and sampler.startswith("log"))
        if chosen or not numeric or len(values) < 2:
            return Setting(name, tuple(values), side_by_side=True, log=log)
        ends = sorted(set(scored))
        if len(ends) > 1:
            low, high = (math.log(end) if log else end for end in (ends[0], ends[-1]))
            at = {value: math.log(value) if log else value for value in values}
            values = [value for value in values if 2 * low - high <= at[value] <= 2 * high - low]
        return Setting(name, tuple(values), side_by_side=False, log=log)

    @property
    def is_numeric(self) -> bool:
        return all(_is_number(value) for value in self.values)

    def place(self, value: Any) -> float:
        """Where on the axis, from 0 to 1; ABOVE or BELOW if it is far away."""
        if self.side_by_side:
            return self.values.index(hashable(value)) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high, at = (math.log(each) if self.log else each for each in (self.values[0], self.values[-1], value))
        found = (at - low) / (high - low)
        return found if 0 <= found <= 1 else ABOVE if found > 1 else BELOW

    def ticks(self) -> list[tuple[float, str]]:
        """Both ends, and round numbers between them."""
        if self.side_by_side:
            return [(self.place(value), number(value)) for value in self.values]
        ends = self.values[0], self.values[-1]
        inside = [value for value in ticks(*ends, self.log) if 0.06 < self.place(value) < 0.94]
        return [(self.place(value), number(value)) for value in (*ends, *inside)]

    def bins(self) -> list[str]:
        """Names of the columns or rows of a heat map: the values, or ranges of them."""
        if self.side_by_side:
            return [number(value) for value in self.values]
        low, high = (math.log(end) if self.log else end for end in (self.values[0], self.values[-1]))
        edges = [low + (high - low) * index / BINS for index in range(BINS + 1)]
        names = [f"{math.exp(edge) if self.log else edge:.2g}" for edge in edges]
        return [f"{left} to {right}" for left, right in itertools.pairwise(names)]

    def bin(self, value: Any) -> int | None:
        """None if it is far away."""
        if self.side_by_side:
            return self.values.index(hashable(value))
        place = self.place(value)
        return None if place in (ABOVE, BELOW) else min(int(place * BINS), BINS - 1)


@dataclass(frozen=True)
class Sweep:
    """The trials, and what has to be known of the experiment to draw them."""

    trials: Sequence[Trial]
    budget_tokens: int
    """Of one trial."""
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """(tokens, training loss) of each trial, by its id."""
    samplers: Mapping[str, str] = field(default_factory=dict)
    """Swept key -> name of its sampler, of those that have one."""
    metric: str = "perplexity"
    """What trials are ranked by: perplexity or bits_per_byte."""
    measure: str = "perplexity"
    """What a person calls it: perplexity, pseudo-perplexity or bits per byte."""

    def score(self, trial: Trial) -> float | None:
        """The best of the metric. A trial that failed has none."""
        if trial.status == "failed" or not trial.results:
            return None
        value = trial.results[-1][f"best_{self.metric}"]
        return value if math.isfinite(value) else None

    @cached_property
    def scored(self) -> list[tuple[Trial, float]]:
        """The trials that have a score, the best first."""
        found = [(trial, score) for trial in self.trials if (score := self.score(trial)) is not None]
        return sorted(found, key=lambda pair: pair[1])

    @cached_property
    def ranked(self) -> list[Trial]:
        """All trials: the best first, those without a score in the end."""
        best = [trial for trial, _ in self.scored]
        return best + [trial for trial in self.trials if self.score(trial) is None]

    def kind(self, trial: Trial) -> Kind:
        is_best = self.score(trial) is not None and trial is self.ranked[0]
        return "best" if is_best else trial.status

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """By the swept key."""
        scored = [trial for trial, _ in self.scored]

        def values(trials: Iterable[Trial], key: str) -> list[Any]:
            return [trial.settings[key] for trial in trials if key in trial.settings]

        return {
            key: Setting.of(short(key), values(self.trials, key), self.samplers.get(key), values(scored, key))
            for key in dict.fromkeys(key for trial in self.trials for key in trial.settings)
        }

    def about(self, trial: Trial) -> str:
        """A line a fact."""
        score = self.score(trial)
        lines = [f"{trial.trial_id}: {trial.status}", f"{trial.tokens:,} tokens"]
        lines += [f"{self.measure} {score:.2f}"] if score is not None else []
        lines += [f"{short(key)} {number(value)}" for key, value in trial.settings.items()]
        return "\n".join(lines)


def short(key: str) -> str:
    """learning_rate of train.learning_rate."""
    return key.partition(".")[2] or key


def ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers from low to high."""
    if low == high:
        return [low]
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
            if 2 <= len(found) <= 7:
                return found
        if len(found) > 7:
            return found[:: math.ceil(len(found) / 7)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(multiple for multiple in (1, 2, 5, 10) if (high - low) / (step * multiple) <= 6)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, dict) else value
