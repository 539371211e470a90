"""What it costs to say which differences are real: `python benchmarks/differences.py`, a few seconds.

Scores of made documents of skewed lengths, for 8 models of 10,000 documents: their intervals, the difference of each to
the best one, and its p by 10,000 flips of signs for all pairs of models. Prints seconds (the best of three) and the
memory that the process holds at most beyond what it held before, in megabytes.

2026-11-29, 2 cores shared with other work (load 14): 3.9 s and 75 MB.
"""

import argparse
import resource
import time

import numpy as np

from raylm import document_scores
from raylm.document_scores import DocumentScores
from raylm.results.differences import Scored, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--documents", type=int, default=10_000)
    arguments = parser.parse_args()
    models = made(arguments.models, arguments.documents)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        for model in models:
            document_scores.intervals(model.scores, model.measure)
        differences(models)
        seconds.append(time.perf_counter() - start)
    megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print(f"{arguments.models} models, {arguments.documents:,} documents: {min(seconds):.2f} s, {megabytes:.0f} MB")


def made(models: int, documents: int) -> list[Scored]:
    """Models that differ by 0.001 nats a token, each from the next."""
    generator = np.random.default_rng(0)
    tokens = np.maximum(5, generator.lognormal(5, 1, documents)).round()
    hardness = generator.gamma(8, 0.45, documents)
    found = []
    for number in range(models):
        nll = tokens * (hardness + generator.normal(0.001 * number, 0.05, documents))
        found.append(Scored(f"model {number}", DocumentScores(nll, tokens, 4 * tokens, "d"), "perplexity", "float32"))
    return found


if __name__ == "__main__":
    main()
