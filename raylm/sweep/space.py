"""tune.space -> the settings of trials, drawn at random or searched for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray import tune
from ray.tune.search.sample import _BackwardsCompatibleNumpyRng
from ray.tune.search.variant_generator import generate_variants

from raylm.config import TuneConfig, is_sampler, spaces
from raylm.errors import ConfigError

Space = Mapping[str, Mapping[str, Any]]


class Points(Protocol):
    """Where the settings of trials come from. Asked and told the same in the same order, it says the same."""

    total: int
    """How many trials there will be."""

    def draw(self, trial_id: str) -> dict[str, Any]:
        """The settings of the next trial."""

    def again(self, trial_id: str) -> None:
        """That the next trial was drawn before, maybe when there were to be more of them."""

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        """What became of a trial: what shall be small, or None if it failed."""


def points(section: TuneConfig, seed: int) -> Points:
    """As tune.searcher says."""
    return Searched(section, seed) if section.searcher == "optuna" else Drawn(section, seed)


def keys(space: Space) -> list[str]:
    """The settings that a space sweeps, those of its inner spaces too."""
    every = ((key, spaces(key, sampler)) for key, sampler in space.items())
    return list(dict.fromkeys(name for key, inner in every for each in inner or [{key: None}] for name in each))


def shown(sampler: Mapping[str, Any]) -> str:
    """A sampler as a person writes it: loguniform(0.0005, 0.02)."""
    ((kind, values),) = sampler.items()
    return f"{kind}({', '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)})"


class Drawn:
    """Points drawn at random, each with every point of the grid. They are known before the sweep begins."""

    def __init__(self, section: TuneConfig, seed: int):
        random = _BackwardsCompatibleNumpyRng(seed)
        self._points: list[dict[str, Any]] = []
        # Of grids alone every draw is the same, and trials of the same settings end with the same bytes.
        is_drawn = any("grid" not in sampler for sampler in section.space.values())
        for number in range(section.num_samples if is_drawn else len(section.points) + 1):
            given = section.points[number] if number < len(section.points) else {}
            left = {key: sampler for key, sampler in section.space.items() if key not in given}
            for _, found in generate_variants({"config": domains(left)}, random_state=random):
                point = {**_settings(found["config"]), **given}
                self._points.append({key: point[key] for key in keys(section.space) if key in point})
        self.total = len(self._points)
        self._drawn = 0

    def draw(self, trial_id: str) -> dict[str, Any]:
        self._drawn += 1
        return self._points[self._drawn - 1]

    def again(self, trial_id: str) -> None:
        self._drawn += 1

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        pass  # whatever came of it, the points stay


def domains(space: Space) -> dict[str, Any]:
    """A space in ray.tune's own terms."""
    found = {}
    for key, sampler in space.items():
        ((kind, values),) = sampler.items()
        inner_spaces = spaces(key, sampler)
        if inner_spaces is not None:
            values = [{**inner, **domains(_drawn(inner))} for inner in inner_spaces]
        found[key] = _domain(kind, values)
    return found


def _domain(kind: str, values: list[Any]) -> Any:
    if kind == "grid":
        return tune.grid_search(values)
    return tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)


def _drawn(space: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in space.items() if is_sampler(value)}


def _settings(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of a space, of whose inner spaces only the settings are left."""
    found: dict[str, Any] = {}
    for key, value in point.items():
        found |= {key: value} if "." in key else value
    return found


class Searched:
    """Points where Optuna expects the best ones, from what it was told so far."""

    def __init__(self, section: TuneConfig, seed: int):
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "tune.searcher=optuna needs Optuna: pip install 'raylm[optuna]'", where="tune.searcher"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.total = section.num_samples
        self._space = section.space
        self._trials: dict[str, Any] = {}
        self._study = optuna.create_study(
            directions=["minimize"] * (1 if section.against is None else 2),
            # Its default of 10 trials at random is more than most sweeps have. Trials that run count as bad ones, or
            # those beside each other would be drawn at the same place.
            sampler=optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=min(10, max(4, section.num_samples // 4)), constant_liar=True
            ),
        )
        for point in section.points:
            self._study.enqueue_trial({key: self._known(key, value) for key, value in point.items()})

    def draw(self, trial_id: str) -> dict[str, Any]:
        trial = self._trials[trial_id] = self._study.ask()
        return self._suggested(trial, self._space)

    def again(self, trial_id: str) -> None:
        self.draw(trial_id)

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        from optuna.trial import TrialState

        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        self._study.tell(self._trials.pop(trial_id), values, state=state)

    def _suggested(self, trial: Any, space: Space, inside: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, sampler in space.items():
            value = _suggest(trial, inside + key, *next(iter(sampler.items())))
            if spaces(key, sampler) is None:
                found[key] = value
            else:
                number = next(iter(sampler.values())).index(value)
                found |= {**value, **self._suggested(trial, _drawn(value), f"{key} {number}: ")}
        return found

    def _known(self, key: str, value: Any) -> Any:
        """A value as Optuna knows it."""
        choices = self._space[key].get("choice")
        if choices is not None and value not in choices:
            raise ConfigError(f"tune.points: {key} must be one of {choices}, got {value!r}", where="tune.points")
        return value if choices is None else choices.index(value)


def _suggest(trial: Any, name: str, kind: str, values: list[Any]) -> Any:
    match kind:
        case "choice":  # of anything, lists and mappings too
            return values[trial.suggest_categorical(name, range(len(values)))]
        case "uniform" | "loguniform":
            return trial.suggest_float(name, *values, log=kind == "loguniform")
        case "quniform":
            return trial.suggest_float(name, *values[:2], step=values[2])
        case _:
            return trial.suggest_int(name, values[0], values[1] - 1, log=kind == "lograndint")
