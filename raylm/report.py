"""Tables of a sweep and of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def figure(value: Any) -> str:
    """A number as a person writes it: 400,384 and 0.00312."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def trials(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Trials in the order given: rank, id, scores, tokens, what became of it, and its settings."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    settings = list(rows[0]["settings"]) if rows else []
    table.add_column("", justify="right")
    table.add_column("trial")
    for name in ("perplexity", "bits/byte", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("status")
    for key in settings:
        table.add_column(key.split(".", 1)[1], justify="right")
    for rank, row in enumerate(rows, 1):
        scores = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("perplexity", "bits_per_byte")]
        table.add_row(
            str(rank),
            row["trial_id"],
            *scores,
            f"{row['tokens']:,}",
            row["status"],
            *[figure(row["settings"][key]) for key in settings],
            style="bold" if rank == 1 and row["perplexity"] is not None else None,
        )
    return table


def facts(pairs: Mapping[str, Any]) -> str:
    """A line a fact: its name, its value; None is left out."""
    width = max(len(name) for name in pairs)
    return "\n".join(f"{name:<{width}}  {figure(value)}" for name, value in pairs.items() if value is not None)


def scores(by_name: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each source of the text that was scored."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("source")
    for name in ("perplexity", "bits/byte", "tokens", "bytes"):
        table.add_column(name, justify="right")
    for name, row in by_name.items():
        numbers = [
            f"{next(iter(row.values())):.2f}",
            f"{row['bits_per_byte']:.2f}",
            f"{row['tokens']:,}",
            f"{row['bytes']:,}",
        ]
        table.add_row(name, *numbers)
    return table
