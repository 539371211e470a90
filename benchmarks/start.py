"""Command to first optimizer step, with prepared tokens: raylm train beside a script that imports and runs the Trainer.

    python benchmarks/start.py [--timeline DIRECTORY]

From the start of the process to the time that the first step's loss is logged: with one worker beside the script, with
two beside the script under torchrun, each pair in turn, `--repeat` times after one of each that is not counted. Then
`raylm --help` and `raylm train --dry-run`, from start to end. With --timeline a Chrome trace of one run with each
number of workers is written, for ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import compileall
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns

import raylm as package

SIZES = ["train.max_tokens=2560", "train.batch_tokens=512", "train.eval_every_tokens=2560", "eval.max_tokens=1000"]

SCRIPT = """
import os, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

class Told(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1 and os.environ.get("RANK", "0") == "0":
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
    parser.add_argument("--timeline", type=Path, help="a directory for Chrome traces")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        for workers in (1, 2):
            turns.show(first_step(home, workers, args.repeat), f"s, {workers} worker{'s' * (workers > 1)}", "script")
        imports = [sys.executable, "-c", "import torch; from transformers import Trainer, GPT2LMHeadModel"]
        whole = {
            "raylm --help": [sys.executable, "-m", "raylm", "--help"],
            "raylm train --dry-run": [sys.executable, "-m", "raylm.train", "--dry-run", *settings(home, 1)],
            "import of the Trainer": imports,
        }
        ways = {name: functools.partial(took, command) for name, command in whole.items()}
        turns.show(turns.in_turn(ways, args.repeat, warm_up=1), "s", "import of the Trainer")
        if args.timeline is not None:
            args.timeline.mkdir(exist_ok=True)
            for workers in (1, 2):
                raylm(home, workers, "--timeline", str(args.timeline / f"{workers}.json"))


def first_step(home: Path, workers: int, repeat: int) -> dict[str, list[float]]:
    """Seconds to the first step of the script and of raylm in turn, after one of each that does not count.

    raylm is compiled to bytecode first, as pip compiles whatever it installs, torch and transformers for example. Else
    the command compiles 129 modules and its worker 84 at each start where PYTHONDONTWRITEBYTECODE is set.
    """
    compileall.compile_dir(Path(package.__file__).parent, quiet=1)
    (home / "script.py").write_text(SCRIPT % home)
    ways = {"script": lambda: script(home, workers), "raylm": lambda: raylm(home, workers)}
    return turns.in_turn(ways, repeat, warm_up=1)  # the first raylm prepares the tokens


def script(home: Path, workers: int) -> float:
    """Seconds until the first step of the Trainer by itself."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if workers > 1 else []
    began = time.time()
    done = subprocess.run(
        [sys.executable, *torchrun, str(home / "script.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"} if workers > 1 else None,  # which torchrun sets with a warning
    )
    return float(done.stdout.split()[0]) - began


def settings(home: Path, workers: int) -> list[str]:
    places = [f"storage={home}/runs", f"tracking.uri=sqlite:///{home}/mlflow.db", "name=start"]
    return [*places, f"cluster.num_workers={workers}", *SIZES]


def raylm(home: Path, workers: int, *options: str) -> float:
    """Seconds until the first step of raylm train."""
    began = time.time()
    command = [sys.executable, "-m", "raylm.train", "--json", "--resume", "never", *options, *settings(home, workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    run = json.loads(done.stdout)["run"]
    lines = (home / "runs" / "start" / run / "metrics.jsonl").read_text().splitlines()
    points = [json.loads(line) for line in lines]
    return min(point["time"] for point in points if "train/loss" in point.get("metrics", {})) / 1000 - began


def took(command: list[str]) -> float:
    """Seconds that a command takes."""
    began = time.monotonic()
    subprocess.run(command, capture_output=True, check=True)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
