"""A sweep of 20 trials: raylm tune beside the same trials one after another, each a plain Hugging Face Trainer script.

    python benchmarks/sweep.py                       # about 20 minutes on 2 cores, and more with precision auto
    python benchmarks/sweep.py --trials 8 --rows plain,raylm

The text is the built-in experiment's, with its tokenizer ready and its tokens not. The plain script reads the text
with `datasets`, maps the tokenizer over it and concatenates blocks, each with the cache of `datasets` that the first
trial fills, and evaluates and saves as often, on the same documents. Every trial has the same tokens, whatever its
block size. `overhead` is the time of a trial beyond its training, after the first two.

2026-11-23, 2 cores without bfloat16, two runs of two rows each:

    plain            656.1 s          overhead 9.6 s a trial
    raylm            389.6 s   0.59   overhead 0.5 s, best perplexity 218.64, 3,932,160 tokens

    plain            609.6 s          overhead 10.1 s a trial
    raylm + asha     105.4 s   0.17   overhead 0.4 s, best perplexity 218.64, 774,144 tokens

With ASHA trials wait after 1, 3 and 9 of their 16 evaluations, and one of three goes on. It found the same best trial
with other rungs too: after 2 and 6 of 16, one of three, in 162.6 s; after 2 and 8, one of four, in 128.8 s.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import turns

ROWS = {
    "plain": [],
    "raylm": ["tune.scheduler=none"],
    "raylm + asha": ["tune.scheduler={kind: asha, reduction_factor: 3, grace_tokens: 12_288}"],
    "raylm + precision auto": ["tune.scheduler=none", "train.precision=auto"],
}
EVALUATIONS = 16
SPACE = "{train.learning_rate: {loguniform: [5e-4, 2e-2]}, blocks.block_size: {choice: [64, 128, 256]}}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=196_608)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plain", type=json.loads)
    parser.add_argument("--home", type=Path)
    args = parser.parse_args()
    if args.plain:
        plain_trial(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        points = prepare(args, home)
        names = args.rows.split(",")
        ways = {name: functools.partial(timed, args, home, name, points) for name in names}
        turns.show(turns.in_turn(ways, args.repeat), "s", names[0], args.json)


def timed(args: argparse.Namespace, home: Path, name: str, points: list[dict]) -> float:
    """Seconds of all trials of a row."""
    seconds, told = plain(args, home, points) if name == "plain" else raylm(args, home, name)
    print(f"{name:<24} {seconds:7.1f} s   {told}", flush=True)
    return seconds


def settings(args: argparse.Namespace, home: Path, place: str) -> list[str]:
    return [
        "name=sweep",
        f"storage={home / place}",
        f"tokenizer.path={home / 'tokenizer'}",
        f"train.max_tokens={args.tokens}",
        f"train.eval_every_tokens={args.tokens // EVALUATIONS}",
        f"tune.num_samples={args.trials}",
        f"tune.space={SPACE}",
        f"tracking.uri=sqlite:///{home / place}/mlflow.db",
    ]


def prepare(args: argparse.Namespace, home: Path) -> list[dict]:
    """The tokenizer, the documents of both splits as JSON lines, and the settings of the trials."""
    from raylm import cluster, config, sweep
    from raylm import plan as plans
    from raylm.pipeline import stores

    made = config.load(None, [*settings(args, home, "first")[:2], "tokenizer.train={vocab_size: 2048}"])
    with cluster.connect(made.cluster):
        store, _ = stores.prepare(plans.resolve_tokens(made))
    store.tokenizer.save_pretrained(home / "tokenizer")
    for name, split in (("train", store.train), ("validation", store.validation)):
        texts = (store.tokenizer.decode(split[number]) for number in range(len(split)))
        (home / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = config.load(None, settings(args, home, "first"))
    points = sweep.searcher(made.tune, made.train.seed)
    return [points.draw(str(number)) for number in range(points.total)]


def plain(args: argparse.Namespace, home: Path, points: list[dict]) -> tuple[float, str]:
    began, losses, overheads = time.monotonic(), [], []
    for point in points:
        start = time.monotonic()
        command = [sys.executable, __file__, *sys.argv[1:], "--plain", json.dumps(point), "--home", str(home)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(run.stderr[-3000:])
        result = json.loads(run.stdout.splitlines()[-1])
        losses.append(result["eval_loss"])
        overheads.append(time.monotonic() - start - result["train_runtime"])
    late = overheads[2:] or overheads
    return time.monotonic() - began, f"overhead {sum(late) / len(late):.1f} s a trial, best eval_loss {min(losses):.3f}"


def plain_trial(args: argparse.Namespace) -> None:
    import datasets
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainingArguments,
    )

    from raylm import config  # for the sizes of the model alone

    datasets.disable_progress_bars()
    made, home, size = config.load(), args.home, args.plain["blocks.block_size"]
    tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer")
    tokenizer.pad_token = tokenizer.eos_token
    files = {name: str(home / f"{name}.jsonl") for name in ("train", "validation")}
    text = datasets.load_dataset("json", data_files=files, cache_dir=str(home / "cache"))
    tokens = text.map(
        lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]}, batched=True, remove_columns="text"
    )

    def grouped(rows):
        joined = [token for ids in rows["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        return {"input_ids": [joined[at : at + size] for at in range(0, len(joined) - size + 1, size)]}

    blocks = tokens.map(grouped, batched=True)
    sizes = {name: value for name, value in made.model.config.items() if name != "model_type"}
    eos = tokenizer.eos_token_id
    network = GPT2LMHeadModel(
        GPT2Config(**sizes, vocab_size=len(tokenizer), n_positions=size, bos_token_id=eos, eos_token_id=eos)
    )
    steps = args.tokens // made.train.batch_tokens
    with tempfile.TemporaryDirectory() as directory:
        run = Trainer(
            model=network,
            args=TrainingArguments(
                output_dir=directory,
                per_device_train_batch_size=made.train.batch_tokens // size,
                per_device_eval_batch_size=4096 // size,
                max_steps=steps,
                learning_rate=args.plain["train.learning_rate"],
                warmup_steps=made.train.warmup_steps,
                lr_scheduler_type="cosine",
                eval_strategy="steps",
                eval_steps=steps // EVALUATIONS,
                save_strategy="steps",
                save_steps=steps // EVALUATIONS,
                save_total_limit=2,
                logging_steps=max(1, steps // 100),
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=blocks["train"],
            eval_dataset=blocks["validation"],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        trained = run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    print(json.dumps({"eval_loss": min(losses), "train_runtime": trained.metrics["train_runtime"]}))


def raylm(args: argparse.Namespace, home: Path, name: str) -> tuple[float, str]:
    place = name.replace(" ", "")
    shutil.rmtree(home / place, ignore_errors=True)  # an earlier turn, whose tokens would be ready
    command = [sys.executable, "-m", "raylm.tune", "--json", *settings(args, home, place), *ROWS[name]]
    began = time.monotonic()
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TERM": "dumb"})
    seconds = time.monotonic() - began
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    result = json.loads(run.stdout)
    tokens = sum(trial["tokens"] for trial in result["trials"])
    told = f"best perplexity {result['best']['perplexity']:.2f}, {tokens:,} tokens"
    return seconds, f"overhead {overhead(home / place):.1f} s a trial, {told}"


def overhead(storage: Path) -> float:
    """Seconds from a trial's begin to its last logged loss, less its training: the mean, but for the first two."""
    (events,) = storage.glob("sweep/tune-*/events.jsonl")
    (directory,) = {events.parent}
    spans = []
    for trial in sorted(directory.glob("trial_*"))[2:]:
        lines = [json.loads(line) for line in (trial / "tracking.jsonl").read_text().splitlines()]
        times = [line["time"] for line in lines if "time" in line]
        metrics = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        steps = [(line["time"], line["step"]) for line in metrics if "train/loss" in line.get("metrics", {})]
        (first, at), (last, end) = steps[0], steps[-1]
        training = (last - first) * end / max(1, end - at)
        spans.append((last - min(times) - training) / 1000)
    return sum(spans) / len(spans) if spans else float("nan")


if __name__ == "__main__":
    main()
