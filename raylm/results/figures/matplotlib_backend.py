"""Figure -> PNG, drawn by matplotlib."""

from __future__ import annotations

import io
import logging
from typing import TYPE_CHECKING

from raylm.results.figures.primitives import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAR_INCHES = 0.24
"""Height of a bar with the space around it."""


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, 1,170 pixels wide."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home it tells where its cache is
    from matplotlib.figure import Figure as Sheet

    height = max(2.5, 1.7 + BAR_INCHES * len(figure.bars)) if figure.bars else 5.0
    sheet = Sheet(figsize=(9.0, height), dpi=130, layout="constrained")
    axes = sheet.subplots()
    axes.set_title(figure.title, loc="left", pad=12)
    axes.spines[["top", "right"]].set_visible(False)
    for draw in (_lines, _bars, _cells, _texts, _scales, _legend):
        draw(figure, axes)
    file = io.BytesIO()
    sheet.savefig(file, format="png")
    return file.getvalue()


def _lines(figure: Figure, axes: Axes) -> None:
    for line in figure.lines:
        xs, ys = zip(*line.points, strict=True)
        axes.plot(
            xs,
            ys,
            "--" if line.kind == "failed" else "-",
            color=line.colour,
            linewidth=2.6 if line.kind == "best" else 1.3,
            marker="x" if line.ends_in_cross else "o",
            markersize=line.end_size,
            markevery=[-1],
        )


def _bars(figure: Figure, axes: Axes) -> None:
    if not figure.bars:
        return
    rows, colours = range(len(figure.bars)), [bar.colour for bar in figure.bars]
    axes.barh(rows, [max(bar.whole, bar.length) for bar in figure.bars], color=colours, alpha=0.2)
    axes.barh(rows, [bar.length for bar in figure.bars], color=colours)
    for row, bar in enumerate(figure.bars):
        axes.annotate(bar.note, (bar.length, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(rows, [bar.name for bar in figure.bars], fontsize=9)
    axes.set_ylim(len(figure.bars) - 0.4, -0.6)


def _cells(figure: Figure, axes: Axes) -> None:
    from matplotlib.patches import Rectangle

    for cell in figure.cells:
        place = cell.column - 0.5, cell.row - 0.5
        axes.add_patch(Rectangle(place, 1, 1, facecolor=cell.colour, edgecolor="white"))
        ink = "white" if cell.shade is not None and cell.shade < 0.6 else "black"
        axes.text(cell.column, cell.row, cell.text, ha="center", va="center", color=ink)
    if figure.cells:
        axes.set_xlim(-0.5, len(figure.x.ticks or ()) - 0.5)
        axes.set_ylim(-0.5, len(figure.y.ticks or ()) - 0.5)


def _texts(figure: Figure, axes: Axes) -> None:
    box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
    for x, y, text in figure.texts:
        axes.plot(x, y, "_", color="black", markersize=9)
        axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=9, bbox=box)


def _scales(figure: Figure, axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter

    if figure.x.log:
        axes.set_xscale("log")
    if figure.y.log:
        axes.set_yscale("log")
    if figure.x.log or figure.y.log:
        axes.minorticks_off()
    for axis, scale in ((figure.x, axes.xaxis), (figure.y, axes.yaxis)):
        scale.set_label_text(axis.title)
        if axis.ticks is not None:
            scale.set_ticks([place for place, _ in axis.ticks], [name for _, name in axis.ticks])
        elif "tokens" in axis.title:
            scale.set_major_formatter(EngFormatter(sep=""))
        if not figure.cells and not (figure.bars and axis is figure.y):
            scale.grid(color="#E5E5E5")
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in figure.legend.items()]
    if len(lines) > 1:
        axes.legend(handles=lines, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
