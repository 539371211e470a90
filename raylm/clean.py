"""python -m raylm.clean: removes what finished sweeps and killed commands have left behind and nobody needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from raylm import cli, console


def clean(
    arguments: cli.Place = None,
    stores: Annotated[
        bool, typer.Option("--stores", help="Also token stores of the storage that no run was trained on.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    config: cli.ConfigFile = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Remove checkpoints of trials that lost in finished sweeps, and what killed commands left on this machine.

    Those trials cannot be exported or scored again then. Nothing is removed of runs that run or may resume.
    """
    places, settings = cli.places_and_settings(arguments)
    experiment = cli.experiment(config, settings)
    from raylm import cleaning
    from raylm.results import runs, tables

    found = cleaning.leftovers(runs.place(places, experiment.storage), stores=stores)
    total = sum(leftover.num_bytes for leftover in found) if dry_run else cleaning.remove(found)
    record = {"removed": [] if dry_run else [asdict(leftover) for leftover in found], "bytes": total}
    if dry_run:
        record["would_remove"] = [asdict(leftover) for leftover in found]
    table = tables.numbers("what", "number", "size")
    for what in dict.fromkeys(leftover.what for leftover in found):
        sizes = [leftover.num_bytes for leftover in found if leftover.what == what]
        table.add_row(what, f"{len(sizes):,}", console.format_size(sum(sizes)))
    verb = "would be removed" if dry_run else "removed"
    view = (table, f"{console.format_size(total)} {verb}") if found else "there is nothing to remove"
    return cli.CommandResult(record, view)


def main() -> None:
    cli.run(clean)


if __name__ == "__main__":
    from raylm.clean import main  # by its real name, so that Ray ships functions by reference

    main()
