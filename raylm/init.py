"""python -m raylm.init PATHS: look at a text and this machine, and write an experiment for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from raylm import cli
from raylm.errors import ConfigError

Arguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="PATHS... [SECTION.KEY=VALUE]...", help="Files, directories, globs or URIs of text; then settings."
    ),
]
Base = Annotated[
    str | None, typer.Option("--from", metavar="MODEL", help="Finetune this model: a directory or Hub id.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="The file to write. Default: NAME.yaml, NAME of the text."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]


def init(
    arguments: Arguments = None,
    base: Base = None,
    output: Output = None,
    force: Force = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Look at a text and this machine, and write a commented experiment: columns, split, model, budget and a sweep.

    The sweep takes at most about ten minutes on this machine, whose speed is measured for some seconds.
    """
    settings = [each for each in arguments or [] if _is_setting(each)]
    paths = [each for each in arguments or [] if not _is_setting(each)]
    if not paths:
        raise ConfigError("give the text: raylm init FILE, DIRECTORY or 'GLOB'", "PATHS")
    named = any(setting.startswith("name=") for setting in settings)
    name = _name(output.stem if output else Path(paths[0].partition("*")[0].rstrip("/")).stem)
    given = [] if named else [f"name={name}"]
    if base is not None:
        given.append(f"model.path={base}")
    from raylm import config as experiments

    layer = dict(map(experiments.parse_setting, [*given, *settings]))
    layer["corpus.paths"] = paths
    experiment = experiments.load(None, layer)
    file = output or Path(f"{experiment.name}.yaml")
    if not file.parent.is_dir():
        raise ConfigError(f"--output {file}: there is no directory {file.parent}", "--output")
    if file.exists() and not force:
        raise ConfigError(f"{file} exists; --force replaces it, --output FILE writes another", "--output")
    from raylm import views
    from raylm.pipeline import proposal

    found = proposal.propose(experiment, layer)
    file.write_text(found.text, encoding="utf-8")
    return cli.CommandResult(found.record(str(file)), views.proposal(found, file))


def _is_setting(argument: str) -> bool:
    """Whether it is section.key=value; a file of such a name is given as ./name."""
    from raylm import config as experiments

    key, equals, _ = argument.partition("=")
    return bool(equals) and key.split(".")[0] in experiments.Experiment.model_fields


def _name(text: str) -> str:
    """A name of runs for a file or directory: letters, digits, dots, dashes, underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "experiment"


def main() -> None:
    cli.run(init)


if __name__ == "__main__":
    from raylm.init import main  # by its real name, so that Ray ships functions by reference

    main()
