"""Muon beside AdamW at AdamW's best learning rate.

    python benchmarks/optimizers.py               # about ten minutes on 2 cores

The built-in experiment with 200,000 tokens; its model is half as wide. AdamW's rate is the best of RATES with seed 0;
then both train with it and three seeds.
"""

from __future__ import annotations

import argparse
import tempfile

import trainings

RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
SEEDS = (0, 1, 2)
SETTINGS = ("train.max_tokens=204_800", "train.eval_every_tokens=204_800", "model.config.n_embd=64")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as place:
        trainings.prepare(place, *SETTINGS)
        jobs = [(place, "adamw", rate, 0) for rate in RATES]
        by_rate = dict(zip(RATES, trainings.in_two_processes(score, jobs), strict=True))
        print("adamw by rate:", ", ".join(f"{rate:g} {found:.2f}" for rate, found in by_rate.items()), flush=True)
        best = min(by_rate, key=lambda rate: by_rate[rate])
        jobs = [(place, optimizer, best, seed) for seed in SEEDS for optimizer in ("adamw", "muon")]
        found = list(trainings.in_two_processes(score, jobs))
    for seed, adamw, muon in zip(SEEDS, found[::2], found[1::2], strict=True):
        print(f"seed {seed}: adamw {adamw:.2f}, muon {muon:.2f}: {muon / adamw - 1:+.1%}")


def score(place: str, optimizer: str, rate: float, seed: int) -> float:
    changes = {"train.optimizer": optimizer, "train.learning_rate": rate, "train.seed": seed}
    *_, last = trainings.scores(place, SETTINGS, changes, {}).values()
    return last


if __name__ == "__main__":
    main()
