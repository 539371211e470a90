"""Tables and lines of facts, for the screen and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from raylm.console import format_number


def trials(rows: Sequence[Mapping[str, Any]], measure: str = "perplexity") -> Table:
    """Trials in the order given: rank, id, scores and what they are weighed against, tokens, status, settings."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    settings = list(dict.fromkeys(key for row in rows for key in row["settings"]))
    weighed = [name for name in ("parameters", "seconds") if rows and name in rows[0]]
    table.add_column("", justify="right")
    table.add_column("trial")
    for name in (measure, "bits/byte", *weighed, "tokens"):
        table.add_column(name, justify="right")
    table.add_column("status")
    if weighed:
        table.add_column("pareto front")
    for key in settings:
        table.add_column(key.split(".", 1)[1], justify="right")
    for rank, row in enumerate(rows, 1):
        scores = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("perplexity", "bits_per_byte")]
        table.add_row(
            str(rank),
            row["trial_id"],
            *scores,
            *["-" if row[name] is None else f"{row[name]:,.0f}" for name in weighed],
            f"{row['tokens']:,}",
            "; ".join([row["status"], *overfitting(row)]),
            *["✓" * row["pareto"] for _ in weighed],
            *[format_number(row["settings"].get(key, "-")) for key in settings],
            style="bold" if rank == 1 and row["perplexity"] is not None else None,
        )
    return table


def overfitting(row: Mapping[str, Any]) -> list[str]:
    """When a training was at its best, if it ended clearly worse than that; else nothing."""
    best, last, tokens = (row.get(key) for key in ("perplexity", "last_perplexity", "best_tokens"))
    if best is None or last is None or tokens is None or not last > 1.05 * best:
        return []
    return [f"overfitted: {format_number(best)} at {tokens:,} tokens, {format_number(last)} at the end"]


def key_values(pairs: Mapping[str, Any]) -> str:
    """A line a fact: its name, its value; None is left out."""
    width = max(len(name) for name in pairs)
    return "\n".join(f"{name:<{width}}  {format_number(value)}" for name, value in pairs.items() if value is not None)


def side_by_side(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    """A column for each of a few things, a row for each fact of theirs; None is a dash."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for fact, values in rows.items():
        table.add_row(fact, *("-" if value is None else format_number(value) for value in values))
    return table


def scores(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row for each part of the text that was scored; the first figure of each is its perplexity, under its name."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("text")
    measure = next(name for name in rows[0][1] if name.endswith("perplexity"))
    with_keywords = "keywords" in rows[0][1]
    of_keywords = ("of keywords", "keyword tokens") if with_keywords else ()
    counted = ["tokens", "bytes", *(["unknown_tokens"] if any(row["unknown_tokens"] for _, row in rows) else [])]
    counts = [what.replace("_", " ") for what in counted]
    for heading in (measure, "bits/byte", *counts, *of_keywords):
        table.add_column(heading.replace("_", "-"), justify="right")
    for name, row in rows:
        numbers = [f"{row[what]:.2f}" if row[what] is not None else "-" for what in (measure, "bits_per_byte")]
        numbers += [f"{row[what]:,}" for what in counted]
        if with_keywords:
            each = row["keywords"]
            numbers += ["-" if each[measure] is None else f"{each[measure]:.2f}", f"{each['tokens']:,}"]
        table.add_row(name, *numbers)
    return table
