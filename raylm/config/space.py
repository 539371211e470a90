"""tune.space: samplers of settings, and whole spaces to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raylm.config.setting_errors import show
from raylm.errors import did_you_mean

SAMPLERS = {
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "quniform": "[low, high, step]",
    "randint": "[low, high), whole numbers",
    "lograndint": "[low, high), whole numbers",
    "choice": "[a, b, ...], drawn",
    "grid": "[a, b, ...], all of them",
}

NOT_SWEPT = ("name", "storage", "corpus", "tokenizer", "cluster", "eval", "tracking", "tune")


def spaces(key: str, sampler: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The inner spaces that an entry of tune.space chooses from, if its key has no dot; None for a setting."""
    values = next(iter(sampler.values()), None) if {*sampler} <= {"choice", "grid"} else None
    chosen = "." not in str(key) and isinstance(values, list) and all(isinstance(value, dict) for value in values)
    return values if chosen else None


def is_sampler(value: Any) -> bool:
    """Whether a value in a space is drawn rather than fixed."""
    return isinstance(value, dict) and len(value) == 1 and {*value} <= {*SAMPLERS}


def corners(key: str, sampler: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings by which an entry of tune.space is checked: each choice, or both ends of a range."""
    inner_spaces = spaces(key, sampler)
    if inner_spaces is not None:
        found = []
        for space in inner_spaces:
            each = {inner: _ends(value) if is_sampler(value) else [value] for inner, value in space.items()}
            first = {inner: ends[0] for inner, ends in each.items()}
            found += [first, *({**first, inner: end} for inner, ends in each.items() for end in ends[1:])]
        return found
    return [{key: value} for value in _ends(sampler)]


def _ends(sampler: Mapping[str, Any]) -> list[Any]:
    ((name, values),) = sampler.items()
    if name in ("choice", "grid"):
        return list(values)
    return [values[0], values[1] - 1 if name.endswith("randint") else values[1]]


def entry_fault(key: str, sampler: dict[str, Any]) -> str | None:
    """The fault of an entry of tune.space that does not depend on the experiment; None if there is none."""
    inner_spaces = spaces(key, sampler)
    if inner_spaces is None:
        return sampler_fault(key, sampler)
    for number, space in enumerate(inner_spaces, 1):
        for inner, value in space.items():
            if "." not in str(inner):
                return f"space {number}: {inner} must be a dotted key; spaces in spaces are not taken"
            if is_sampler(value) and "grid" in value:
                return f"space {number}: {inner} must be drawn, got a grid; make it a choice"
            if fault := sampler_fault(inner, value if is_sampler(value) else {"choice": [value]}):
                return f"space {number}: {inner} {fault}"
    return None


def sampler_fault(key: str, sampler: dict[str, Any]) -> str | None:
    """The fault of a setting's sampler; None if there is none."""
    section = str(key).split(".")[0]
    if section in NOT_SWEPT:
        return f"{section} is one for a whole sweep; sweep model, blocks, objective or train settings"
    known = ", ".join(f"{name} {arguments}" for name, arguments in SAMPLERS.items())
    if len(sampler) != 1:
        return f"takes one sampler, got {show(sampler)}; samplers: {known}"
    ((name, values),) = sampler.items()
    if name not in SAMPLERS:
        guess = did_you_mean(str(name), SAMPLERS)
        return f"unknown sampler {name}{f', {guess}' if guess else ';'} samplers: {known}"
    if not isinstance(values, list) or not values:
        return f"{name} takes {SAMPLERS[name]}, got {show(values)}"
    if name in ("choice", "grid"):
        return None
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    count = 3 if name == "quniform" else 2
    if not numbers or len(values) != count or values[0] >= values[1]:
        return f"{name} takes {SAMPLERS[name]} with low < high, got {show(values)}"
    if name.startswith("log") and values[0] <= 0:
        return f"{name} needs low > 0, got {values[0]}"
    return None


def prior_fault(key: str, sampler: Mapping[str, Any], value: Any) -> str | None:
    """What is wrong with a value of tune.prior; None if its sampler can give it."""
    ((name, values),) = sampler.items()
    if spaces(key, sampler) is not None:
        return f"must be a setting, and {key} chooses between inner spaces"
    if name == "choice":
        return None if value in values else f"must be one of {values}, got {show(value)}"
    low, high = values[0], values[1] - 1 if name.endswith("randint") else values[1]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        return f"must be from {low:g} to {high:g}, as in tune.space, got {show(value)}"
    if name.endswith("randint") and value != int(value):
        return f"must be a whole number, got {show(value)}"
    return None


def gaussian_process_fault(space: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Why Optuna's Gaussian process cannot search a space; None if it can."""
    inner = [key for key, sampler in space.items() if spaces(key, sampler) is not None]
    if not inner:
        return None
    return (
        f"must be tpe with inner spaces in tune.space ({inner[0]}), got gp: a Gaussian process takes the same settings "
        "in every trial"
    )
