"""Where a training step's time goes, by operator: `python benchmarks/step.py`, two minutes on 2 cores.

In one process a step of raylm's Trainer and a step of the bare loop of benchmarks/training.py alternate, each with a
model of its own, so that both see the same machine: first --steps of each, timed, then as many under torch.profiler.
The bare loop has the Trainer's optimizer (fused AdamW). Prints milliseconds a step (medians) and the operators whose
own time differs most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import training as loops
import turns

SHOWN = 12
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 256), ("block", 128), ("batch", 8), ("steps", 40)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    from raylm.local_worker import WORKER_ENVIRONMENT

    if not WORKER_ENVIRONMENT.items() <= os.environ.items():  # glibc reads its part when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **WORKER_ENVIRONMENT})
    with tempfile.TemporaryDirectory() as home:
        args.home, measured_steps = home, args.steps
        loops.prepare(args, home)
        args.steps = 2 * (measured_steps + WARM_UP)
        seconds, operators = alternate(args, measured_steps)
    rates = {name: [args.batch * args.block / each for each in values] for name, values in seconds.items()}
    for name, values in seconds.items():
        print(f"{name:<5} {1000 * statistics.median(values):7.1f} ms a step")
    for row in compared(operators):
        print("  ".join(f"{value:>8.1f}" if isinstance(value, float) else f"{value:<40}" for value in row))
    turns.show(rates, "tokens/s", "bare")
    if args.json:
        print(json.dumps({"unit": "tokens/s", "found": rates, "operators": compared(operators)}))


def alternate(args: argparse.Namespace, measured_steps: int) -> tuple[dict[str, list[float]], dict[str, list[dict]]]:
    """Seconds of each step that was timed, and of each profiled one the milliseconds by operator, of both loops."""
    import numpy as np
    import torch
    from torch.profiler import ProfilerActivity, profile

    from raylm import budget, runs, tracking, training
    from raylm import plan as plans
    from raylm.pipeline import stores
    from raylm.training import trainer

    rows, network, _ = loops.blocks_of(args)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=0.01, fused=True)
    seconds: dict[str, list[float]] = {"bare": [], "raylm": []}
    operators: dict[str, list[dict]] = {"bare": [], "raylm": []}
    running: dict[str, Any] = {}

    def bare_step(step: int) -> None:
        ids = torch.from_numpy(np.stack(rows[step * args.batch : (step + 1) * args.batch]).astype(np.int64))
        network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def start(name: str, step: int) -> None:
        if step >= measured_steps + WARM_UP:
            running["profile"] = profile(activities=[ProfilerActivity.CPU])
            running["profile"].__enter__()
        running.update(name=name, at=time.perf_counter())

    def stop(step: int) -> None:
        spent = time.perf_counter() - running["at"]
        if found := running.pop("profile", None):
            found.__exit__(None, None, None)
            operators[running["name"]].append(
                {event.key: event.self_cpu_time_total / 1000 for event in found.key_averages()}
            )
        elif step >= WARM_UP:
            seconds[running["name"]].append(spent)

    class Alternating(trainer._Reporting):
        """A whole turn of the Trainer's loop, from one start of a step to the next, with logging and reading."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step = state.global_step
            if step:
                stop(step - 1)
            start("bare", step)
            bare_step(step)
            stop(step)
            start("raylm", step)

    made = loops.experiment(args, args.home)
    store, _ = stores.open_or_prepare(plans.resolve_tokens(made))
    started = runs.start_or_resume(made, "train", store.fingerprint, "never")
    run = tracking.start(made.tracking, experiment="step", name=started.name, tags={}, directory=started.directory)
    task = training.TrainTask(
        made, store.path, budget.for_store(made, store), run, started.directory, training.SingleProcess
    )
    trainer._Reporting = Alternating
    with tempfile.TemporaryDirectory() as directory:
        trainer.build(task, training.SingleProcess(), Path(directory)).run()
    if found := running.pop("profile", None):  # the last step's, with the final evaluation and checkpoint
        found.__exit__(None, None, None)
    count = min(map(len, seconds.values()))
    return {name: values[:count] for name, values in seconds.items()}, operators


def compared(operators: dict[str, list[dict]]) -> list[list[Any]]:
    """[operator, ms of the bare loop, ms of raylm, difference]: those that differ most, and the sums of all."""
    names = {name for steps in operators.values() for step in steps for name in step}
    spent = {
        name: [statistics.median(step.get(name, 0.0) for step in operators[loop]) for loop in ("bare", "raylm")]
        for name in names
    }
    ranked = sorted(spent, key=lambda name: -abs(spent[name][1] - spent[name][0]))[:SHOWN]
    rows = [[name, *spent[name], spent[name][1] - spent[name][0]] for name in ranked]
    bare, ours = (sum(values[index] for values in spent.values()) for index in (0, 1))
    return [*rows, ["all operators", bare, ours, ours - bare]]


if __name__ == "__main__":
    main()
