"""Several sweeps in one report: what changed between them, and their trials ranked at equal tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.table import Table

from raylm import document_scores
from raylm.console import format_number, label
from raylm.errors import ConfigError
from raylm.results import compare, differences, tables
from raylm.results.compared_run import ComparedRun, of_sweep
from raylm.results.differences import Difference, Scored
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
    scored: Scored
    """The scores of the documents of that evaluation."""
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
    runs: Sequence[ComparedRun]
    """The best trial of each."""
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
        for results, run in zip(self.sweeps, self.runs, strict=True):
            fixed = compare.training_settings(results.experiment)
            own = {key: fixed[key] for key in swept if key in fixed}
            for trial, score in results.data.at(self.equal_tokens, self._metric):
                *_, last = (result for result in trial.results if result["tokens"] <= self.equal_tokens)
                training, step = trial.best_place(last)
                scored = replace(
                    run.scored,
                    name=f"{trial.trial_id} of {results.name}",
                    scores=document_scores.read(f"{results.directory}/{training}", step),
                )
                ranked.append(RankedTrial(results.name, trial, score, scored, {**own, **trial.settings}))
        return sorted(ranked, key=lambda each: each.score)

    @cached_property
    def differences(self) -> list[Difference]:
        """Of each of `trials` to the best one, document by document. The correction allows for the best trial of each
        sweep having been chosen on the same documents."""
        return differences.differences([each.scored for each in self.trials])

    @property
    def _metric(self) -> str:
        """The key of the measure in a trial's results, which call every kind of perplexity perplexity."""
        return "bits_per_byte" if self.measure == "bits_per_byte" else "perplexity"

    def left_out(self) -> int:
        """Number of trials without a score at `equal_tokens`."""
        return sum(len(results.data.trials) for results in self.sweeps) - len(self.trials)

    def record(self) -> dict[str, Any]:
        """The comparison for --json."""
        ranked = [
            {**each.record(self.measure or ""), "difference": difference.record()}
            for each, difference in zip(self.trials, self.differences, strict=True)
        ]
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

    def sentences(self) -> list[str]:
        """How the best trial of each other sweep differs from the best of all, and whether that is real."""
        best_of = {each.sweep: number for number, each in reversed(list(enumerate(self.trials)))}
        numbers = sorted(best_of.values())
        told = differences.sentences(
            [self.trials[number].scored for number in numbers], [self.differences[number] for number in numbers]
        )
        reasons = [self.differences[number].not_compared for number in numbers]
        return told or [f"whether that is real cannot be told: {reason}" for reason in reasons if reason][:1]

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
        answer = [f"\n{self.answer}", *self.sentences()]
        return [*views, *answer, *([ranked_table(self)] if self.trials else [])]


def read(sweeps: Sequence[SweepResults]) -> SeveralSweeps:
    """The comparison of sweeps; ConfigError if one has no trial with a score."""
    for results in sweeps:
        if results.best is None:
            raise ConfigError(f"{results.name} has no trial with a score yet; leave it out", "SWEEP")
    runs = [
        replace(
            of_sweep(results.directory, None),
            name=results.name,
            scored_on=scored_on(results.experiment, results.state.parameters),
        )
        for results in sweeps
    ]
    return SeveralSweeps(
        sweeps,
        runs,
        compare.differing([results.experiment for results in sweeps]),
        compare.warnings(runs),
        compare.common_measure(runs),
        min(results.data.equal_tokens for results in sweeps),
    )


def cells(several: SeveralSweeps) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of the ranked table."""
    keys = list(dict.fromkeys(key for results in several.sweeps for key in results.data.swept))
    is_compared = any(difference.not_compared is None for difference in several.differences)
    verdict = ["as good as best"] * is_compared
    headings = ["", "sweep", "trial", label(several.measure or ""), *verdict, "tokens", *map(short_name, keys)]
    rows = [
        [
            str(rank),
            each.sweep,
            each.trial.trial_id,
            f"{each.score:.2f}",
            *[difference.verdict if difference.not_compared is None else "-" for _ in verdict],
            f"{each.trial.tokens:,}",
            *(format_number(each.settings.get(key, "-")) for key in keys),
        ]
        for rank, (each, difference) in enumerate(zip(several.trials, several.differences, strict=True), 1)
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
