"""The best trial of each value of a setting that is chosen by name, such as train.optimizer.

One value is better than another if its best settings are: at the same learning rate one of them may be at a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylm.console import counted, format_number, format_p
from raylm.results.figures import short_name
from raylm.results.trial_table import TrialRow, format_score, short_id


@dataclass(frozen=True)
class BestOf:
    """The trials with one value of a setting."""

    value: str
    trials: int
    """How many there are, without those that repeat another with other seeds."""
    best: TrialRow


@dataclass(frozen=True)
class Choice:
    """A setting with the best trial of each of its values."""

    key: str
    """Its dotted key."""
    values: Sequence[BestOf]
    """The best first."""

    @property
    def title(self) -> str:
        return f"By {self.name}"

    @property
    def name(self) -> str:
        return self.key.removeprefix("train.")

    def cells(self, score: str) -> tuple[list[str], list[list[str]]]:
        """The headings and rows of a table; the first and the last column are text, the others are numbers."""
        rows = []
        for each in self.values:
            best = each.best
            others = {key: value for key, value in best.settings.items() if key != self.key}
            settings = ", ".join(f"{short_name(key)} {format_number(value)}" for key, value in others.items())
            scores = (format_score(best.perplexity), format_score(best.bits_per_byte))
            rows.append([each.value, f"{each.trials}", short_id(best.trial_id), *scores, f"{best.tokens:,}", settings])
        return [self.name, "trials", "best trial", score, "bits/byte", "tokens", "its other settings"], rows

    @property
    def sentences(self) -> list[str]:
        """Whether the documents show that the best value is better than each of the others."""
        first, *others = self.values
        return [sentence for other in others if (sentence := _sentence(first, other)) is not None]


def _sentence(first: BestOf, other: BestOf) -> str | None:
    """How the best trial of a value compares with the best one of all; None if that was not tested."""
    standing = other.best.standing
    if other.best.perplexity is None:
        return f"{other.value}: {counted(other.trials, 'trial')}, none with a score"
    if standing is None:
        return None
    if standing.as_good_as_best is None:
        return f"whether {first.value} is better than {other.value} is unknown: too few documents tell"
    at = f" at {standing.compared_at_tokens:,} tokens" if standing.compared_at_tokens is not None else ""
    test = f"{format_p(standing.p, 'p')}, paired by document{at}"
    if not standing.as_good_as_best:
        return f"{first.value} is better than {other.value}, each at its best settings ({test})"
    return (
        f"{other.value} is as good as {first.value}, each at its best settings ({test}); differences below "
        f"{standing.least_percent or 0.0:.2g} % could not be detected"
    )


def of(rows: Sequence[TrialRow]) -> list[Choice]:
    """The settings that are chosen by name and differ between ranked trials; none if no trial has a score.

    Trials whose own space does not have a setting are left out.
    """
    if not rows or rows[0].perplexity is None:
        return []
    found = []
    for key in rows[0].settings:
        by_value: dict[str, list[TrialRow]] = {}
        having = [row for row in rows if key in row.settings]
        if not all(isinstance(row.settings[key], str) for row in having):
            continue
        for row in having:
            by_value.setdefault(row.settings[key], []).append(row)
        if len(by_value) > 1:
            found.append(Choice(key, [_best_of(value, own) for value, own in by_value.items()]))
    return found


def _best_of(value: str, rows: Sequence[TrialRow]) -> BestOf:
    return BestOf(value, sum(row.repeat_of is None for row in rows), rows[0])
