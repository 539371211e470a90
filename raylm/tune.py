"""python -m raylm.tune: a sweep. A trial is a training with overrides, on the same tokens as every other."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from raylm import cli
from raylm.errors import TrainingError

logger = logging.getLogger(__name__)

Strict = Annotated[bool, typer.Option("--strict", help="Exit with 4 if any trial failed.")]


def tune(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    resume: cli.Resume = "auto",
    strict: Strict = False,
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    timeline: cli.Timeline = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Sweep settings of an experiment and rank the trials by perplexity on the same validation tokens.

    Without --config and corpus.paths: a small GPT-2 on the source code of Python's standard library.
    """
    experiment = cli.experiment(config, settings, print_config, "training")
    from raylm import plan, views
    from raylm.pipeline import sweep

    resolved = sweep.resolve(experiment, starts=not dry_run)
    if dry_run:
        for warning in (*resolved.plan.warnings, *plan.check_places(resolved.experiment)):
            logger.warning(warning)
        return cli.CommandResult(resolved.record(), views.sweep_plan(resolved))
    result = sweep.run(resolved, resume)
    exit_code = TrainingError.exit_code if strict and result.failures else 0
    return cli.CommandResult(result.record(), views.sweep(result, resolved.experiment), exit_code)


def main() -> None:
    cli.run(tune)


if __name__ == "__main__":
    from raylm.tune import main  # by its real name, so that Ray ships functions by reference

    main()
