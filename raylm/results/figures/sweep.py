"""The data of a sweep, in any state -> its six figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raylm.console import format_number
from raylm.results.figures.data import BELOW, Setting, SweepData, hashable, short_name, ticks
from raylm.results.figures.primitives import Axis, Bar, Cell, Figure, Line, Omitted

if TYPE_CHECKING:
    from raylm.sweep import Trial

FEWEST_TRIALS = 4
"""Fewest trials with a score for the importance of settings."""
PREFERRED_SETTINGS = ("train.learning_rate", "blocks.block_size")
"""The two settings of the heat map, if both are swept."""


def build(data: SweepData) -> list[Figure | Omitted]:
    """The figures of a sweep in the order in which the report shows them."""
    shares = importance(data)
    return [
        score_curves(data),
        loss_curves(data),
        parallel_coordinates(data),
        heat_map(data, shares),
        saved_tokens(data),
        importance_bars(data, shares),
    ]


def score_curves(data: SweepData) -> Figure | Omitted:
    """The metric of every trial against the tokens it was trained on."""
    title = f"Validation {data.score_name} against training tokens"
    points = {
        trial.trial_id: [(result["tokens"], result[data.metric]) for result in trial.results] for trial in data.trials
    }
    lines = _lines(data, points)
    if not lines:
        return Omitted("perplexity", title, "no trial has been evaluated yet")
    caption = "Every trial is scored on the same tokens, with any block size and batch. " + _about_failures(data, lines)
    y = Axis(data.score_name)
    if data.metric == "perplexity":
        values = [score for line in lines for _, score in line.points]
        y = Axis(
            data.score_name,
            log=True,
            ticks=[(each, format_number(each)) for each in ticks(0.8 * min(values), 1.2 * max(values), True)],
        )
    return Figure("perplexity", title, caption, Axis("training tokens"), y, lines=lines)


def loss_curves(data: SweepData) -> Figure | Omitted:
    """The training loss of every trial against the tokens it was trained on."""
    title = "Training loss against training tokens"
    lines = _lines(data, data.losses)
    if not lines:
        return Omitted("loss", title, "no trial has logged a loss yet")
    caption = "Each point is the mean over the steps after the previous point. " + _about_failures(data, lines)
    return Figure("loss", title, caption, Axis("training tokens"), Axis("loss, nats per token"), lines=lines)


def _lines(data: SweepData, points: Mapping[str, Sequence[tuple[float, float]]]) -> list[Line]:
    """A line for each trial that has finite points, the worst first, so that the best is drawn over the others."""
    lines = []
    for trial in reversed(data.ranked):
        finite = [point for point in points.get(trial.trial_id, ()) if math.isfinite(point[1])]
        if finite:
            lines.append(Line(trial.trial_id, data.kind(trial), finite, data.about(trial)))
    return lines


def _about_failures(data: SweepData, lines: Sequence[Line]) -> str:
    """The sentence of a caption that explains how failed trials look, and names those without a line."""
    failed = [trial.trial_id for trial in data.trials if trial.status == "failed"]
    if not failed:
        return ""
    names = {line.name for line in lines}
    absent = [trial_id for trial_id in failed if trial_id not in names]
    return "A cross: the trial failed." + (f" Failed before the first point: {', '.join(absent)}." if absent else "")


def parallel_coordinates(data: SweepData) -> Figure | Omitted:
    """Parallel coordinates: a line for each trial through its settings to its score, each on an axis from 0 to 1."""
    if not data.compared:
        return Omitted("settings", f"Settings and {data.score_name}", "no trial has a score yet")
    scores = [score for _, score in data.compared]
    last = Setting.of(data.score_name, scores, "loguniform")
    axes = [*data.settings.values(), last]
    texts = {(column, place): text for column, axis in enumerate(axes) for place, text in axis.ticks()}
    lines = []
    for rank, (trial, score) in reversed(list(enumerate(data.compared))):
        places = []
        for column, (key, setting) in enumerate(data.settings.items()):
            places.append(setting.place(trial.settings[key]) if key in trial.settings else BELOW)
            if key not in trial.settings:
                texts[column, BELOW] = "not set"
        points = list(enumerate([*places, last.place(score)]))
        shade = rank / max(1, len(scores) - 1)
        lines.append(Line(trial.trial_id, data.kind(trial), points, _about_equal(data, trial, score), shade))
    caption = (
        f"The darker a line, the lower its {data.score_name}; the thick one is the best of the sweep. "
        f"{data.about_equal_tokens}"
    )
    x = Axis(ticks=[(column, axis.name) for column, axis in enumerate(axes)])
    written = [(column, place, text) for (column, place), text in texts.items()]
    title = f"Settings and {data.score_name} {data.at_equal_tokens}"
    return Figure("settings", title, caption, x, Axis(ticks=()), lines=lines, texts=written)


def _about_equal(data: SweepData, trial: Trial, score: float) -> str:
    """The description of a compared trial, with its score at equal tokens."""
    return f"{data.about(trial)}\n{data.at_equal_tokens}: {data.score_name} {score:.2f}"


def heat_map(data: SweepData, shares: Mapping[str, float] | str) -> Figure | Omitted:
    """The best score by learning rate and block size, else by the two most important numeric settings."""
    pair = _heat_map_settings(data.settings, {} if isinstance(shares, str) else shares)
    if pair is None:
        problem = "fewer than two numbers are swept" if data.compared else "no trial has a score yet"
        return Omitted("heat", f"Best {data.score_name} by two settings", problem)
    (across_key, across), (up_key, up) = pair
    inside: dict[tuple[int, int], list[tuple[Trial, float]]] = {}
    for trial, score in data.compared:
        if across_key in trial.settings and up_key in trial.settings:
            place = across.bin(trial.settings[across_key]), up.bin(trial.settings[up_key])
            inside.setdefault(place, []).append((trial, score))
    order = sorted(pairs[0][1] for pairs in inside.values())
    cells = []
    for (column, row), pairs in inside.items():
        trial, score = pairs[0]
        text = f"{score:.2f}\n{len(pairs)} trial{'s' if len(pairs) > 1 else ''}"
        shade = order.index(score) / max(1, len(order) - 1)
        cells.append(Cell(column, row, text, _about_equal(data, trial, score), shade))
    caption = (
        "The best score in each cell, and the number of its trials. Darker is better; an empty cell was not tried. "
        f"{data.about_equal_tokens}"
    )
    title = f"Best {data.score_name} by {across.name} and {up.name} {data.at_equal_tokens}"
    x, y = (Axis(setting.name, ticks=list(enumerate(setting.bins()))) for setting in (across, up))
    return Figure("heat", title, caption, x, y, cells=cells)


def _heat_map_settings(
    settings: Mapping[str, Setting], shares: Mapping[str, float]
) -> list[tuple[str, Setting]] | None:
    """The keys and settings of the heat map's axes; None if fewer than two numbers are swept."""
    numeric = {key: setting for key, setting in settings.items() if setting.is_numeric and len(setting.values) > 1}
    preferred = [key for key in PREFERRED_SETTINGS if key in numeric]
    chosen = preferred if len(preferred) == 2 else sorted(numeric, key=lambda key: -shares.get(key, 0.0))[:2]
    return [(key, numeric[key]) for key in chosen] if len(chosen) == 2 else None


def saved_tokens(data: SweepData) -> Figure | Omitted:
    """The tokens that each trial was trained on, beside its budget."""
    stopped = [trial for trial in data.trials if trial.status == "stopped early"]
    if not data.trials:
        return Omitted("saved", "What early stopping saved", "no trial has started yet")
    saved = sum(data.budget_tokens - trial.tokens for trial in stopped)
    whole = data.budget_tokens * len(data.trials)
    title = f"Early stopping saved {saved:,} of {whole:,} tokens: {saved / whole:.0%}"
    bars = [
        Bar(
            trial.trial_id,
            data.kind(trial),
            trial.tokens,
            data.about(trial),
            whole=data.budget_tokens,
            note="failed" if trial.status == "failed" else "",
        )
        for trial in data.ranked
    ]
    caption = "Pale: the unused part of a trial's budget. The best trial is at the top."
    return Figure(
        "saved", title if stopped else "No trial was stopped early", caption, Axis("training tokens"), Axis(), bars=bars
    )


def importance_bars(data: SweepData, shares: Mapping[str, float] | str) -> Figure | Omitted:
    """A bar for each setting: its share in the variance of the score."""
    title = f"What {data.score_name} depends on {data.at_equal_tokens}" if data.compared else "What scores depend on"
    if isinstance(shares, str):
        return Omitted("importance", title, shares)
    bars = [
        Bar(short_name(key), "setting", 100 * share, f"{short_name(key)}: {share:.0%}", note=f"{share:.0%}")
        for key, share in shares.items()
    ]
    caption = (
        f"The share of each setting in how the logarithm of the {data.score_name} varies (fANOVA, Hutter et al. 2014) "
        f"over {len(data.compared)} trials; with few trials it is only a hint. {data.about_equal_tokens}"
    )
    return Figure("importance", title, caption, Axis("share of the variance, %"), Axis(), bars=bars)


def importance(data: SweepData) -> dict[str, float] | str:
    """Swept key -> its share in the variance of the score, the largest first; or the reason why it is unknown."""
    scored = data.compared
    settings = {
        key: setting for key, setting in data.settings.items() if all(key in trial.settings for trial, _ in scored)
    }
    varied = {key: setting for key, setting in settings.items() if len(setting.values) > 1}
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
        return given if varied[key].is_numeric else str(hashable(given))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    distributions = {key: distribution(setting) for key, setting in varied.items()}
    for trial, score in scored:
        params = {key: value(key, trial) for key in varied}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=math.log(max(score, 1e-9)))
        )
    return optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))
