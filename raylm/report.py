"""python -m raylm.report SWEEP: the report of a sweep, made again from its directory."""

from __future__ import annotations

from typing import Annotated

import typer

from raylm import cli, console
from raylm.config import DEFAULT_STORAGE


def report(
    sweep: Annotated[
        str, typer.Argument(help=f"A sweep's directory, or its name if it is one of {DEFAULT_STORAGE}/*/ here.")
    ],
    json: cli.Json = False,
) -> cli.CommandResult:
    """Write the report of a sweep again, of one that still runs or was stopped too, and print its table."""
    from raylm import storage
    from raylm.results import html, runs, trial_table
    from raylm.results import sweep as sweeps

    results = sweeps.read(runs.find_sweep(sweep))
    page = html.write(results)
    directory = page.rpartition("/")[0]
    pictures = [name for name in storage.names(directory) if name.endswith(".png")]
    record = {
        "sweep": results.name,
        "report": page,
        "pictures": [f"{directory}/{name}" for name in pictures],
        "best": results.best.record(results.measure) if results.best is not None else None,
        "trials": [row.record(results.measure) for row in results.trials],
    }
    table = trial_table.RankedTable(results.trials, console.label(results.measure))
    failures = [f"{row.trial_id} failed: {row.failure}" for row in results.trials if row.failure]
    paths = console.key_values({"report": page, "pictures": ", ".join(pictures)})
    return cli.CommandResult(record, (table, *failures, "", paths))


def main() -> None:
    cli.run(report)


if __name__ == "__main__":
    from raylm.report import main  # by its real name, so that Ray ships functions by reference

    main()
