"""L(N, D) = E + A N^-alpha + B D^-beta: its fit, what it predicts of a larger run, and how sure that is.

N is a model's parameters, D the tokens it was trained on, L its loss in nats per token. The fit is that of Hoffmann et
al. 2022 (arXiv:2203.15556), approach 3: Huber's loss on the residuals of log L, by L-BFGS from a grid of starting
points. As Besiroglu et al. 2024 (arXiv:2404.10102) found, it must not stop early: the losses of the points are summed,
not averaged, and the tolerances are as tight as numbers allow.

The interval of a prediction holds a new run: the score that one training of this size and budget would have, not only
the mean of many. 1,000 times, runs are made up that depart from the law as the real ones do, and the law is fitted to
them; the interval has the percentiles of what these laws predict, each with the departure of a new run. How far runs
depart is itself unsure, of nine points it is known from four, so it is drawn for each (Student's t). The intervals of
the constants are percentiles of the same laws. benchmarks/scaling_law.py counts how often both hold what they should.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from raylm.statistics import LEVEL

DELTA = 1e-3
"""Where Huber's loss becomes linear, in log L, as of Hoffmann et al.: nearly the sum of absolute residuals."""

CONSTANTS = 5
"""Numbers that are fitted: E, A, alpha, B, beta."""

FEWEST_POINTS = 8
"""Points that a law takes: without the largest, two more than it has constants."""

DRAWS = 1000
"""Fits to made-up runs, for intervals."""

LEAST_NOISE = 1e-5
"""The least noise of log L: scores that follow a law exactly are not known better than this."""

MOST = 700.0
"""Nats a token, as the end of an interval: the perplexity of more is no number that a float can hold."""

FLOPS = 6
"""Floating-point operations of a training for each parameter and token: two forward, four backward."""

LOW = np.array([-12.0, -12.0, 0.01, -12.0, 0.01])
HIGH = np.array([5.0, 5.0, 3.0, 5.0, 3.0])
"""Bounds of E, A, alpha, B, beta; of the first, second and fourth the logarithms at the middle of the points."""


class Law(NamedTuple):
    """E + A N^-alpha + B D^-beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta

    def optimal(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) of the least loss for this compute: Hoffmann et al.'s equation 4."""
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = scale * (flops / FLOPS) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / FLOPS / parameters


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


class LeftOut(NamedTuple):
    """The run of the most compute, as a fit to all others predicts it."""

    parameters: float
    tokens: float
    loss: float
    """Its loss, in nats per token."""
    predicted: Estimate

    @property
    def is_predicted(self) -> bool:
        return self.predicted.low <= self.loss <= self.predicted.high


@dataclass(frozen=True, eq=False)
class Fit:
    """A law that was fitted to the losses of runs."""

    parameters: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray
    covariance: np.ndarray | None = None
    """Of the logarithms of the losses, over documents: how they vary together with the text that is scored. None if
    that is unknown."""
    seed: int = 0

    @cached_property
    def law(self) -> Law:
        return _law(self._constants, self._middle)

    @cached_property
    def noise(self) -> float:
        """How far runs depart from the law: standard deviation of log L."""
        residuals = np.log(self.losses) - self._expected
        return max(LEAST_NOISE, math.sqrt(residuals @ residuals / (len(residuals) - CONSTANTS)))

    @cached_property
    def intervals(self) -> dict[str, Estimate]:
        """Name of a constant -> its estimate, of these runs and of these documents as drawn from many."""
        drawn = _law(self._on_other_documents.constants.T, self._middle)
        return {name: _percentiles(getattr(self.law, name), getattr(drawn, name)) for name in Law._fields}

    @cached_property
    def unknown(self) -> tuple[str, ...]:
        """The exponents that the runs do not tell: of made-up runs more than one in twenty have it at an end of what is
        searched, or no such term at all. Without both no size is known to be the best for a compute."""
        drawn, near = self._on_other_documents.constants, 0.01
        at_end = (drawn < LOW + near) | (drawn > HIGH - near)
        exponents = {"alpha": (1, 2), "beta": (3, 4)}
        return tuple(name for name, at in exponents.items() if at_end[:, at].any(axis=1).mean() > 1 - LEVEL)

    def predict(self, parameters: float, tokens: float, *, on_other_documents: bool = False) -> Estimate:
        """The loss of a new run, on the documents that the others were scored on, or on others like them."""
        refits = self._on_other_documents if on_other_documents else self._on_these_documents
        place = np.log([parameters]) - self._middle[0], np.log([tokens]) - self._middle[1]
        expected = _log_loss(self._constants[None], place)[0][0, 0]
        drawn = _log_loss(refits.constants, place)[0][:, 0] + refits.departures
        return Estimate(*(min(MOST, math.exp(min(each, MOST))) for each in _percentiles(expected, drawn)))

    def optimal(self, flops: float) -> Estimate:
        """The parameters of the least loss for this compute."""
        drawn, _ = _law(self._on_other_documents.constants.T, self._middle).optimal(flops)
        return _percentiles(self.law.optimal(flops)[0], drawn)

    def without_largest(self) -> LeftOut:
        """The run of the most compute, predicted by a fit to all others."""
        largest = int(np.argmax(self.parameters * self.tokens))
        rest = np.arange(len(self.losses)) != largest
        covariance = None if self.covariance is None else self.covariance[np.ix_(rest, rest)]
        others = Fit(self.parameters[rest], self.tokens[rest], self.losses[rest], covariance, self.seed)
        parameters, tokens = float(self.parameters[largest]), float(self.tokens[largest])
        return LeftOut(parameters, tokens, float(self.losses[largest]), others.predict(parameters, tokens))

    # How sure it is ------------------------------------------------------------------------------------------------

    @cached_property
    def _on_these_documents(self) -> _Refits:
        return self._refits(np.zeros((DRAWS, len(self.losses))))

    @cached_property
    def _on_other_documents(self) -> _Refits:
        """As on these documents where the covariance is not known."""
        if self.covariance is None:
            return self._on_these_documents
        shifts = np.random.default_rng(self.seed + 1).multivariate_normal(
            np.zeros(len(self.losses)), self.covariance, DRAWS, method="svd"
        )
        return self._refits(shifts)

    def _refits(self, shifts: np.ndarray) -> _Refits:
        """Laws of made-up runs, whose log L are shifted besides (DRAWS, points)."""
        generator = np.random.default_rng(self.seed)
        freedom = len(self.losses) - CONSTANTS
        noise = self.noise * np.sqrt(freedom / generator.chisquare(freedom, DRAWS))
        made = self._expected + noise[:, None] * generator.standard_normal((DRAWS, len(self.losses))) + shifts
        constants = _refit(made, self._points, np.tile(self._constants, (DRAWS, 1)))
        return _Refits(constants, noise * generator.standard_normal(DRAWS))

    @cached_property
    def _expected(self) -> np.ndarray:
        return _log_loss(self._constants[None], self._points)[0][0]

    # The fit -------------------------------------------------------------------------------------------------------

    @cached_property
    def _middle(self) -> tuple[float, float]:
        """The means of log N and log D. Around them the constants depend on each other little, so that it takes few
        steps to find them."""
        return float(np.log(self.parameters).mean()), float(np.log(self.tokens).mean())

    @cached_property
    def _points(self) -> _Points:
        return np.log(self.parameters) - self._middle[0], np.log(self.tokens) - self._middle[1]

    @cached_property
    def _constants(self) -> np.ndarray:
        """log E, log A', alpha, log B', beta, where A' and B' are what the terms are in the middle of the points."""
        from scipy.optimize import minimize

        target = np.log(self.losses)
        starts = _grid(self.losses)
        near = _refit(np.tile(target, (len(starts), 1)), self._points, starts, steps=30)
        costs = _cost(target - _log_loss(near, self._points)[0])
        best = [near[number] for number in np.argsort(costs)[:5]]
        options = {"maxiter": 10_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
        found = [
            minimize(
                _summed, start, args=(target, self._points), jac=True, method="L-BFGS-B",
                bounds=list(zip(LOW, HIGH, strict=True)), options=options,
            )
            for start in best
        ]  # fmt: skip
        return min(found, key=lambda each: each.fun).x


class _Refits(NamedTuple):
    """Laws of made-up runs, and for each how far a new run departs from it."""

    constants: np.ndarray
    """(DRAWS, 5)."""
    departures: np.ndarray
    """Of log L, (DRAWS,)."""


_Points = tuple[np.ndarray, np.ndarray]
"""log N and log D of points, less those of their middle."""


def _law(constants: np.ndarray, middle: tuple[float, float]) -> Law:
    """The law of constants around the middle of the points; of rows of them, a row for each constant, arrays."""
    log_e, log_a, alpha, log_b, beta = constants
    return Law(np.exp(log_e), np.exp(log_a + alpha * middle[0]), alpha, np.exp(log_b + beta * middle[1]), beta)


def _log_loss(constants: np.ndarray, points: _Points) -> tuple[np.ndarray, np.ndarray]:
    """For rows of constants (rows, 5) the log L of each point (rows, points), and its derivatives (rows, points, 5)."""
    sizes, horizons = points
    log_e, log_a, alpha, log_b, beta = constants.T[:, :, None]
    terms = np.exp(np.stack([log_e + 0 * sizes, log_a - alpha * sizes, log_b - beta * horizons]))
    total = terms.sum(axis=0)
    of_e, of_a, of_b = terms / total
    return np.log(total), np.stack([of_e, of_a, -sizes * of_a, of_b, -horizons * of_b], axis=-1)


def _cost(residuals: np.ndarray) -> np.ndarray:
    """Huber's loss, summed over points, in units of DELTA squared."""
    scaled = np.abs(residuals) / DELTA
    return np.where(scaled <= 1, scaled**2 / 2, scaled - 0.5).sum(axis=-1)


def _summed(constants: np.ndarray, target: np.ndarray, points: _Points) -> tuple[float, np.ndarray]:
    """The cost of constants and its gradient."""
    expected, slopes = _log_loss(constants[None], points)
    residuals = target - expected[0]
    return float(_cost(residuals)), -(np.clip(residuals / DELTA, -1, 1) @ slopes[0]) / DELTA


def _grid(losses: np.ndarray) -> np.ndarray:
    """Starting points: exponents, and shares of E in the least loss; A and B share the rest of the mean loss."""
    exponents, shares = (0.1, 0.25, 0.5, 0.9, 1.5), (0.3, 0.6, 0.9)
    starts = []
    for alpha in exponents:
        for beta in exponents:
            for share in shares:
                irreducible = share * losses.min()
                half = math.log((losses.mean() - irreducible) / 2)
                starts.append([math.log(irreducible), half, alpha, half, beta])
    return np.array(starts)


def _refit(targets: np.ndarray, points: _Points, starts: np.ndarray, steps: int = 100) -> np.ndarray:
    """The constants of many fits at once, each from a start near it: rows of `targets` are the log L of the points.

    Levenberg and Marquardt's method on squares that are weighted so that they touch Huber's loss from above where the
    fit is, so no step that is taken makes it worse. A thousand fits take about as long as two by L-BFGS.
    """
    constants = starts.copy()
    costs = _cost(targets - _log_loss(constants, points)[0])
    damping = np.full(len(starts), 1e-3)
    active = np.arange(len(starts))
    for _ in range(steps):
        expected, slopes = _log_loss(constants[active], points)
        residuals = targets[active] - expected
        weighted = (slopes / np.maximum(np.abs(residuals) / DELTA, 1)[..., None]).swapaxes(1, 2)
        curvature = weighted @ slopes
        diagonal = np.einsum("rii->ri", curvature)
        diagonal += damping[active, None] * (diagonal + 1e-9)
        step = np.linalg.solve(curvature, weighted @ residuals[..., None])[..., 0]
        tried = np.clip(constants[active] + step, LOW, HIGH)
        cost = _cost(targets[active] - _log_loss(tried, points)[0])
        gain = costs[active] - cost
        is_better = gain > 0
        constants[active[is_better]] = tried[is_better]
        costs[active[is_better]] = cost[is_better]
        damping[active] *= np.where(is_better, 0.2, 8.0)
        finished = is_better & (gain < 1e-6 * cost) | (damping[active] > 1e6)
        active = active[~finished]
        if not len(active):
            break
    return constants


def _percentiles(value: float, drawn: Any) -> Estimate:
    """A number with the interval of what was drawn, an array."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Estimate(float(value), float(low), float(high))
