"""python -m raylm.compare RUN RUN: runs side by side, and whether their numbers can be compared."""

from __future__ import annotations

from typing import Annotated

import typer

from raylm import cli
from raylm.config import DEFAULT_STORAGE


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help=f"Directories, or names under {DEFAULT_STORAGE}/*/ here: a training run, a trial, a sweep (its best "
            "trial), a model that raylm trained; or the name of an experiment: its newest run or sweep; or files that "
            "raylm evaluate --documents has written.",
        ),
    ],
    json: cli.Json = False,
) -> cli.CommandResult:
    """Print runs side by side: scores, which are really better, speed, data, settings that differ; warn of scores that
    cannot be compared."""
    from raylm.results import compare, tables

    comparison = compare.compare(runs)
    table = tables.side_by_side([run.name for run in comparison.runs], comparison.rows())
    warnings = [f"\nwarning: {warning}" for warning in comparison.warnings]
    sentences = [f"\n{sentence}" for sentence in comparison.sentences()]
    return cli.CommandResult(comparison.record(), (table, *sentences, *warnings))


def main() -> None:
    cli.run(compare)


if __name__ == "__main__":
    from raylm.compare import main  # by its real name, so that Ray ships functions by reference

    main()
