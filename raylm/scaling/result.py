"""What raylm scale answers: the law of the finished trainings of sweeps, and what it says of a larger one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylm import console
from raylm.errors import DataError
from raylm.results import tables
from raylm.results.sweep import SweepResults
from raylm.scaling import observations, prediction
from raylm.scaling import settings as best_settings
from raylm.scaling.law import FEWEST_POINTS, Estimate, Fit, LeftOut
from raylm.scaling.observations import Observations
from raylm.scaling.prediction import Prediction, Request, ends, perplexity, shown
from raylm.scaling.settings import Trend

FEWEST = 3
"""Sizes, and numbers of training tokens, that a law takes."""

MOST_ALIKE = 0.99
"""Correlation of log N and log D at which nothing tells what is due to which."""

NOTHING = 1e-4
"""A constant below it is shown as 0: the search for E ends at 6e-6."""

COUNTS = {"parameters": "all parameters", "parameters_without_embeddings": "without embeddings"}
"""The two ways to count N, each with a law of its own. Predictions are by all parameters: 6 N D is then nearly the
compute of a model whose embeddings are its output head, and Hoffmann et al. counted so."""


@dataclass(frozen=True)
class Scaling:
    """A law of sweeps, and what it predicts."""

    observed: Observations
    fits: Mapping[str, Fit]
    """By how N is counted (COUNTS)."""
    left_out: Mapping[str, LeftOut]
    """The largest training, as each law without it predicts it."""
    trends: Mapping[str, Trend | str]
    """Setting -> the power law of its best value, or why it has none."""
    prediction: Prediction | None
    """Of the training that was asked about, if one was."""

    @property
    def measure(self) -> str:
        return self.observed.measure

    def record(self) -> dict[str, Any]:
        """The result for --json."""
        return {
            "sweeps": [results.name for results in self.observed.sweeps],
            "scored_on": self.observed.scored_on,
            "trainings": len(self.observed.every),
            "points": [each.record(self.measure) for each in self.observed.best],
            "laws": {count: self._law_record(count) for count in COUNTS},
            "best_settings": {key: _trend_record(trend) for key, trend in self.trends.items()},
            "prediction": None if self.prediction is None else self.prediction.record(self.measure),
        }

    def _law_record(self, count: str) -> dict[str, Any]:
        left_out = self.left_out[count]
        constants = [ends(name, each) for name, each in self.fits[count].intervals.items()]
        return {
            **{key: value for each in constants for key, value in each.items()},
            "unknown": list(self.fits[count].unknown),
            "noise": self.fits[count].noise,
            "largest_left_out": {
                "parameters": left_out.parameters,
                "tokens": left_out.tokens,
                self.measure: math.exp(left_out.loss),
                **ends(f"predicted_{self.measure}", perplexity(left_out.predicted)),
                "is_predicted": left_out.is_predicted,
            },
        }

    def views(self) -> list[Any]:
        """The result for the screen."""
        score = console.label(self.measure)
        points = tables.numbers("parameters", "without embeddings", "tokens", "FLOPs", score, "best of")
        for each in self.observed.best:
            cells = f"{each.parameters:,}", f"{each.without_embeddings:,}", f"{each.tokens:,}", f"{each.flops:.3g}"
            points.add_row(*cells, f"{each.perplexity:.2f}", str(each.draws))
        laws = tables.numbers("L = E + A N^-alpha + B D^-beta", *COUNTS.values())
        for name in self.fits["parameters"].intervals:
            laws.add_row(name, *(_constant(self.fits[count].intervals[name]) for count in COUNTS))
        laws.add_row("noise of a run", *(f"{self.fits[count].noise:.2%}" for count in COUNTS))
        views: list[Any] = [points, "", laws, "", *self.sentences()]
        if self.prediction is not None:
            views += ["", console.key_values(self.prediction.facts(self.measure))]
            views += [f"warning: {warning}" for warning in self.prediction.warnings]
        return views

    def sentences(self) -> list[str]:
        """How well the largest training was predicted without it, and how the best settings change with size."""
        told = [f"{sentence_of(self.left_out[count], self.measure)} ({text})" for count, text in COUNTS.items()]
        if unknown := self.fits["parameters"].unknown:
            told.append(
                f"the trainings do not tell {' and '.join(unknown)}, and so no best size for a cost; sizes and budgets "
                "that are further apart, or less noise of a run, would"
            )
        for key, trend in self.trends.items():
            if isinstance(trend, str):
                told.append(f"no power law of the best {key}: {trend}")
            else:
                powers = " ".join(f"{name}^{shown(each)}" for name, each in trend.exponents.items())
                told.append(f"the best {key} goes as {powers}")
        return told


def scale(sweeps: Sequence[SweepResults], request: Request | None = None) -> Scaling:
    """The law of sweeps, and what it says of the training that is asked about.

    ConfigError if the sweeps were not scored on the same documents; DataError if there is too little for a law, or if
    it does not predict the largest training without having seen it.
    """
    observed = observations.read(sweeps)
    check_enough(observed)
    best = observed.best
    tokens, losses = (np.array([getattr(each, name) for each in best], float) for name in ("tokens", "loss"))
    sizes = {"parameters": "parameters", "parameters_without_embeddings": "without_embeddings"}
    fits = {
        count: Fit(np.array([getattr(each, name) for each in best], float), tokens, losses, observed.covariance)
        for count, name in sizes.items()
    }
    left_out = {count: fit.without_largest() for count, fit in fits.items()}
    if not left_out["parameters"].is_predicted:
        raise DataError(
            f"no law that can be believed: {sentence_of(left_out['parameters'], observed.measure)}; train more sizes "
            "and budgets, or larger ones",
            "SWEEP",
        )
    trends = best_settings.trends(best)
    predicted = None if request is None else prediction.predict(request, observed, fits, trends)
    return Scaling(observed, fits, left_out, trends, predicted)


def check_enough(observed: Observations) -> None:
    """DataError if the trainings cannot tell the five constants of a law."""
    best = observed.best
    sizes, horizons = len({each.without_embeddings for each in best}), len({each.tokens for each in best})
    if sizes < FEWEST or horizons < FEWEST or len(best) < FEWEST_POINTS:
        raise DataError(
            f"too little for a law of five constants: {console.counted(sizes, 'size')} and "
            f"{console.counted(horizons, 'budget')} in {console.counted(len(best), 'combination')} that came to the "
            f"end of a schedule; it takes {FEWEST} sizes, {FEWEST} budgets and {FEWEST_POINTS} combinations",
            "SWEEP",
        )
    logs = np.log([[each.parameters, each.tokens] for each in best])
    if abs(np.corrcoef(logs.T)[0, 1]) > MOST_ALIKE:
        raise DataError(
            "sizes and training tokens grow together, so that no law can tell which of them a loss is due to; train "
            "each size for several budgets",
            "SWEEP",
        )


def sentence_of(left_out: LeftOut, measure: str) -> str:
    """How the largest training was predicted without it."""
    actual, predicted = math.exp(left_out.loss), math.exp(left_out.predicted.value)
    off = actual / predicted - 1
    verdict = "inside" if left_out.is_predicted else "outside of"
    interval = shown(perplexity(left_out.predicted))
    return (
        f"without the largest training ({left_out.parameters:,.0f} parameters, {left_out.tokens:,.0f} tokens) its "
        f"{console.label(measure)} is predicted as {interval}; it is {actual:.4g}, {verdict} the interval, "
        f"{abs(off):.1%} {'below' if off < 0 else 'above'} the prediction"
    )


def _constant(estimate: Estimate) -> str:
    """A constant of a law for the screen: 1.8 [1.77, 1.85]. B may be anything between 0 and 3e+18."""
    value, low, high = (f"{each if each > NOTHING else 0:.3g}" for each in estimate)
    return f"{value} [{low}, {high}]"


def _trend_record(trend: Trend | str) -> dict[str, Any]:
    if isinstance(trend, str):
        return {"exponents": None, "why": trend}
    return {
        "exponents": {key: value for name, each in trend.exponents.items() for key, value in ends(name, each).items()},
        "why": None,
    }
