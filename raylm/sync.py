"""python -m raylm.sync: what MLflow has missed of runs, out of their journals."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from raylm import cli, console

PATIENCE_SECONDS = 10.0
"""How long a server is waited for that takes nothing."""

URI = "tracking.uri="


def sync(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIRECTORY]... [SECTION.KEY=VALUE]...",
            help="Where to look for runs; by default the experiment's storage. With tracking.uri=URI they are shipped "
            "there, else where each belongs.",
        ),
    ] = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Ship to MLflow what it has missed of runs, since it was down or they ran without it; nothing twice.

    The exit code is 5 if something is left.
    """
    directories = [argument for argument in arguments or [] if "=" not in argument or os.path.isdir(argument)]
    settings = [argument for argument in arguments or [] if argument not in directories]
    experiment = cli.experiment(config, settings, print_config)
    elsewhere = experiment.tracking.uri if any(setting.startswith(URI) for setting in settings) else None
    from raylm import tables, tracking

    found = [run for place in directories or [experiment.storage] for run in tracking.runs(place, elsewhere)]
    runs = {run.directory: run for run in found if run.uri is not None}
    owed = {place: run.left() for place, run in runs.items()}
    total = sum(owed.values())
    left = dict(owed)
    silent: set[str | None] = set()
    if total and not dry_run:
        with console.task("Shipping", "entries") as advance:
            for place, run in runs.items():
                while run.uri not in silent and left[place] and not run.ship(PATIENCE_SECONDS):
                    before, left[place] = left[place], run.left()
                    if left[place] >= before and run.is_cut_off:
                        silent.add(run.uri)
                left[place] = run.left()
                advance(total - sum(left.values()), total)
    record = {"runs": len(runs), "shipped": total - sum(left.values()), "left": sum(left.values())}
    lines = [f"{place}: {count:,} entries are not in MLflow yet" for place, count in left.items() if count]
    view = "\n".join([*lines, tables.key_values(record)])
    return cli.CommandResult(record, view, exit_code=5 if record["left"] and not dry_run else 0)


def main() -> None:
    cli.run(sync)


if __name__ == "__main__":
    from raylm.sync import main  # by its real name, so that Ray ships functions by reference

    main()
