"""python -m raylm.push MODEL REPO_ID: a trained model, with a card that says what it is, to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raylm import cli, console


def push(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    repo_id: Annotated[str, typer.Argument(help="Where it goes on the Hub: NAMESPACE/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and those you let in see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder only; send nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep what is sent in this new or empty directory.")
    ] = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Send a model, its tokenizer and a model card to the Hugging Face Hub, as one commit.

    The token is that of HF_TOKEN or of hf auth login.

    To edit the card first: write it with --dry-run --out DIR, edit DIR/README.md, and push DIR.
    """

    from raylm.export import hub

    result = hub.push(model, repo_id, private=private, dry_run=dry_run, out=out)
    sizes = {name: f"{size:,} bytes" for name, size in result.files.items()}
    where = {"folder": result.folder, "would go to" if dry_run else "sent to": result.url}
    return cli.CommandResult(result.record(), console.key_values({**where, **sizes}))


def main() -> None:
    cli.run(push)


if __name__ == "__main__":
    from raylm.push import main  # by its real name, so that Ray ships functions by reference

    main()
