"""python -m raylm.tune: a sweep. A trial is a training with overrides, on the same tokens as every other."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from raylm import cli
from raylm.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

Strict = Annotated[bool, typer.Option("--strict", help="Exit with 4 if any trial failed.")]
Status = Annotated[bool, typer.Option("--status", help="Show the trials of [SWEEP], by default the newest, and stop.")]
StopTrial = Annotated[
    str | None,
    typer.Option("--stop-trial", metavar="TRIAL", help="Have a trial of [SWEEP] stop at its next evaluation."),
]
AddTrials = Annotated[
    int | None,
    typer.Option(
        "--add-trials", metavar="N", min=1, help="Have [SWEEP] train N more trials, the next one with these settings."
    ),
]


def tune(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    resume: cli.Resume = "auto",
    strict: Strict = False,
    status: Status = False,
    stop_trial: StopTrial = None,
    add_trials: AddTrials = None,
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    timeline: cli.Timeline = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Sweep settings of an experiment and rank the trials by perplexity on the same validation tokens.

    Without --config and corpus.paths: a small GPT-2 on the source code of Python's standard library.

    The same command with a larger tune.num_samples extends a finished sweep.
    """
    if status or stop_trial is not None or add_trials is not None:
        return _of_running(settings or [], config, status, stop_trial, add_trials)
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


def _of_running(
    arguments: list[str], config: Path | None, status: bool, stop_trial: str | None, add_trials: int | None
) -> cli.CommandResult:
    """Show the trials of a sweep, or ask something of it. `arguments`: [SWEEP] [SECTION.KEY=VALUE]...

    Settings that trials can have are those of the trial to add. Others, such as name, say which sweep it is.
    """
    if status + (stop_trial is not None) + (add_trials is not None) > 1:
        raise ConfigError("give one of --status, --stop-trial and --add-trials", "--status")
    from raylm.config.space import NOT_SWEPT

    places, settings = cli.places_and_settings(arguments)
    swept = [setting for setting in settings if setting.partition("=")[0].split(".")[0] not in NOT_SWEPT]
    of_trial = swept if add_trials is not None else []
    experiment = cli.experiment(config, [setting for setting in settings if setting not in of_trial])
    from raylm.pipeline import running_sweep

    sweep = running_sweep.find(places, experiment)
    if status:
        found = running_sweep.status(sweep)
        return cli.CommandResult(found.record(), found.view)
    if stop_trial is not None:
        answer = running_sweep.stop_trial(sweep, stop_trial)
    else:
        answer = running_sweep.add_trials(sweep, add_trials or 0, of_trial)
    return cli.CommandResult({"sweep": sweep, "answer": answer}, answer)


def main() -> None:
    cli.run(tune)


if __name__ == "__main__":
    from raylm.tune import main  # by its real name, so that Ray ships functions by reference

    main()
