"""Command line -> experiment; result -> screen. Shared by every verb.

A verb is a function that takes the options below and returns a CommandResult. `run` calls it with argv, prints the
result on stdout (with --json one JSON object and nothing else), all else on stderr, and exits with the error's code.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, RenderableType

from raylm import console, timeline
from raylm.errors import ConfigError, Interrupted, RaylmError, StorageFull
from raylm.redaction import redacted

if TYPE_CHECKING:
    from raylm.config import Experiment

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings over those of the file; see --print-config."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The experiment; the built-in one if not given.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the resolved experiment with every setting explained, and stop.")
]


def _print_schema(asked: bool) -> None:
    """End the command with the schema, before anything else of its command line is looked at."""
    if asked:
        from raylm import config as experiments  # 0.2 s, which --help does not need

        schema = experiments.json_schema()
        raise _Done(CommandResult(schema, json.dumps(schema, indent=2, ensure_ascii=False)))


PrintSchema = Annotated[
    bool,
    typer.Option(
        "--print-schema",
        is_eager=True,
        callback=_print_schema,
        help="Print the JSON schema of an experiment, by which editors check and complete its file, and stop.",
    ),
]
Place = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[NAME|DIRECTORY] [SECTION.KEY=VALUE]...",
        help="An experiment's name or any directory, s3://... too; by default all of the storage. Names are "
        "looked up in storage=DIRECTORY.",
    ),
]
Resume = Annotated[
    Literal["auto", "never", "must"],
    typer.Option(
        help="auto: resume the newest run of this name that stopped before its end. never: start a new one. must: "
        "fail if there is none to resume."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the plan; start no Ray, write nothing.")
]
Timeline = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write what each process does when as a Chrome trace, for ui.perfetto.dev or chrome://tracing.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout; all else on stderr.")]

HELP = ["-h", "--help"]

INTERRUPTED = 130  # the exit code that shells use for Ctrl-C


@dataclass(frozen=True)
class CommandResult:
    """The result of a verb: a record for programs and a view for people."""

    record: dict[str, Any]
    view: RenderableType | tuple[RenderableType, ...]
    exit_code: int = 0


def places_and_settings(arguments: list[str] | None) -> tuple[list[str], list[str]]:
    """(arguments that name directories or runs, arguments that are settings)"""
    places = [argument for argument in arguments or [] if "=" not in argument or os.path.isdir(argument)]
    return places, [argument for argument in arguments or [] if argument not in places]


def experiment(
    config: Path | None,
    settings: list[str] | None,
    print_config: bool = False,
    derives: Literal["text", "training"] | None = None,
) -> Experiment:
    """The experiment of the command line. With `print_config` the command prints it and ends.

    Without a config file it is printed with the sizes that are derived from its text, as far as `derives` says.
    """
    from raylm import config as experiments  # 0.2 s, which --help does not need

    loaded = experiments.load(config, settings or [])
    if print_config:
        if derives is not None and loaded.sizes_follow_text:
            from raylm import plan  # imports Ray, so only after the settings are checked

            (loaded, _), _ = plan.derive(loaded, with_sizes=derives == "training")
        raise _Done(
            CommandResult(redacted(loaded.model_dump(mode="json")), experiments.dump(loaded, comments=True).rstrip())
        )
    return loaded


def run(verb: Callable[..., CommandResult | None] | typer.Typer, name: str | None = None) -> None:
    """Run a verb, or a group of them, with argv. Never returns. `name` is the command's name in its help."""
    as_json = "--json" in sys.argv[1:]  # read here, so that an error of parsing is JSON, too
    if isinstance(verb, typer.Typer):
        app = verb
    else:
        app = typer.Typer(add_completion=False)
        add(app, verb)
    _heed_signals()
    _keep_stderr()
    console.show_messages()
    console.is_command = True
    _quiet_libraries()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see local_worker.WORKER_ENVIRONMENT
    with _stdout_for_result(as_json) as stdout:
        exit_code = _run(app, name, as_json, stdout)
        stdout.flush()
    sys.stderr.flush()
    storage = sys.modules.get("raylm.storage")  # importing it takes time
    if storage is not None and storage.is_waiting():
        _leave(exit_code)
    sys.exit(exit_code)


def _leave(exit_code: int) -> None:
    """End the process as usual, but without pyarrow's exit function, which waits until all S3 requests have failed."""
    import pyarrow.fs

    atexit.unregister(pyarrow.fs.ensure_s3_finalized)
    atexit._run_exitfuncs()
    os._exit(exit_code)


def _quiet_libraries() -> None:
    """Hide the warnings of libraries, unless the user has set Python's or the libraries' own options for them."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for library in ("TRANSFORMERS", "HF_HUB", "DATASETS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def add(app: typer.Typer, verb: Callable[..., CommandResult | None], name: str | None = None) -> None:
    """Make a verb a command. If the verb has `passes_on`, options after its first argument are another command's."""
    settings: dict[str, Any] = {"help_option_names": HELP}
    if getattr(verb, "passes_on", False):
        settings |= {"ignore_unknown_options": True, "allow_interspersed_args": False}

    @functools.wraps(verb)
    def command(*args: Any, **kwargs: Any) -> CommandResult | None:
        file = kwargs.get("timeline")
        try:
            with timeline.recorded(file) if file is not None else contextlib.nullcontext():
                return verb(*args, **kwargs)
        except KeyboardInterrupt as interrupt:  # typer would only keep an exit code
            raise _Stopped(str(interrupt)) from interrupt

    app.command(name, context_settings=settings)(command)


FORK_SECONDS = 0.05
"""Delay of a signal that arrives during a fork. A fork takes a millisecond or two."""

_forking: list[bool] = []
"""Not empty while this process forks."""


def _heed_signals() -> None:
    """Have SIGTERM and Ctrl-C raise an exception, so that the command cleans up as after an error.

    Not during a fork, and Ray forks several times as it starts: Python drops an exception in a function registered for
    a fork, so logging would not release its lock, and another thread would wait for it forever.
    """
    import logging  # noqa: F401  # registers its own functions first, which then run inside of ours

    os.register_at_fork(
        before=functools.partial(_forking.append, True), after_in_parent=_forking.pop, after_in_child=_forking.clear
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # shell scripts have background commands ignore SIGINT
            signal.signal(number, _stop)
    sys.unraisablehook = _heed_what_was_lost


def _heed_what_was_lost(lost: Any) -> None:
    """Repeat an interruption that Python only prints, because it was raised where no error can be, as in a __del__."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        _stop_later(signal.SIGINT)
    elif isinstance(lost.exc_value, Interrupted):
        _stop_later(signal.SIGTERM)
    else:
        sys.__unraisablehook__(lost)


def _stop_later(number: int) -> None:
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, FORK_SECONDS)


def _stop(number: int, frame: object) -> None:
    signal.alarm(0)  # an alarm of Ray's core, while it starts, would abort the process
    if _forking:
        _stop_later(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Interrupted("terminated; the same command resumes from there")


def _run(app: typer.Typer, name: str | None, as_json: bool, stdout: Any) -> int:
    def fail(error: str, where: str | None, exit_code: int) -> int:
        if as_json:
            print(json.dumps(redacted({"error": error, "where": where, "exit_code": exit_code})), file=stdout)
        head = "" if exit_code in (INTERRUPTED, Interrupted.exit_code) else "[red]error:[/] "
        for line in error.split("\n"):
            console.screen.print(f"{head}{console.escaped(line)}", soft_wrap=True)
        return exit_code

    try:
        answer = _called(app, name)
        record = json.dumps(answer.record, allow_nan=False) if as_json and isinstance(answer, CommandResult) else ""
    except (RaylmError, Interrupted) as error:
        cause = getattr(error, "cause", error)  # Ray wraps a task's error in one with the traceback as text
        return fail(cause.message, cause.where, cause.exit_code)
    except _Stopped as stopped:
        return fail(str(stopped) or "interrupted", None, INTERRUPTED)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            return fail(_usage(error), None, ConfigError.exit_code)
        if isinstance(error, OSError) and (why := _no_room(error)):
            return fail(why, None, StorageFull.exit_code)
        traceback.print_exc()
        return fail(f"{type(error).__name__}: {error}", None, 1)
    if answer == INTERRUPTED:  # before the verb has started
        return fail("interrupted", None, INTERRUPTED)
    if isinstance(answer, CommandResult) and as_json:
        print(record, file=stdout)
    elif isinstance(answer, CommandResult):
        _show(answer.view, stdout)
    return answer if isinstance(answer, int) else getattr(answer, "exit_code", 0)


def _no_room(error: OSError) -> str:
    """What to say of a disk that is full, wherever a library or raylm wrote to it; empty for other errors."""
    way_out = "make room, or set TMPDIR to another directory; then run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a temporary file'}: {error.strerror}; {way_out}"
    if str(error.strerror).startswith("No usable temporary directory"):  # libraries look for one as they are imported
        return f"{str(error.strerror).replace('No usable', 'no writable')}; {way_out}"
    return ""


def _usage(error: Any) -> str:
    """The error of a command line; for options of other tools with raylm's settings of the same meaning."""
    context = getattr(error, "ctx", None)
    parameters = context.command.params if context is not None else []
    if not hasattr(error, "possibilities") or not any(parameter.name == "settings" for parameter in parameters):
        return error.format_message()
    known = [name for parameter in parameters for name in parameter.opts]
    from raylm.config import as_settings

    settings = as_settings(sys.argv[1:], known)
    how = f": {settings}" if settings else ", other fields of TrainingArguments as train.arguments.name=value"
    return f"{error.format_message()}; settings are given as section.key=value{how}"


def _called(app: typer.Typer, name: str | None) -> Any:
    try:
        return typer.main.get_command(app)(prog_name=name, standalone_mode=False)
    except _Done as done:
        return done.answer


def _show(view: RenderableType | tuple[RenderableType, ...], stdout: Any) -> None:
    """Print a view. Text is never wrapped, so that commands and paths can be copied whole; nor is a table in a file."""
    screen = Console(file=stdout, highlight=False, markup=False, emoji=False, width=None if stdout.isatty() else 200)
    for part in view if isinstance(view, tuple) else (view,):
        if isinstance(part, str):
            print(part, file=stdout)  # rich would replace tabs by spaces
        else:
            screen.print(part)


class _Done(Exception):
    def __init__(self, answer: CommandResult):
        self.answer = answer


class _Stopped(Exception):
    """The command was interrupted by Ctrl-C."""


@contextlib.contextmanager
def _stdout_for_result(as_json: bool) -> Iterator[Any]:
    """stdout. With --json all other output, also that of libraries and subprocesses, goes to stderr meanwhile."""
    if not as_json:
        if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal's encoding may not have all of a file's name
            sys.stdout.reconfigure(errors="backslashreplace")
        yield sys.stdout
        return
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stdout:
        os.dup2(2, 1)
        yield stdout


def _keep_stderr() -> None:
    """Keep sys.stderr where it is while descriptor 2 is redirected to hide the output of libraries."""
    with contextlib.suppress(AttributeError, OSError):  # sys.stderr is None, or in memory
        if sys.stderr.fileno() == 2:
            descriptor = os.fdopen(os.dup(2), "wb")
            sys.stderr = _Redacting(descriptor, sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _Redacting(io.TextIOWrapper):
    """stderr without the passwords in addresses, whichever code writes them."""

    def write(self, text: str) -> int:
        super().write(redacted(text))
        return len(text)
