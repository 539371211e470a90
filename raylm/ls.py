"""python -m raylm.ls: the runs and sweeps of a storage, with state, best score and what resumes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from raylm import cli
from raylm.errors import StorageError

if TYPE_CHECKING:
    from raylm.results.runs import ListedRun


def ls(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME|DIRECTORY] [SECTION.KEY=VALUE]...",
            help="An experiment's name, or a directory, s3://... too; by default all of the storage. storage=DIRECTORY "
            "is where names are looked up.",
        ),
    ] = None,
    config: cli.ConfigFile = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """List runs and sweeps: state, best score, tokens, size on disk, and what resumes an interrupted one."""
    place = place_of(arguments or [], config)
    from raylm.results import runs

    listed = runs.listed(place)
    if not listed:
        return cli.CommandResult({"place": place, "runs": []}, f"there are no runs in {place}")
    return cli.CommandResult({"place": place, "runs": [run.record() for run in listed]}, _view(listed))


def place_of(arguments: list[str], config: cli.ConfigFile) -> str:
    """The directory that a command line names: of a run, of an experiment's runs, or a whole storage."""
    from raylm import storage

    names = [argument for argument in arguments if "=" not in argument or os.path.isdir(argument)]
    experiment = cli.experiment(config, [argument for argument in arguments if argument not in names])
    storage.look(experiment.storage)
    if not names:
        return experiment.storage
    if len(names) > 1:
        raise StorageError(f"{' '.join(names)}: give one name or directory", names[1])
    for place in (names[0].rstrip("/"), f"{experiment.storage.rstrip('/')}/{names[0]}"):
        if storage.names(place):
            return storage.absolute(place)
    raise StorageError(f"{names[0]} is neither a directory nor an experiment in {experiment.storage}", names[0])


def _view(listed: list[ListedRun]) -> tuple:
    from raylm import console
    from raylm.results import tables, trial_table

    parts: list = []
    for experiment in dict.fromkeys(run.experiment for run in listed):
        table = tables.numbers("run", "score", "tokens", "size", "state")
        runs = [run for run in listed if run.experiment == experiment]
        for run in runs:
            cells = (trial_table.format_score(run.score), f"{run.tokens:,}", console.format_size(run.num_bytes))
            table.add_row(run.name, *cells, run.state)
        notes = [f"{run.name}: {run.error}" for run in runs if run.error]
        notes += [f"resume {run.name}: {run.resume}" for run in runs if run.resume]
        parts += ["", experiment, table, *notes]
    return tuple(parts[1:])


def main() -> None:
    cli.run(ls)


if __name__ == "__main__":
    from raylm.ls import main  # by its real name, so that Ray ships functions by reference

    main()
