"""The figures of a sweep, in whatever state it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raylm.console import format_number as number
from raylm.pictures.marks import Axis, Bar, Cell, Figure, Line, Omitted
from raylm.pictures.trials import ABOVE, BELOW, Setting, Sweep, hashable, short, ticks

if TYPE_CHECKING:
    from raylm.sweep import Trial

FEWEST_TRIALS = 4
"""With fewer that have a score nothing can be said of what matters."""
SO_FAR = "Trials that were stopped early count with the score they had by then."
FAVOURITES = ("train.learning_rate", "blocks.block_size")
"""Of the heat map, where both are swept."""


def build(sweep: Sweep) -> list[Figure | Omitted]:
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
