"""python -m raylm.train: one training. The same command resumes a run that stopped before its end."""

from __future__ import annotations

import logging

from raylm import cli

logger = logging.getLogger(__name__)


def train(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    resume: cli.Resume = "auto",
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    timeline: cli.Timeline = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Train one language model on the corpus; the tokens are prepared first, unless they exist already."""
    experiment = cli.experiment(config, settings, print_config, "training")
    from raylm import local_worker

    if not dry_run and not experiment.sizes_follow_text and local_worker.is_alone(experiment.cluster):
        local_worker.start_worker_early()  # beside the imports of this process
    from raylm import estimate, plan, views

    resolved = plan.resolve(experiment, starts=None if dry_run else "train")
    if dry_run:
        for warning in (*resolved.warnings, *plan.check_places(resolved.experiment)):
            logger.warning(warning)
        estimated = estimate.training(resolved, resolved.budget, measures=True)
        return cli.CommandResult({**resolved.record(), **estimated.record()}, views.plan(resolved, estimated))
    from raylm.pipeline import training

    result = training.run(resolved, resume)
    return cli.CommandResult(result.record(), views.training(result, experiment.tracking))


def main() -> None:
    cli.run(train)


if __name__ == "__main__":
    from raylm.train import main  # by its real name, so that Ray ships functions by reference

    main()
