"""The progress of a sweep: a table that updates in place on a terminal, plain lines elsewhere.

with live_table.show(budget_tokens=737_280, total_trials=8, keys=["train.learning_rate"], measure="perplexity") as view:
    view.update("trial_00000", settings={"train.learning_rate": 0.003})
    view.update("trial_00000", tokens=81_920, perplexity=130.5)
    view.update("trial_00000", status="stopped early")

Output of `logger.info` or `print` meanwhile appears above the table.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from raylm import console
from raylm.results import trial_table
from raylm.results.trial_table import TrialRow

logger = logging.getLogger(__name__)

MOST_ROWS = 12
"""Rows of the table: running trials first, then the best of the others."""
PLAIN_SECONDS = 5.0
"""Shortest time between two plain lines; later it is 5 % of the time so far, because a day would have 17,000 lines."""


@contextlib.contextmanager
def show(
    budget_tokens: int,
    total_trials: int,
    keys: Sequence[str],
    measure: str = "perplexity",
    stages: Sequence[tuple[int, int]] = (),
    repeats: tuple[int, int] = (0, 0),
    tokens_of_all: int | None = None,
) -> Iterator[LiveTable]:
    """Show the progress of a sweep within the context. After an error the table stays on the screen.

    `keys` are the swept keys, `measure` is what the score is called. `stages`, `repeats` and `tokens_of_all`: see
    `LiveTable`.
    """
    view = LiveTable(budget_tokens, total_trials, keys, measure, stages, repeats, tokens_of_all)
    if console.screen.is_terminal:
        with Live(get_renderable=view.table, console=console.screen, refresh_per_second=2, transient=True) as screen:
            try:
                yield view
            except BaseException:
                screen.transient = False
                raise
    else:
        yield view
    logger.info(f"Sweep: {console.format_duration(time.monotonic() - view.started)}")


@dataclass
class TrialProgress:
    """A trial and its speed in this process; a resumed trial starts with some tokens."""

    first: tuple[float, int]
    """(seconds, tokens) at its first update, or when it was promoted."""
    last: tuple[float, int]
    """(seconds, tokens) at the last update of its tokens."""
    status: str = "running"
    perplexity: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.last[1]

    @property
    def is_over(self) -> bool:
        return self.status not in ("running", "paused")

    def row(self, trial_id: str) -> TrialRow:
        return TrialRow(trial_id, self.status, self.perplexity, None, self.tokens, self.settings)

    def left(self, budget_tokens: int, now: float) -> float | None:
        """Seconds until it has trained on the whole budget; None while unknown."""
        seconds, gained = self.last[0] - self.first[0], self.last[1] - self.first[1]
        if self.status != "running" or gained <= 0 or seconds <= 0:
            return None
        return max(0.0, (budget_tokens - self.tokens) * seconds / gained - (now - self.last[0]))


class LiveTable:
    """The trials of a running sweep that have reported."""

    def __init__(
        self,
        budget_tokens: int,
        total_trials: int,
        keys: Sequence[str],
        measure: str,
        stages: Sequence[tuple[int, int]] = (),
        repeats: tuple[int, int] = (0, 0),
        tokens_of_all: int | None = None,
    ):
        self.budget_tokens = budget_tokens
        self.total_trials = total_trials
        self.keys = list(keys)
        self.score_name = console.label(measure)
        self.stages = stages
        """(tokens, trials expected to reach them), up to the budget, for a scheduler that promotes."""
        self.repeats = repeats
        """The fewest and the most trials that follow, which repeat the best few settings."""
        self.tokens_of_all = tokens_of_all
        """Training tokens of all trials, of a ladder, whose trials have budgets of their own."""
        self.trials: dict[str, TrialProgress] = {}
        self.gained, self.busy = 0, 0.0
        """Tokens that all trials were trained on in this process, and the sum of their seconds."""
        self.together = 1
        """The most trials that ran at the same time."""
        self.started = self._last_line = time.monotonic()
        self._estimate: tuple[float, float] | None = None
        """Time of the last estimate, and its seconds left, which count down until the next one."""

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
        """Update a trial. `perplexity` is its best so far; `failure` is the reason, for a plain line.

        A trial that had finished before a resume gets no line.
        """
        now = time.monotonic()
        trial = self.trials.get(trial_id)
        was_over = trial is None or trial.is_over
        if trial is None:
            trial = self.trials[trial_id] = TrialProgress((now, tokens or 0), (now, tokens or 0))
        if tokens is not None:
            (then, before), trial.last = trial.last, (now, min(tokens, self.budget_tokens))
            if trial.tokens > before:
                self.gained += trial.tokens - before
                self.busy += now - then
        if (trial.status, status) == ("paused", "running"):
            trial.first = trial.last = now, trial.tokens
        trial.status = status or trial.status
        self.together = max(self.together, self._count("running"))
        if self.busy:
            self._estimate = now, self._seconds_to_train()
        trial.perplexity = perplexity if perplexity is not None else trial.perplexity
        trial.settings = dict(settings) if settings is not None else trial.settings
        if console.screen.is_terminal:
            return
        if trial.is_over and not was_over:
            score = f", {self.score_name} {trial.perplexity:.2f}" if trial.perplexity is not None else ""
            logger.info(
                f"{trial_id}: {trial.status}, {trial.tokens:,} tokens{score}{f': {failure}' if failure else ''}"
            )
        # Not when a trial pauses or finishes: its successor is reported a moment later.
        if status in (None, "running") and now - self._last_line >= max(PLAIN_SECONDS, (now - self.started) / 20):
            self._last_line = now
            logger.info(self.summary())

    def _count(self, status: str) -> int:
        return sum(trial.status == status for trial in self.trials.values())

    def summary(self) -> str:
        """Trials by status, tokens, the best score and the time left, in one line."""
        trials = self.trials.values()
        counts = {status: self._count(status) for status in ("running", "completed", "stopped early", "failed")}
        statuses = [f"{count:,} {status}" for status, count in counts.items() if count]
        if paused := sorted({trial.tokens for trial in trials if trial.status == "paused"}):
            at = " to ".join(f"{tokens:,}" for tokens in dict.fromkeys((paused[0], paused[-1])))
            statuses.insert(bool(counts["running"]), f"{self._count('paused'):,} paused at {at} tokens")
        if missing := self.total_trials - len(trials):
            statuses.append(f"{missing:,} not started")
        parts = [", ".join(statuses)]
        most = self.tokens_of_all or self.total_trials * self.budget_tokens
        parts.append(f"{sum(trial.tokens for trial in trials):,} of at most {most:,} tokens")
        scores = [trial.perplexity for trial in trials if trial.perplexity is not None and trial.status != "failed"]
        if scores:
            parts.append(f"best {self.score_name} {trial_table.format_score(min(scores))}")
        left = self.seconds_left()
        if left is not None and left >= 1:
            parts.append(f"about {console.format_duration(left)} left")
        if any(self.repeats):
            parts.append(f"then {' to '.join(f'{count:,}' for count in dict.fromkeys(self.repeats))} repeats")
        return "; ".join(parts)

    def seconds_left(self) -> float | None:
        """Seconds until all trials have finished, at the speed so far; None while unknown."""
        if self._estimate is None:
            return None
        then, seconds = self._estimate
        return max(0.0, seconds - (time.monotonic() - then))

    def _seconds_to_train(self) -> float:
        """Seconds to train the remaining tokens with as many concurrent trials as so far; at least those of the longest
        trial."""
        seconds_per_token = self.busy / self.gained
        unfinished = [trial.tokens for trial in self.trials.values() if not trial.is_over]
        is_one_to_complete = self.stages and not self._count("completed")
        longest = self.budget_tokens - max(unfinished, default=0) if is_one_to_complete else 0
        return seconds_per_token * max(self._tokens_left() / self.together, longest)

    def _tokens_left(self) -> float:
        """Training tokens until all trials have finished.

        A scheduler that promotes has an expected number of trials for each stage. Otherwise each trial is expected to
        need as many as the finished ones did on average, as if early stopping saved as much as so far.
        """
        trials = list(self.trials.values())
        if self.stages:
            left, begins = 0, 0
            for ends, expected in self.stages:
                done = sum(min(max(trial.tokens - begins, 0), ends - begins) for trial in trials)
                running = [trial.tokens for trial in trials if trial.status == "running"]
                here = sum(ends - tokens for tokens in running if begins <= tokens < ends)
                count = min(expected, self.total_trials - self._count("failed"))
                left += max(here, count * (ends - begins) - done)
                begins = ends
            return left
        if self.tokens_of_all is not None:
            return max(0, self.tokens_of_all - sum(trial.tokens for trial in trials))
        over = [trial.tokens for trial in trials if trial.is_over and trial.status != "failed"]
        each = sum(over) / len(over) if over else self.budget_tokens
        need = sum(max(0.0, each - trial.tokens) for trial in trials if not trial.is_over)
        return need + each * (self.total_trials - len(trials))

    def table(self) -> Table:
        """The table on the terminal."""
        ranked = sorted(self.trials.items(), key=_rank)
        shown = ranked[:MOST_ROWS]
        rows = [trial.row(trial_table.short_id(trial_id)) for trial_id, trial in shown]
        columns = trial_table.columns(rows, self.score_name, self.keys)
        headings = trial_table.narrow_headings(columns)
        table = Table(
            title=self.summary(), title_justify="left", title_style="", box=None, pad_edge=False, header_style="bold"
        )
        names = ["trial_id", "status", "tokens", "perplexity", *self.keys]
        for name in names:
            heading = f"tokens\nof {self.budget_tokens:,}" if name == "tokens" else headings[name]
            table.add_column(heading, justify=columns[name].justify, no_wrap=True, vertical="bottom")
        table.add_column("time\nleft", justify="right", no_wrap=True, vertical="bottom")
        now = time.monotonic()
        for number, (_, trial) in enumerate(shown):
            left = trial.left(trial.settings.get("train.max_tokens", self.budget_tokens), now)
            cells = [columns[name].cells[number] for name in names]
            cells.append("" if left is None else console.format_duration(left))
            # Text, in which rich reads no markup: settings may have brackets.
            table.add_row(*map(Text, cells), style={"running": "bold", "failed": "red"}.get(trial.status))
        if len(ranked) > MOST_ROWS:
            table.add_row("…", f"{len(ranked) - MOST_ROWS} more", style="dim")
        return table


def _rank(item: tuple[str, TrialProgress]) -> tuple[int, float, str]:
    """The sort key of a trial: running trials, then the best, then those without a score."""
    trial_id, trial = item
    if trial.status == "running":
        return 0, 0.0, trial_id
    if trial.perplexity is not None and trial.status != "failed":
        return 1, trial.perplexity, trial_id
    return 2, 0.0, trial_id
