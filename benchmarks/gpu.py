"""What only a GPU can show: `python benchmarks/gpu.py`, on a machine with one. Not measured yet.

    step     tokens a second and MFU of GPT-2 of 124M and 1.3B parameters: raylm beside a hand-written loop, both with
             torch.compile, bfloat16, fused AdamW and the same batches. Goal: 0.95 of the loop
    trials   four trials of 10M parameters on one GPU at a time, beside one after another. Goal: 1.3 of that
    start    seconds from the command to the first step, beside a script with the Trainer
    sweep    a sweep of 8 such trials with ASHA, four at a time, from the command to its report
    checks   how often a step makes the host wait for the GPU, between two logged steps (torch's sync debug mode);
             that a gradient that is not finite ends a run without changing a weight, though nobody waits to look at it;
             that the same command gives the same bytes, also if it was stopped; that memory that runs out halves the
             micro-batch

    python benchmarks/gpu.py --parts step,trials    # some of them
    python benchmarks/gpu.py --tiny                 # a rehearsal with models that any CPU trains

Each part prints what it finds at once, and says so if it fails; the others follow. They are in the order of their
worth, because a machine with a GPU may be lent for minutes only: all are meant to take less than five.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import start

from raylm import api, budget, cluster, config, runs, tracking, training
from raylm import plan as plans
from raylm.errors import Diverged
from raylm.pipeline import stores
from raylm.tracking import journal
from raylm.training import launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SHOWN = re.compile("raylm|transformers/|accelerate/")


WARM = 10
"""Steps before those that are timed: they compile and allocate."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of GPT-2's kind, and its training."""

    layers: int
    width: int
    heads: int
    block: int
    batch: int
    """Blocks of a step, all at once."""
    steps: int
    vocabulary: int = 50304
    """Rows of the embedding: GPT-2's, in whole multiples of 128."""

    @property
    def tokens(self) -> int:
        return self.batch * self.block

    def settings(self, home: str, *others: str) -> list[str]:
        sizes = f"n_layer: {self.layers}, n_head: {self.heads}, n_embd: {self.width}, vocab_size: {self.vocabulary}"
        no_dropout = "resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0"
        return [
            f"storage={home}",
            "name=gpu",
            f"corpus.paths={home}/text.txt",
            "corpus.separator=\\n",
            "corpus.keep_any=[]",
            "corpus.max_chars=null",
            "tokenizer.train.vocab_size=1024",
            f"blocks.block_size={self.block}",
            f"model.config={{model_type: gpt2, {sizes}, {no_dropout}}}",
            f"train.batch_tokens={self.tokens}",
            f"train.micro_batch_tokens={self.tokens}",
            f"train.max_tokens={self.tokens * self.steps}",
            f"train.eval_every_tokens={self.tokens * self.steps}",
            "train.learning_rate=1e-4",
            "train.arguments.logging_steps=20",
            "eval.max_tokens=1000",
            "tracking.uri=null",
            *others,
        ]


WHOLE = {"124M": Size(12, 768, 12, 1024, 32, 60), "1.3B": Size(24, 2048, 16, 1024, 8, 40)}
SMALL = Size(6, 384, 6, 256, 32, 400, 4096)
TINY = {"tiny": Size(1, 64, 1, 32, 4, 16, 2048)}
TINY_SMALL = Size(1, 64, 1, 32, 4, 20, 2048)


def write_text(home: str) -> None:
    """Two megabytes of made-up words, 20 a line: nothing is learned from them but their frequencies."""
    import random

    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=drawn.randint(2, 9))) for _ in range(3000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    lines = [" ".join(drawn.choices(words, weights, k=20)) for _ in range(16000)]
    Path(home, "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


# Steps ---------------------------------------------------------------------------------------------------------------


def step(home: str, is_tiny: bool) -> None:
    for name, size in (TINY if is_tiny else WHOLE).items():
        ours, mfu = raylm_speed(home, size)
        loop = loop_speed(home, size)
        print(
            f"step, {name}: raylm {ours:,.0f} tokens/s, loop {loop['speed']:,.0f}: {ours / loop['speed']:.3f} of it "
            f"(goal 0.95); MFU of the loop {shown(loop['mfu'])}, of raylm {shown(mfu)} by its own count; losses after "
            f"the last step {loop['loss']:.3f} and {loop['raylm_loss']:.3f}",
            flush=True,
        )


def shown(mfu: float | None) -> str:
    return "unknown" if mfu is None else f"{mfu:.1%}"


def raylm_speed(home: str, size: Size) -> tuple[float, float | None]:
    """(tokens a second after the warm steps, MFU) of `raylm train`."""
    cpus = f"cluster.cpus_per_worker={cluster.cpus_here()}"
    job = job_of(size.settings(home, cpus, "train.precision=bfloat16", "train.compile=on"), patched(timed(home)))
    fit(job)
    began, ended = json.loads(Path(home, "times.json").read_text())
    losses = job.run.metric_history()["train/loss"]
    Path(home, "loss.json").write_text(json.dumps(losses[-1][1]))
    return (size.steps - WARM) * size.tokens / (ended - began), job.run.figures()["mfu"]


def timed(home: str) -> Callable[[Any], None]:
    """Writes when the warm steps and the last one were done, by the device."""

    def patch(trainer: Any) -> None:
        times: list[float] = []
        plain = trainer._Reporting.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step in (WARM, state.max_steps):
                self.trainer.costs._wait()
                times.append(time.perf_counter())
                Path(home, "times.json").write_text(json.dumps(times))
            plain(self, args, state, control, **more)

        trainer._Reporting.on_step_end = on_step_end

    return patch


def loop_speed(home: str, size: Size) -> dict[str, Any]:
    """What `loop` prints, in a process of its own, which frees the GPU's memory."""
    command = [sys.executable, __file__, "--loop", json.dumps(dataclasses.asdict(size)), "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return {**json.loads(done.stdout.splitlines()[-1]), "raylm_loss": json.loads(Path(home, "loss.json").read_text())}


def loop(size: Size, home: str) -> None:
    """Twenty lines of PyTorch on the blocks of the run, in its order and from its weights."""
    import numpy as np
    import torch

    from raylm import blocks, examples, model, tokens
    from raylm.training import peak_flops

    made = config.load(None, size.settings(home))
    store = tokens.open_store(plans.resolve_tokens(made).store)
    cut = blocks.build(store.train, made.blocks, store.frame("auto"))
    stream = examples.Stream(cut, seed=0, length=size.steps * size.batch)
    rows = torch.from_numpy(np.stack([stream[number] for number in range(len(stream))]).astype(np.int64))
    device = model.device()
    if device.type == "cuda":
        rows = rows.pin_memory()
        torch.backends.fp32_precision = "tf32"
    network = model.build(made.model, store.tokenizer, block_size=size.block, seed=0).to(device).train()
    compiled = torch.compile(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    began, loss = 0.0, torch.zeros(())
    for number in range(size.steps):
        ids = rows[number * size.batch : (number + 1) * size.batch].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number + 1 in (WARM, size.steps):
            if device.type == "cuda":
                torch.cuda.synchronize()
            began, before = time.perf_counter(), began
    speed = (size.steps - WARM) * size.tokens / (began - before)
    a_token = model.flops_per_token(network.config, model.parameters(network.config), block_size=size.block)
    peak = peak_flops.find(device, "bfloat16")
    print(json.dumps({"speed": speed, "mfu": peak and speed * a_token / peak, "loss": loss.item()}))


# Trials --------------------------------------------------------------------------------------------------------------

RATES = {"tune.space": {"train.learning_rate": {"grid": [1e-4, 2e-4, 4e-4, 8e-4]}}}


def trials(home: str, is_tiny: bool) -> None:
    size = TINY_SMALL if is_tiny else SMALL
    spans = {}
    for together in (1, 4):
        result = api.tune(
            swept(home, size, f"name=together-{together}", "tune.scheduler=none", together=together), resume="never"
        )
        spans[together] = span(f"{home}/together-{together}/{result.sweep}")
        mfus = ", ".join(shown(row.mfu) for row in result.trials)
        print(f"trials, {together} at a time: {spans[together]:.1f} s of training, MFU {mfus}", flush=True)
    print(f"trials: four at a time are {spans[1] / spans[4]:.2f} times as fast (goal 1.3)", flush=True)


def swept(home: str, size: Size, *settings: str, together: int) -> config.Experiment:
    import torch

    share = [f"cluster.gpus_per_worker={1 / together}"] if torch.cuda.is_available() else []
    several = f"tune.max_concurrent_trials={together}"
    return config.override(config.load(None, size.settings(home, *share, several, *settings)), RATES)


def span(directory: str) -> float:
    """Seconds from the first logged step of any trial of a sweep to the last."""
    times = []
    for trial in sorted(Path(directory).glob("trial_*")):
        points: dict[Any, Any] = {}
        journal.apply_metrics(journal.json_lines(str(trial), journal.METRICS_FILE).read()[0], points)
        times += [when / 1000 for (name, _), (_, when) in points.items() if name == "train/tokens"]
    return max(times) - min(times)


def sweep(home: str, is_tiny: bool) -> None:
    size = TINY_SMALL if is_tiny else SMALL
    rates = {"train.learning_rate": {"loguniform": [5e-5, 5e-3]}}
    made = swept(home, size, "name=sweep", f"train.eval_every_tokens={size.tokens * size.steps // 8}", together=4)
    made = config.override(config.override(made, {"tune.space": {}}), {"tune.space": rates, "tune.num_samples": 8})
    began = time.monotonic()
    result = api.tune(made, resume="never")
    took, trained = time.monotonic() - began, sum(row.tokens for row in result.trials)
    print(f"sweep: 8 trials with ASHA in {took:.1f} s, {trained / took:,.0f} tokens/s in all, {result!r}", flush=True)


def first_step(home: str, is_tiny: bool) -> None:
    place = Path(home, "start")
    place.mkdir()
    found = start.first_step(place, 1, 1 if is_tiny else 2)
    told = ", ".join(f"{name} {' '.join(f'{each:.2f}' for each in seconds)}" for name, seconds in found.items())
    print(f"start: seconds to the first step: {told}", flush=True)


# Checks --------------------------------------------------------------------------------------------------------------


def job_of(settings: list[str], session: type) -> training.TrainTask:
    made = config.load(None, settings)
    store, _ = stores.open_or_prepare(plans.resolve_tokens(made))
    begun = runs.start_or_resume(made, "train", store.fingerprint, "never")
    run = tracking.start(made.tracking, experiment="gpu", name=begun.name, tags={}, directory=begun.directory)
    return training.TrainTask(made, store.path, budget.for_store(made, store), run, begun.directory, session)


def fit(job: training.TrainTask, stop: bool = False) -> Any:
    with cluster.progress_channel(lambda value: None, print) as board:
        if stop:
            board.stop()
        resources = cluster.planned_resources(job.experiment.cluster)
        return launch.fit(dataclasses.replace(job, channel=board), resources)


def left(job: training.TrainTask, step: int) -> dict[str, str]:
    """File -> SHA-256 of what a checkpoint has of the model and the optimizer."""
    manifest = json.loads(Path(job.checkpoints.path(step), "manifest.json").read_text())
    return {name: manifest["files"][name]["sha256"] for name in ("model.safetensors", "optimizer.pt")}


def patched(patch: Any) -> type:
    class Patched(training.SingleProcess):
        def __init__(self) -> None:
            super().__init__()
            from raylm.training import trainer

            patch(trainer)

    return Patched


def counts_waits(file: Path) -> type:
    """Writes where in the code the host waited for the GPU between steps 10 and 90."""

    def patch(trainer: Any) -> None:
        import torch

        places: list[str] = []
        plain = trainer._Reporting.on_step_end

        def show(message: Any, *_: Any, **__: Any) -> None:
            if "synchroniz" in str(message):
                frames = [each for each in traceback.extract_stack() if SHOWN.search(each.filename)]
                places.append(" < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[:-3:-1]))

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 10:
                warnings.showwarning = show
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            if state.global_step == 90:
                torch.cuda.set_sync_debug_mode("default")
                file.write_text(json.dumps(places))
            plain(self, args, state, control, **more)

        trainer._Reporting.on_step_end = on_step_end

    return patched(patch)


def poisoned(trainer: Any) -> None:
    """Step 37's gradient is not a number."""
    import torch

    plain = trainer._Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = plain(self, *args, **kwargs)
        if self.state.global_step == 40:
            bad = [name for name, each in self.model.named_parameters() if not torch.isfinite(each).all()]
            assert not bad, bad
        return loss * float("nan") if self.state.global_step == 36 else loss

    trainer._Trainer.compute_loss = compute_loss


def hungry(trainer: Any) -> None:
    """Little is left of the GPU's memory."""
    import torch

    torch.cuda.set_per_process_memory_fraction(0.05)


def checks(home: str, is_tiny: bool) -> None:
    import torch

    size = dataclasses.replace(TINY_SMALL, steps=100) if is_tiny else Size(4, 256, 4, 256, 64, 100, 4096)

    def job(session: type, *settings: str) -> training.TrainTask:
        return job_of(size.settings(home, "cluster.cpus_per_worker=1", *settings), session)

    file = Path(home) / "waits.json"
    for precision in ("float32", "bfloat16") if torch.cuda.is_available() else ():
        fit(job(counts_waits(file), f"train.precision={precision}"))
        places = json.loads(file.read_text())
        print(f"{precision}: {len(places)} waits in 80 steps, logged every 20", flush=True)
        for place in sorted(set(places)):
            print(f"    {places.count(place):4} {place}", flush=True)
    try:
        fit(job(patched(poisoned)))
    except Diverged as error:
        print("poisoned at step 37:", error, flush=True)
    whole, other, cut = (job(training.SingleProcess) for _ in range(3))
    fit(whole)
    fit(other)
    print("the same command twice, the same bytes:", left(whole, 100) == left(other, 100), flush=True)
    stopped = fit(cut, stop=True)
    fit(cut)
    same = left(whole, 100) == left(cut, 100)
    print(f"stopped after step {stopped.step} and resumed, the same bytes:", same, flush=True)
    if torch.cuda.is_available():
        large = ("train.micro_batch_tokens=524288", "train.batch_tokens=524288", "train.max_tokens=1048576")
        outcome = fit(job(patched(hungry), *large))
        print("little memory: ended at step", outcome.step)


PARTS = {"step": step, "trials": trials, "start": first_step, "sweep": sweep, "checks": checks}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, by their names")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal, on any machine")
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--home", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        loop(Size(**json.loads(args.loop)), args.home)
        return
    failed = []
    with tempfile.TemporaryDirectory() as home:
        write_text(home)
        for name in args.parts.split(","):
            began = time.monotonic()
            try:
                PARTS[name](home, args.tiny)
            except Exception:
                traceback.print_exc()
                failed.append(name)
            print(f"-- {name} took {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
