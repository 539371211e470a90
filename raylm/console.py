"""What a person sees of a command while it works: messages, progress, and numbers as people write them.

Whatever is to be said goes through logging, to loggers named after their modules (`raylm.tokens.write`). A command
shows it (`show_messages`); a program that imports raylm decides for itself, as with any library.
"""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from raylm import timeline

# Without emoji, or ":100:" of file.yaml:100:3 becomes a picture; as plain text in a notebook, where rich would make a
# paragraph of each line.
screen = Console(stderr=True, highlight=False, emoji=False, force_jupyter=False)
"""Where messages, progress and errors go. Results go to stdout."""

logger = logging.getLogger(__name__)

is_command = False
"""Whether this process is a command (cli.run), not a program of the user's that imports raylm."""


class _Screen(logging.Handler):
    """Messages as lines of the console; they stand above a progress bar that is there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                screen.print(f"[yellow]warning:[/] {escaped(text)}", soft_wrap=True)
            else:
                screen.print(text, soft_wrap=True, markup=False)
        except Exception:
            self.handleError(record)


def show_messages() -> None:
    """Show what raylm's loggers say from level INFO on, once, on the console."""
    log = logging.getLogger("raylm")
    if not any(isinstance(handler, _Screen) for handler in log.handlers):
        log.addHandler(_Screen())
        log.setLevel(logging.INFO)
        log.propagate = False  # or a library that sets up the root logger would show each line twice


def escaped(text: str) -> str:
    """Text in which rich sees no markup."""
    return text.replace("[", r"\[")


def format_number(value: Any) -> str:
    """A number as a person writes it: 400,384, 1,057,006 and 0.00312."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def format_estimate(value: float, low: float | None, high: float | None) -> str:
    """A number with its interval and no more digits than it has, two of the half width: 53.2 [47.7, 59.7].

    Two of the number itself if that is smaller, as a perplexity may be far below the upper end: 300 [0, 172,000].
    """
    if low is None or high is None or not low < high:
        return format_number(value)
    decimals = decimals_of_interval(low, min(high, low + 2 * value) if low >= 0 < value else high)
    shown, *ends = (f"{round(each, decimals):,.{max(0, decimals)}f}" for each in (value, low, high))
    return f"{shown} [{', '.join(ends)}]"


def decimals_of_interval(low: float, high: float) -> int:
    """Decimals with which half of an interval has two digits; negative above 99. `low` is less than `high`."""
    return 1 - math.floor(math.log10((high - low) / 2))


def format_p(p: float | None, name: str = "") -> str:
    """A p-value with the digits that 10,000 flips give it, two above 0.01 and one below; a dash for None.

    After its name, if that is given: p = 0.013, p < 0.0001.
    """
    if p is None:
        return "-"
    if p < 5e-5:  # the least of 10,000 flips is 0.0001
        return f"{name} < 0.0001".lstrip()
    return f"{name}{' = ' if name else ''}{p:.2g}" if p >= 0.01 else f"{name}{' = ' if name else ''}{p:.1g}"


def format_size(num_bytes: float) -> str:
    """Bytes as a person says them: 512 bytes, 49.9 KB, 3.0 GB."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} bytes"
    for unit in ("KB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 999.95:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} TB"


def format_duration(seconds: float) -> str:
    """In the two largest units that matter: 12 s, 4 min 10 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(number: int, noun: str) -> str:
    """A number of things: 1 file, 2,048 files."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def command(verb: str, *arguments: str) -> str:
    """A command of raylm that can be pasted into a shell, whatever characters its arguments have."""
    return shlex.join([sys.executable, "-m", f"raylm.{verb}", *arguments])


def label(key: str) -> str:
    """The name of a metric or another key as a person writes it: pseudo-perplexity, bits per byte."""
    return key.replace("_", "-" if key.endswith("perplexity") else " ")


def key_values(pairs: Mapping[str, Any]) -> str:
    """A line for each name and its value, aligned; pairs whose value is None are left out."""
    width = max(len(name) for name in pairs)
    return "\n".join(f"{name:<{width}}  {format_number(value)}" for name, value in pairs.items() if value is not None)


def as_html(view: RenderableType) -> str:
    """A table or text as HTML that needs no other file."""
    recorder = Console(record=True, width=130, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    recorder.print(view)
    return recorder.export_html(inline_styles=True)


class Advance(Protocol):
    def __call__(self, done: float, total: float | None, note: str = "") -> None:
        """Show that so much is done of `total`, None if that is unknown; and `note` on a line below the bar."""


class _Bar(Progress):
    """A bar with a line of text below it."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def task(description: str, unit: str = "") -> Iterator[Advance]:
    """Show that something is under way: a bar on a terminal, elsewhere a line now and then.

    Yields what is to be called whenever there is news.
    """
    started = time.monotonic()
    with timeline.phase(description), _progress(description, unit) as advance:
        yield advance
    logger.info(f"{description}: {time.monotonic() - started:.1f} s")


@contextlib.contextmanager
def _progress(description: str, unit: str) -> Iterator[Advance]:
    if screen.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None if screen.width < 100 else 30),
            TextColumn("{task.fields[amount]}"),
            TimeElapsedColumn(),
            TextColumn("so far,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with _Bar(*columns, console=screen, transient=True) as progress:
            bar = progress.add_task(description, total=None, amount="")

            def show(done: float, total: float | None, note: str = "") -> None:
                progress.note = note
                progress.update(bar, completed=done, total=total, amount=_amount(done, total, unit))

            yield show
    else:
        logger.info(f"{description} …")
        last = started = time.monotonic()

        def advance(done: float, total: float | None, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= 5:
                last = now
                left = f", {(now - started) * (total - done) / done:.0f} s left" if total and done else ""
                logger.info(f"{description} … {_amount(done, total, unit)}{left}")

        yield advance


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most so many characters between the least and the largest value, each of the mean of its part.

    Empty for less than two values, and where the screen's encoding has no blocks.
    """
    try:
        BLOCKS.encode(screen.encoding)
    except UnicodeEncodeError:
        return ""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    ends = [len(finite) * number // count for number in range(count + 1)]
    means = [sum(finite[begin:end]) / (end - begin) for begin, end in itertools.pairwise(ends)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what takes some seconds: a line that goes away on a terminal."""
    with timeline.phase(what):
        if screen.is_terminal:
            with screen.status(what):
                yield
        else:
            logger.info(f"{what} …")
            yield


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import much in four fifths of the time: the garbage collector, which finds nothing in modules, rests."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Import PyTorch and transformers, which takes seconds; it is said, unless they have been imported."""
    is_loaded = {"torch", "transformers"} <= sys.modules.keys()
    with contextlib.nullcontext() if is_loaded else waiting("Loading PyTorch and transformers"), importing():
        yield
        if is_command:  # as in local_worker.serve; a program's own objects are not raylm's to freeze
            gc.freeze()


def _amount(done: float, total: float | None, unit: str) -> str:
    return f"{done:,.0f}{f' of {total:,.0f}' if total else ''} {unit}".strip()
