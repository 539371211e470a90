"""python -m raylm.inspect: the data as the model will see it: text, tokens, blocks, a batch, and what was left out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raylm import cli, console

if TYPE_CHECKING:
    from raylm.config import Experiment

logger = logging.getLogger(__name__)

Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write what is shown as a page, too.")]
Coordinates = Annotated[
    bool,
    typer.Option(
        "--coordinates",
        help="Show instead how the sizes of activations in the first steps depend on the model's width, with "
        "model.transfer and without.",
    ),
]
Examples = Annotated[int, typer.Option("--examples", min=1, max=100, help="Documents and blocks to show.")]


def inspect(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    examples: Examples = 2,
    coordinates: Coordinates = False,
    html: Html = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Show the data as the model will see it: documents, their tokens, blocks, a batch, lengths, the ledger."""
    experiment = cli.experiment(config, settings, print_config, "text")
    from raylm import plan, views
    from raylm.pipeline import stores
    from raylm.results import inspection

    if coordinates:
        return _coordinates(experiment, dry_run, html)
    resolved = plan.resolve_tokens(experiment)
    if dry_run:
        return cli.CommandResult(*views.tokens_plan(resolved))
    store, _ = stores.open_or_prepare(resolved)
    for warning in stores.warnings(resolved, store):
        logger.warning(warning)
    record = inspection.inspect(resolved.experiment, store, examples)
    view = inspection.view(record)
    if html is not None:
        html.write_text(console.as_html(view), encoding="utf-8")
        logger.info(f"written: {html}")
    return cli.CommandResult(record, view)


def _coordinates(experiment: Experiment, dry_run: bool, html: Path | None) -> cli.CommandResult:
    """The check of models like the experiment's at several widths, with its text if that is prepared."""
    from raylm import plan, views
    from raylm.results import coordinates as results
    from raylm.training import coordinates

    resolved = plan.resolve(experiment)
    if dry_run:
        return cli.CommandResult(*views.tokens_plan(resolved.tokens))
    store = resolved.prepared.store if resolved.prepared is not None else None
    record = coordinates.check(resolved.experiment, resolved.model_config, store)
    if html is not None:
        html.write_text(results.page(record), encoding="utf-8")
        logger.info(f"written: {html}")
    return cli.CommandResult(record, results.view(record))


def main() -> None:
    cli.run(inspect)


if __name__ == "__main__":
    from raylm.inspect import main  # by its real name, so that Ray ships functions by reference

    main()
