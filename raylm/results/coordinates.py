"""A coordinate check on a terminal and as a page with a plot."""

from __future__ import annotations

import importlib.util
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from raylm import console
from raylm.results import tables

NAMES = {"with_transfer": "with model.transfer", "without": "without"}


def view(record: dict[str, Any]) -> RenderableType:
    """A table of slopes and one of sizes, with model.transfer and without."""
    widths, steps = record["widths"], record["steps"]
    parts: list[RenderableType] = [
        Text(
            f"Models of {record['layers']} layers, widths {widths[0]} to {widths[-1]}, trained with "
            f"{record['optimizer']} at a learning rate of {record['learning_rate']:g} on {record['tokens']:,} "
            f"{record['text']} tokens. Each figure is of a root mean square: before the first step of the activations, "
            "later of their difference from before. A slope of 0 means: the same at every width. "
            "Only logits before the first step are to have one of -0.5 with model.transfer, as sums of random terms."
        )
    ]
    for key, name in NAMES.items():
        slopes = tables.numbers(f"slope {name}", "before", *(f"step {step}" for step in steps[1:]))
        sizes = tables.numbers(f"size after step {steps[-1]}, {name}", *(f"{width} wide" for width in widths))
        for kind, found in record[key].items():
            slopes.add_row(kind, *(f"{slope:+.2f}" for slope in found["slopes"]))
            sizes.add_row(kind, *(f"{size:.3g}" for size in found["sizes"][-1]))
        parts += [Text(), slopes, Text(), sizes]
    return Group(*parts)


def page(record: dict[str, Any]) -> str:
    """The tables as HTML, and a plot if plotly is installed; it needs no other file."""
    shown = console.as_html(view(record))
    is_drawn = importlib.util.find_spec("plotly") is not None
    plot = _plot(record) if is_drawn else "<p>The plot needs plotly: pip install 'raylm[plotly]'.</p>"
    return shown.replace("</body>", f"{plot}</body>")


def _plot(record: dict[str, Any]) -> str:
    """Size against width: a column for each kind of activation, a line for each step."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    kinds, rows = list(record["without"]), list(NAMES)
    titles = [f"{kind}, {NAMES[key]}" for key in rows for kind in kinds]
    figure = make_subplots(len(rows), len(kinds), subplot_titles=titles)
    for row, key in enumerate(rows, 1):
        for column, kind in enumerate(kinds, 1):
            for number, (step, sizes) in enumerate(zip(record["steps"], record[key][kind]["sizes"], strict=True)):
                line = Scatter(
                    x=record["widths"],
                    y=sizes,
                    name=f"step {step}" if step else "before",
                    legendgroup=str(step),
                    showlegend=row == column == 1,
                    line={"color": f"rgb({40 * number}, 80, {200 - 40 * number})"},
                )
                figure.add_trace(line, row=row, col=column)
    figure.update_xaxes(type="log", tickvals=record["widths"], title="width")
    figure.update_yaxes(type="log", exponentformat="power")
    figure.update_layout(height=760, plot_bgcolor="#F5F5F5")
    return str(figure.to_html(full_html=False, include_plotlyjs=True))
