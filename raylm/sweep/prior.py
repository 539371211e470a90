"""Settings drawn at random around a guess of the user: tune.prior.

The first trial has the prior itself. After it, half of the trials are drawn anywhere in the space, so that a wrong
prior costs at most half of them. The other half are drawn around the prior or around the incumbent, the best trial so
far; how often around which depends on which of them explains the best trials better. These are the sampler and the
constants of PriorBand (Mallik et al. 2023, arXiv:2306.12370; NePS, neps/optimizers/priorband.py) at the lowest rung,
where every trial of a sweep starts. Two things differ: PriorBand waits for a whole bracket of Hyperband before it looks
at the incumbent, and it may draw the settings of an earlier trial again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from raylm.config import TuneConfig, spaces
from raylm.sweep.space import keys, likeliest, variants
from raylm.sweep.start import Start

UNIFORM = 0.5
"""Share of the trials that are drawn anywhere: 1 / (1 + eta^rung) at rung 0."""

SPREAD = 0.25
"""Standard deviation around a value, as a share of its range; of the range of its logarithm for loguniform and
lograndint. A choice is left with this probability."""

CHANGED = 0.5
"""Share of the incumbent's settings that are drawn anew."""

ETA = 3
"""One of so many trials counts as one of the best. Before there are so many scores, there is no incumbent."""

TRIES = 10
"""Draws until one is not that of an earlier trial, of which it would be the same training."""


class PriorSearch:
    """Settings around tune.prior and around the best trial so far, and anywhere in the space."""

    def __init__(self, section: TuneConfig, seed: int, start: Start):
        self.total = section.num_samples
        self._space, self._prior, self._seed = section.space, section.prior, seed
        self._first = [*start.points, section.prior]
        self._settings: dict[str, Mapping[str, Any]] = {}
        """Those of every trial so far."""
        self._scored: list[tuple[float, Mapping[str, Any]]] = [
            (each.score, each.settings) for each in start.observations
        ]
        """(score, settings) of the trials that have a score, first those of earlier sweeps."""

    def draw(self, trial_id: str) -> dict[str, Any]:
        number = len(self._settings)
        # Its own random numbers, so that they do not depend on how many trials were drawn and how many added.
        random = np.random.default_rng([self._seed, number])
        given = self._first[number] if number < len(self._first) else {}
        for _ in range(TRIES):
            point = {**self._point(random), **given}
            settings = {key: point[key] for key in keys(self._space) if key in point}
            if settings not in self._settings.values():
                break
        self._settings[trial_id] = settings
        return settings

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        self._settings[trial_id] = dict(settings)

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        if values is not None and math.isfinite(values[0]):
            self._scored.append((values[0], self._settings[trial_id]))

    def _point(self, random: np.random.Generator) -> dict[str, Any]:
        around_prior, around_incumbent = self._weights()
        kind = random.choice(3, p=[UNIFORM, around_prior, around_incumbent])
        (anywhere,) = variants(self._space, random)
        if kind == 0:
            return anywhere
        if kind == 1:
            return {**anywhere, **{key: around(self._space[key], self._prior[key], random) for key in self._prior}}
        return self._changed(min(self._scored, key=lambda each: each[0])[1], anywhere, random)

    def _weights(self) -> tuple[float, float]:
        """The shares of the trials around the prior and around the incumbent."""
        best = [settings for _, settings in sorted(self._scored, key=lambda each: each[0])[: len(self._scored) // ETA]]
        if not best:
            return 1 - UNIFORM, 0.0
        incumbent = {key: best[0][key] for key in self._space if key in best[0]}

        def explains(centers: Mapping[str, Any]) -> float:
            """How likely the best trials are around these values; the best counts most."""
            return sum(
                (len(best) - place)
                * math.prod(density(self._space[key], center, settings[key]) for key, center in centers.items())
                for place, settings in enumerate(best)
            )

        of_prior, of_incumbent = explains(self._prior), explains(incumbent)
        share = of_prior / (of_prior + of_incumbent)
        return (1 - UNIFORM) * share, (1 - UNIFORM) * (1 - share)

    def _changed(
        self, incumbent: Mapping[str, Any], anywhere: Mapping[str, Any], random: np.random.Generator
    ) -> dict[str, Any]:
        """The incumbent with some of its settings drawn anew around their values, at least one."""
        found = dict(incumbent)
        selected = random.random(len(self._space)) < CHANGED
        selected[random.integers(len(self._space))] = True
        for (key, sampler), is_changed in zip(self._space.items(), selected, strict=True):
            if not is_changed:
                continue
            inner_spaces = spaces(key, sampler)
            if inner_spaces is None:
                found[key] = around(sampler, incumbent[key], random, leaves=True)
                continue
            for inner in inner_spaces[likeliest(inner_spaces, incumbent)]:
                found.pop(inner)
            found |= {inner: anywhere[inner] for inner in inner_spaces[likeliest(inner_spaces, anywhere)]}
        return found


def around(sampler: Mapping[str, Any], center: Any, random: np.random.Generator, *, leaves: bool = False) -> Any:
    """A value near another one; of a choice mostly the same, or with `leaves` never the same."""
    ((kind, values),) = sampler.items()
    if kind == "choice":
        others = [value for value in values if value != center]
        moves = others and (leaves or random.random() < SPREAD)
        return others[random.integers(len(others))] if moves else center
    place = NormalDist(_place(kind, values, center), SPREAD)
    low, high = place.cdf(0), place.cdf(1)
    return _value(kind, values, place.inv_cdf(low + (high - low) * random.uniform(1e-9, 1 - 1e-9)))


def density(sampler: Mapping[str, Any], center: Any, value: Any) -> float:
    """The density at a value of the distribution that `around` draws from, in units of the range."""
    ((kind, values),) = sampler.items()
    if kind == "choice":
        return 1 - SPREAD if value == center else SPREAD / max(1, len(values) - 1)
    place = NormalDist(_place(kind, values, center), SPREAD)
    return place.pdf(_place(kind, values, value)) / (place.cdf(1) - place.cdf(0))


def _place(kind: str, values: Sequence[float], value: float) -> float:
    """Where in its range a value is, from 0 to 1."""
    low, high = values[:2]
    value += 0.5 if kind.endswith("randint") else 0.0  # the middle of those that are rounded down to it
    value = min(max(value, low), high)  # an inner space may give one outside
    return math.log(value / low) / math.log(high / low) if kind.startswith("log") else (value - low) / (high - low)


def _value(kind: str, values: Sequence[float], place: float) -> float:
    """The value at a place in its range."""
    low, high = values[:2]
    value = low * (high / low) ** place if kind.startswith("log") else low + (high - low) * place
    if kind.endswith("randint"):
        return int(min(max(math.floor(value), low), high - 1))
    if kind == "quniform":
        value = round(value / values[2]) * values[2]
    return float(min(max(value, low), high))
