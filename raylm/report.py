"""python -m raylm.report SWEEP: the page and the pictures of a sweep, made again from its directory."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from raylm import cli
from raylm.errors import StorageError

RUNS = "runs"
"""Where names are looked for: the default of `storage`."""
MOST_NAMES = 10
"""Of an error."""


def report(
    sweep: Annotated[str, typer.Argument(help=f"A sweep's directory, or its name if it is one of {RUNS}/*/ here.")],
    json: cli.Json = False,
) -> cli.CommandResult:
    """Write the report of a sweep again, of one that still runs or was stopped too, and print its table."""
    from raylm import page, storage, tables

    directory = located(sweep)
    if not page.is_sweep(directory):
        raise StorageError(f"{sweep} is not a sweep; {there(directory)}", sweep)
    found = page.read(directory)
    path = page.write(found)
    rows = page.rows(found)
    place = path.rpartition("/")[0]
    pictures = [f"{place}/{name}" for name in storage.names(place) if name.endswith(".png")]
    measure = found.measure.replace("-", "_")

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {measure if key == "perplexity" else key: value for key, value in row.items()}

    record = {
        "sweep": directory.rpartition("/")[2],
        "report": path,
        "pictures": pictures,
        "best": named(found.best) if found.best is not None else None,
        "trials": [named(row) for row in rows],
    }
    failures = [f"{row['trial_id']} failed: {row['failure']}" for row in rows if row["failure"]]
    facts = tables.key_values({"report": path, "pictures": ", ".join(name.rpartition("/")[2] for name in pictures)})
    return cli.CommandResult(record, (tables.trials(rows, found.measure), *failures, "", facts))


def located(given: str) -> str:
    """The directory of a run: as it is given, or by a name under runs/*/ here; StorageError if there is none."""
    from raylm import storage

    if storage.is_remote(given):
        return given.rstrip("/")
    if os.path.isdir(given):
        return os.path.abspath(given)
    named = [run for run in _runs(RUNS) if run.rpartition("/")[2] == given]
    if len(named) > 1:
        raise StorageError(f"{given} is the name of {' and of '.join(named)}; give the directory", given)
    if not named:
        raise StorageError(f"{given} is no directory, and no name under {RUNS}/*/ here; {there(RUNS)}", given)
    return os.path.abspath(named[0])


def there(place: str) -> str:
    """What could have been meant: the runs and sweeps in a directory, the newest ones first."""
    from raylm import page

    above = place.rpartition("/")[0]
    if page.is_sweep(above):
        return f"did you mean {above}?"
    found = _runs(place)
    shown = [run.rpartition("/")[2] for run in found[:MOST_NAMES]]
    more = f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else ""
    return f"in {place} there are {', '.join(shown)}{more}" if found else f"in {place} there are no runs"


def _runs(place: str) -> list[str]:
    """The directories of runs and sweeps in a directory or in those in it, the newest first."""
    from raylm import storage

    inside = [f"{place}/{name}" for name in storage.names(place)]
    deeper = [f"{each}/{name}" for each in inside for name in storage.names(each)]
    found = [run for run in (*inside, *deeper) if run.rpartition("/")[2].startswith(("train-", "tune-"))]
    return sorted(found, key=lambda run: run.rpartition("/")[2].partition("-")[2], reverse=True)


def main() -> None:
    cli.run(report)


if __name__ == "__main__":
    from raylm.report import main  # by its real name, so that Ray ships functions by reference

    main()
