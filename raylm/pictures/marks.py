"""What a figure is made of, as plain values that say what to draw and not how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["best", "completed", "stopped early", "running", "failed", "setting"]
"""What a mark stands for, and so how it looks."""


@dataclass(frozen=True)
class Axis:
    title: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    """Places and their names; None: numbers, wherever they fall."""


@dataclass(frozen=True)
class Line:
    name: str
    kind: Kind
    points: Sequence[tuple[float, float]]
    about: str
    """Facts, a line each."""
    shade: float | None = None
    """From 0, the best, to 1: in a colour between two; None: in the colour of its kind."""


@dataclass(frozen=True)
class Bar:
    name: str
    kind: Kind
    length: float
    about: str
    whole: float = 0.0
    """What it could have been, where that is more."""
    note: str = ""
    """At its end."""


@dataclass(frozen=True)
class Cell:
    column: int
    row: int
    text: str
    about: str
    shade: float | None
    """From 0, the best, to 1; None: there is no score."""


@dataclass(frozen=True)
class Figure:
    name: str
    """Of its file."""
    title: str
    caption: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    """From top to bottom; the y axis has their names."""
    cells: Sequence[Cell] = ()
    """In the columns and rows that the ticks name."""
    texts: Sequence[tuple[float, float, str]] = ()
    """(x, y, text) beside the lines."""


@dataclass(frozen=True)
class Omitted:
    """A figure that cannot be drawn, and why."""

    name: str
    title: str
    reason: str
