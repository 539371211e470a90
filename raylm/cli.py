"""Command line -> experiment; result -> screen. Shared by every verb.

A verb is a function of the options below that returns an Answer. `run` gives it argv, prints the answer on stdout
(with --json as one JSON object and nothing else), everything else on stderr, and exits with the error's code.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from raylm import config as experiments
from raylm.errors import ConfigError, RaylmError

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings over those of the file; see --print-config."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The experiment. [default: the built-in one]")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved experiment with every setting explained, and stop.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the plan; start no Ray, write nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout; all else on stderr.")]

console = Console(stderr=True, highlight=False)
"""Where progress and errors go. Results go to stdout."""


@dataclass(frozen=True)
class Answer:
    """What a verb found: one record for programs, one view for people."""

    record: dict[str, Any]
    view: RenderableType


def experiment(config: Path | None, settings: list[str] | None, print_config: bool = False) -> experiments.Experiment:
    """The experiment of the command line. With `print_config` it is printed and the command ends."""
    loaded = experiments.load(config, settings or [])
    if print_config:
        raise _Done(Answer(loaded.model_dump(mode="json"), experiments.dump(loaded, comments=True).rstrip()))
    return loaded


def run(verb: Callable[..., Answer | None] | typer.Typer) -> None:
    """Run a verb, or a group of them, with argv. Never returns."""
    as_json = "--json" in sys.argv[1:]  # read here, so that a command line that does not parse answers in JSON too
    if isinstance(verb, typer.Typer):
        app = verb
    else:
        app = typer.Typer(add_completion=False)
        app.command()(verb)
    with _stdout_for_result(as_json) as stdout:
        exit_code = _run(app, as_json, stdout)
        stdout.flush()
    sys.stderr.flush()
    sys.exit(exit_code)


def _run(app: typer.Typer, as_json: bool, stdout: Any) -> int:
    def fail(error: str, where: str | None, exit_code: int) -> int:
        if as_json:
            print(json.dumps({"error": error, "where": where, "exit_code": exit_code}), file=stdout)
        for line in error.split("\n"):
            console.print(f"[red]error:[/] {_escaped(line)}", soft_wrap=True)
        return exit_code

    try:
        answer = typer.main.get_command(app)(standalone_mode=False)
    except _Done as done:
        answer = done.answer
    except RaylmError as error:
        cause = getattr(error, "cause", error)  # Ray wraps what a task raises, with the task's traceback as its text
        return fail(cause.message, cause.where, cause.exit_code)
    except KeyboardInterrupt:
        return fail("interrupted", None, 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            return fail(error.format_message(), None, ConfigError.exit_code)
        traceback.print_exc()
        return fail(f"{type(error).__name__}: {error}", None, 1)
    if isinstance(answer, Answer):
        if as_json:
            print(json.dumps(answer.record, allow_nan=False), file=stdout)
        else:
            Console(file=stdout, highlight=False).print(answer.view, soft_wrap=isinstance(answer.view, str))
    return answer if isinstance(answer, int) else 0


class _Done(Exception):
    def __init__(self, answer: Answer):
        self.answer = answer


@contextlib.contextmanager
def _stdout_for_result(as_json: bool) -> Iterator[Any]:
    """stdout; with --json everybody else's prints, of libraries and subprocesses too, go to stderr meanwhile."""
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        yield stdout


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


@contextlib.contextmanager
def task(description: str, unit: str = "") -> Iterator[Callable[[float, float | None], None]]:
    """Show that something is under way: a bar on a terminal, elsewhere a line now and then.

    Yields `advance(done, total)`, to be called whenever there is news; a total of None is unknown.
    """
    started = time.monotonic()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(description, total=None, amount="")
            yield lambda done, total: progress.update(
                bar, completed=done, total=total, amount=_amount(done, total, unit)
            )
    else:
        console.print(f"{description} …", soft_wrap=True)
        last = started

        def advance(done: float, total: float | None) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 5:
                last = now
                left = f", {(now - started) * (total - done) / done:.0f} s left" if total and done else ""
                console.print(f"{description} … {_amount(done, total, unit)}{left}", soft_wrap=True)

        yield advance
    console.print(f"{description}: {time.monotonic() - started:.1f} s", soft_wrap=True)


def _amount(done: float, total: float | None, unit: str) -> str:
    return f"{done:,.0f}{f' of {total:,.0f}' if total else ''} {unit}".strip()
