"""The figure of a law: score against compute, a curve for each size, the frontier, and the prediction with its band."""

from __future__ import annotations

import math

import numpy as np

from raylm.console import format_number, label
from raylm.results.figures import Figure
from raylm.results.figures.data import ticks
from raylm.results.figures.primitives import Axis, Line
from raylm.scaling.law import FLOPS
from raylm.scaling.prediction import perplexity
from raylm.scaling.result import Scaling

SAMPLES = 40
"""Points of a curve."""


def build(scaling: Scaling) -> Figure:
    """Score against the floating-point operations of a training as the law counts them, 6 N D; both logarithmic."""
    score, fit = label(scaling.measure), scaling.fits["parameters"]
    best, law, predicted = scaling.observed.best, fit.law, scaling.prediction
    sizes = sorted({each.without_embeddings for each in best})
    lines: list[Line] = []
    texts: list[tuple[float, float, str]] = []
    for rank, size in enumerate(sizes):
        own = [each for each in best if each.without_embeddings == size]
        points, name = [(each.compute, each.perplexity) for each in own], f"{own[-1].parameters:,} parameters"
        about = "\n".join([name, *(f"{each.tokens:,} tokens: {each.perplexity:.2f}" for each in own)])
        shade = 0.7 * (1 - rank / max(1, len(sizes) - 1))  # the band of the prediction is lighter than all sizes
        lines.append(Line(name, "completed", points, about, shade))
        texts.append((*points[-1], _short(own[-1].parameters)))
    if not fit.unknown:
        most = max(best[-1].compute, predicted.compute if predicted is not None else 0.0)
        compute = np.geomspace(best[0].compute, 2 * most, SAMPLES)
        frontier = [(each, math.exp(law.loss(*law.optimal(each)))) for each in compute.tolist()]
        lines.append(Line("frontier", "setting", frontier, "the best that this compute can reach"))
        texts.append((*frontier[-1], "frontier"))
    if predicted is not None:
        horizons = np.geomspace(min(each.tokens for each in best), predicted.tokens, SAMPLES // 2).tolist()
        found = [perplexity(fit.predict(predicted.parameters, each)) for each in horizons]
        at = [float(FLOPS) * predicted.parameters * each for each in horizons]
        about = f"{predicted.parameters:,} parameters, predicted"
        for end in ("low", "high"):
            band = [(flops, getattr(each, end)) for flops, each in zip(at, found, strict=True)]
            lines.append(Line(f"95 % {end}", "completed", band, f"{about}: {end} end of 95 %", shade=1.0))
        lines.append(Line(about, "best", [(flops, each.value) for flops, each in zip(at, found, strict=True)], about))
        texts.append((at[-1], found[-1].value, f"{_short(predicted.parameters)}, predicted"))
    scores = [y for line in lines for _, y in line.points]
    flops = [x for line in lines for x, _ in line.points]
    orders = [(each, f"{each:.0e}") for each in ticks(min(flops), max(flops), True)]
    return Figure(
        "scaling",
        f"Validation {score} against compute",
        "A curve for each size, through its best training of each budget. The frontier, if the trainings tell it, is "
        "the least score that the compute can reach. Orange: the training that was asked about, between the two light "
        "green ends of its 95 % interval.",
        Axis("6 N D, FLOPs of a training", True, orders),
        Axis(score, True, [(each, format_number(each)) for each in ticks(0.9 * min(scores), 1.1 * max(scores), True)]),
        lines=lines,
        texts=texts,
    )


def _short(parameters: float) -> str:
    return f"{parameters / 1e6:.3g} M" if parameters >= 1e6 else f"{parameters / 1e3:.3g} k"
