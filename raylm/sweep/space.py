"""tune.space -> the settings of trials; those of a random search, drawn before the sweep starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.search.variant_generator import generate_variants

from raylm.config import TuneConfig, is_sampler, spaces
from raylm.sweep.start import Start

Space = Mapping[str, Mapping[str, Any]]

LADDER = "ladder"
"""The entry of a space that tune.ladder has become: a grid of sizes, at each of which every draw is trained."""


class Searcher(Protocol):
    """The source of the trials' settings. They depend only on the trials so far and the scores reported of them."""

    total: int
    """How many trials there will be."""

    def draw(self, trial_id: str) -> dict[str, Any]:
        """The settings of the next trial."""

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        """Add the next trial with the settings of the record, because it has started already.

        Drawn again they may differ: tune.num_samples may change, and libraries do.
        """

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        """Report the values of a trial, which are minimized; None if it failed."""


def keys(space: Space) -> list[str]:
    """The settings that a space sweeps, including those of its inner spaces."""
    every = ((key, spaces(key, sampler)) for key, sampler in space.items())
    return list(dict.fromkeys(name for key, inner in every for each in inner or [{key: None}] for name in each))


def shown(sampler: Mapping[str, Any]) -> str:
    """A sampler as a person writes it: loguniform(0.0005, 0.02)."""
    ((kind, values),) = sampler.items()
    return f"{kind}({', '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)})"


class RandomSearch:
    """Points drawn at random, each combined with every point of the grid; all are drawn before the sweep starts."""

    def __init__(self, section: TuneConfig, seed: int, start: Start):
        random = np.random.default_rng(seed)
        self._points: list[dict[str, Any]] = []
        # With grids alone every draw is the same, and trials of the same settings are bit-identical.
        is_drawn = any("grid" not in sampler for sampler in section.space.values())
        for number in range(section.num_samples if is_drawn else len(start.points) + 1):
            given = start.points[number] if number < len(start.points) else {}
            left = {key: sampler for key, sampler in section.space.items() if key not in given}
            for found in variants(left, random, is_one_draw=LADDER in section.space):
                point = {**found, **given}
                self._points.append({key: point[key] for key in keys(section.space) if key in point})
        self._grid = [key for key, sampler in section.space.items() if "grid" in sampler]
        self.total, self._drawn = len(self._points), 0

    def draw(self, trial_id: str) -> dict[str, Any]:
        self._drawn += 1
        return self._points[self._drawn - 1]

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        """Add a trial instead of the first point that has its values of the grid. That is the next one, unless the grid
        has changed since; a trial of none of the points is one more."""
        for number in range(self._drawn, len(self._points)):
            if all(self._points[number].get(key) == settings.get(key) for key in self._grid):
                del self._points[number]
                break
        self._points.insert(self._drawn, dict(settings))
        self.total, self._drawn = len(self._points), self._drawn + 1

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        pass  # the points do not depend on scores


def variants(space: Space, random: np.random.Generator, *, is_one_draw: bool = False) -> Iterator[dict[str, Any]]:
    """The settings of one draw: one point, or each point of a grid; with the same draw at each if `is_one_draw`."""
    spec = {"config": domains(space)}
    for _, found in generate_variants(spec, constant_grid_search=is_one_draw, random_state=random):
        yield _settings(found["config"])


def domains(space: Space) -> dict[str, Any]:
    """A space in ray.tune's own terms."""
    found = {}
    for key, sampler in space.items():
        ((kind, values),) = sampler.items()
        inner_spaces = spaces(key, sampler)
        if inner_spaces is not None:
            values = [{**inner, **domains(samplers(inner))} for inner in inner_spaces]
        found[key] = _domain(kind, values)
    return found


def _domain(kind: str, values: list[Any]) -> Any:
    if kind == "grid":
        return tune.grid_search(values)
    return tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)


def samplers(space: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of an inner space that are drawn rather than fixed."""
    return {key: value for key, value in space.items() if is_sampler(value)}


def _settings(point: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a point, with those of its inner spaces in place of these."""
    found: dict[str, Any] = {}
    for key, value in point.items():
        found |= {key: value} if "." in key else value
    return found


def fits(sampler: Any, value: Any) -> bool:
    """Whether an entry of a space, a sampler or a fixed value, can give this value."""
    if not is_sampler(sampler):
        return sampler == value
    ((kind, values),) = sampler.items()
    if kind in ("choice", "grid"):
        return value in values
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and values[0] <= value <= (values[1] - 1 if kind.endswith("randint") else values[1])


def likeliest(inner_spaces: list[dict[str, Any]], settings: Mapping[str, Any]) -> int:
    """The number of the inner space that fits these settings best."""

    def agreement(number: int) -> int:
        entries = inner_spaces[number].items()
        return sum(1 if key in settings and fits(entry, settings[key]) else -1 for key, entry in entries)

    return max(range(len(inner_spaces)), key=agreement)
