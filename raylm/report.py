"""python -m raylm.report SWEEP...: the report of a sweep, made again from its directory, or of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raylm import DEFAULT_STORAGE, cli, console

if TYPE_CHECKING:
    from raylm.results.sweep import SweepResults


def report(
    sweep: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP",
            help=f"A sweep's directory, its name if it is one of {DEFAULT_STORAGE}/*/ here, or the name of an "
            "experiment: its newest sweep. Several are compared.",
        ),
    ],
    json: cli.Json = False,
) -> cli.CommandResult:
    """Write the report of a sweep again, of one that still runs or was stopped too, and print its table.

    Of several sweeps: what changed between them, and which trial is best after as many training tokens.
    """
    from raylm.results import html, runs, several
    from raylm.results import sweep as sweeps

    found = [sweeps.read(runs.find_sweep(each)) for each in dict.fromkeys(sweep)]
    if len(found) == 1:
        return _of_one(found[0])
    compared = several.read(found)
    page = html.write_several(compared)
    paths = console.key_values({"report": page})
    return cli.CommandResult({**compared.record(), "report": page}, (*compared.views(), "", paths))


def _of_one(results: SweepResults) -> cli.CommandResult:
    from raylm import storage, tracking
    from raylm.results import choices, html, tables, trial_table
    from raylm.results import sweep as sweeps

    page = html.write(results)
    directory = page.rpartition("/")[0]
    pictures = [name for name in storage.names(directory) if name.endswith(".png")]
    record = {
        "sweep": results.name,
        "report": page,
        "pictures": [f"{directory}/{name}" for name in pictures],
        "best": results.best.record(results.measure) if results.best is not None else None,
        "trials": [row.record(results.measure) for row in results.trials],
        **({"repeats": results.result["repeats"]} if "repeats" in results.result else {}),
    }
    untrained = results.result.get("untrained")
    if untrained is not None:
        untrained = {**untrained, "perplexity": untrained[results.measure]}
    rows, score = results.trials, console.label(results.measure)
    table = trial_table.RankedTable(rows, score, untrained)
    found = [part for choice in choices.of(rows) for part in ("", *tables.choice(choice, score))]
    text = sweeps.scored_on_with_size(results.experiment, results.state.parameters)
    notes = [f"ranked by {results.data.score_name} on {text}", *filter(None, [results.result.get("significance")])]
    notes += [results.result["repeats"]["sentence"]] if "repeats" in results.result else []
    failures = [f"{row.trial_id} failed: {row.failure}" for row in results.trials if row.failure]
    run = tracking.Run(results.directory, results.state.uri)
    opened = tracking.how_to_open(run.uri, run.path, "compare trials") if run.path else {}
    paths = console.key_values({"report": page, "pictures": ", ".join(pictures), **opened})
    return cli.CommandResult(record, (table, *notes, *failures, *found, "", paths))


def main() -> None:
    cli.run(report)


if __name__ == "__main__":
    from raylm.report import main  # by its real name, so that Ray ships functions by reference

    main()
