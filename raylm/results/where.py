"""Where two models differ: by source, by length, by position in the context, on keywords, and in which documents."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from raylm import statistics
from raylm.console import format_estimate
from raylm.results import tables

MOST_LENGTHS = 4
"""Bands of length, with as many documents each."""

MOST_DOCUMENTS = 5
"""Documents that are shown with their text."""

TEXT_WIDTH = 80

POSITIONS = (0, 16, 64, 256, 1024, 4096)
"""First positions of the bands of the context."""


@dataclass(frozen=True)
class Part:
    """The difference on a part of the text."""

    name: str
    documents: int
    """Documents with any of it."""
    size: int
    """Tokens, or bytes if the tokenizers differ."""
    difference: float
    """Above zero if the model is worse than the best one here."""
    low: float | None
    """The lower end of the 95 % interval; None for fewer than six documents."""
    high: float | None

    @classmethod
    def of(cls, name: str, difference: np.ndarray, size: np.ndarray) -> Part:
        """Of the summed differences and sizes of documents."""
        ends = statistics.interval(difference, size)
        low, high = ends if math.isfinite(ends.high) else (None, None)
        total = size.sum()
        return cls(name, int(np.count_nonzero(size)), round(total), float(difference.sum() / total), low, high)


@dataclass(frozen=True)
class DocumentPart:
    """A document that contributes much to the difference."""

    difference: float
    """Summed over the document."""
    size: int
    source: str | None
    document: str | None
    """Its id, as in the file of raylm evaluate --documents; None if the corpus is gone, as with its text."""
    text: str | None
    """Its beginning."""


@dataclass(frozen=True)
class Where:
    """Where a model is worse or better than the best one."""

    name: str
    best: str
    unit: str
    """nats/token, or bits/byte if the tokenizers differ."""
    parts: dict[str, list[Part]]
    """Parts of the text by what cuts it: source, length, position (in the context), keyword; those that are known."""
    documents: list[DocumentPart]
    """Those that contribute most, in one direction or the other."""
    scored_unit: str = "document"
    """What a document is here: a document of the corpus, or a passage of one."""
    notes: list[str] = field(default_factory=list)
    """What is not shown, and why."""

    def record(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def views(self) -> list[Any]:
        """For the screen."""
        sum_unit, size = self.unit.split("/")
        shown: list[Any] = [f"\n{self.unit} of {self.name} above {self.best}; below zero where it is better"]
        for by, parts in self.parts.items():
            if len(parts) == 1:
                continue
            heading = "by position in the context" if by == "position" else f"by {by}"
            table = tables.numbers(heading, f"{self.scored_unit}s", f"{size}s", self.unit)
            for part in parts:
                difference = format_difference(part.difference, part.low, part.high)
                table.add_row(part.name, f"{part.documents:,}", f"{part.size:,}", difference)
            shown += ["", table]
        shown.append(f"\n{self.scored_unit}s that contribute most")
        for each in self.documents:
            digits = ",.0f" if abs(each.difference) >= 100 else ".2g"
            amount = f"{each.difference:+{digits}} {sum_unit}, {each.size:,} {size}s"
            shown.append(", ".join(filter(None, [amount, each.source])))
            shown += textwrap.wrap(each.text or "", TEXT_WIDTH, initial_indent="    ", subsequent_indent="    ")
        return [*shown, *(f"\n{note}" for note in self.notes)]


def format_difference(value: float, low: float | None, high: float | None) -> str:
    """A difference with its interval; without one it has two digits."""
    return f"{value:.2g}" if low is None else format_estimate(value, low, high)


def by_source(difference: np.ndarray, size: np.ndarray, sources: Sequence[str]) -> list[Part]:
    """A part for each source, the one that contributes most first."""
    named = np.array(sources)
    parts = [Part.of(name, difference[named == name], size[named == name]) for name in dict.fromkeys(sources)]
    return sorted(parts, key=lambda part: -abs(part.difference * part.size))


def by_length(difference: np.ndarray, size: np.ndarray, num_bytes: np.ndarray) -> list[Part]:
    """Bands of about as many documents each, at least six; documents of one length are in one band."""
    count = max(1, min(MOST_LENGTHS, len(num_bytes) // statistics.FEWEST_DOCUMENTS))
    edges = np.quantile(num_bytes, np.arange(1, count) / count, method="higher")
    band = np.searchsorted(np.unique(edges), num_bytes, side="left")
    parts = []
    for number in np.unique(band):
        inside = band == number
        shortest, longest = round(num_bytes[inside].min()), round(num_bytes[inside].max())
        parts.append(Part.of(f"{shortest:,} to {longest:,} bytes", difference[inside], size[inside]))
    return parts


def by_position(rows: np.ndarray, best: np.ndarray) -> list[Part]:
    """`rows` and `best`: nll and tokens of each document in each of POSITIONS, of the model and of the best one."""
    parts = []
    for number, first in enumerate(POSITIONS):
        nll, tokens = rows[:, 2 * number] - best[:, 2 * number], rows[:, 2 * number + 1]
        last = POSITIONS[number + 1] - 1 if number + 1 < len(POSITIONS) else None
        name = f"after {first:,} tokens or more" if last is None else f"after {first:,} to {last:,} tokens"
        parts += [Part.of(name, nll, tokens)] if tokens.any() else []
    return parts


def largest(difference: np.ndarray) -> np.ndarray:
    """The numbers of the documents that contribute most, the largest first."""
    return np.argsort(-np.abs(difference), kind="stable")[:MOST_DOCUMENTS]
