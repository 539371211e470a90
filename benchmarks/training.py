"""Training speed: raylm beside a bare PyTorch loop and a plain Hugging Face Trainer, on the same blocks of text.

    python benchmarks/training.py                                    # GPT-2 4 x 256, vocabulary 8k, block 128, batch 8
    python benchmarks/training.py --layers 12 --width 768 --block 1024 --batch 32 --steps 60      # on a GPU

Each row is a process of its own, the rows in turn, all of it `--repeat` times; tokens a second are of the median step
after the first tenth. `environment` rows have raylm's settings of glibc's allocator (local_worker.WORKER_ENVIRONMENT).

raylm x 2 workers stands beside "bare loop x 2 processes", DDP by itself. Figures: docs/performance.md.

Two processes that never wait for each other have 1.18 of one of two threads; gloo takes that back, at this batch.
Beside a worker group Ray has processes of its own, 6 % of the CPU, and two workers on two cores leave them none. A
single worker has none beside it, as in `raylm train`, which stops Ray before its training if it needed it at all.

Not measured again with this one: `raylm + precision auto`, 1.19 of the Trainer when raylm itself was 1.13.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns

ROWS = {
    "bare loop": ("bare", "float32", False),
    "bare loop + environment": ("bare", "float32", True),
    "bare loop + fused AdamW": ("fused", "float32", True),  # the Trainer's optimizer, and the environment
    "Trainer": ("trainer", "float32", False),
    "Trainer + environment": ("trainer", "float32", True),
    "raylm": ("raylm", "float32", True),
    "raylm + precision auto": ("raylm", "auto", True),
    "raylm x 2 workers": ("raylm", "float32", True),
    "bare loop x 2 processes": ("twice", "float32", True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("layers", 4), ("width", 256), ("block", 128), ("batch", 8), ("steps", 120), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocabulary", type=int, default=8192)
    usual = ",".join(name for name in ROWS if " x 2 " not in name)  # for which a GPU is too few
    parser.add_argument("--rows", default=usual, help="by their names")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row")
    parser.add_argument("--home", type=Path)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measured(args)))
        return
    with tempfile.TemporaryDirectory() as home:
        prepare(args, home)
        ways = {name: functools.partial(measured_apart, args, name, home) for name in args.rows.split(",")}
        rates = turns.in_turn(ways, args.repeat)
    turns.show(rates, "tokens/s", "Trainer" if "Trainer" in rates else next(iter(rates)), args.json)


def measured_apart(args: argparse.Namespace, name: str, home: str) -> float:
    """Tokens a second of a row, in a process of its own."""
    from raylm.local_worker import WORKER_ENVIRONMENT

    *_, with_environment = ROWS[name]
    environment = {**os.environ, **(WORKER_ENVIRONMENT if with_environment else {})}
    command = [sys.executable, __file__, *sys.argv[1:], "--row", name, "--home", home]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{name}: {run.stderr[-3000:]}")
    result = json.loads(run.stdout.splitlines()[-1])
    print(f"{name:<26} {result['tokens_per_second']:>10,.0f} tokens/s   {result['told']}", flush=True)
    return result["tokens_per_second"]


def experiment(args: argparse.Namespace, home: str | Path, precision: str = "float32", workers: int = 1):
    from raylm import config

    batch_tokens = args.batch * args.block
    sizes = f"n_layer: {args.layers}, n_head: {args.width // 64}, n_embd: {args.width}"
    return config.load(
        None,
        [
            "name=speed",
            f"storage={home}",
            "corpus.paths=python://stdlib",
            "corpus.keep_any=[]",
            f"tokenizer.train.vocab_size={args.vocabulary}",
            f"blocks.block_size={args.block}",
            f"model.config={{model_type: gpt2, {sizes}}}",
            f"train.batch_tokens={batch_tokens}",
            f"train.micro_batch_tokens={batch_tokens // workers}",
            f"train.max_tokens={batch_tokens * args.steps}",
            f"train.eval_every_tokens={batch_tokens * args.steps}",
            "train.learning_rate=5e-4",
            "train.warmup_steps=0",
            "train.lr_scheduler_type=constant",
            f"train.precision={precision}",
            "eval.max_tokens=1000",
            "tracking.uri=null",
            f"cluster.num_workers={workers}",
            f"cluster.cpus_per_worker={len(os.sched_getaffinity(0)) // workers}",
        ],
    )


def prepare(args: argparse.Namespace, home: str) -> None:
    from raylm import cluster
    from raylm import plan as plans
    from raylm.pipeline import stores

    made = experiment(args, home)
    with cluster.connect(made.cluster):
        stores.prepare(plans.resolve_tokens(made))


def measured(args: argparse.Namespace) -> dict:
    kind, precision, _ = ROWS[args.row]
    times, losses = {"bare": bare, "fused": fused, "twice": bare_twice, "trainer": trainer, "raylm": raylm_run}[kind](
        args, precision
    )
    each = [after - before for before, after in itertools.pairwise(times)]
    rate = args.batch * args.block / statistics.median(each[len(each) // 10 :])
    return {"tokens_per_second": rate, "told": f"loss {losses:.4f}"}


def blocks_of(args: argparse.Namespace):
    """The store's examples in raylm's order of training, as rows of token ids; and the model of a run."""
    import torch

    from raylm import blocks, examples, model, tokens
    from raylm import plan as plans
    from raylm.pipeline import stores

    made = experiment(args, args.home)
    store, _ = stores.open_or_prepare(plans.resolve_tokens(made))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    cut = blocks.build(tokens.open_store(store.path).train, made.blocks, store.frame("auto"))
    stream = examples.Stream(cut, seed=0, length=args.steps * args.batch)
    network = model.build(made.model, store.tokenizer, block_size=args.block, seed=0, masked=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [stream[number] for number in range(len(stream))], network.to(device).train(), device


def fused(args: argparse.Namespace, precision: str) -> tuple[list[float], float]:
    return bare(args, precision, is_fused=True)


def bare(
    args: argparse.Namespace, precision: str, rank: int = 0, world: int = 1, is_fused: bool = False
) -> tuple[list[float], float]:
    import numpy as np
    import torch

    rows, network, device = blocks_of(args)
    if world > 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)) // world)
        network = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4, weight_decay=0.01, fused=is_fused or None)
    times, loss = [], torch.zeros(())
    for step in range(args.steps):
        mine = rows[step * args.batch + rank : (step + 1) * args.batch : world]
        ids = torch.from_numpy(np.stack(mine).astype(np.int64)).to(device)
        loss = network(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return times, float(loss)


def bare_twice(args: argparse.Namespace, precision: str) -> tuple[list[float], float]:
    """The bare loop in two processes, with DDP over gloo: what two workers could reach."""
    import torch

    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(bare_rank, (args, directory), nprocs=2)
        return tuple(json.loads(Path(directory, "times.json").read_text()))


def bare_rank(rank: int, args: argparse.Namespace, directory: str) -> None:
    import torch

    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/met", rank=rank, world_size=2)
    measured = bare(args, "float32", rank, 2)
    if rank == 0:
        Path(directory, "times.json").write_text(json.dumps(measured))
    torch.distributed.destroy_process_group()


def trainer(args: argparse.Namespace, precision: str) -> tuple[list[float], float]:
    """As in the Hugging Face course: a data set of blocks in memory, its collator, and the defaults."""
    import datasets
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

    from raylm import plan as plans
    from raylm.pipeline import stores

    rows, network, _ = blocks_of(args)
    store, _ = stores.open_or_prepare(plans.resolve_tokens(experiment(args, args.home)))
    store.tokenizer.pad_token = store.tokenizer.eos_token
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        run = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=directory,
                per_device_train_batch_size=args.batch,
                max_steps=args.steps,
                learning_rate=5e-4,
                weight_decay=0.01,
                lr_scheduler_type="constant",
                logging_steps=max(1, args.steps // 100),
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in rows]}),
            data_collator=DataCollatorForLanguageModeling(store.tokenizer, mlm=False),
            callbacks=[Times()],
        )
        run.train()
    return times, next(entry["loss"] for entry in reversed(run.state.log_history) if "loss" in entry)


def raylm_run(args: argparse.Namespace, precision: str) -> tuple[list[float], float]:
    """`raylm train` from its prepared tokens on."""
    import cloudpickle

    from raylm import budget, cluster, runs, tracking, training
    from raylm import plan as plans
    from raylm.local_worker import is_alone
    from raylm.pipeline import stores
    from raylm.training import launch

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    made = experiment(args, args.home, precision, workers=2 if "2 workers" in args.row else 1)
    file = Path(args.home) / "times.json"

    class Timed(training.RayTrainSession if made.cluster.most_workers > 1 else training.SingleProcess):
        def __init__(self) -> None:
            super().__init__()
            from raylm.training import trainer

            times: list[float] = []
            plain = trainer._Reporting.on_step_end

            def on_step_end(self, args, state, control, **more) -> None:
                times.append(time.perf_counter())
                if state.global_step == state.max_steps and self.trainer.session.rank == 0:
                    file.write_text(json.dumps(times))
                plain(self, args, state, control, **more)

            trainer._Reporting.on_step_end = on_step_end

    tokens = plans.resolve_tokens(made)
    resources = cluster.planned_resources(made.cluster) if is_alone(made.cluster) else None
    with contextlib.nullcontext(resources) if resources else cluster.connect(made.cluster) as resources:
        store, _ = stores.open_or_prepare(tokens)
        started = runs.start_or_resume(made, "train", store.fingerprint, "never")
        run = tracking.start(made.tracking, experiment="speed", name=started.name, tags={}, directory=started.directory)
        task = training.TrainTask(made, store.path, budget.for_store(made, store), run, started.directory, Timed)
        launch.fit(task, resources)
    return json.loads(file.read_text()), run.metric_history()["train/loss"][-1][1]


if __name__ == "__main__":
    main()
