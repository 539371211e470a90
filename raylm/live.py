"""A sweep while it goes on: on a terminal one table that changes in place, elsewhere a line now and then.

with live.sweep(budget_tokens=737_280, total_trials=8, keys=["train.learning_rate"], measure="perplexity") as view:
    view.update("trial_00000", settings={"train.learning_rate": 0.003})
    view.update("trial_00000", tokens=81_920, perplexity=130.5)
    view.update("trial_00000", status="stopped early")

What is printed meanwhile through `logger.info` or `print` stands above the table.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from raylm import console

logger = logging.getLogger(__name__)

MOST_ROWS = 12
"""Of the table: those that run, then the best of the others."""
PLAIN_SECONDS = 5.0
"""Between two plain lines at first; later a twentieth of the time so far, or a day of sweep is 17,000 lines."""


@contextlib.contextmanager
def sweep(
    budget_tokens: int, total_trials: int | None, keys: Sequence[str], measure: str = "perplexity"
) -> Iterator[View]:
    """Show a sweep for as long as the context lasts. What is left of the table after an error stays on the screen."""
    view = View(budget_tokens, total_trials, keys, measure)
    if console.screen.is_terminal:
        with Live(get_renderable=view.table, console=console.screen, refresh_per_second=2, transient=True) as screen:
            try:
                yield view
            except BaseException:
                screen.transient = False
                raise
    else:
        yield view
    logger.info(f"Sweep: {console.format_duration(time.monotonic() - view.began)}")


@dataclass
class Row:
    """A trial, and how fast it goes in this process: one that goes on has some tokens already."""

    first: tuple[float, int]
    """(seconds, tokens) when it was first heard of, or went on after it had waited."""
    last: tuple[float, int]
    """(seconds, tokens) when its tokens were last told."""
    status: str = "running"
    perplexity: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.last[1]

    @property
    def is_over(self) -> bool:
        return self.status not in ("running", "waiting")

    def left(self, budget_tokens: int, now: float) -> float | None:
        """Seconds until it has trained on the whole budget; None before that can be told."""
        seconds, gained = self.last[0] - self.first[0], self.last[1] - self.first[1]
        if self.status != "running" or gained <= 0 or seconds <= 0:
            return None
        return max(0.0, (budget_tokens - self.tokens) * seconds / gained - (now - self.last[0]))


class View:
    """What is known of the trials."""

    def __init__(self, budget_tokens: int, total_trials: int | None, keys: Sequence[str], measure: str):
        self.budget_tokens = budget_tokens
        self.total_trials = total_trials
        self.keys = list(keys)
        self.measure = measure
        self.rows: dict[str, Row] = {}
        self.gained = 0
        """Tokens, in this process."""
        self.began = self._told = time.monotonic()

    def update(
        self,
        trial_id: str,
        *,
        status: str | None = None,
        tokens: int | None = None,
        perplexity: float | None = None,
        settings: Mapping[str, Any] | None = None,
        failure: str | None = None,
    ) -> None:
        """What is new of a trial. `perplexity` is the best so far; `failure` is why it failed, for a plain line.

        A trial that is over when it is first heard of, in a sweep that goes on, gets no line of its own.
        """
        now = time.monotonic()
        row = self.rows.get(trial_id)
        was_over = row is None or row.is_over
        if row is None:
            row = self.rows[trial_id] = Row((now, tokens or 0), (now, tokens or 0))
        if tokens is not None:
            before, row.last = row.tokens, (now, min(tokens, self.budget_tokens))
            self.gained += row.tokens - before
        if (row.status, status) == ("waiting", "running"):
            row.first = now, row.tokens
        row.status = status or row.status
        row.perplexity = perplexity if perplexity is not None else row.perplexity
        row.settings = dict(settings) if settings is not None else row.settings
        if console.screen.is_terminal:
            return
        if row.is_over and not was_over:
            score = f", {self.measure} {row.perplexity:.2f}" if row.perplexity is not None else ""
            logger.info(f"{trial_id}: {row.status}, {row.tokens:,} tokens{score}{f': {failure}' if failure else ''}")
        if now - self._told >= max(PLAIN_SECONDS, (now - self.began) / 20):
            self._told = now
            logger.info(self.summary())

    def summary(self) -> str:
        """All trials in a line."""
        rows = list(self.rows.values())
        over = sum(row.is_over for row in rows)
        waiting = sum(row.status == "waiting" for row in rows)
        held = f", {waiting:,} waiting" if waiting else ""
        of = f" of {self.total_trials:,}" if self.total_trials else ""
        left = self.seconds_left()
        told = f", about {console.format_duration(left)} left" if left is not None else ""
        return f"{over:,}{of} trials over{held}, {sum(row.tokens for row in rows):,} tokens{told}"

    def seconds_left(self) -> float | None:
        """Of all trials together, at the speed so far; None before that can be told.

        One to come needs as much as those that are over, or wait, took: early stopping saves there what it saved so
        far.
        """
        if self.gained <= 0:
            return None
        rows = list(self.rows.values())
        done = [row.tokens for row in rows if row.status not in ("running", "failed")]
        expected = sum(done) / len(done) if done else self.budget_tokens
        need = sum(max(0.0, expected - row.tokens) for row in rows if not row.is_over)
        need += expected * max(0, (self.total_trials or 0) - len(rows))
        return need * (time.monotonic() - self.began) / self.gained

    def table(self) -> Table:
        """What the terminal shows."""
        shown = sorted(self.rows.items(), key=_rank)
        table = Table(
            title=self.summary(), title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold"
        )
        for heading in ("trial", "status"):
            table.add_column(heading, no_wrap=True)
        settings = [key.rpartition(".")[2].replace("_", "\n") for key in self.keys]
        for heading in (f"tokens\nof {self.budget_tokens:,}", self.measure.replace("_", "\n"), *settings, "time\nleft"):
            table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
        now = time.monotonic()
        for trial_id, row in shown[:MOST_ROWS]:
            left = row.left(self.budget_tokens, now)
            table.add_row(
                trial_id.removeprefix("trial_"),
                row.status,
                f"{row.tokens:,}",
                "-" if row.perplexity is None or not math.isfinite(row.perplexity) else f"{row.perplexity:.2f}",
                *[
                    Text(console.format_number(row.settings.get(key, "-"))) for key in self.keys
                ],  # brackets in it are no markup
                "" if left is None else console.format_duration(left),
                style={"running": "bold", "failed": "red"}.get(row.status),
            )
        if len(shown) > MOST_ROWS:
            table.add_row("…", f"{len(shown) - MOST_ROWS} more", style="dim")
        return table


def _rank(item: tuple[str, Row]) -> tuple[int, float, str]:
    """Those that run, then the best, then those without a score."""
    trial_id, row = item
    if row.status == "running":
        return 0, 0.0, trial_id
    if row.perplexity is not None and row.status != "failed":
        return 1, row.perplexity, trial_id
    return 2, 0.0, trial_id
