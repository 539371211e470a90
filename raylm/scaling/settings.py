"""Power laws of the best settings: the learning rate against size and training tokens, the batch against the tokens.

log setting = c + p log N + q log D by least squares over the best trial of each size and budget, as Li et al. 2025
("Step Law", arXiv:2503.04715) fit them: a larger model takes a lower rate, a longer training a higher one; the best
batch hardly depends on the size. The best of few draws is a rough guess of the optimum, so intervals are wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raylm.scaling.law import Estimate
from raylm.scaling.observations import Observation
from raylm.statistics import LEVEL

DEPENDS_ON: Mapping[str, tuple[str, ...]] = {
    "train.learning_rate": ("parameters", "tokens"),
    "train.batch_tokens": ("tokens",),
}

FEWEST_VALUES = 3
"""Different values of each number that a setting depends on, and of the setting itself."""


@dataclass(frozen=True)
class Trend:
    """A power law of the best value of a setting."""

    key: str
    of: tuple[str, ...]
    """What it depends on."""
    constants: np.ndarray
    """log of the value where all of `of` are 1; then the exponents."""
    covariance: np.ndarray
    """Of the constants."""
    spread: float
    """Standard deviation of the logarithms of the best values about the law."""
    freedom: int
    """Best values in addition to constants."""

    @property
    def exponents(self) -> dict[str, Estimate]:
        errors = np.sqrt(np.diag(self.covariance))
        return {
            name: self._around(float(self.constants[number]), float(errors[number]))
            for number, name in enumerate(self.of, 1)
        }

    def at(self, parameters: float, tokens: float) -> Estimate:
        """The best value for a size and training tokens, with the interval of the best of as many draws again."""
        known = {"parameters": parameters, "tokens": tokens}
        place = np.array([1.0, *(math.log(known[name]) for name in self.of)])
        error = math.sqrt(place @ self.covariance @ place + self.spread**2)
        return Estimate(*map(math.exp, self._around(float(place @ self.constants), error)))

    def _around(self, value: float, error: float) -> Estimate:
        from scipy.special import stdtrit

        half = float(stdtrit(self.freedom, (1 + LEVEL) / 2)) * error
        return Estimate(value, value - half, value + half)


def trends(best: Sequence[Observation]) -> dict[str, Trend | str]:
    """Setting -> its power law, or why it has none."""
    return {key: _trend(key, of, best) for key, of in DEPENDS_ON.items()}


def _trend(key: str, of: tuple[str, ...], best: Sequence[Observation]) -> Trend | str:
    chosen = [each for each in best if each.draws > 1 and key in each.trial.settings]
    if not any(key in each.trial.settings for each in best):
        return "not swept"
    if not chosen:
        return "one draw of each size and budget, of which none is best"
    numbers = {name: [getattr(each, name) for each in chosen] for name in of}
    values = [float(each.trial.settings[key]) for each in chosen]
    for name, each in {**numbers, "different best values": values}.items():
        if len(set(each)) < FEWEST_VALUES:
            return f"{len(set(each))} {name}, and a power law takes {FEWEST_VALUES}"
    rows = np.column_stack([np.ones(len(values)), *(np.log(each) for each in numbers.values())])
    freedom = len(values) - rows.shape[1]
    if freedom < 2 or np.linalg.matrix_rank(rows - np.array([0, *rows[:, 1:].mean(axis=0)])) < rows.shape[1]:
        return f"too few sizes and budgets for {rows.shape[1]} constants"
    constants, *_ = np.linalg.lstsq(rows, np.log(values), rcond=None)
    variance = float(((np.log(values) - rows @ constants) ** 2).sum() / freedom)
    covariance = variance * np.linalg.inv(rows.T @ rows)
    return Trend(key, of, constants, covariance, math.sqrt(variance), freedom)
