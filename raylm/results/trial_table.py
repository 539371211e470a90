"""The ranked table of a sweep's trials: its columns and cells, made once for the screen, the report and the live table.

The terminal's table after a sweep is drawn here; `html` and `live_table` draw the same columns in their own ways.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.table import Table

from raylm.console import format_number
from raylm.results.figures import short_name

WEIGHED = ("parameters", "seconds")
"""What tune.against can weigh scores against."""


@dataclass(frozen=True)
class TrialRow:
    """A trial as a row of the ranked table."""

    trial_id: str
    status: str
    """running, waiting, completed, stopped early or failed."""
    perplexity: float | None
    """The best score on the tokens by which trials are ranked, whatever perplexity it is; None without a score."""
    bits_per_byte: float | None
    tokens: int
    """Training tokens."""
    settings: Mapping[str, Any]
    """Swept dotted key -> value."""
    best_tokens: int | None = None
    """Training tokens at the best score."""
    last_perplexity: float | None = None
    """The score of the last evaluation."""
    weighed: Mapping[str, float | None] = field(default_factory=dict)
    """parameters or seconds, in a finished sweep whose scores are weighed against these."""
    pareto: bool | None = None
    """Whether no trial is better in both; None in a sweep of scores alone."""
    failure: str | None = None
    repeat: str | None = None
    """The command that trains with the same settings."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TrialRow:
        """The row of a trial in the result of a sweep, where the score is called perplexity."""
        names = cls.__dataclass_fields__.keys() & record.keys()
        weighed = {name: record[name] for name in WEIGHED if name in record}
        return cls(**{name: record[name] for name in names}, weighed=weighed)

    def record(self, measure: str) -> dict[str, Any]:
        """The row for --json; the score stands under its own name."""
        return {
            "trial_id": self.trial_id,
            "status": self.status,
            measure: self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **self.weighed,
            **({} if self.pareto is None else {"pareto": self.pareto}),
            "tokens": self.tokens,
            "best_tokens": self.best_tokens,
            "last_perplexity": self.last_perplexity,
            "settings": self.settings,
            "failure": self.failure,
            "repeat": self.repeat,
        }

    @property
    def overfitting(self) -> str | None:
        return overfitting(self.perplexity, self.last_perplexity, self.best_tokens)


def overfitting(best: float | None, last: float | None, best_tokens: int | None) -> str | None:
    """When a training had its best score, if its last one is more than 5 % worse; else None."""
    if best is None or last is None or best_tokens is None or not last > 1.05 * best:
        return None
    return f"overfitted: {format_number(best)} at {best_tokens:,} tokens, {format_number(last)} at the end"


@dataclass(frozen=True)
class Column:
    """A column of the table, with a cell for each row."""

    heading: str
    cells: list[str]
    justify: Literal["left", "right"] = "right"


def columns(rows: Sequence[TrialRow], score: str, settings: Iterable[str] | None = None) -> dict[str, Column]:
    """Name -> column: rank, trial_id, perplexity, bits_per_byte, `WEIGHED`, tokens, status, pareto, each swept key.

    `score` is the heading of perplexity. `settings` are the swept keys in their order, by default that of the rows.
    """
    swept = list(dict.fromkeys(key for row in rows for key in row.settings)) if settings is None else settings
    weighed = list(rows[0].weighed) if rows else []
    table = {
        "rank": Column("", [str(rank) for rank in range(1, len(rows) + 1)]),
        "trial_id": Column("trial", [row.trial_id for row in rows], justify="left"),
        "perplexity": Column(score, [_score(row.perplexity) for row in rows]),
        "bits_per_byte": Column("bits/byte", [_score(row.bits_per_byte) for row in rows]),
        **{name: Column(name, [_count(row.weighed.get(name)) for row in rows]) for name in weighed},
        "tokens": Column("tokens", [_count(row.tokens) for row in rows]),
        "status": Column("status", ["; ".join(filter(None, [row.status, row.overfitting])) for row in rows], "left"),
    }
    if weighed:
        table["pareto"] = Column("pareto front", ["✓" if row.pareto else "" for row in rows], justify="left")
    for key in swept:
        table[key] = Column(short_name(key), [format_number(row.settings.get(key, "-")) for row in rows])
    return table


def rich_table(rows: Sequence[TrialRow], score: str) -> Table:
    """The table for a terminal, the best trial in bold; rows stand in the order given."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    cells = columns(rows, score)
    for column in cells.values():
        table.add_column(column.heading, justify=column.justify)
    for number, row in enumerate(rows):
        is_best = number == 0 and row.perplexity is not None
        table.add_row(*(column.cells[number] for column in cells.values()), style="bold" if is_best else None)
    return table


def _score(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
