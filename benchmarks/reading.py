"""How fast training examples are read in random order: `python benchmarks/reading.py`, a minute on 2 cores.

The source code of Python and of NumPy in blocks of 32 to 256 tokens, one process, as torch's DataLoader reads them: a
micro-batch of 8,192 tokens at a time (train.micro_batch_tokens).

    datasets   a Dataset of ready blocks, written and memory-mapped by `datasets`, rows by shuffled indices as NumPy
    raylm      examples.Stream over the token store: blocks cut out of the documents when they are read
    mixture    examples.Mixture of the two sources of the corpus, three parts of the smaller to one of the other

In turn, five times each. Also one example by itself: what it costs to go on in the middle.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable

import turns
from datasets import Dataset, disable_progress_bars, load_from_disk

from raylm import blocks, cluster, config, examples
from raylm import plan as plans
from raylm.pipeline import stores

EXAMPLES = 16_384
MICRO_BATCH_TOKENS = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as home:
        paths = "corpus.paths={stdlib: python://stdlib, numpy: python://numpy}"
        settings = ["name=reading", f"storage={home}", "tokenizer.train={vocab_size: 8192}", paths]
        experiment = config.load(None, settings)
        with cluster.connect(experiment.cluster):
            store, _ = stores.prepare(plans.resolve_tokens(experiment))
        for size in args.blocks:
            section = experiment.blocks.model_copy(update={"block_size": size})
            cut = blocks.build(store.train, section, store.frame("auto"))
            stream = examples.Stream(cut, seed=0, length=EXAMPLES)
            shares = section.model_copy(update={"mixture": {"stdlib": 1.0, "numpy": 3.0}})
            mixture = examples.build(store.train, shares, store.frame("auto"), seed=0, length=EXAMPLES)
            Dataset.from_dict({"input_ids": [cut[index] for index in range(len(cut))]}).save_to_disk(f"{home}/{size}")
            rows = load_from_disk(f"{home}/{size}").with_format("numpy")
            order = [stream.index(k) for k in range(EXAMPLES)]
            step = MICRO_BATCH_TOKENS // size
            batches = [range(first, first + step) for first in range(0, EXAMPLES, step)]
            assert all((rows[order[k]]["input_ids"] == stream[k]).all() for k in range(100))
            ways = {
                "datasets": lambda batch, rows=rows, order=order: rows.__getitems__([order[k] for k in batch]),
                "raylm": stream.rows,
                "mixture": mixture.rows,
            }
            rates = {
                name: lambda read=read, size=size, batches=batches: EXAMPLES * size / seconds(read, batches) / 1e6
                for name, read in ways.items()
            }
            found = turns.in_turn(rates, 5)
            one = min(seconds(stream.__getitem__, range(first, first + 100)) / 100 for first in range(0, 10_000, 100))
            print(f"block {size}, one example by itself {one * 1e6:.1f} us", flush=True)
            turns.show(found, "Mtokens/s", "datasets", args.json)


def seconds(read: Callable, each: Iterable) -> float:
    start = time.perf_counter()
    for numbers in each:
        read(numbers)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
