"""How fast training examples are read in random order: `python benchmarks/reading.py`, a minute on 2 cores.

The built-in corpus in blocks of 32 to 256 tokens, one process, as torch's DataLoader reads them: a micro-batch of 8,192
tokens at a time (train.micro_batch_tokens).

    datasets   a Dataset of ready blocks, written and memory-mapped by `datasets`, rows by shuffled indices as NumPy
    raylm      blocks.Stream over the token store: blocks cut out of the documents when they are read

In turn, five times each; the fastest turn counts. Also one example by itself: what it costs to go on in the middle.
"""

import tempfile
import time
from collections.abc import Callable, Iterable

import numpy as np
from datasets import Dataset, disable_progress_bars, load_from_disk

from raylm import blocks, cluster, config
from raylm import plan as plans
from raylm.pipeline import stores

EXAMPLES = 16_384
MICRO_BATCH_TOKENS = 8192


def main() -> None:
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as home:
        settings = ["name=reading", f"storage={home}", "tokenizer.train={vocab_size: 8192}"]
        experiment = config.load(None, settings)
        with cluster.connect(experiment.cluster):
            store, _ = stores.prepare(plans.resolve_tokens(experiment))
        for size in (32, 64, 128, 256):
            section = experiment.blocks.model_copy(update={"block_size": size})
            cut = blocks.build(store.train, section, store.frame("auto"))
            stream = blocks.Stream(cut, seed=0, length=EXAMPLES)
            Dataset.from_dict({"input_ids": [cut[index] for index in range(len(cut))]}).save_to_disk(f"{home}/{size}")
            rows = load_from_disk(f"{home}/{size}").with_format("numpy")
            order = [stream.index(k) for k in range(EXAMPLES)]
            step = MICRO_BATCH_TOKENS // size
            batches = [range(first, first + step) for first in range(0, EXAMPLES, step)]
            assert all((rows[order[k]]["input_ids"] == stream[k]).all() for k in range(100))
            ways = {
                "datasets": lambda batch, rows=rows, order=order: rows.__getitems__([order[k] for k in batch]),
                "raylm": stream.rows,
            }
            found = dict.fromkeys(ways, np.inf)
            for _ in range(5):
                for name, read in ways.items():
                    found[name] = min(found[name], seconds(read, batches) / EXAMPLES)
            one = min(seconds(stream.__getitem__, range(first, first + 100)) / 100 for first in range(0, 10_000, 100))
            rates = ", ".join(f"{name} {size / spent / 1e6:5.1f}" for name, spent in found.items())
            print(
                f"block {size:>3}: {rates} million tokens/s, {found['datasets'] / found['raylm']:.1f} times; "
                f"one example {one * 1e6:.1f} us",
                flush=True,
            )


def seconds(read: Callable, each: Iterable) -> float:
    start = time.perf_counter()
    for numbers in each:
        read(numbers)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
