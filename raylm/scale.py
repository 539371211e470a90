"""python -m raylm.scale SWEEP...: what a larger training will score and cost, by the law that the trials follow."""

from __future__ import annotations

from typing import Annotated

import typer

from raylm import DEFAULT_STORAGE, cli, console


def scale(
    sweep: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP...",
            help=f"Sweeps over sizes and budgets: directories, names under {DEFAULT_STORAGE}/*/ here, or the name of "
            "an experiment: its newest sweep. They must be scored on the same documents.",
        ),
    ],
    to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SECTION.KEY=VALUE",
            help="Predict a training with this setting over those of the largest trial, such as "
            "model.config.n_layer=12. May be repeated.",
        ),
    ] = None,
    tokens: Annotated[float | None, typer.Option(metavar="NUMBER", help="With --to: its training tokens: 1e9.")] = None,
    flops_per_second: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="With --to: the speed it will have; by default that of the largest trial."),
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="With --to: what an hour of its machine costs.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(metavar="DIRECTORY", help="Where the plot is written; by default with the first sweep's report."),
    ] = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Predict a larger training: its score, best settings and cost, by the law of size and training tokens that the
    trials of sweeps follow."""
    from raylm import tracking
    from raylm.config import parse_setting
    from raylm.results import html, runs
    from raylm.results import sweep as sweeps
    from raylm.scaling import figure, prediction, result

    settings = dict(map(parse_setting, to or []))
    request = prediction.request(settings, tokens, flops_per_second, price_per_hour)
    found = [sweeps.read(runs.find_sweep(each)) for each in dict.fromkeys(sweep)]
    with console.loading():
        scaling = result.scale(found, request)
    title = f"From small to large: {', '.join(results.name for results in found)}"
    place = output or f"{found[0].directory}/report"
    page, picture = html.write_figure(figure.build(scaling), place, title, scaling.sentences())
    run = tracking.Run(found[0].directory, found[0].state.uri)
    for file in (page, picture):
        run.log_file(file, f"report/{file.rpartition('/')[2]}")
    run.upload_in_background()
    record = {**scaling.record(), "report": page, "picture": picture}
    return cli.CommandResult(record, (*scaling.views(), "", console.key_values({"plot": page, "picture": picture})))


def main() -> None:
    cli.run(scale)


if __name__ == "__main__":
    from raylm.scale import main  # by its real name, so that Ray ships functions by reference

    main()
