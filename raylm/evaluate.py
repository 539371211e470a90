"""python -m raylm.evaluate MODEL: perplexity and bits per byte of a checkpoint or any Hugging Face model directory."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterable
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from raylm import cli
from raylm.config import parse_setting
from raylm.errors import StorageError

Text = Annotated[
    list[str] | None, typer.Option("--text", help="Score these files, directories or globs. May be repeated.")
]
Lines = Annotated[
    Path | None,
    typer.Option("--documents", metavar="FILE", help="Write the figures of every document, a line of JSON each."),
]


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    settings: cli.Settings = None,
    text: Text = None,
    documents: Lines = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Score a model: on --text, on the sets of eval.paths, or on the validation split it was trained with.

    The number depends on the model and the text alone, not on batch size, workers or training block size.
    """
    from raylm import checkpoint, views
    from raylm.pipeline import evaluation

    given = dict(map(parse_setting, settings or []))
    directory = checkpoint.locate(model, given.get("model.gguf_file")).resolve()
    own = evaluation.settings_of(directory, config)
    experiment = cli.experiment(
        config or checkpoint.experiment_file(directory), [*own, *(settings or [])], print_config
    )
    if documents is not None:
        check_writable(documents)
    plan = evaluation.resolve(model, directory, experiment, text or ())
    if dry_run:
        return cli.CommandResult(plan.record(), views.evaluation_plan(plan))
    result = evaluation.run(plan)
    if documents is not None:
        write_lines(documents, result.documents())
    record = result.record()
    return cli.CommandResult(record, views.evaluation(record))


def check_writable(path: Path) -> None:
    """StorageError, before anything is scored, if no file can be written there."""
    problem = "it is a directory" if path.is_dir() else None
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise StorageError(
            f"--documents {path}: {problem}; give a file in a directory that can be written to", "--documents"
        )


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """A line of JSON each, in a file that is there entirely or not at all."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.writelines(dumps(line) + "\n" for line in lines)
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"--documents {path}: {error.strerror or error}", "--documents") from error
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    cli.run(evaluate)


if __name__ == "__main__":
    from raylm.evaluate import main  # by its real name, so that Ray ships functions by reference

    main()
