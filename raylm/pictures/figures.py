"""A sweep -> figures, as plain values that say what to draw and not how."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from raylm.cli import figure as number

if TYPE_CHECKING:
    from raylm.sweep.record import Trial

FEWEST_TRIALS = 4
"""With fewer that have a score nothing can be said of what matters."""
BINS = 5
"""Of a setting drawn from a range, in the heat map."""
ABOVE, BELOW = 1.1, -0.1
"""Places beyond the ends of an axis: of trials that failed, of values far away, of settings that a trial has not."""
SO_FAR = "Trials that were stopped early count with the score they had by then."
FAVOURITES = ("train.learning_rate", "blocks.block_size")
"""Of the heat map, where both are swept."""


# What is drawn -------------------------------------------------------------------------------------------------------

Kind = Literal["best", "completed", "stopped early", "running", "failed", "setting"]
"""What a mark stands for, and so how it looks."""


@dataclass(frozen=True)
class Axis:
    title: str = ""
    log: bool = False
    ticks: Sequence[tuple[float, str]] | None = None
    """Places and their names; None: numbers, wherever they fall."""


@dataclass(frozen=True)
class Line:
    name: str
    kind: Kind
    points: Sequence[tuple[float, float]]
    about: str
    """Facts, a line each."""
    shade: float | None = None
    """From 0, the best, to 1: in a colour between two; None: in the colour of its kind."""


@dataclass(frozen=True)
class Bar:
    name: str
    kind: Kind
    length: float
    about: str
    whole: float = 0.0
    """What it could have been, where that is more."""
    note: str = ""
    """At its end."""


@dataclass(frozen=True)
class Cell:
    column: int
    row: int
    text: str
    about: str
    shade: float | None
    """From 0, the best, to 1; None: there is no score."""


@dataclass(frozen=True)
class Figure:
    name: str
    """Of its file."""
    title: str
    caption: str
    x: Axis
    y: Axis
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    """From top to bottom; the y axis has their names."""
    cells: Sequence[Cell] = ()
    """In the columns and rows that the ticks name."""
    texts: Sequence[tuple[float, float, str]] = ()
    """(x, y, text) beside the lines."""


@dataclass(frozen=True)
class Omitted:
    """A figure that cannot be drawn, and why."""

    name: str
    title: str
    reason: str


# What it is drawn of -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A swept setting, or the score, and how its values lie on an axis."""

    name: str
    values: tuple[Any, ...]
    """Those of the trials, each once, in order; but for those far away."""
    side_by_side: bool
    """The values stand as far from each other whatever they are: they were not drawn from a range."""
    log: bool = False

    @staticmethod
    def of(name: str, found: Iterable[Any], sampler: str | None, scored: Iterable[Any] = ()) -> Setting:
        """`sampler` is the name of the sampler in tune.space, None if the setting is drawn in another way.

        A number further from those of the trials with a score than these are from each other is far away: a learning
        rate of 1e6, tried and failed, would leave no room for the others.
        """
        values = list(dict.fromkeys(_hashable(value) for value in found))
        numeric = all(_is_number(value) for value in values)
        values.sort(key=None if numeric else str)
        few = len(values) <= BINS and all(isinstance(value, int) for value in values)
        chosen = sampler in ("choice", "grid") or (sampler is None and few)
        log = bool(sampler and sampler.startswith("log"))
        if chosen or not numeric or len(values) < 2:
            return Setting(name, tuple(values), side_by_side=True, log=log)
        ends = sorted(set(scored))
        if len(ends) > 1:
            low, high = (math.log(end) if log else end for end in (ends[0], ends[-1]))
            at = {value: math.log(value) if log else value for value in values}
            values = [value for value in values if 2 * low - high <= at[value] <= 2 * high - low]
        return Setting(name, tuple(values), side_by_side=False, log=log)

    @property
    def is_numeric(self) -> bool:
        return all(_is_number(value) for value in self.values)

    def place(self, value: Any) -> float:
        """Where on the axis, from 0 to 1; ABOVE or BELOW if it is far away."""
        if self.side_by_side:
            return self.values.index(_hashable(value)) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high, at = (math.log(each) if self.log else each for each in (self.values[0], self.values[-1], value))
        found = (at - low) / (high - low)
        return found if 0 <= found <= 1 else ABOVE if found > 1 else BELOW

    def ticks(self) -> list[tuple[float, str]]:
        """Both ends, and round numbers between them."""
        if self.side_by_side:
            return [(self.place(value), number(value)) for value in self.values]
        ends = self.values[0], self.values[-1]
        inside = [value for value in ticks(*ends, self.log) if 0.06 < self.place(value) < 0.94]
        return [(self.place(value), number(value)) for value in (*ends, *inside)]

    def bins(self) -> list[str]:
        """Names of the columns or rows of a heat map: the values, or ranges of them."""
        if self.side_by_side:
            return [number(value) for value in self.values]
        low, high = (math.log(end) if self.log else end for end in (self.values[0], self.values[-1]))
        edges = [low + (high - low) * index / BINS for index in range(BINS + 1)]
        names = [f"{math.exp(edge) if self.log else edge:.2g}" for edge in edges]
        return [f"{left} to {right}" for left, right in itertools.pairwise(names)]

    def bin(self, value: Any) -> int | None:
        """None if it is far away."""
        if self.side_by_side:
            return self.values.index(_hashable(value))
        place = self.place(value)
        return None if place in (ABOVE, BELOW) else min(int(place * BINS), BINS - 1)


@dataclass(frozen=True)
class Sweep:
    """The trials, and what has to be known of the experiment to draw them."""

    trials: Sequence[Trial]
    budget_tokens: int
    """Of one trial."""
    losses: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """(tokens, training loss) of each trial, by its id."""
    samplers: Mapping[str, str] = field(default_factory=dict)
    """Swept key -> name of its sampler, of those that have one."""
    metric: str = "perplexity"
    """What trials are ranked by: perplexity or bits_per_byte."""
    measure: str = "perplexity"
    """What a person calls it: perplexity, pseudo-perplexity or bits per byte."""

    def score(self, trial: Trial) -> float | None:
        """The best of the metric. A trial that failed has none."""
        if trial.status == "failed" or not trial.results:
            return None
        value = trial.results[-1][f"best_{self.metric}"]
        return value if math.isfinite(value) else None

    @cached_property
    def scored(self) -> list[tuple[Trial, float]]:
        """The trials that have a score, the best first."""
        found = [(trial, score) for trial in self.trials if (score := self.score(trial)) is not None]
        return sorted(found, key=lambda pair: pair[1])

    @cached_property
    def ranked(self) -> list[Trial]:
        """All trials: the best first, those without a score in the end."""
        best = [trial for trial, _ in self.scored]
        return best + [trial for trial in self.trials if self.score(trial) is None]

    def kind(self, trial: Trial) -> Kind:
        is_best = self.score(trial) is not None and trial is self.ranked[0]
        return "best" if is_best else trial.status

    @cached_property
    def settings(self) -> dict[str, Setting]:
        """By the swept key."""
        scored = [trial for trial, _ in self.scored]

        def values(trials: Iterable[Trial], key: str) -> list[Any]:
            return [trial.settings[key] for trial in trials if key in trial.settings]

        return {
            key: Setting.of(short(key), values(self.trials, key), self.samplers.get(key), values(scored, key))
            for key in dict.fromkeys(key for trial in self.trials for key in trial.settings)
        }

    def about(self, trial: Trial) -> str:
        """A line a fact."""
        score = self.score(trial)
        lines = [f"{trial.trial_id}: {trial.status}", f"{trial.tokens:,} tokens"]
        lines += [f"{self.measure} {score:.2f}"] if score is not None else []
        lines += [f"{short(key)} {number(value)}" for key, value in trial.settings.items()]
        return "\n".join(lines)


def short(key: str) -> str:
    """learning_rate of train.learning_rate."""
    return key.partition(".")[2] or key


# The figures ---------------------------------------------------------------------------------------------------------


def of(sweep: Sweep) -> list[Figure | Omitted]:
    """Of a sweep in whatever state, in the order in which they are looked at."""
    shares = importance(sweep)
    return [curves(sweep), losses(sweep), parallel(sweep), heat(sweep, shares), saved(sweep), weights(sweep, shares)]


def curves(sweep: Sweep) -> Figure | Omitted:
    """The metric of every trial against the tokens it was trained on."""
    title = f"Validation {sweep.measure} against training tokens"
    points = {
        trial.trial_id: [(result["tokens"], result[sweep.metric]) for result in trial.results] for trial in sweep.trials
    }
    lines = _lines(sweep, points)
    if not lines:
        return Omitted("perplexity", title, "no trial has been evaluated yet")
    caption = "Every trial is scored on the same tokens, whatever its block size and batch. " + _failed(sweep, lines)
    y = Axis(sweep.measure)
    if sweep.metric == "perplexity":
        values = [score for line in lines for _, score in line.points]
        y = Axis(
            sweep.measure,
            log=True,
            ticks=[(each, number(each)) for each in ticks(0.8 * min(values), 1.2 * max(values), True)],
        )
    return Figure("perplexity", title, caption, Axis("training tokens"), y, lines=lines)


def losses(sweep: Sweep) -> Figure | Omitted:
    """The training loss of every trial against tokens."""
    title = "Training loss against training tokens"
    lines = _lines(sweep, sweep.losses)
    if not lines:
        return Omitted("loss", title, "no trial has logged a loss yet")
    caption = "The mean over the steps since the point before. " + _failed(sweep, lines)
    return Figure("loss", title, caption, Axis("training tokens"), Axis("loss, nats per token"), lines=lines)


def _lines(sweep: Sweep, points: Mapping[str, Sequence[tuple[float, float]]]) -> list[Line]:
    """The worst first, so that the best lies over the others."""
    found = []
    for trial in reversed(sweep.ranked):
        finite = [point for point in points.get(trial.trial_id, ()) if math.isfinite(point[1])]
        if finite:
            found.append(Line(trial.trial_id, sweep.kind(trial), finite, sweep.about(trial)))
    return found


def _failed(sweep: Sweep, lines: Sequence[Line]) -> str:
    """How trials that failed are seen, those too that have no line."""
    drawn = {line.name for line in lines}
    absent = [trial.trial_id for trial in sweep.trials if trial.status == "failed" and trial.trial_id not in drawn]
    return "A cross: the trial failed." + (f" Failed before the first point: {', '.join(absent)}." if absent else "")


def parallel(sweep: Sweep) -> Figure | Omitted:
    """A line a trial, through its settings to its score; an axis each, from 0 to 1."""
    title = f"Settings and {sweep.measure} of the trials"
    scores = [score for _, score in sweep.scored]
    if not scores:
        return Omitted("settings", title, "no trial has a score yet")
    settings = sweep.settings
    last = Setting.of(sweep.measure, scores, "loguniform")
    axes = [*settings.values(), last]
    texts = {(column, place): text for column, axis in enumerate(axes) for place, text in axis.ticks()}
    lines = []
    for trial in reversed(
        [trial for trial in sweep.ranked if sweep.score(trial) is not None or trial.status == "failed"]
    ):
        score = sweep.score(trial)
        places = []
        for column, (key, setting) in enumerate(settings.items()):
            places.append(setting.place(trial.settings[key]) if key in trial.settings else BELOW)
            if places[-1] in (ABOVE, BELOW):
                texts[column, places[-1]] = number(trial.settings.get(key, "not set"))
        places.append(ABOVE if score is None else last.place(score))
        if score is None:
            texts[len(settings), ABOVE] = "failed"
        shade = None if score is None else scores.index(score) / max(1, len(scores) - 1)
        lines.append(Line(trial.trial_id, sweep.kind(trial), list(enumerate(places)), sweep.about(trial), shade))
    caption = (
        f"The darker a line, the lower its {sweep.measure}; the thick one is the best. A dashed one is a trial that "
        f"failed. {SO_FAR}"
    )
    x = Axis(ticks=[(column, axis.name) for column, axis in enumerate(axes)])
    written = [(column, place, text) for (column, place), text in texts.items()]
    return Figure("settings", title, caption, x, Axis(ticks=()), lines=lines, texts=written)


def heat(sweep: Sweep, shares: Mapping[str, float] | str) -> Figure | Omitted:
    """The best score by learning rate and block size; else by the two numeric settings that matter most."""
    pair = _two(sweep.settings, {} if isinstance(shares, str) else shares)
    if pair is None:
        return Omitted("heat", f"Best {sweep.measure} by two settings", "fewer than two numbers are swept")
    (across_key, across), (up_key, up) = pair
    title = f"Best {sweep.measure} by {across.name} and {up.name}"
    inside: dict[tuple[int, int], list[Trial]] = {}
    far = []
    for trial in sweep.ranked:
        has_both = across_key in trial.settings and up_key in trial.settings
        if has_both and (trial.status == "failed" or sweep.score(trial) is not None):
            column, row = across.bin(trial.settings[across_key]), up.bin(trial.settings[up_key])
            if column is None or row is None:
                far.append(trial.trial_id)
            else:
                inside.setdefault((column, row), []).append(trial)
    best = {place: sweep.score(trials[0]) for place, trials in inside.items()}
    order = sorted(score for score in best.values() if score is not None)
    cells = []
    for (column, row), trials in inside.items():
        score = best[column, row]
        text = f"{'failed' if score is None else f'{score:.2f}'}\n{len(trials)} trial{'s' if len(trials) > 1 else ''}"
        shade = None if score is None else order.index(score) / max(1, len(order) - 1)
        cells.append(Cell(column, row, text, sweep.about(trials[0]), shade))
    caption = (
        "The best trial of each cell, and how many there are. The darker, the better; an empty cell was not tried. "
    )
    caption += SO_FAR + (f" Far outside: {', '.join(far)}, failed." if far else "")
    x, y = (Axis(setting.name, ticks=list(enumerate(setting.bins()))) for setting in (across, up))
    return Figure("heat", title, caption, x, y, cells=cells)


def _two(settings: Mapping[str, Setting], shares: Mapping[str, float]) -> list[tuple[str, Setting]] | None:
    """The keys and settings of the heat map; None if there are no two."""
    numeric = {key: setting for key, setting in settings.items() if setting.is_numeric and len(setting.values) > 1}
    first = [key for key in FAVOURITES if key in numeric]
    chosen = first if len(first) == 2 else sorted(numeric, key=lambda key: -shares.get(key, 0.0))[:2]
    return [(key, numeric[key]) for key in chosen] if len(chosen) == 2 else None


def saved(sweep: Sweep) -> Figure | Omitted:
    """The tokens that each trial was trained on, of its budget."""
    stopped = [trial for trial in sweep.trials if trial.status == "stopped early"]
    if not sweep.trials:
        return Omitted("saved", "What early stopping saved", "no trial has begun yet")
    spared = sum(sweep.budget_tokens - trial.tokens for trial in stopped)
    whole = sweep.budget_tokens * len(sweep.trials)
    title = f"Early stopping saved {spared:,} of {whole:,} tokens: {spared / whole:.0%}"
    bars = [
        Bar(
            trial.trial_id,
            sweep.kind(trial),
            trial.tokens,
            sweep.about(trial),
            whole=sweep.budget_tokens,
            note="failed" if trial.status == "failed" else "",
        )
        for trial in sweep.ranked
    ]
    caption = "Pale: what is left of a trial's budget. The best trial is at the top."
    return Figure(
        "saved", title if stopped else "No trial was stopped early", caption, Axis("training tokens"), Axis(), bars=bars
    )


def weights(sweep: Sweep, shares: Mapping[str, float] | str) -> Figure | Omitted:
    """How much each setting matters, of all together."""
    title = f"What {sweep.measure} depends on"
    if isinstance(shares, str):
        return Omitted("importance", title, shares)
    bars = [
        Bar(short(key), "setting", 100 * share, f"{short(key)}: {share:.0%}", note=f"{share:.0%}")
        for key, share in shares.items()
    ]
    caption = (
        f"The share of each setting in how the logarithm of the {sweep.measure} varies (fANOVA, Hutter et al. 2014) "
        f"over {len(sweep.scored)} trials; of few it is no more than a hint. {SO_FAR}"
    )
    return Figure("importance", title, caption, Axis("share of the variance, %"), Axis(), bars=bars)


def importance(sweep: Sweep) -> dict[str, float] | str:
    """Share of each setting in the variance of the score, the largest first; or why none can be told."""
    scored = sweep.scored
    found = {
        key: Setting.of(key, (trial.settings[key] for trial, _ in scored), sweep.samplers.get(key))
        for key in sweep.settings
        if all(key in trial.settings for trial, _ in scored)
    }
    varied = {key: setting for key, setting in found.items() if len(setting.values) > 1}
    if len(scored) < FEWEST_TRIALS:
        return f"it takes {FEWEST_TRIALS} trials with a score, and there are {len(scored)}"
    if not varied or scored[0][1] == scored[-1][1]:
        return "the trials do not differ"
    try:
        import optuna
    except ImportError:
        return "it takes optuna, which is not installed: pip install 'raylm[optuna]'"
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    def distribution(setting: Setting) -> BaseDistribution:
        if setting.is_numeric:
            return FloatDistribution(setting.values[0], setting.values[-1], log=setting.log)
        return CategoricalDistribution([str(value) for value in setting.values])

    def value(key: str, trial: Trial) -> Any:
        given = trial.settings[key]
        return given if varied[key].is_numeric else str(_hashable(given))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions = {key: distribution(setting) for key, setting in varied.items()}
    for trial, score in scored:
        params = {key: value(key, trial) for key in varied}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=math.log(max(score, 1e-9)))
        )
    return optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))


def ticks(low: float, high: float, log: bool) -> list[float]:
    """A few round numbers from low to high."""
    if low == high:
        return [low]
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 5), (1,)):
            found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
            if 2 <= len(found) <= 7:
                return found
        if len(found) > 7:
            return found[:: math.ceil(len(found) / 7)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step *= next(multiple for multiple in (1, 2, 5, 10) if (high - low) / (step * multiple) <= 6)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else str(value) if isinstance(value, dict) else value
