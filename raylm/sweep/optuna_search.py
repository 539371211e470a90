"""Settings of trials where Optuna expects the best scores."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raylm.config import TuneConfig, spaces
from raylm.errors import ConfigError
from raylm.sweep.space import Space, likeliest, samplers
from raylm.sweep.start import Start


class OptunaSearch:
    """Points where Optuna expects the best scores, given those so far."""

    def __init__(self, section: TuneConfig, seed: int, start: Start):
        try:
            import optuna
        except ImportError:
            raise ConfigError(
                "tune.searcher=optuna needs Optuna: pip install 'raylm[optuna]'", where="tune.searcher"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.total = section.num_samples
        self._space, self._seed, self._kind = section.space, seed, section.searcher.sampler
        # Optuna's default of 10 random trials is more than most sweeps have.
        self._num_random = min(10, max(4, section.num_samples // 4))
        self._first = [_first(section.space, point) for point in start.points]
        self._trials: dict[str, Any] = {}
        self._study = optuna.create_study(directions=["minimize"] * (1 if section.against is None else 2))
        self._observed = 0
        for number, each in enumerate(start.observations):
            self.add(f"observation {number}", each.settings)
            self.tell(f"observation {number}", [each.score])
        self._observed = len(start.observations)

    def draw(self, trial_id: str) -> dict[str, Any]:
        number = self._number
        return self._suggested(self._ask(trial_id, self._first[number] if number < len(self._first) else {}))

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        self._suggested(self._ask(trial_id, self._parameters(settings), all_known=True))

    @property
    def _number(self) -> int:
        """The number of the next trial."""
        return len(self._study.get_trials(deepcopy=False)) - self._observed

    def _ask(self, trial_id: str, parameters: dict[str, Any], *, all_known: bool = False) -> Any:
        """Start a trial in the study with these parameters fixed."""
        # Each trial has its own random numbers. Those of a single stream would depend on how many trials were drawn and
        # how many added.
        numbers = np.random.SeedSequence([self._seed, self._number])
        self._study.sampler = self._sampler(int(numbers.generate_state(1)[0]), all_known=all_known)
        self._study.enqueue_trial(parameters)
        trial = self._trials[trial_id] = self._study.ask()
        return trial

    def _sampler(self, seed: int, *, all_known: bool) -> Any:
        import optuna

        if self._kind == "tpe":
            # Running trials count as bad ones, or concurrent trials would be drawn at the same place.
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=self._num_random, constant_liar=True)
        if all_known:  # a Gaussian process would be fitted for nothing
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.GPSampler(
            seed=seed,
            n_startup_trials=self._num_random,
            deterministic_objective=False,  # another seed gives another score
            warn_independent_sampling=False,
        )

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
            for inner, drawn in samplers(value).items():
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
            number = found[key] = likeliest(inner_spaces, settings)
            for inner, drawn in samplers(inner_spaces[number]).items():
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
