"""python -m raylm.compare RUN RUN: runs side by side, and whether their numbers can be compared."""

from __future__ import annotations

from typing import Annotated

import typer

from raylm import DEFAULT_STORAGE, cli
from raylm.errors import ConfigError


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN RUN...",
            help=f"Directories, or names under {DEFAULT_STORAGE}/*/ here: a training run, a trial, a sweep (its best "
            "trial), a model that raylm trained; or the name of an experiment: its newest run or sweep; or files that "
            "raylm evaluate --documents has written.",
        ),
    ] = None,
    where: Annotated[
        bool,
        typer.Option(
            "--where",
            help="Of two: show where they differ, by source, length and position in the context, and in which "
            "documents most. Both models are scored again.",
        ),
    ] = False,
    where_keyword: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD", help="With --where: the difference on this word, too. May be repeated."),
    ] = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Print runs side by side: scores, which are really better, speed, data, settings that differ; warn of scores that
    cannot be compared."""
    from raylm.results import compare

    if where_keyword and not where:
        raise ConfigError("--where-keyword: it says where two runs differ; give --where, too", "--where-keyword")
    comparison = compare.compare(runs or [])
    if where:
        from raylm.pipeline.where import explain  # imports torch

        comparison = explain(comparison, where_keyword or ())
    return cli.CommandResult(comparison.record(), tuple(comparison.views()))


def main() -> None:
    cli.run(compare)


if __name__ == "__main__":
    from raylm.compare import main  # by its real name, so that Ray ships functions by reference

    main()
