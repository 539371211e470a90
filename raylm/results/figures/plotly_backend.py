"""Figure -> what plotly.js draws in a browser, as plain values."""

from __future__ import annotations

import html
import importlib.util
import math
from pathlib import Path
from typing import Any

from raylm.results.figures.primitives import Axis, Figure, shade_colour

FONT = "system-ui, sans-serif"


def plotly_js() -> str | None:
    """The source code of plotly.js; None if plotly is not installed."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or spec.origin is None:
        return None
    return (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def plotly_figure(figure: Figure) -> dict[str, Any]:
    """`data` and `layout` of plotly.js. A trace that is one trial has its id as `name`, and `meta` "trial"."""
    height = 126 + 22 * len(figure.bars) if figure.bars else 480
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"l": 70, "r": 20, "t": 36, "b": 60},
        "font": {"family": FONT, "size": 13},
        "plot_bgcolor": "white",
        "hoverlabel": {"align": "left"},
        "barmode": "overlay",
        "legend": {"itemclick": False, "itemdoubleclick": False},
        "xaxis": _axis(figure.x),
        "yaxis": _axis(figure.y),
        "annotations": [
            {
                "x": _place(x, figure.x), "y": _place(y, figure.y), "text": html.escape(text), "showarrow": False,
                "xanchor": "left", "xshift": 4,
                "bgcolor": "rgba(255,255,255,0.75)", "borderpad": 1, "font": {"size": 12},
            }
            for x, y, text in figure.texts
        ],
    }  # fmt: skip
    if figure.bars:
        layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False, "automargin": True}
    if figure.cells:
        layout["xaxis"]["showgrid"] = layout["yaxis"]["showgrid"] = False
    return {
        "data": [*_lines(figure), *_dashes(figure), *_bars(figure), *_cells(figure), *_legend(figure)],
        "layout": layout,
    }


def _place(value: float, axis: Axis) -> float:
    """Where an annotation stands: on a logarithmic axis plotly.js takes the logarithm."""
    return math.log10(value) if axis.log else value


def _axis(axis: Axis) -> dict[str, Any]:
    options: dict[str, Any] = {
        "title": {"text": html.escape(axis.title)},
        "type": "log" if axis.log else "linear",
        "gridcolor": "#E5E5E5",
        "zeroline": False,
        "automargin": True,
    }
    if axis.ticks is not None:
        options |= {
            "tickvals": [place for place, _ in axis.ticks],
            "ticktext": [html.escape(name) for _, name in axis.ticks],
        }
    return options


def _lines(figure: Figure) -> list[dict[str, Any]]:
    traces: list[dict[str, Any]] = []
    for line in figure.lines:
        width, dash = (3.5 if line.kind == "best" else 1.7), ("dash" if line.kind == "failed" else "solid")
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": line.name,
                "meta": "trial",
                "x": [x for x, _ in line.points],
                "y": [y for _, y in line.points],
                "line": {"color": line.colour, "width": width, "dash": dash},
                "marker": {
                    "symbol": ["circle"] * (len(line.points) - 1) + ["x" if line.ends_in_cross else "circle"],
                    "size": [0] * (len(line.points) - 1) + [line.end_size + 2],
                    "color": line.colour,
                    "opacity": 1,
                    "line": {"width": 0},
                },
                "text": _html(line.about),
                "hoverinfo": "text" if figure.texts else "x+y+text",
                "showlegend": False,
            }
        )
    return traces


def _dashes(figure: Figure) -> list[dict[str, Any]]:
    """A short line at the place of each text."""
    if not figure.texts:
        return []
    xs, ys, _ = zip(*figure.texts, strict=True)
    marker = {"symbol": "line-ew-open", "size": 9, "color": "black"}
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": xs,
            "y": ys,
            "marker": marker,
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]


def _bars(figure: Figure) -> list[dict[str, Any]]:
    if not figure.bars:
        return []
    shared: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "meta": "trials" if figure.bars[0].kind != "setting" else None,
        "y": [html.escape(bar.name) for bar in figure.bars],
        "hovertext": [_html(bar.about) for bar in figure.bars],
        "hoverinfo": "text",
        "showlegend": False,
    }
    colours = [bar.colour for bar in figure.bars]
    whole = [max(bar.whole, bar.length) for bar in figure.bars]
    notes = [html.escape(bar.note) for bar in figure.bars]
    return [
        {**shared, "x": whole, "marker": {"color": colours, "opacity": 0.2}},
        {
            **shared,
            "x": [bar.length for bar in figure.bars],
            "marker": {"color": colours},
            "text": notes,
            "textposition": "outside",
        },
    ]


def _cells(figure: Figure) -> list[dict[str, Any]]:
    """A heat map of the cells."""
    if not figure.cells:
        return []
    wide, high = (len(axis.ticks or ()) for axis in (figure.x, figure.y))
    by_place = {(cell.row, cell.column): cell for cell in figure.cells}
    rows = [[by_place.get((row, column)) for column in range(wide)] for row in range(high)]
    return [
        {
            "type": "heatmap",
            "z": [[cell and cell.shade for cell in row] for row in rows],
            "zmin": 0,
            "zmax": 1,
            "colorscale": [[index / 3, shade_colour(index / 3)] for index in range(4)],
            "showscale": False,
            "text": [[_html(cell.text) if cell else "" for cell in row] for row in rows],
            "texttemplate": "%{text}",
            "hovertext": [[_html(cell.about) if cell else "" for cell in row] for row in rows],
            "hoverinfo": "text",
            "xgap": 2,
            "ygap": 2,
        }
    ]


def _legend(figure: Figure) -> list[dict[str, Any]]:
    """Traces without points, which give the legend its entries."""
    if len(figure.legend) < 2:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [None],
            "y": [None],
            "name": label,
            "line": {"color": colour, "width": 4},
        }
        for label, colour in figure.legend.items()
    ]


def _html(text: str) -> str:
    """Text escaped for plotly.js, which interprets some HTML."""
    return html.escape(text, quote=False).replace("\n", "<br>")
