"""How marks look, in pictures and on pages alike."""

from __future__ import annotations

from raylm.pictures.marks import Bar, Figure, Line

COLOURS = {
    "best": "#D55E00",
    "completed": "#0072B2",
    "stopped early": "#56B4E9",
    "running": "#009E73",
    "failed": "#7F7F7F",
    "setting": "#0072B2",
}
"""Of Okabe and Ito (2008): those who see no red or no green can tell them apart."""

SHADES = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98))
"""Viridis without its yellow, which is lost on white: from the best to the worst, each lighter than the one before."""

NO_SCORE = "#DDDDDD"


def shade(at: float) -> str:
    """The colour at a place from 0, the best, to 1."""
    left = min(int(at * 3), 2)
    mixed = (round(a + (b - a) * (at * 3 - left)) for a, b in zip(SHADES[left], SHADES[left + 1], strict=True))
    return "#" + "".join(f"{each:02x}" for each in mixed)


def colour(mark: Line | Bar) -> str:
    if isinstance(mark, Line) and mark.shade is not None and mark.kind != "best":
        return shade(mark.shade)
    return COLOURS[mark.kind]


def end(line: Line) -> tuple[bool, int]:
    """Whether a line ends in a cross, for a failure, or in a dot; and its size."""
    if line.kind == "failed":
        return True, 8
    return False, 6 if line.kind == "stopped early" and line.shade is None else 3


def legend(figure: Figure) -> dict[str, str]:
    """Kind of mark -> colour, of those that a figure has; not of those whose colour tells a rank."""
    told = [line.kind for line in figure.lines if line.shade is None or line.kind == "best"]
    told += [bar.kind for bar in figure.bars]
    kinds = [kind for kind in COLOURS if kind in told and kind != "setting"]
    return {"best trial" if kind == "best" else kind: COLOURS[kind] for kind in kinds}
