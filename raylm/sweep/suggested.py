"""tune.points=suggested: the values that published formulas give for a model, its training tokens and its batch.

    train.batch_tokens    0.58 D^0.571                    Step Law
    train.learning_rate   1.79 N^-0.713 D^0.307           Step Law, N without embeddings
    train.weight_decay    B / (rate D tau), in which      Power Lines, N with embeddings
                          tau = 1.084 (D / N)^-0.527      the weights' memory, as a share of the run

N: parameters; D: training tokens; B: tokens of a batch. Each formula was fitted in a range of N and D, and is an
extrapolation outside of it, which `Suggestion.sentence` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm import model
from raylm.config import SUGGESTED, Experiment, corners, override
from raylm.console import format_number
from raylm.errors import ConfigError
from raylm.sweep.space import Space, keys
from raylm.sweep.start import Start

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Formula:
    """A published formula and where it holds."""

    name: str
    paper: str
    parameters: tuple[float, float]
    """The sizes of the models that it was fitted to."""
    with_embeddings: bool
    """Whether these sizes count embeddings."""
    tokens: tuple[float, float] | None
    """The training tokens that it was fitted to; None if they are given for each parameter."""
    tokens_per_parameter: float = 0.0
    """The fewest that it was fitted to."""

    @property
    def range(self) -> str:
        sizes = f"N of {_short(self.parameters[0])} to {_short(self.parameters[1])}"
        if self.tokens is None:
            return f"{sizes} and at least {self.tokens_per_parameter:g} tokens for each parameter"
        return f"{sizes} and D of {_short(self.tokens[0])} to {_short(self.tokens[1])}"

    def holds(self, parameters: int, tokens: int) -> bool:
        low, high = self.tokens or (0.0, math.inf)
        is_long = tokens >= self.tokens_per_parameter * parameters
        return self.parameters[0] <= parameters <= self.parameters[1] and low <= tokens <= high and is_long


STEP_LAW = Formula("Step Law", "Li et al. 2025, arXiv:2503.04715", (60e6, 1e9), False, (2e9, 100e9))
POWER_LINES = Formula("Power Lines", "Bergsma et al. 2025, arXiv:2505.13738", (111e6, 3.3e9), True, None, 20)


@dataclass(frozen=True)
class Suggestion:
    """A formula's value of a setting."""

    key: str
    value: Any
    """The value in the setting's range or among its choices that is nearest to the formula's."""
    sentence: str
    """The value, its formula, and whether the formula holds here."""


def suggestions(experiment: Experiment, model_config: PreTrainedConfig, tokens: int) -> list[Suggestion]:
    """The suggestions for the settings of tune.space that have formulas, for the experiment's model and these training
    tokens. They are computed for its other settings, whatever trials draw of them."""
    space, section = experiment.tune.space, experiment.train
    masked = experiment.objective.is_masked
    whole = model.num_parameters(model_config, masked=masked)
    inner = model.num_parameters(model_config, masked=masked, embeddings=False)
    unlike = _unlike(experiment)
    batch, rate = float(section.batch_tokens), section.learning_rate
    found: list[Suggestion] = []
    for key in SUGGESTED:  # in this order: each needs those before it
        if key not in space:
            continue
        formula, parameters = (POWER_LINES, whole) if key == "train.weight_decay" else (STEP_LAW, inner)
        match key:
            case "train.batch_tokens":
                computed = float(batch_tokens(tokens, experiment))
                value = batch = inside(space[key], computed)
            case "train.learning_rate":
                computed = _rounded(1.79 * inner**-0.713 * tokens**0.307)
                value = rate = inside(space[key], computed)
            case _:
                timescale = 1.084 * (tokens / whole) ** -0.527
                computed = _rounded(batch / (rate * tokens * timescale))
                value = inside(space[key], computed)
        found.append(Suggestion(key, value, _sentence(formula, key, value, computed, parameters, tokens, unlike)))
    return found


def batch_tokens(tokens: int, experiment: Experiment) -> int:
    """Step Law's batch for so many training tokens, in whole blocks of every worker, whichever size is drawn."""
    ((kind, values),) = experiment.tune.space.get("blocks.block_size", {"": ()}).items()
    sizes = values if kind in ("choice", "grid") else [experiment.blocks.block_size]
    step = math.lcm(*sizes) * experiment.cluster.most_workers
    return max(1, round(0.58 * tokens**0.571 / step)) * step


def start(experiment: Experiment, model_config: PreTrainedConfig, tokens: int) -> Start:
    """What a sweep with tune.points=suggested starts from; ConfigError if no trial can have the suggested values."""
    found = suggestions(experiment, model_config, tokens)
    point = {each.key: each.value for each in found}
    try:
        override(experiment, point)
    except ConfigError as error:
        raise ConfigError(f"tune.points=suggested: {error.message}", where="tune.points") from None
    return Start((point,), notes=tuple(f"suggested: {each.sentence}" for each in found))


def placeholder(space: Space) -> Start:
    """A start with as many trials as `start`, for a sweep of which the training tokens are not known yet."""
    return Start(({key: corners(key, space[key])[0][key] for key in SUGGESTED if key in space},))


def inside(sampler: Mapping[str, Any], value: float) -> Any:
    """The value of a sampler that is nearest to this one; of choices by their ratio."""
    ((kind, values),) = sampler.items()
    if kind in ("choice", "grid"):
        return min(values, key=lambda choice: abs(math.log(max(choice, 1e-12) / value)))
    if kind.endswith("randint"):
        return int(min(max(round(value), values[0]), values[1] - 1))
    if kind == "quniform":
        value = round(value / values[2]) * values[2]
    return float(min(max(value, values[0]), values[1]))


def _sentence(
    formula: Formula, key: str, value: Any, computed: float, parameters: int, tokens: int, unlike: list[str]
) -> str:
    taken = "" if value == computed else f", the nearest in tune.space to {format_number(computed)}"
    size = f"{_short(parameters)} parameters{'' if formula.with_embeddings else ' without embeddings'}"
    where = "inside" if formula.holds(parameters, tokens) else "outside"
    here = f"this run, with {size} and {_short(tokens)} tokens, is {where} of that range"
    others = f", and unlike those it was fitted to: {'; '.join(unlike)}" if unlike else ""
    return f"{key}={format_number(value)}{taken} ({formula.name}, {formula.paper}, for {formula.range}: {here}{others})"


def _unlike(experiment: Experiment) -> list[str]:
    """What sets a run apart from those that the formulas were fitted to: causal models from scratch with AdamW."""
    found = []
    if experiment.model.path is not None:
        found.append("it continues model.path")
    if experiment.objective.is_masked:
        found.append("its model is masked")
    if not experiment.train.optimizer.startswith("adamw"):
        found.append(f"train.optimizer={experiment.train.optimizer}")
    if sizes := [key for key in keys(experiment.tune.space) if key.startswith("model.")]:
        found.append(f"trials draw {sizes[0]}, and the value is for the experiment's own model")
    return found


def _rounded(value: float) -> float:
    """Three digits, which is more than a formula knows."""
    return float(f"{value:.3g}")


def _short(number: float) -> str:
    """1.2M for 1,234,567."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
