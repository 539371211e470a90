"""What only a GPU can show: `python benchmarks/gpu.py`, on a machine with one.

how often a step makes the host wait for the GPU, between two logged steps (torch's sync debug mode)
that a gradient that is not finite ends a run without changing a weight, though nobody waits to look at it
that memory that runs out halves the micro-batch
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import cloudpickle

from raylm import budget, cluster, config, runs, tracking, training
from raylm import plan as plans
from raylm.errors import Diverged
from raylm.pipeline import stores
from raylm.training import launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SHOWN = re.compile("raylm|transformers/|accelerate/")


def job_of(home: str, session: type, *settings: str) -> training.TrainTask:
    made = config.load(
        None,
        [
            f"storage={home}",
            "name=gpu",
            "corpus.keep_any=[]",
            "corpus.max_chars=null",
            "blocks.block_size=256",
            "model.config={model_type: gpt2, n_layer: 4, n_head: 4, n_embd: 256, resid_pdrop: 0.1}",
            "train.batch_tokens=16384",
            "train.micro_batch_tokens=16384",
            "train.max_tokens=1638400",
            "train.eval_every_tokens=1638400",
            "eval.max_tokens=10000",
            "tracking.uri=null",
            "cluster.cpus_per_worker=1",
            *settings,
        ],
    )
    store, _ = stores.prepare(plans.resolve_tokens(made))
    begun = runs.start_or_resume(made, "train", store.fingerprint, "never")
    run = tracking.start(made.tracking, experiment="gpu", name=begun.name, tags={}, directory=begun.directory)
    return training.TrainTask(made, store.path, budget.for_store(made, store), run, begun.directory, session)


def fit(job: training.TrainTask, resources: Any, stop: bool = False) -> Any:
    with cluster.progress_channel(lambda value: None, print) as board:
        if stop:
            board.stop.remote()
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


def main() -> None:
    with tempfile.TemporaryDirectory() as home, cluster.connect(config.ClusterConfig()) as resources:
        file = Path(home) / "waits.json"
        for precision in ("float32", "auto"):
            settings = (f"train.precision={precision}", "train.arguments.logging_steps=20")
            fit(job_of(home, counts_waits(file), *settings), resources)
            places = json.loads(file.read_text())
            print(f"{precision}: {len(places)} waits in 80 steps, logged every 20", flush=True)
            for place in sorted(set(places)):
                print(f"    {places.count(place):4} {place}", flush=True)
        try:
            fit(job_of(home, patched(poisoned), "train.arguments.logging_steps=20"), resources)
        except Diverged as error:
            print("poisoned at step 37:", error, flush=True)
        whole, other, cut = (job_of(home, training.SingleProcess) for _ in range(3))
        fit(whole, resources)
        fit(other, resources)
        print("the same command twice, the same bytes:", left(whole, 100) == left(other, 100), flush=True)
        stopped = fit(cut, resources, stop=True)
        fit(cut, resources)
        same = left(whole, 100) == left(cut, 100)
        print(f"stopped after step {stopped.step} and gone on, the same bytes:", same, flush=True)
        large = ("train.micro_batch_tokens=524288", "train.batch_tokens=524288", "train.max_tokens=1048576")
        outcome = fit(job_of(home, patched(hungry), *large), resources)
        print("little memory: ended at step", outcome.step)


if __name__ == "__main__":
    main()
