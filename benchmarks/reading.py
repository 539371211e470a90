"""How fast training examples are read in random order: `python benchmarks/reading.py`, a minute on 2 cores.

The built-in corpus in blocks of 64, 128 and 256 tokens, one process:

    datasets   a Dataset of ready blocks, written and memory-mapped by `datasets`, rows by shuffled indices as NumPy
    raylm      blocks.Stream over the token store: blocks cut out of the documents when they are read

In turn, five times each; the fastest turn counts. Also the tenth example beside the ten thousandth: what it costs to go
on in the middle.

2026-11-23, 2 cores: 5.7, 11.5 and 22.8 million tokens/s at 64, 128 and 256 tokens, 13.1, 12.8 and 12.7 times those of
the Dataset; example 10 in 9.0, 9.0 and 9.2 us, example 10,000 in 11.9, 8.7 and 9.3 us.
"""

import tempfile
import time
from collections.abc import Callable

import numpy as np
from datasets import Dataset, disable_progress_bars, load_from_disk

from raylm import blocks, cluster, config
from raylm import plan as plans
from raylm.pipeline import stores

EXAMPLES = 20_000


def main() -> None:
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as home:
        settings = ["name=reading", f"storage={home}", "tokenizer.train={vocab_size: 8192}"]
        experiment = config.load(None, settings)
        with cluster.connect(experiment.cluster):
            store, _ = stores.prepare(plans.resolve_tokens(experiment))
        for size in (64, 128, 256):
            section = experiment.blocks.model_copy(update={"block_size": size})
            cut = blocks.build(store.train, section, store.frame("auto"))
            stream = blocks.Stream(cut, seed=0, length=EXAMPLES)
            Dataset.from_dict({"input_ids": [cut[index] for index in range(len(cut))]}).save_to_disk(f"{home}/{size}")
            rows = load_from_disk(f"{home}/{size}").with_format("numpy")
            order = [stream.index(k) for k in range(EXAMPLES)]
            assert all((rows[order[k]]["input_ids"] == stream[k]).all() for k in range(100))
            ways = {"datasets": lambda k, rows=rows, order=order: rows[order[k]], "raylm": stream.__getitem__}
            found = dict.fromkeys(ways, np.inf)
            for _ in range(5):
                for name, read in ways.items():
                    found[name] = min(found[name], seconds(read, range(EXAMPLES)) / EXAMPLES)
            tenth, far = (min(seconds(stream.__getitem__, [k]) for _ in range(100)) for k in (10, 10_000))
            rates = ", ".join(f"{name} {size / spent / 1e6:5.1f}" for name, spent in found.items())
            print(
                f"block {size:>3}: {rates} million tokens/s, {found['datasets'] / found['raylm']:.1f} times; "
                f"example 10 in {tenth * 1e6:.1f} us, example 10,000 in {far * 1e6:.1f} us",
                flush=True,
            )


def seconds(read: Callable, indices: range | list[int]) -> float:
    began = time.perf_counter()
    for index in indices:
        read(index)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
