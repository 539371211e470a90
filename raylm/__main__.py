"""The command `raylm`: every verb by its name."""

import importlib

import typer

from raylm import cli

VERBS = (
    "init", "prepare", "inspect", "train", "tune", "evaluate", "generate", "push", "report", "compare", "sync",
    "submit", "doctor",
)  # fmt: skip


def main() -> None:
    app = typer.Typer(
        help="Train language models on your own text: Ray Data, Ray Train, Ray Tune, Hugging Face and MLflow as one.",
        no_args_is_help=True,
        add_completion=False,
    )
    for verb in VERBS:
        cli.add(app, getattr(importlib.import_module(f"raylm.{verb}"), verb), verb)
    cli.run(app)


if __name__ == "__main__":
    main()
