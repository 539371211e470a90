"""Whether raylm scale can be believed: python benchmarks/scaling_law.py [made|chinchilla|speed]

made        losses that are made by a known law, with noise of 0.5 % (normal, or Student's t with 5 degrees of freedom):
            how often a new run at four times the compute of the largest is inside its 95 % interval, and how often each
            constant of the law is inside its own; for comparison, intervals from resampling the points themselves
chinchilla  the runs of Hoffmann et al. 2022 (arXiv:2203.15556) as Besiroglu et al. 2024 (arXiv:2404.10102) read them
            from their figure 4, without the five of the highest loss, as theirs: the constants, beside theirs
speed       CPU seconds of a fit with its intervals and with the largest run left out
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from raylm.scaling import law
from raylm.scaling.law import Fit, Law

TRUTH = Law(E=1.8, A=480.0, alpha=0.35, B=2100.0, beta=0.37)
NOISE = 0.005
DESIGNS = {
    "3 sizes, 3 horizons": ((1e6, 2.5e6, 6e6), (5, 10, 20)),
    "4 sizes, 4 horizons": ((1e6, 2e6, 4e6, 8e6), (5, 10, 20, 40)),
    "6 sizes, 4 horizons": ((1e6, 2e6, 4e6, 8e6, 16e6, 32e6), (5, 10, 20, 40)),
}
"""Parameters, and tokens a parameter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["made", "chinchilla", "speed"], default="chinchilla")
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", choices=CASES, action="append", help="of made; all of them by default")
    arguments = parser.parse_args()
    if arguments.what == "made":
        for case in arguments.case or CASES:
            CASES[case](arguments.draws, arguments.seed)
    elif arguments.what == "speed":
        speed(arguments.seed)
    else:
        chinchilla()


# Made losses ---------------------------------------------------------------------------------------------------------

Noise = Callable[[np.random.Generator, int], np.ndarray]


def normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return NOISE * generator.standard_normal(count)


def students(generator: np.random.Generator, count: int) -> np.ndarray:
    """Student's t with 5 degrees of freedom, of the same standard deviation."""
    return NOISE * generator.standard_t(5, count) / math.sqrt(5 / 3)


def covers(design: str, noise: Noise, draws: int, seed: int) -> None:
    """Prints in how many of the draws the intervals hold what they promise."""
    parameters, tokens = points(design)
    largest, its_tokens = parameters.max(), tokens.max()
    new = 2 * largest, 2 * its_tokens
    inside = dict.fromkeys(["a new run", *Law._fields], 0)
    off, widths = [], []
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        losses = TRUTH.loss(parameters, tokens) * np.exp(noise(generator, len(parameters)))
        run = TRUTH.loss(*new) * math.exp(noise(generator, 1)[0])
        fit = Fit(parameters, tokens, losses, seed=draw)
        predicted = fit.predict(*new)
        inside["a new run"] += predicted.low <= run <= predicted.high
        off.append(abs(math.log(predicted.value / run)))
        widths.append(math.log(predicted.high / predicted.low) / 2)
        for name, estimate in fit.intervals.items():
            inside[name] += estimate.low <= getattr(TRUTH, name) <= estimate.high
    shares = ", ".join(f"{name} {count / draws:.1%}" for name, count in inside.items())
    print(
        f"{design}, {noise.__name__} noise of {NOISE:.1%}, {draws} draws, seed {seed}: inside: {shares}; median "
        f"half interval {np.median(widths):.2%} of the loss, median error {np.median(off):.2%}",
        flush=True,
    )


def points(design: str) -> tuple[np.ndarray, np.ndarray]:
    sizes, ratios = DESIGNS[design]
    pairs = [(size, size * ratio) for size in sizes for ratio in ratios]
    parameters, tokens = np.array(pairs).T
    return parameters, tokens


def resampling(design: str, draws: int, seed: int) -> None:
    """Prints in how many of the draws a new run is inside the interval that fits to resampled points give."""
    parameters, tokens = points(design)
    new = 2 * parameters.max(), 2 * tokens.max()
    inside, widths = 0, []
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        losses = TRUTH.loss(parameters, tokens) * np.exp(normal(generator, len(parameters)))
        run = TRUTH.loss(*new) * math.exp(normal(generator, 1)[0])
        low, high = resampled(Fit(parameters, tokens, losses), new, generator)
        inside += low <= run <= high
        widths.append(math.log(high / low) / 2)
    print(
        f"{design}, points resampled, {draws} draws, seed {seed}: a new run inside {inside / draws:.1%}; median half "
        f"interval {np.median(widths):.2%} of the loss",
        flush=True,
    )


def resampled(fit: Fit, new: tuple[float, float], generator: np.random.Generator) -> tuple[float, float]:
    """The interval of a new run by 100 fits to points that are drawn from the points, with their residuals as noise."""
    target = np.log(fit.losses)
    residuals = target - np.log(fit.law.loss(fit.parameters, fit.tokens))
    bounds = list(zip(law.LOW, law.HIGH, strict=True))
    found = []
    for _ in range(100):
        drawn = generator.integers(0, len(target), len(target))
        some = tuple(each[drawn] for each in fit._points)
        fitted = minimize(
            law._summed, fit._constants, args=(target[drawn], some), jac=True, method="L-BFGS-B", bounds=bounds
        )
        found.append(law._law(fitted.x, fit._middle).loss(*new) * math.exp(generator.choice(residuals)))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


CASES = {
    "small": functools.partial(covers, "3 sizes, 3 horizons", normal),
    "middle": functools.partial(covers, "4 sizes, 4 horizons", normal),
    "large": functools.partial(covers, "6 sizes, 4 horizons", normal),
    "heavy tails": functools.partial(covers, "4 sizes, 4 horizons", students),
    "small, resampled": functools.partial(resampling, "3 sizes, 3 horizons"),
    "middle, resampled": functools.partial(resampling, "4 sizes, 4 horizons"),
}


# The runs of Chinchilla ----------------------------------------------------------------------------------------------

THEIRS = {
    "E": (1.81686, 0.02566), "A": (482.00572, 124.52232), "alpha": (0.34781, 0.01540),
    "B": (2085.43420, 1293.28410), "beta": (0.36585, 0.02060),
}  # fmt: skip
"""Besiroglu et al.'s constants and their standard errors, by resampling the points."""
OUTLIERS = 5


def read() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(parameters, training FLOPs, loss) of each run."""
    lines = Path(__file__).with_name("chinchilla.csv").read_text(encoding="utf-8").splitlines()
    rows = csv.reader(line for line in lines[1:] if not line.startswith("#"))
    parameters, flops, losses = np.array([[float(cell) for cell in row] for row in rows]).T
    kept = losses < np.sort(losses)[-OUTLIERS]
    return parameters[kept], flops[kept], losses[kept]


def chinchilla() -> None:
    parameters, flops, losses = read()
    fit = Fit(parameters, flops / law.FLOPS / parameters, losses)
    print(f"{len(losses)} runs, noise {fit.noise:.2%} of the loss, seed {fit.seed}")
    for name, estimate in fit.intervals.items():
        theirs, error = THEIRS[name]
        print(
            f"{name:>5} {estimate.value:10.4f} [{estimate.low:.4f}, {estimate.high:.4f}]; theirs {theirs:.4f} +- "
            f"{error:.4f}, {abs(estimate.value - theirs) / error:.2f} standard errors away"
        )
    left_out = fit.without_largest()
    print(
        f"the largest left out: loss {left_out.loss:.4f}, predicted {left_out.predicted.value:.4f} "
        f"[{left_out.predicted.low:.4f}, {left_out.predicted.high:.4f}]"
    )


# Speed ---------------------------------------------------------------------------------------------------------------


def speed(seed: int) -> None:
    generator = np.random.default_rng(seed)
    for count in (12, 25, 100):
        parameters = 10 ** generator.uniform(6, 8, count)
        tokens = parameters * generator.uniform(5, 40, count)
        losses = TRUTH.loss(parameters, tokens) * np.exp(normal(generator, count))
        start = time.process_time()
        fit = Fit(parameters, tokens, losses, covariance=1e-5 + 1e-7 * np.eye(count))
        fit.intervals, fit.predict(2e8, 4e9)
        whole = time.process_time() - start
        fit.without_largest()
        both = time.process_time() - start
        print(f"{count} points: {whole:.2f} s of CPU, with the largest left out {both:.2f} s", flush=True)


if __name__ == "__main__":
    main()
