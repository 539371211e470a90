"""The data of figures: the trials of a sweep, their scores, and their settings' positions on an axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from raylm.console import format_number
from raylm.results.figures.primitives import Kind
from raylm.sweep.record import by_rank

if TYPE_CHECKING:
    from raylm.sweep import Trial

BINS = 5
"""Columns or rows of the heat map for a setting that is drawn from a range."""
BELOW = -0.1
"""The place beyond the end of an axis for a setting that a trial does not have."""


@dataclass(frozen=True)
class Setting:
    """A swept setting, or the score, as an axis."""

    name: str
    values: tuple[Any, ...]
    """The values of the trials, sorted, each once."""
    evenly_spaced: bool
    """Whether values have equal distances on the axis, because they come from a list and not from a range."""
    log: bool = False

    @staticmethod
    def of(name: str, values: Iterable[Any], sampler: str | None) -> Setting:
        """The setting with these values; `sampler` is its sampler's name in tune.space, None if it has several."""
        unique = list(dict.fromkeys(hashable(value) for value in values))
        numeric = all(_is_number(value) for value in unique)
        unique.sort(key=None if numeric else str)
        few_integers = len(unique) <= BINS and all(isinstance(value, int) for value in unique)
        chosen = sampler in ("choice", "grid") or (sampler is None and few_integers)
        log = bool(sampler and sampler.startswith("log"))
        if chosen or not numeric or len(unique) < 2:
            return Setting(name, tuple(unique), evenly_spaced=True, log=log)
        return Setting(name, tuple(unique), evenly_spaced=False, log=log)

    @property
    def is_numeric(self) -> bool:
        return all(_is_number(value) for value in self.values)

    def place(self, value: Any) -> float:
        """The place on the axis, from 0 to 1."""
        if self.evenly_spaced:
            return self.values.index(hashable(value)) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high, at = (math.log(each) if self.log else each for each in (self.values[0], self.values[-1], value))
        return (at - low) / (high - low)

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

    def bin(self, value: Any) -> int:
        """The index of a value's bin."""
        if self.evenly_spaced:
            return self.values.index(hashable(value))
        return min(int(self.place(value) * BINS), BINS - 1)


@dataclass(frozen=True)
class SweepData:
    """The trials of a sweep, with all that is needed to rank and draw them."""

    trials: Sequence[Trial]
    budget_tokens: int
    """Training tokens of a trial that is not stopped early."""
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Trial id -> (tokens, training loss) of each logged step."""
    samplers: Mapping[str, str] = field(default_factory=dict)
    """Swept key -> the name of its sampler, if it has a single one."""
    metric: str = "perplexity"
    """The metric that ranks the trials: perplexity or bits_per_byte."""
    score_name: str = "perplexity"
    """The name of that metric for people: perplexity, pseudo-perplexity or bits per byte."""

    def score(self, trial: Trial) -> float | None:
        """The best value of the metric; None if the trial failed or has not been evaluated."""
        return trial.score(self.metric)

    @cached_property
    def scored(self) -> list[tuple[Trial, float]]:
        """The trials that have a score, the best first."""
        pairs = [(trial, score) for trial in self.trials if (score := self.score(trial)) is not None]
        return sorted(pairs, key=lambda pair: pair[1])

    @cached_property
    def ranked(self) -> list[Trial]:
        """All trials in the order of the sweep's table: see `sweep.record.by_rank`."""
        return by_rank(self.trials, self.metric)

    def kind(self, trial: Trial) -> Kind:
        """How the trial's line or bar looks."""
        is_best = self.score(trial) is not None and trial is self.ranked[0]
        return "best" if is_best else trial.status

    @cached_property
    def equal_tokens(self) -> int:
        """The training tokens at which trials compare: the deepest that all trials with a score have reached."""
        return min((trial.tokens for trial, _ in self.scored), default=0)

    @cached_property
    def compared(self) -> list[tuple[Trial, float]]:
        """The trials that have a score by `equal_tokens`, with the best one by then; the best trial first."""
        return self.at(self.equal_tokens, self.metric)

    def at(self, tokens: int, metric: str) -> list[tuple[Trial, float]]:
        """The trials that have a score by so many training tokens, with the best one by then; the best trial first."""
        pairs = []
        for trial, _ in self.scored:
            scores = [result[f"best_{metric}"] for result in trial.results if result["tokens"] <= tokens]
            if scores and math.isfinite(scores[-1]):
                pairs.append((trial, scores[-1]))
        return sorted(pairs, key=lambda pair: pair[1])

    @property
    def at_equal_tokens(self) -> str:
        """The end of a title: at how many tokens trials compare."""
        return f"at {self.equal_tokens:,} training tokens"

    @property
    def about_equal_tokens(self) -> str:
        """The sentence of a caption that says at which tokens trials compare, and how many of them are left out."""
        failed = sum(trial.status == "failed" for trial in self.trials)
        others = len(self.trials) - len(self.compared) - failed
        left_out = [f"{failed} that failed"] * bool(failed) + [f"{others} without a score there"] * bool(others)
        ending = f"; left out: {', '.join(left_out)}" if left_out else ""
        count = len(self.compared)
        reached = f"{'' if left_out or count == 1 else 'all '}{count} trial{'s' if count > 1 else ''}"
        return f"Scores at {self.equal_tokens:,} training tokens, the deepest that {reached} reached{ending}."

    @property
    def swept(self) -> list[str]:
        """The swept keys, in the order in which the trials had them."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.settings))

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """Swept key -> its setting among the compared trials, in the order in which the trials had them."""
        return {
            key: Setting.of(
                short_name(key),
                [trial.settings[key] for trial, _ in self.compared if key in trial.settings],
                self.samplers.get(key),
            )
            for key in self.swept
            if any(key in trial.settings for trial, _ in self.compared)
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
    """A YAML value made hashable: lists become tuples, mappings text."""
    return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, dict) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
