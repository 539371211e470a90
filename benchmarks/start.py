"""Command to first optimizer step, with prepared tokens: raylm train beside a script that imports and runs the Trainer.

    python benchmarks/start.py

From the start of the process to the time that the first step's loss is logged; the two in turn, `--repeat` times.

2026-11-23, 2 cores, five times each: the script 6.9 s (5.5 to 7.5), raylm 10.8 s (10.1 to 12.2). With the worker as a
task of Ray it was 15.8 s the same day, beside a script of 6.1 s: Ray is up after 5 s and has a worker after 7, which
imports then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = ["train.max_tokens=2560", "train.batch_tokens=512", "train.eval_every_tokens=2560", "eval.max_tokens=1000"]

SCRIPT = """
import time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

class Told(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            print(time.time())

sizes = dict(vocab_size=2048, n_positions=64, n_layer=2, n_head=4, n_embd=128)
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 2048, (40, 64))]
Trainer(
    model=GPT2LMHeadModel(GPT2Config(**sizes)),
    args=TrainingArguments(output_dir="%s", max_steps=5, report_to="none", disable_tqdm=True, save_strategy="no"),
    train_dataset=rows,
    callbacks=[Told()],
).train()
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        raylm(home)  # which prepares the tokens
        seconds: dict[str, list[float]] = {"Trainer": [], "raylm": []}
        for _ in range(args.repeat):
            seconds["Trainer"].append(script(home))
            seconds["raylm"].append(raylm(home))
        for name, found in seconds.items():
            print(f"{name:<8} {statistics.median(found):5.1f} s   {min(found):.1f} to {max(found):.1f}")


def script(home: Path) -> float:
    began = time.time()
    done = subprocess.run([sys.executable, "-c", SCRIPT % home], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0]) - began


def raylm(home: Path) -> float:
    began = time.time()
    settings = [f"storage={home}/runs", f"tracking.uri=sqlite:///{home}/mlflow.db", "name=start", *SIZES]
    command = [sys.executable, "-m", "raylm.train", "--json", "--resume", "never", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout)["run"]
    lines = (home / "runs" / "start" / run / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return min(point["time"] for point in points if "train/loss" in point.get("metrics", {})) / 1000 - began


if __name__ == "__main__":
    main()
