"""What it costs to open a token store and to draw examples, at 1e9 and 1e12 tokens: `python benchmarks/scale.py`.

The manifests are made up, with as many shards as `prepare` cuts from so much text; no tokens lie behind them. A process
of its own opens each, cuts it into blocks of 1,024 and computes which block 1,000 examples of the second epoch are.

2026-11-23, 2 cores: 1.7 and 48 ms to open, 0.1 and 9.6 MB of memory, 8 and 195 ms for the first example, since an
epoch's order is drawn up then as tables of 2^10 and 2^15 entries, and 1.5 and 1.9 us for each of the next.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BYTES_A_TOKEN = 4


def main() -> None:
    for tokens in (10**9, 10**12):
        with tempfile.TemporaryDirectory() as directory:
            shards = simulate(Path(directory), tokens)
            run = subprocess.run([sys.executable, __file__, directory], capture_output=True, text=True, check=True)
            print(f"{tokens:.0e} tokens, {shards:,} shards: {run.stdout.strip()}", flush=True)


def simulate(directory: Path, tokens: int) -> int:
    total = tokens * BYTES_A_TOKEN
    most = min(max(8_000_000, total // 2048), 256_000_000)  # as corpus.shards has it
    count = -(-total // most)
    each = tokens // count
    shards = [
        {
            "file": f"train/shard-{number:05}.arrow",
            "documents": each // 800,
            "tokens": each,
            "bytes": most,
            "size": 2 * each,
        }
        for number in range(count)
    ]
    manifest = {
        "format": 2,
        "fingerprint": "f" * 16,
        "tokenizer": {"frames": {"auto": [0, 0]}, "vocab_size": 50_257, "files": {}},
        "sources": [],
        "ledger": {},
        "train": {"shards": shards},
        "validation": {"shards": []},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return count


def measure(directory: str) -> None:
    from raylm import blocks, examples, tokens
    from raylm.config import BlocksConfig

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    store = tokens.open_store(directory)
    cut = blocks.build(store.train, BlocksConfig(block_size=1024), store.frame("auto"))
    stream = examples.Stream(cut, seed=0, length=2 * len(cut))
    opened = time.perf_counter()
    stream.index(len(cut))
    first = time.perf_counter()
    for k in range(len(cut), len(cut) + 1000):
        stream.index(k)
    drawn = time.perf_counter()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{(opened - began) * 1000:.1f} ms to open, {(first - opened) * 1000:.1f} ms for the first example, "
        f"{(drawn - first) * 1000:.1f} us for the next, "
        f"{grown / 1000:.1f} MB of memory, {len(cut):,} blocks"
    )


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
