"""The elements of a figure and their colours, as plain values, for any library that draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["best", "completed", "stopped early", "running", "interrupted", "not started", "failed", "setting"]
"""What a line or bar represents, which decides its colour and shape."""

COLOURS: dict[Kind, str] = {
    "best": "#D55E00",
    "completed": "#0072B2",
    "stopped early": "#56B4E9",
    "running": "#009E73",
    "interrupted": "#009E73",
    "not started": "#009E73",
    "failed": "#7F7F7F",
    "setting": "#0072B2",
}
"""The palette of Okabe and Ito (2008), which people with any kind of colour blindness can tell apart."""

SHADES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98))
"""Viridis from dark, the best, to light, the worst, without its yellow, which is hard to see on white."""


def shade_colour(shade: float) -> str:
    """The colour of a shade from 0, the best, to 1, the worst."""
    left = min(int(shade * 3), 2)
    mixed = (round(a + (b - a) * (shade * 3 - left)) for a, b in zip(SHADES[left], SHADES[left + 1], strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


@dataclass(frozen=True)
class Axis:
    """An axis and its labels."""

    title: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    """Positions and their labels; None leaves both to the library that draws."""


@dataclass(frozen=True)
class Line:
    """A trial as a line through points."""

    name: str
    kind: Kind
    points: Sequence[tuple[float, float]]
    about: str
    """What the reader sees when pointing at the line; one fact per line of text."""
    shade: float | None = None
    """A shade from 0, the best, to 1 for a line coloured by rank; None for one in the colour of its kind."""

    @property
    def colour(self) -> str:
        return COLOURS[self.kind] if self.shade is None or self.kind == "best" else shade_colour(self.shade)

    @property
    def ends_in_cross(self) -> bool:
        """Whether the last point is a cross, for a failure, instead of a dot."""
        return self.kind == "failed"

    @property
    def end_size(self) -> int:
        """Size of the last point. An early stop is shown larger, unless colours tell ranks and not kinds."""
        if self.ends_in_cross:
            return 8
        return 6 if self.kind == "stopped early" and self.shade is None else 3


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: a trial, or the importance of a setting."""

    name: str
    kind: Kind
    length: float
    about: str
    """What the reader sees when pointing at the bar; one fact per line of text."""
    whole: float = 0.0
    """The possible length, if it is larger; drawn pale behind the bar."""
    note: str = ""
    """A text at the end of the bar."""

    @property
    def colour(self) -> str:
        return COLOURS[self.kind]


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    column: int
    row: int
    text: str
    about: str
    """What the reader sees when pointing at the cell; one fact per line of text."""
    shade: float
    """A shade from 0, the best, to 1."""

    @property
    def colour(self) -> str:
        return shade_colour(self.shade)


@dataclass(frozen=True)
class Figure:
    """A figure: lines, bars or cells on two axes."""

    name: str
    """The name of its file, without the suffix."""
    title: str
    caption: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    """Bars from top to bottom; the y axis shows their names."""
    cells: Sequence[Cell] = ()
    """Cells in the columns and rows that the ticks of the axes name."""
    texts: Sequence[tuple[float, float, str]] = ()
    """(x, y, text) written beside the lines."""

    @property
    def legend(self) -> dict[str, str]:
        """Label -> colour of each kind of trial in the figure, without those whose colour tells a rank."""
        shown = [line.kind for line in self.lines if line.shade is None or line.kind == "best"]
        shown += [bar.kind for bar in self.bars]
        kinds = [kind for kind in COLOURS if kind in shown and kind != "setting"]
        return {"best trial" if kind == "best" else kind: COLOURS[kind] for kind in kinds}


@dataclass(frozen=True)
class Omitted:
    """A figure that cannot be drawn, and why."""

    name: str
    title: str
    reason: str
