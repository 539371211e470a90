"""What the benchmarks share: measuring things in turn, because the machine's speed changes by a fifth from minute to
minute, and showing what was found."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping


def in_turn(ways: Mapping[str, Callable[[], float]], repeat: int, warm_up: int = 0) -> dict[str, list[float]]:
    """What each measures, `repeat` times one after the other, after `warm_up` times that do not count."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warm_up + repeat):
        for name, measure in ways.items():
            found[name].append(measure())
    return {name: values[warm_up:] for name, values in found.items()}


def ratios(found: Mapping[str, list[float]], name: str, beside: str) -> list[float]:
    """The ratio of two things in each turn."""
    return [one / other for one, other in zip(found[name], found[beside], strict=True)]


def show(found: Mapping[str, list[float]], unit: str, beside: str, as_json: bool = False) -> None:
    """Print medians, lowest and highest, and ratios to what stands beside; for bench.py also one line of JSON."""
    for name, values in found.items():
        ratio = statistics.median(ratios(found, name, beside))
        middle, low, high = (f"{value:,.4g}" for value in (statistics.median(values), min(values), max(values)))
        print(f"{name:<26} {middle:>8} {unit:<12} {low} to {high}   {ratio:.2f} of {beside}", flush=True)
    if as_json:
        print(json.dumps({"unit": unit, "found": found}), flush=True)
