"""tune.space -> the settings of trials, drawn at random or by Optuna."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.search.variant_generator import generate_variants

from raylm.config import TuneConfig, is_sampler, spaces
from raylm.errors import ConfigError

Space = Mapping[str, Mapping[str, Any]]


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


def searcher(section: TuneConfig, seed: int) -> Searcher:
    """The searcher of tune.searcher."""
    return OptunaSearch(section, seed) if section.searcher == "optuna" else RandomSearch(section, seed)


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

    def __init__(self, section: TuneConfig, seed: int):
        random = np.random.default_rng(seed)
        self._points: list[dict[str, Any]] = []
        # With grids alone every draw is the same, and trials of the same settings are bit-identical.
        is_drawn = any("grid" not in sampler for sampler in section.space.values())
        for number in range(section.num_samples if is_drawn else len(section.points) + 1):
            given = section.points[number] if number < len(section.points) else {}
            left = {key: sampler for key, sampler in section.space.items() if key not in given}
            for _, found in generate_variants({"config": domains(left)}, random_state=random):
                point = {**_settings(found["config"]), **given}
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
    """The settings of a point, with those of its inner spaces in place of these."""
    found: dict[str, Any] = {}
    for key, value in point.items():
        found |= {key: value} if "." in key else value
    return found


class OptunaSearch:
    """Points where Optuna expects the best scores, given those so far."""

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
        self._space, self._seed = section.space, seed
        # Optuna's default of 10 random trials is more than most sweeps have.
        self._num_random = min(10, max(4, section.num_samples // 4))
        self._first = [_first(section.space, point) for point in section.points]
        self._trials: dict[str, Any] = {}
        self._study = optuna.create_study(directions=["minimize"] * (1 if section.against is None else 2))

    def draw(self, trial_id: str) -> dict[str, Any]:
        number = len(self._study.get_trials(deepcopy=False))
        return self._suggested(self._ask(trial_id, self._first[number] if number < len(self._first) else {}))

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        self._suggested(self._ask(trial_id, self._parameters(settings)))

    def _ask(self, trial_id: str, parameters: dict[str, Any]) -> Any:
        """Start a trial in the study with these parameters fixed."""
        import optuna

        # Each trial has its own random numbers. Those of a single stream would depend on how many trials were drawn and
        # how many added.
        numbers = np.random.SeedSequence([self._seed, len(self._study.get_trials(deepcopy=False))])
        # Running trials count as bad ones, or concurrent trials would be drawn at the same place.
        self._study.sampler = optuna.samplers.TPESampler(
            seed=int(numbers.generate_state(1)[0]),
            n_startup_trials=self._num_random,
            constant_liar=True,
        )
        self._study.enqueue_trial(parameters)
        trial = self._trials[trial_id] = self._study.ask()
        return trial

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        from optuna.trial import TrialState

        state = TrialState.FAIL if values is None else TrialState.COMPLETE
        self._study.tell(self._trials.pop(trial_id), values, state=state)

    def _suggested(self, trial: Any) -> dict[str, Any]:
        """The settings of a trial that has started in the study."""
        found: dict[str, Any] = {}
        for key, sampler in self._space.items():
            value = _suggest(trial, key, *next(iter(sampler.items())))
            inner_spaces = spaces(key, sampler)
            if inner_spaces is None:
                found[key] = value
                continue
            found |= value
            for inner, drawn in _drawn(value).items():
                found[inner] = _suggest(
                    trial, f"{key} {inner_spaces.index(value)}: {inner}", *next(iter(drawn.items()))
                )
        return found

    def _parameters(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Optuna's parameters from which `_suggested` makes these settings."""
        found: dict[str, Any] = {}
        for key, sampler in self._space.items():
            inner_spaces = spaces(key, sampler)
            if inner_spaces is None:
                if settings[key] in sampler.get("choice", [settings[key]]):  # else an inner space set it
                    found[key] = _known(sampler, settings[key])
                continue
            number = found[key] = _likeliest(inner_spaces, settings)
            for inner, drawn in _drawn(inner_spaces[number]).items():
                found[f"{key} {number}: {inner}"] = _known(drawn, settings[inner])
        return found


def _first(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """One of tune.points as Optuna's parameters."""
    for key, value in point.items():
        choices = space[key].get("choice", [value])
        if value not in choices:
            raise ConfigError(f"tune.points: {key} must be one of {choices}, got {value!r}", where="tune.points")
    return {key: _known(space[key], value) for key, value in point.items()}


def _known(sampler: Mapping[str, Any], value: Any) -> Any:
    """A value as Optuna's parameter: the index of a choice, because choices may be lists and mappings."""
    return sampler["choice"].index(value) if "choice" in sampler else value


def _may_give(sampler: Any, value: Any) -> bool:
    """Whether an entry of a space, a sampler or a fixed value, can give this value."""
    if not is_sampler(sampler):
        return sampler == value
    ((kind, values),) = sampler.items()
    return value in values if kind == "choice" else values[0] <= value <= values[1]


def _likeliest(inner_spaces: list[dict[str, Any]], settings: Mapping[str, Any]) -> int:
    """The number of the inner space that fits these settings best."""

    def agreement(number: int) -> int:
        entries = inner_spaces[number].items()
        return sum(1 if key in settings and _may_give(entry, settings[key]) else -1 for key, entry in entries)

    return max(range(len(inner_spaces)), key=agreement)


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
