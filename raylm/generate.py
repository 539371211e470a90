"""python -m raylm.generate MODEL --prompt TEXT: text from a trained model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from raylm import cli, console

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="How to generate: fields of transformers' GenerationConfig by their names, such as max_new_tokens=100 "
        "temperature=0.8 top_p=0.95 (the defaults) or do_sample=false. And settings of an experiment: corpus.… for the "
        "documents to continue, cluster.… for the workers, model.trust_remote_code.",
    ),
]


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    settings: Settings = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to continue. May be repeated.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help='A file with a prompt a line; - is standard input. In a .jsonl file a line is "a text" or '
            '{"prompt": "a text"}, so prompts may have several lines.',
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Continue every document of corpus.paths, into this .jsonl or .parquet file."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text for a prompt.")] = 0,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Let a model continue prompts, or every document of a corpus; a masked model fills its mask tokens."""
    from raylm import generation

    plan = generation.resolve(
        model, settings or [], prompt or [], prompts, output, overwrite=overwrite, batch_size=batch_size, seed=seed
    )
    if dry_run:
        return cli.CommandResult(plan.record(), console.key_values(plan.record()))
    if plan.documents is not None:
        record = asdict(generation.write(plan))
        return cli.CommandResult(record, console.key_values(record))
    if plan.can_stream and not json and sys.stdout.isatty():
        try:
            texts = generation.texts(plan, _print)
        finally:
            _print("\n")
        return cli.CommandResult({"prompts": plan.prompts, "texts": texts}, ())
    texts = generation.texts(plan)
    return cli.CommandResult({"prompts": plan.prompts, "texts": texts}, "\n\n".join(texts))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    cli.run(generate)


if __name__ == "__main__":
    from raylm.generate import main  # by its real name, so that Ray ships functions by reference

    main()
