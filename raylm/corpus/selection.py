"""Which documents to keep if that depends on other documents: duplicates, and corpus.max_documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from raylm.config import CorpusConfig, SplitName
from raylm.corpus.reader import Ledger, Shard, content_hash, kept

SEEN = np.dtype([("hash", np.uint64), ("source", np.uint16)])
"""The record of a document that passes the filters, for `select`."""

PRECEDENCE: tuple[SplitName, ...] = ("validation", "test", "train")
"""Of equal documents in several splits the one in the first of these is kept."""


def selected(corpus: CorpusConfig) -> bool:
    """Whether keeping a document depends on other documents, so that `select` is needed."""
    return corpus.deduplicate or corpus.max_documents is not None


def hashes(shard: Shard, corpus: CorpusConfig) -> bytes:
    """The SEEN of a shard's documents that pass the filters, 10 bytes each."""
    found = [(content_hash(encoded), part.source) for part, _, encoded in kept(shard, corpus, Ledger())]
    return np.array(found, SEEN).tobytes()


def select(plan: list[Shard], read: Callable[[list[Shard]], Iterator[bytes]], corpus: CorpusConfig) -> list[Shard]:
    """The shards with the documents to keep: one of each content, and corpus.max_documents in total.

    The sources take turns: the first document of each, then the second of each, and so on. The first document of a
    content is kept, with corpus.validation_paths before corpus.test_paths, and both before corpus.paths, so that no
    held-out text is trained on. Documents of corpus.test_paths do not count, and are all kept: the validation split is
    the same without them. `read` yields the SEEN of some shards in order and is consumed as far as needed. Holds 10
    bytes per document.
    """
    if not plan:
        return []
    most = corpus.max_documents
    tests = [number for number, shard in enumerate(plan) if shard.parts[0].split == "test"]
    counted = [number for number in range(len(plan)) if number not in set(tests)]
    order = [counted[at] for at in _in_turn([plan[number] for number in counted])] if most is not None else counted
    found = _seen(plan, order, read, corpus)
    found |= {
        number: np.frombuffer(chunk, SEEN)
        for number, chunk in zip(tests, read([plan[number] for number in tests]), strict=True)
    }
    read_shards = sorted(found)
    parts = [found[number] for number in read_shards]
    seen = np.concatenate(parts) if parts else np.empty(0, SEEN)
    splits = [PRECEDENCE.index(plan[number].parts[0].split) for number in read_shards]
    keep = _kept(seen, np.repeat(splits, [len(part) for part in parts]), corpus)
    chosen = []
    for number, mask in zip(read_shards, np.split(keep, np.cumsum([len(part) for part in parts])), strict=False):
        if most is not None:  # nothing is read after the last one
            mask = mask[: np.flatnonzero(mask)[-1] + 1] if mask.any() else mask[:0]
        if len(mask) or most is None:
            chosen.append(plan[number]._replace(keep=np.packbits(mask).tobytes(), num_bits=len(mask)))
    return chosen


def _seen(
    plan: list[Shard], order: Sequence[int], read: Callable[[list[Shard]], Iterator[bytes]], corpus: CorpusConfig
) -> dict[int, np.ndarray]:
    """The SEEN of the shards in this order, as far as corpus.max_documents needs them."""
    most = corpus.max_documents
    found: dict[int, np.ndarray] = {}
    left = Counter(part.source for number in order for part in plan[number].parts)
    look_at = most or 0
    for number, chunk in zip(order, read([plan[number] for number in order]), strict=True):
        found[number] = np.frombuffer(chunk, SEEN)
        left -= Counter(part.source for part in plan[number].parts)
        if most is None or sum(len(part) for part in found.values()) < look_at:
            continue
        different = _num_certain(found, left, corpus)
        if different >= most:
            break
        look_at = sum(len(part) for part in found.values()) + most - different
    return found


def _in_turn(plan: list[Shard]) -> list[int]:
    """The order in which to read shards: the first of each source, then the second of each, and so on."""
    num_read: Counter[int] = Counter()
    rounds = []
    for shard in plan:
        sources = {part.source for part in shard.parts}
        rounds.append(max((num_read[source] for source in sources), default=0))
        num_read |= Counter(dict.fromkeys(sources, rounds[-1] + 1))
    return sorted(range(len(plan)), key=rounds.__getitem__)


def _turns(source: np.ndarray) -> np.ndarray:
    """For each document, the number of earlier documents of its source."""
    by_source = np.argsort(source, kind="stable")
    _, first, counts = np.unique(source[by_source], return_index=True, return_counts=True)
    turns = np.empty(len(source), np.int64)
    turns[by_source] = np.arange(len(source)) - np.repeat(first, counts)
    return turns


def _num_certain(found: dict[int, np.ndarray], left: Counter[int], corpus: CorpusConfig) -> int:
    """The number of documents, or different ones, before the first that has not been read yet."""
    seen = np.concatenate([found[number] for number in sorted(found)])
    turns = _turns(seen["source"])
    unread = [source for source, parts in left.items() if parts > 0]
    certain = seen[turns < min((np.sum(seen["source"] == source) for source in unread), default=len(seen))]
    return len(np.unique(certain["hash"])) if corpus.deduplicate else len(certain)


def _kept(seen: np.ndarray, split: np.ndarray, corpus: CorpusConfig) -> np.ndarray:
    """Which documents to keep, as bools. `split`: that of each, as an index of PRECEDENCE."""
    most = corpus.max_documents
    order = np.arange(len(seen)) if most is None else np.argsort(_turns(seen["source"]), kind="stable")
    is_test = split[order] == PRECEDENCE.index("test")
    order, tests = order[~is_test], order[is_test]
    if not corpus.deduplicate:
        order = np.concatenate([order[:most], tests])
    else:
        firsts = np.sort(np.unique(seen["hash"][order], return_index=True)[1])
        order = order if most is None or len(firsts) <= most else order[: firsts[most]]
        order = np.concatenate([order, tests])
        order = order[np.argsort(split[order], kind="stable")]
        order = order[np.unique(seen["hash"][order], return_index=True)[1]]
    keep = np.zeros(len(seen), bool)
    keep[order] = True
    return keep
