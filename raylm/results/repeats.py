"""Which settings of a sweep are better, apart from which model is: by runs that differ in nothing but their seeds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylm import statistics
from raylm import sweep as sweeps
from raylm.console import format_p
from raylm.results import significance
from raylm.results.trial_table import TrialRow, short_id
from raylm.sweep.record import SweepRecord, by_rank

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepeatedSettings:
    """Settings that were repeated, and how they compare with the best ones."""

    trial_id: str
    """The trial by which they were chosen; its own score does not count."""
    settings: Mapping[str, Any]
    """Swept dotted key -> value."""
    runs: int
    """Repeats with a score."""
    failed: int
    """Repeats without one: they failed, or were stopped with the sweep."""
    perplexity: float | None
    """Of the mean over runs of the nll per token; None without a run."""
    low: float | None
    """The lower end of its 95 % interval over seeds; None for fewer than two runs."""
    high: float | None
    as_good_as_best: bool | None
    """Whether the runs show no difference to the best settings; None if they are too few to tell."""
    p: float | None = None
    """p-value of the difference to the best settings, corrected for all pairs; None for the best settings."""
    nats_per_token: float | None = None
    """Mean difference to the best settings."""
    nats_low: float | None = None
    """The lower end of the 95 % interval of that difference."""
    nats_high: float | None = None
    least_percent: float | None = None
    """The smallest difference in perplexity that these runs could have shown, in percent."""

    def record(self, measure: str) -> dict[str, Any]:
        names = {"perplexity": measure, "low": f"{measure}_low", "high": f"{measure}_high"}
        return {names.get(name, name): value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Repeats:
    """The settings that were repeated, the best first."""

    settings: list[RepeatedSettings]

    @property
    def sentence(self) -> str:
        """Which settings are better, in a sentence."""
        best, *others = self.settings
        told = [each for each in others if each.as_good_as_best is not None]
        if not told:
            return "settings: fewer than two repeats of each have a score, too few to tell which are better"
        over = f"settings, over {best.runs} other seeds: those of {short_id(best.trial_id)} are"
        worse = [f"{short_id(each.trial_id)} ({format_p(each.p, 'p')})" for each in told if not each.as_good_as_best]
        ties = [each for each in told if each.as_good_as_best]
        parts = [f"better than those of {' and '.join(worse)}"] if worse else []
        if ties:
            least = max(each.least_percent or 0.0 for each in ties)
            names = " and ".join(short_id(each.trial_id) for each in ties)
            parts.append(f"as good as those of {names}, as far as these runs tell: {_least(least)}")
        failed = sum(each.failed for each in self.settings)
        without = f"; {failed} repeat{'s have' if failed > 1 else ' has'} no score" if failed else ""
        return f"{over} {', and '.join(parts)}{without}"

    def record(self, measure: str) -> dict[str, Any]:
        """For --json; the key of a score is its name."""
        return {"sentence": self.sentence, "settings": [each.record(measure) for each in self.settings]}


def choose(record: SweepRecord, metric: str) -> None:
    """Record which trials are repeated (sweep.repeats.choose); no trial, if fewer than two settings have a score."""
    scored = [trial for trial in by_rank(record.searched, metric) if trial.score(metric) is not None]
    standings = significance.standings(record.directory, scored)
    chosen = sweeps.repeats.choose(scored, {name for name, each in standings.items() if each.as_good_as_best})
    record.repeat(chosen)
    if chosen:
        logger.info(f"Repeating the settings of {', '.join(chosen)} with other seeds")
    else:
        logger.warning("tune.repeats: fewer than two settings have a score, and nothing is repeated")


def compare(rows: Sequence[TrialRow], *, has_patience: bool) -> Repeats | None:
    """The repeated settings among the trials of a sweep; None if there are none.

    Only repeats that ran to their own end count: that of the budget, or an earlier one if the training `has_patience`.
    """
    own_ends = ("completed", "stopped early") if has_patience else ("completed",)
    names = list(dict.fromkeys(row.repeat_of for row in rows if row.repeat_of is not None))
    if not names:
        return None
    seeds = sorted({tuple(row.seeds.values()) for row in rows if row.repeat_of is not None})
    nll = np.full((len(seeds), len(names)), np.nan)
    settings, failed = {}, dict.fromkeys(names, 0)
    for row in rows:
        if row.repeat_of is None:
            continue
        settings[row.repeat_of] = row.settings
        if row.status in own_ends and row.perplexity is not None and math.isfinite(row.perplexity):
            nll[seeds.index(tuple(row.seeds.values())), names.index(row.repeat_of)] = math.log(row.perplexity)
        else:
            failed[row.repeat_of] += 1
    runs = np.isfinite(nll).sum(axis=0)
    means = [float(np.nanmean(column)) if count else math.inf for column, count in zip(nll.T, runs, strict=True)]
    order = np.argsort(means, kind="stable")
    best = int(order[0])
    differences = statistics.compare_runs(nll, best=best)
    found = []
    for column in map(int, order):
        name, difference = names[column], differences[column]
        ends = statistics.mean_interval(nll[np.isfinite(nll[:, column]), column])
        low, high = (math.exp(end) if math.isfinite(end) else None for end in ends)
        found.append(
            RepeatedSettings(
                trial_id=name,
                settings=settings[name],
                runs=int(runs[column]),
                failed=failed[name],
                perplexity=math.exp(means[column]) if runs[column] else None,
                low=low,
                high=high,
                as_good_as_best=True if column == best else None if difference is None else not difference.is_real,
                **({} if difference is None else _figures(difference)),
            )
        )
    return Repeats(found)


def _least(percent: float) -> str:
    """The smallest difference in perplexity that would show."""
    if percent >= 100:  # of two runs each, Student's t has one degree of freedom
        return "only more than twice the perplexity would show, and more tune.repeats tell more"
    return f"only {f'{percent:.0f}' if percent >= 10 else f'{percent:.2g}'} % or more would show"


def _figures(difference: statistics.Difference) -> dict[str, float]:
    return {
        "p": difference.p,
        "nats_per_token": difference.nats_per_token,
        "nats_low": difference.interval.low,
        "nats_high": difference.interval.high,
        "least_percent": 100 * math.expm1(min(difference.least, 700)),
    }
