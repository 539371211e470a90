"""python -m raylm.ls: the runs and sweeps of a storage, with state, best score and what resumes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raylm import cli

if TYPE_CHECKING:
    from raylm.results.runs import ListedRun


def ls(
    arguments: cli.Place = None,
    config: cli.ConfigFile = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """List runs and sweeps: state, best score, tokens, size on disk, and what resumes an interrupted one."""
    places, settings = cli.places_and_settings(arguments)
    experiment = cli.experiment(config, settings)
    from raylm.results import runs

    place = runs.place(places, experiment.storage)
    listed = runs.listed(place)
    if not listed:
        return cli.CommandResult({"place": place, "runs": []}, f"there are no runs in {place}")
    return cli.CommandResult({"place": place, "runs": [run.record() for run in listed]}, _view(listed))


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
