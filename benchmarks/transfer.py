"""model.transfer: does the best learning rate of a small model stay best when the model is wider?

    python benchmarks/transfer.py coordinates     # two minutes: slopes of activations' sizes against width; with
                                                  # --optimizer muon ten, because it computes in bfloat16
    python benchmarks/transfer.py record          # an hour on 2 cores: trains each width with each learning rate
    python benchmarks/transfer.py                 # the best rate of each width, from transfer.jsonl

`record` adds to transfer.jsonl what it does not have yet, so it can be stopped and started again. The experiment is the
built-in one with a budget of 102,400 tokens; the base is 64 wide, so at this width both ways are one training.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import trainings

RECORD = Path(__file__).with_suffix(".jsonl")
BASE, WIDTHS, QUICK_WIDTHS = 64, (64, 256, 128), (64, 256)
RATES = tuple(2.0**power for power in range(-10, -3))
"""1e-3 to 6e-2."""
BUDGET, QUICK_BUDGET = 102_400, 25_600
SEEDS = range(10)
"""Of the coordinate check; the trainings have the first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["coordinates", "record", "show"], default="show")
    parser.add_argument("--record", type=Path, default=RECORD, metavar="FILE")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--quick", action="store_true", help="two widths and a quarter of the tokens")
    args = parser.parse_args()
    {"coordinates": coordinates, "record": record, "show": show}[args.what](args)


def settings(args: argparse.Namespace) -> list[str]:
    budget = QUICK_BUDGET if args.quick else BUDGET
    return [
        f"train.max_tokens={budget}",
        f"train.eval_every_tokens={budget}",
        "eval.max_tokens=20_480",
        f"train.optimizer={args.optimizer}",
    ]


# Coordinates


def coordinates(args: argparse.Namespace) -> None:
    """Print the slopes of gpt2 and llama, on the built-in text."""
    from raylm import config, plan
    from raylm.training import coordinates

    llama = (
        "{model_type: llama, hidden_size: 128, intermediate_size: 344, num_hidden_layers: 2, num_attention_heads: 8, "
        "num_key_value_heads: 4}"
    )
    with tempfile.TemporaryDirectory() as place:
        trainings.prepare(place)
        for name, shape in (("gpt2", []), ("llama", [f"model.config={llama}"])):
            given = [f"storage={place}", *trainings.SETTINGS, *shape, f"train.optimizer={args.optimizer}"]
            resolved = plan.resolve(config.load(None, given))
            assert resolved.prepared is not None, "its tokens are ready"
            found = coordinates.check(resolved.experiment, resolved.model_config, resolved.prepared.store, SEEDS)
            for way in ("with_transfer", "without"):
                for kind, of_kind in found[way].items():
                    slopes = ", ".join(f"{slope:+.3f}" for slope in of_kind["slopes"])
                    print(f"{name}, {args.optimizer}, {way}, {kind}: {slopes}", flush=True)


# Learning rates


def jobs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All trainings, the narrowest first; the base has no transfer, because it would be the same."""
    shared = {"optimizer": args.optimizer, "tokens": QUICK_BUDGET if args.quick else BUDGET, "seed": SEEDS[0]}
    return [
        {**shared, "width": width, "transfer": is_scaled, "learning_rate": rate}
        for width in (QUICK_WIDTHS if args.quick else WIDTHS)
        for is_scaled in ((False,) if width == BASE else (True, False))
        for rate in RATES
    ]


def record(args: argparse.Namespace) -> None:
    """Add each training that is not recorded to the file."""
    from raylm.errors import Diverged

    done = [{key: row[key] for key in row if key not in RESULT} for row in recorded(args.record)]
    with tempfile.TemporaryDirectory() as place:
        if left := [job for job in jobs(args) if job not in done]:
            trainings.prepare(place)
        for job in left:
            changes: dict[str, Any] = {
                "model.config.n_embd": job["width"],
                "model.config.n_head": job["width"] // 32,
                "train.learning_rate": job["learning_rate"],
                "train.seed": job["seed"],
            }
            if job["transfer"]:
                changes["model.transfer"] = {"base": {"n_embd": BASE}}
            started = time.monotonic()
            try:
                *_, perplexity = trainings.scores(place, settings(args), changes, {}).values()
            except Diverged:
                perplexity = math.inf
            seconds = time.monotonic() - started
            row = {**job, "perplexity": perplexity, "seconds": round(seconds, 1), "date": time.strftime("%Y-%m-%d")}
            with args.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


RESULT = ("perplexity", "seconds", "date")
"""What a row has besides the settings of its training."""


def recorded(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def show(args: argparse.Namespace) -> None:
    """Print the perplexity at each rate and width, and how far the best rate is from the base's."""
    rows = {
        (row["width"], row["transfer"], row["learning_rate"]): row["perplexity"]
        for row in recorded(args.record)
        if {key: row[key] for key in row if key not in RESULT} in jobs(args)
    }
    best_of_base = None
    print("width, transfer:", ", ".join(f"{rate:.1e}" for rate in RATES))
    for width, is_scaled in sorted({key[:2] for key in rows}):
        scores = [rows.get((width, is_scaled, rate)) for rate in RATES]
        line = ", ".join("-" if score is None else f"{score:.1f}" for score in scores)
        if None in scores:
            print(f"{width}, {is_scaled}: {line}")
            continue
        best = min(range(len(RATES)), key=lambda at: scores[at])
        best_of_base = best if width == BASE else best_of_base
        away = "" if best_of_base is None else f", {best - best_of_base:+d} from the base's"
        print(f"{width}, {is_scaled}: {line}; best {RATES[best]:.1e}{away}")


if __name__ == "__main__":
    main()
