"""The ranked table of a sweep's trials: columns and cells for the screen, the report and the live table.

The table on the terminal after a sweep is drawn here; `html` and `live_table` draw the same columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from raylm.console import format_number
from raylm.results.figures import short_name
from raylm.results.significance import Standing
from raylm.tracking import COSTS, MEANING

WEIGHED = ("parameters", "seconds")
"""What tune.against can weigh scores against."""


@dataclass(frozen=True)
class TrialRow:
    """A trial as a row of the ranked table."""

    trial_id: str
    status: str
    """running, paused, completed, stopped early or failed."""
    perplexity: float | None
    """The best score on the text that ranks the trials, of the kind that the experiment measures; None without one."""
    bits_per_byte: float | None
    tokens: int
    """Training tokens."""
    settings: Mapping[str, Any]
    """Swept dotted key -> value."""
    best_tokens: int | None = None
    """Training tokens at the best score."""
    last_perplexity: float | None = None
    """The score of the last evaluation."""
    weighed: Mapping[str, float | None] = field(default_factory=dict)
    """parameters or seconds, in a finished sweep with tune.against."""
    pareto: bool | None = None
    """Whether no trial is better in both; None without tune.against."""
    failure: str | None = None
    repeat: str | None = None
    """The command that trains with the same settings."""
    parameters: int | None = None
    """The size of its model."""
    seconds: float | None = None
    """Run time up to its last evaluation."""
    tokens_per_parameter: float | None = None
    """The budget in tokens for each parameter of the model."""
    tokens_per_parameter_without_embeddings: float | None = None
    """For each parameter outside of embeddings and output head."""
    weight_decay_timescale: float | None = None
    """Tokens of a batch / (learning rate x weight decay x budget in tokens): the fraction of the run over which weights
    average their updates; None without weight decay, or with optimizers other than AdamW and Muon."""
    training_flops: float | None = None
    """Floating-point operations of the budget."""
    evaluation_seconds: float | None = None
    """Seconds of its evaluations."""
    saving_seconds: float | None = None
    """Seconds of saving its checkpoints."""
    peak_memory_bytes: float | None = None
    """The most memory at a time: of tensors on a GPU, else of the process; of several workers that with the most."""
    mfu: float | None = None
    """Model FLOPs utilization: the fraction of the devices' floating-point operations that training steps used."""
    checkpoint: str | None = None
    """Its best checkpoint; None while the sweep has not finished."""
    best_step: int | None = None
    mlflow_run_id: str | None = None
    repeat_of: str | None = None
    """The trial whose settings it repeats with other seeds."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    """The seeds of a repeat by their dotted keys."""
    standing: Standing | None = None
    """The interval of the score, and whether it is worse than the best; None without document scores."""
    weighted_nll: float | None = None
    """The score that ranks the trials, if tune.metric has weights."""
    cooldown_tokens: int = 0
    """Tokens that its cooldowns were trained on, in addition to `tokens`."""
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Task/metric -> value, if its best model was scored on tasks of lm-eval."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TrialRow:
        """The row of a trial in the result of a sweep, where the score is called perplexity."""
        names = cls.__dataclass_fields__.keys() & record.keys()
        weighed = {name: record[name] for name in WEIGHED if name in record and "pareto" in record}
        return cls(**{name: record[name] for name in names}, weighed=weighed)

    def record(self, measure: str) -> dict[str, Any]:
        """The row for --json; the key of the score is its name."""
        return {
            "trial_id": self.trial_id,
            "status": self.status,
            measure: self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            **({} if self.weighted_nll is None else {"weighted_nll": self.weighted_nll}),
            "parameters": self.parameters,
            "seconds": self.seconds,
            **{name: getattr(self, name) for name in (*MEANING, *COSTS)},
            **self.weighed,
            **({} if self.pareto is None else {"pareto": self.pareto}),
            "tokens": self.tokens,
            **({"cooldown_tokens": self.cooldown_tokens} if self.cooldown_tokens else {}),
            "best_tokens": self.best_tokens,
            "last_perplexity": self.last_perplexity,
            "settings": self.settings,
            "failure": self.failure,
            "repeat": self.repeat,
            "checkpoint": self.checkpoint,
            "best_step": self.best_step,
            "mlflow_run_id": self.mlflow_run_id,
            **({"repeat_of": self.repeat_of, "seeds": self.seeds} if self.repeat_of is not None else {}),
            **(self.standing.record(measure) if self.standing is not None else {}),
            **({"tasks": dict(self.tasks)} if self.tasks else {}),
        }

    @property
    def overfitting(self) -> str | None:
        return overfitting(self.perplexity, self.last_perplexity, self.best_tokens)


def overfitting(best: float | None, last: float | None, best_tokens: int | None) -> str | None:
    """When a training had its best score, if its last one is more than 5 % worse; else None."""
    if best is None or last is None or best_tokens is None or not last > 1.05 * best:
        return None
    return f"overfitted: {format_number(best)} at {best_tokens:,} tokens, {format_number(last)} at the end"


@dataclass(frozen=True)
class Column:
    """A column of the table, with a cell for each row."""

    heading: str
    cells: list[str]
    justify: Literal["left", "right"] = "right"


def columns(rows: Sequence[TrialRow], score: str, settings: Iterable[str] | None = None) -> dict[str, Column]:
    """Name -> column: rank, trial_id, repeat_of, weighted_nll, perplexity, bits_per_byte, metrics of tasks, `WEIGHED`,
    tokens, status, pareto, what the settings mean if that helps to choose, and each swept key.

    `score` is the heading of perplexity. `settings` are the swept keys in their order, by default that of the rows.
    """
    swept = list(dict.fromkeys(key for row in rows for key in row.settings)) if settings is None else list(settings)
    weighed = list(rows[0].weighed) if rows else []
    table = {
        "rank": Column("", [str(rank) for rank in range(1, len(rows) + 1)]),
        "trial_id": Column("trial", [row.trial_id for row in rows], justify="left"),
        **_repeat_of(rows),
        **_weighted_nll(rows),
        "perplexity": Column(score, [format_score(row.perplexity) for row in rows]),
        "bits_per_byte": Column("bits/byte", [format_score(row.bits_per_byte) for row in rows]),
        **_tasks(rows),
        **{name: Column(name, [_count(row.weighed.get(name)) for row in rows]) for name in weighed},
        "tokens": Column("tokens", [_count(row.tokens) for row in rows]),
        "status": Column("status", ["; ".join(filter(None, [row.status, row.overfitting])) for row in rows], "left"),
    }
    if weighed:
        table["pareto"] = Column("pareto front", ["✓" if row.pareto else "" for row in rows], justify="left")
    table |= _meaning(rows, swept)
    for key in swept:
        table[key] = Column(short_name(key), [format_number(row.settings.get(key, "-")) for row in rows])
    return table


def _meaning(rows: Sequence[TrialRow], swept: Collection[str]) -> dict[str, Column]:
    """Tokens for each parameter, if models or budgets are swept; and the timescale of weight decay, if that is swept:
    it is what the best values for different learning rates have in common."""
    shown = {}
    sizes = [key for key in swept if key.startswith("model.") or key in ("train.max_tokens", "train.num_epochs")]
    if sizes and len({row.tokens_per_parameter for row in rows} - {None}) > 1:
        shown["tokens_per_parameter"] = "tokens/parameter"
    if "train.weight_decay" in swept and any(row.weight_decay_timescale is not None for row in rows):
        shown["weight_decay_timescale"] = "decay timescale"
    values = {name: [getattr(row, name) for row in rows] for name in shown}
    return {
        name: Column(heading, ["-" if value is None else format_number(value) for value in values[name]])
        for name, heading in shown.items()
    }


def _weighted_nll(rows: Sequence[TrialRow]) -> dict[str, Column]:
    """The column of the score by weights, if the trials are ranked by it."""
    if all(row.weighted_nll is None for row in rows):
        return {}
    return {"weighted_nll": Column("weighted nll", [format_score(row.weighted_nll) for row in rows])}


def _tasks(rows: Sequence[TrialRow]) -> dict[str, Column]:
    """A column for each metric of each task that a row was scored on, without standard errors."""
    names = sorted({name for row in rows for name in row.tasks if not name.endswith("_stderr")})
    values = {name: [row.tasks.get(name) for row in rows] for name in names}
    return {
        f"tasks/{name}": Column(
            name.replace("/", " "), ["-" if value is None else format_number(value) for value in values[name]]
        )
        for name in names
    }


def _repeat_of(rows: Sequence[TrialRow]) -> dict[str, Column]:
    """The column of the trials that rows repeat, if one of them does."""
    cells = [short_id(row.repeat_of) if row.repeat_of is not None else "" for row in rows]
    return {"repeat_of": Column("repeats", cells, justify="left")} if any(cells) else {}


@dataclass(frozen=True)
class RankedTable:
    """The ranked table for a terminal of any width, the best trial in bold; rows keep their order.

    Nothing is cut off: columns that do not fit beside the others follow in further tables of the same rows.
    """

    rows: Sequence[TrialRow]
    score: str
    """The heading of perplexity."""
    untrained: Mapping[str, float] | None = None
    """perplexity and bits_per_byte before training, for a last row."""

    def tables(self, width: int) -> list[Table]:
        """The tables, each of at most `width` characters unless a single column needs more."""
        shown = columns(self.rows, self.score)
        shown["trial_id"] = replace(shown["trial_id"], cells=[short_id(row.trial_id) for row in self.rows])
        shown["status"] = replace(shown["status"], cells=[row.status for row in self.rows])
        if self.untrained is not None:
            before = {
                **{name: format_score(self.untrained[name]) for name in ("perplexity", "bits_per_byte")},
                "tokens": "0",
                "status": "untrained",
            }
            shown = {
                name: replace(column, cells=[*column.cells, before.get(name, "")]) for name, column in shown.items()
            }
        headings = narrow_headings(shown)
        widths = {
            name: max(map(len, [*headings[name].split("\n"), *column.cells])) + GAP for name, column in shown.items()
        }
        parts: list[list[str]] = [["rank", "trial_id"]]
        for name in [name for name in shown if name not in parts[0]]:
            if len(parts[-1]) > 2 and sum(widths[each] for each in [*parts[-1], name]) - GAP > width:
                parts.append(["rank", "trial_id"])
            parts[-1].append(name)
        return [self._table({name: shown[name] for name in part}, headings) for part in parts]

    def _table(self, shown: Mapping[str, Column], headings: Mapping[str, str]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name, column in shown.items():
            table.add_column(headings[name], justify=column.justify, overflow="fold", vertical="bottom")
        for number, cells in enumerate(zip(*(column.cells for column in shown.values()), strict=True)):
            is_best = number == 0 and bool(self.rows) and self.rows[0].perplexity is not None
            # Text, in which rich reads no markup: settings may have brackets.
            table.add_row(*map(Text, cells), style="bold" if is_best else None)
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, table in enumerate(self.tables(options.max_width)):
            if number:
                yield ""
            yield table
        for row in self.rows:
            if row.overfitting:
                yield Text(f"{row.trial_id} {row.overfitting}")


GAP = 2
"""Between two columns of a table without a box."""


def narrow_headings(shown: Mapping[str, Column]) -> dict[str, str]:
    """Headings of one word per line: the last part of a dotted name, if no other name ends with it."""
    last = {name: column.heading.rpartition(".")[2] for name, column in shown.items()}
    several = {heading for heading in last.values() if list(last.values()).count(heading) > 1}
    whole = {name: shown[name].heading if heading in several else heading for name, heading in last.items()}
    return {name: re.sub("[-_ .]|(?<=/)", "\n", heading) for name, heading in whole.items()}


def short_id(trial_id: str) -> str:
    """The id of a trial in a column: 00003."""
    return trial_id.removeprefix("trial_")


def format_score(value: float | None) -> str:
    """A score in a column, with two decimals below 1,000; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
