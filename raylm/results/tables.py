"""Tables for the terminal that several commands show. The ranked table of trials is in `trial_table`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from raylm.console import format_estimate, format_number, label
from raylm.results import trial_table
from raylm.results.choices import Choice
from raylm.results.trial_table import TrialRow
from raylm.tokens import ANSWERS


def side_by_side(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> Table:
    """A column for each name and a row for each fact, with its value for each name; None is a dash."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for fact, values in rows.items():
        table.add_row(fact, *("-" if value is None else format_number(value) for value in values))
    return table


def numbers(*headings: str) -> Table:
    """A table without rows, whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table


def choice(found: Choice, score: str) -> tuple[Table | str, ...]:
    """A row for each value of a setting, with its best trial; and a sentence for each but the best."""
    headings, rows = found.cells(score)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if 0 < number < len(headings) - 1 else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table, *found.sentences


def splits(counts: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each split of a token store."""
    answers = [ANSWERS] if any(ANSWERS in split for split in counts.values()) else []
    table = numbers(
        "split",
        "documents",
        "tokens",
        *(["of answers", "bytes of answers"] if answers else ["bytes"]),
        "bytes/token",
        "unknown tokens",
    )
    for name, split in counts.items():
        scored = split.get(ANSWERS, split["tokens"])
        ratio = f"{split['bytes'] / scored:.2f}" if scored else "-"
        cells = [f"{split.get(count, 0):,}" for count in ("documents", "tokens", *answers, "bytes")]
        table.add_row(name, *cells, ratio, f"{split['unknown_tokens']:,}")
    return table


MARKDOWN_ROWS = 20
"""Trials of a Markdown table at most: MLflow takes descriptions of 5000 characters."""


def ranked_markdown(rows: Sequence[TrialRow], score: str) -> str:
    """The best of the ranked trials as a Markdown table with the name and settings of each."""
    columns = trial_table.columns(rows[:MARKDOWN_ROWS], score)
    shown = [column for name, column in columns.items() if name != "status"]
    table = _markdown(
        [column.heading for column in shown],
        [column.justify == "right" for column in shown],
        list(zip(*(column.cells for column in shown), strict=True)),
    )
    left_out = len(rows) - MARKDOWN_ROWS
    return f"{table}\n\nand {left_out} more trials" if left_out > 0 else table


def choice_markdown(found: Choice, score: str) -> str:
    """`choice` as Markdown, with its sentences."""
    headings, rows = found.cells(score)
    table = _markdown(headings, [0 < number < len(headings) - 1 for number in range(len(headings))], rows)
    return "\n\n".join([f"**{found.title}**", table, *found.sentences])


def _markdown(headings: Sequence[str], are_numbers: Sequence[bool], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---:" if is_number else "---" for is_number in are_numbers]]
    lines += [[cell.replace("|", "\\|") for cell in cells] for cells in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evaluations(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """A row for each text that was scored, given as its name and its record as in the result of an evaluation."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("text")
    measure = next(name for name in rows[0][1] if name.endswith("perplexity"))
    with_keywords = "keywords" in rows[0][1]
    keyword_headings = ("of keywords", "keyword tokens") if with_keywords else ()
    counts = ["tokens", "bytes", *(["unknown_tokens"] if any(row["unknown_tokens"] for _, row in rows) else [])]
    for heading in (label(measure), "bits/byte", *map(label, counts), *keyword_headings):
        table.add_column(heading, justify="right")
    for name, row in rows:
        cells = [estimate(row, score) for score in (measure, "bits_per_byte")]
        cells += [f"{row[count]:,}" for count in counts]
        if with_keywords:
            keywords = row["keywords"]
            cells += [estimate(keywords, measure), f"{keywords['tokens']:,}"]
        table.add_row(name, *cells)
    return table


def tasks(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each metric of each task, given as in the result of an evaluation; the standard error behind ±."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(("task", "metric", "value", "documents", "examples in front")):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for name, record in records.items():
        metrics = [key for key in record if not key.endswith("_stderr") and key not in ("documents", "shots")]
        for number, metric in enumerate(metrics):
            error = record.get(f"{metric}_stderr")
            value = f"{record[metric]:.4g}" + ("" if error is None else f" ± {error:.2g}")
            shots = "-" if record["shots"] is None else str(record["shots"])
            about = ["", "", ""] if number else [name, f"{record['documents']:,}", shots]
            table.add_row(about[0], metric, value, *about[1:])
    return table


def estimate(record: Mapping[str, Any], name: str) -> str:
    """A score in a record with its interval, if it has one: 53.2 [47.7, 59.7]."""
    value, low, high = record[name], record.get(f"{name}_low"), record.get(f"{name}_high")
    if value is None:
        return "-"
    return f"{value:.2f}" if low is None else format_estimate(value, low, high)
