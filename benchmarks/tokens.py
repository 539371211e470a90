"""How fast the corpus becomes tokens: `python benchmarks/tokens.py --copies 8`, about 4 minutes on 2 cores.

Copies of the standard library's source, one byte-level BPE of 8192 entries trained on it. Three ways, in turns within
one run so that they share the machine's moods:

    plain      tokenizers' encode_batch_fast, 64 documents a call, all cores, texts in memory; on one copy
    slow       raylm's prepare with that encoder: files in, store out; on one copy
    fast       raylm's prepare with fastokens: files in, store out; on all copies

Reading, hashing, splitting, checksums and writing are in raylm's times, as is the check of the fast encoder; the
training of the tokenizer and the start of processes are not. Prints million tokens a second, and ratios to plain.

2026-11-23, 2 cores shared with other work (load 3 to 8), tokenizers 0.23.3, fastokens 0.3.5, three runs: plain 0.58,
0.25 and 0.48 million tokens a second; slow 1.09, 1.15 and 0.80 of it; fast 17.7, 19.2 and 21.0 times it.

With `--nodes 4` instead: raylm's prepare of all copies on a cluster of 1, 2, 3 and 4 nodes of one CPU each, which are
raylets of their own on this machine; million tokens a second, the ratio to one node, and whether the store has the same
manifest, which holds the checksum of every shard. More nodes than cores cannot be faster. docs/scaling.md has what
was seen.
"""

import argparse
import json
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import turns
from ray.cluster_utils import Cluster

from raylm import cluster, tokenizer, tokens
from raylm.config import ClusterConfig, CorpusConfig, TokenizerConfig, TrainedTokenizer
from raylm.corpus import Ledger, documents, list_sources, shards
from raylm.tokenizer import encoders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--nodes", type=int, help="compare 1 to so many nodes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        copy_library(root / "copies", arguments.copies)
        one = CorpusConfig(paths=f"{root}/copies/0", on_bad_row="skip")
        every = CorpusConfig(paths=f"{root}/copies", on_bad_row="skip")
        texts = [document.text for shard in shards(list_sources(one)) for document in documents(shard, one, Ledger())]
        tokenizer.train(texts, TrainedTokenizer(vocab_size=8192)).save_pretrained(root / "tokenizer")
        section = TokenizerConfig(path=f"{root}/tokenizer")
        if arguments.nodes:
            for turn in range(arguments.turns):
                on_nodes(arguments.nodes, one, every, section, root / f"nodes{turn}")
            return
        with cluster.connect(ClusterConfig()):
            prepare(one, section, root / "warm-up")  # starts Ray's workers, which import what they need once

            def slow() -> float:
                with mock.patch.object(encoders, "_Fast", side_effect=ValueError("a tokenizer it does not know")):
                    return prepare(one, section, root / "slow")[0]

            ways = {
                "plain": lambda: encode(texts, root / "tokenizer"),
                "slow": slow,
                "fast": lambda: prepare(every, section, root / "fast")[0],
            }
            turns.show(turns.in_turn(ways, arguments.turns), "Mtokens/s", "plain", arguments.json)


def copy_library(target: Path, copies: int) -> None:
    for number in range(copies):
        for file in list_sources(CorpusConfig(paths="python://stdlib"))[0].files:
            path = target / str(number) / Path(file.path).relative_to(sysconfig.get_path("stdlib"))
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, path)


def encode(texts: list[str], directory: Path) -> float:
    """Million tokens a second of tokenizers alone."""
    backend = tokenizer.load(directory).backend_tokenizer
    start = time.perf_counter()
    count = 0
    for first in range(0, len(texts), tokenizer.BATCH):
        batch = backend.encode_batch_fast(texts[first : first + tokenizer.BATCH], add_special_tokens=False)
        count += sum(len(encoding.ids) for encoding in batch)
    return count / (time.perf_counter() - start) / 1e6


def prepare(corpus: CorpusConfig, section: TokenizerConfig, storage: Path) -> tuple[float, dict[str, Any]]:
    """Million tokens a second of the whole way from files to store, and the store's manifest."""
    start = time.perf_counter()
    store, _ = tokens.prepare(corpus, section, storage=str(storage), sources=list_sources(corpus))
    seconds = time.perf_counter() - start
    shutil.rmtree(storage)
    return (store.train.num_tokens + store.validation.num_tokens) / seconds / 1e6, store.manifest


def on_nodes(most: int, one: CorpusConfig, every: CorpusConfig, section: TokenizerConfig, storage: Path) -> None:
    """Print how fast all copies are prepared on each number of nodes; one copy first, which starts Ray's workers."""
    alone: tuple[float, dict[str, Any]] | None = None
    for count in range(1, most + 1):
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for _ in range(count):
                nodes.add_node(num_cpus=1)
            with cluster.connect(ClusterConfig(address=nodes.address)):
                prepare(one, section, storage)
                speed, manifest = prepare(every, section, storage)
        finally:
            nodes.shutdown()
        alone = alone or (speed, manifest)
        found = {
            "nodes": count,
            "mtokens": round(sum(manifest[split]["tokens"] for split in ("train", "validation")) / 1e6, 1),
            "mtokens_per_second": round(speed, 2),
            "to_one_node": round(speed / alone[0], 2),
            "same_store": manifest == alone[1],
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
