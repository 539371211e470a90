"""python -m raylm.evaluate MODEL: perplexity and bits per byte of any model, and its scores on tasks of lm-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raylm import cli

Text = Annotated[
    list[str] | None, typer.Option("--text", help="Score these files, directories or globs. May be repeated.")
]
Lines = Annotated[
    Path | None,
    typer.Option("--documents", metavar="FILE", help="Write the figures of every document, a line of JSON each."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Also score these tasks: names that lm-evaluation-harness knows, directories or *.yaml files of tasks, "
        "between commas. Needs raylm\\[tasks].",
    ),
]


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's directory, a run, a trial or a sweep, of which the best model is taken, or an id of the "
            "Hugging Face Hub."
        ),
    ],
    settings: cli.Settings = None,
    text: Text = None,
    tasks: Tasks = None,
    documents: Lines = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Score a model: on --text, on the sets of eval.paths, or on the validation split it was trained with.

    The number depends on the model and the text alone, not on batch size, workers or training block size.

    Metrics of tasks are logged to the run that has trained the model, too.
    """
    from raylm import checkpoint, views
    from raylm.config import parse_setting
    from raylm.pipeline import evaluated_model, evaluation

    given = dict(map(parse_setting, settings or []))
    model, directory = evaluated_model.locate(model, given.get("model.gguf_file"))
    own = evaluation.settings_of(directory, config)
    experiment = cli.experiment(
        config or checkpoint.experiment_file(directory), [*own, *(settings or [])], print_config
    )
    if documents is not None:
        evaluation.check_writable(documents)
    plan = evaluation.resolve(model, directory, experiment, text or (), tasks or ())
    if dry_run:
        return cli.CommandResult(plan.record(), views.evaluation_plan(plan))
    result = evaluation.run(plan)
    if documents is not None:
        evaluation.write_documents(result, documents)
    record = result.record()
    return cli.CommandResult(record, views.evaluation(record))


def main() -> None:
    cli.run(evaluate)


if __name__ == "__main__":
    from raylm.evaluate import main  # by its real name, so that Ray ships functions by reference

    main()
