"""How much memory prepare takes: `python benchmarks/memory.py --megabytes 30 300 3000`, about 5 minutes on 2 cores.

One JSONL file of the standard library's source, over and over, each document with random words that no cache has seen.
While `python -m raylm.prepare` runs on it, the private memory (USS: what would be free if the process ended, so without
shared pages and memory maps) of the command and of Ray's task processes is read five times a second. Prints the peaks
in MB: they should not grow with the corpus.

2026-11-23, 2 shared cores, fastokens 0.3.5, peaks of the command, of one task process, of all of them:
     30 MB    511   351   1027
    300 MB    519   374   1064
   3000 MB    475   400   1132    87 seconds in all
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from raylm.config import CorpusConfig
from raylm.corpus import Ledger, documents, list_sources, shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[30, 300, 3000])
    arguments = parser.parse_args()
    library = CorpusConfig(paths="python://stdlib")
    texts = [
        document.text for shard in shards(list_sources(library)) for document in documents(shard, library, Ledger())
    ]
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "corpus.jsonl"
            write(path, texts, megabytes * 1_000_000)
            print(json.dumps({"megabytes": megabytes, **peaks(path, Path(directory))}), flush=True)


def write(path: Path, texts: list[str], num_bytes: int) -> None:
    draw = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        while True:
            for text in texts:
                words = " ".join(f"{draw.getrandbits(48):x}" for _ in range(len(text) // 500))
                file.write(json.dumps({"text": f"{text}\n{words}"}) + "\n")
                if file.tell() >= num_bytes:
                    return


def peaks(path: Path, storage: Path) -> dict[str, float]:
    """Peak MB of the command, of its largest task process and of all of them together, and its seconds."""
    command = [sys.executable, "-m", "raylm.prepare", f"corpus.paths={path}", f"storage={storage}"]
    start = time.monotonic()
    driver = psutil.Popen([*command, "tokenizer.train={vocab_size: 8192}"], stdout=subprocess.DEVNULL)
    most = {"driver": 0.0, "task": 0.0, "tasks": 0.0}
    while driver.poll() is None:
        tasks = [private(process) for process in driver.children(recursive=True) if is_task(process)]
        now = {"driver": private(driver), "task": max(tasks, default=0), "tasks": sum(tasks)}
        most = {name: max(most[name], now[name]) for name in most}
        time.sleep(0.2)
    assert driver.returncode == 0
    return {**{name: round(value) for name, value in most.items()}, "seconds": round(time.monotonic() - start)}


def is_task(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::")
    except psutil.NoSuchProcess:
        return False


def private(process: psutil.Process) -> float:
    try:
        return process.memory_full_info().uss / 1e6
    except psutil.NoSuchProcess:
        return 0.0


if __name__ == "__main__":
    main()
