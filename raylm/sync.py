"""python -m raylm.sync: upload what MLflow has missed of runs, from their journals."""

from __future__ import annotations

from typing import Annotated

import typer

from raylm import cli, console

TIMEOUT_SECONDS = 10.0
"""How long to wait for a server that takes nothing."""

URI_SETTING = "tracking.uri="


def sync(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIRECTORY]... [SECTION.KEY=VALUE]...",
            help="Where to look for runs; by default the experiment's storage. With tracking.uri=URI they are uploaded "
            "there, else each to its own MLflow.",
        ),
    ] = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Upload to MLflow what it has missed of runs, because it was down or they ran without it; nothing twice.

    The exit code is 5 if something is still missing.
    """
    directories, settings = cli.places_and_settings(arguments)
    experiment = cli.experiment(config, settings, print_config)
    uri = experiment.tracking.uri if any(setting.startswith(URI_SETTING) for setting in settings) else None
    from raylm import tracking

    with_journal = [run for place in directories or [experiment.storage] for run in tracking.find_runs(place, uri)]
    runs = {run.directory: run for run in with_journal if run.uri is not None}
    pending = {directory: run.pending() for directory, run in runs.items()}
    total = sum(pending.values())
    unreachable: set[str | None] = set()
    if total and not dry_run:
        with console.task("Uploading", "entries") as advance:
            for directory, run in runs.items():
                while run.uri not in unreachable and pending[directory] and not run.upload(TIMEOUT_SECONDS):
                    before, pending[directory] = pending[directory], run.pending()
                    if pending[directory] >= before and run.upload_failed:
                        unreachable.add(run.uri)
                pending[directory] = run.pending()
                advance(total - sum(pending.values()), total)
    missing = sum(pending.values())
    record = {"runs": len(runs), "uploaded": total - missing, "pending": missing}
    lines = [f"{directory}: {count:,} entries are not in MLflow yet" for directory, count in pending.items() if count]
    newest = tracking.newest(runs.values())
    opened = tracking.how_to_open(newest.uri, newest.path, "newest run") if newest and newest.path else {}
    view = "\n".join([*lines, console.key_values({**record, **opened})])
    return cli.CommandResult(record, view, exit_code=5 if missing and not dry_run else 0)


def main() -> None:
    cli.run(sync)


if __name__ == "__main__":
    from raylm.sync import main  # by its real name, so that Ray ships functions by reference

    main()
