"""Several sweeps in one report: what changed between them, and their trials ranked at equal tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.table import Table

from raylm.console import format_number, label
from raylm.errors import ConfigError
from raylm.results import compare, tables
from raylm.results.figures import short_name
from raylm.results.sweep import scored_on

if TYPE_CHECKING:
    from raylm.results.sweep import SweepResults
    from raylm.sweep import Trial


@dataclass(frozen=True)
class RankedTrial:
    """A trial among those of several sweeps."""

    sweep: str
    trial: Trial
    score: float
    """The score at equal tokens."""
    settings: Mapping[str, Any]
    """Dotted key -> value, for every setting that one of the sweeps varied."""

    def record(self, measure: str) -> dict[str, Any]:
        """The trial for --json; the key of the score is its name."""
        return {
            "sweep": self.sweep,
            "trial_id": self.trial.trial_id,
            measure: self.score,
            "tokens": self.trial.tokens,
            "settings": self.settings,
        }


@dataclass(frozen=True)
class SeveralSweeps:
    """Sweeps side by side."""

    sweeps: Sequence[SweepResults]
    settings: Mapping[str, Sequence[Any]]
    """Dotted key -> its value in each sweep's experiment, of the settings that differ."""
    warnings: Sequence[str]
    """What cannot be compared."""
    measure: str | None
    """The score that compares all trials: that of all sweeps, or bits_per_byte; None if neither does."""
    equal_tokens: int
    """The deepest training tokens that every trial with a score has reached."""

    @cached_property
    def trials(self) -> list[RankedTrial]:
        """The trials of all sweeps with a score by `equal_tokens`, the best first; empty if no score compares them."""
        if self.measure is None:
            return []
        swept = list(dict.fromkeys(key for results in self.sweeps for key in results.data.swept))
        ranked = []
        for results in self.sweeps:
            fixed = dict(compare.flat_settings(results.experiment.model_dump(mode="json")))
            own = {key: fixed[key] for key in swept if key in fixed}
            for trial, score in results.data.at(self.equal_tokens, self._metric):
                ranked.append(RankedTrial(results.name, trial, score, {**own, **trial.settings}))
        return sorted(ranked, key=lambda each: each.score)

    @property
    def _metric(self) -> str:
        """The key of the measure in a trial's results, which call every kind of perplexity perplexity."""
        return "bits_per_byte" if self.measure == "bits_per_byte" else "perplexity"

    def left_out(self) -> int:
        """Number of trials without a score at `equal_tokens`."""
        return sum(len(results.data.trials) for results in self.sweeps) - len(self.trials)

    def record(self) -> dict[str, Any]:
        """The comparison for --json."""
        ranked = [each.record(self.measure or "") for each in self.trials]
        return {
            "sweeps": [results.name for results in self.sweeps],
            "settings": dict(self.settings),
            "warnings": list(self.warnings),
            "measure": self.measure,
            "equal_tokens": self.equal_tokens,
            "best": ranked[0] if ranked else None,
            "trials": ranked,
        }

    @property
    def answer(self) -> str:
        """Which trial is best at equal tokens, in a sentence, or that this cannot be said."""
        if not self.trials:
            return "no trial of one sweep can be compared with one of another"
        best, left_out = self.trials[0], self.left_out()
        note = f"; left out: {left_out} without a score there" if left_out else ""
        return (
            f"{best.trial.trial_id} of {best.sweep} is best: {label(self.measure or '')} {best.score:.2f} at "
            f"{self.equal_tokens:,} training tokens, the deepest that {'' if left_out else 'all '}{len(self.trials)} "
            f"trials reached{note}"
        )

    def changes(self) -> dict[str, list[Any]]:
        """Label -> value for each sweep: settings that differ, swept settings, best score."""
        swept = [", ".join(map(short_name, results.experiment.tune.space)) for results in self.sweeps]
        best = [results.best for results in self.sweeps]
        return {
            **{key: list(values) for key, values in self.settings.items()},
            "swept": swept,
            "trials": [len(results.data.trials) for results in self.sweeps],
            "best score": [each and each.perplexity for each in best],
            "its tokens": [results.data.ranked[0].tokens for results in self.sweeps],
        }

    def views(self) -> list[Any]:
        """The comparison for the screen."""
        names = [results.name for results in self.sweeps]
        views: list[Any] = [tables.side_by_side(names, self.changes())]
        views += [f"\nwarning: {warning}" for warning in self.warnings]
        return [*views, f"\n{self.answer}", *([ranked_table(self)] if self.trials else [])]


def read(sweeps: Sequence[SweepResults]) -> SeveralSweeps:
    """The comparison of sweeps; ConfigError if one has no trial with a score."""
    for results in sweeps:
        if results.best is None:
            raise ConfigError(f"{results.name} has no trial with a score yet; leave it out", "SWEEP")
    runs = [
        replace(
            compare.of_sweep(results.directory, None),
            name=results.name,
            scored_on=scored_on(results.experiment, results.state.parameters),
        )
        for results in sweeps
    ]
    return SeveralSweeps(
        sweeps,
        compare.differing([results.experiment for results in sweeps]),
        compare.warnings(runs),
        compare.common_measure(runs),
        min(results.data.equal_tokens for results in sweeps),
    )


def cells(several: SeveralSweeps) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of the ranked table."""
    keys = list(dict.fromkeys(key for results in several.sweeps for key in results.data.swept))
    headings = ["", "sweep", "trial", label(several.measure or ""), "tokens", *map(short_name, keys)]
    rows = [
        [
            str(rank),
            each.sweep,
            each.trial.trial_id,
            f"{each.score:.2f}",
            f"{each.trial.tokens:,}",
            *(format_number(each.settings.get(key, "-")) for key in keys),
        ]
        for rank, each in enumerate(several.trials, 1)
    ]
    return headings, rows


def ranked_table(several: SeveralSweeps) -> Table:
    """The ranked trials for a terminal."""
    headings, rows = cells(several)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("sweep", "trial") else "right")
    for row in rows:
        table.add_row(*row)
    return table
