"""The command `raylm`: every verb by its name."""

import importlib
import sys
from typing import Annotated

import typer

from raylm import __version__, cli

VERBS = (
    "init", "prepare", "inspect", "train", "tune", "evaluate", "generate", "push", "ls", "clean", "report", "compare",
    "scale", "sync", "submit", "doctor",
)  # fmt: skip


def raylm(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and stop.")] = False,
) -> None:
    """Train language models on your own text: Ray Data, Ray Train, Ray Tune, Hugging Face and MLflow as one."""
    if version:
        print(f"raylm {__version__}")
        raise typer.Exit


def main() -> None:
    if sys.argv[1:2] in ([], ["help"]):  # raylm, raylm help, raylm help train
        sys.argv[1:] = [*sys.argv[2:3], "--help"]
    app = typer.Typer(
        invoke_without_command=True,
        epilog="raylm help COMMAND explains a command.",
        context_settings={"help_option_names": cli.HELP},
    )
    app.callback()(raylm)
    for verb in VERBS:
        cli.add(app, getattr(importlib.import_module(f"raylm.{verb}"), verb), verb)
    cli.run(app, "raylm")


if __name__ == "__main__":
    main()
