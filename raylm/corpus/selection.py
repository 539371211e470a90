"""Which documents to keep if that depends on other documents: duplicates, and corpus.max_documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from raylm.config import CorpusConfig, SplitName
from raylm.corpus import minhash
from raylm.corpus.reader import Ledger, Shard, content_hash, held_out, kept

SEEN = np.dtype([("hash", np.uint64), ("source", np.uint16)])
"""The record of a document that passes the filters, for `select`."""

SEEN_NEAR = np.dtype([*SEEN.descr, ("bands", np.uint64, (minhash.BANDS,))])
"""The same with corpus.deduplicate: near."""

PRECEDENCE: tuple[SplitName, ...] = ("validation", "test", "train")
"""Of equal documents in several splits the one in the first of these is kept."""


def selected(corpus: CorpusConfig) -> bool:
    """Whether keeping a document depends on other documents, so that `select` is needed."""
    return bool(corpus.deduplicate) or corpus.max_documents is not None


def seen_type(corpus: CorpusConfig) -> np.dtype:
    """The record of a document, by corpus.deduplicate."""
    return SEEN_NEAR if corpus.deduplicate == "near" else SEEN


def hashes(shard: Shard, corpus: CorpusConfig) -> bytes:
    """The record of each of a shard's documents that pass the filters: 10 bytes, or 122 if near duplicates count."""
    documents = kept(shard, corpus, Ledger())
    return records(((content_hash(encoded), part.source, text) for part, text, encoded in documents), corpus)


def records(documents: Iterable[tuple[int, int, str]], corpus: CorpusConfig) -> bytes:
    """The record of each document, given as (hash, source, text), for `select`."""
    if corpus.deduplicate == "near":
        near = [(digest, source, minhash.bands(text)) for digest, source, text in documents]
        return np.array(near, SEEN_NEAR).tobytes()
    return np.array([(digest, source) for digest, source, _ in documents], SEEN).tobytes()


def select(
    plan: list[Shard],
    read: Callable[[list[Shard]], Iterator[bytes]],
    corpus: CorpusConfig,
    ledger: Ledger | None = None,
) -> list[Shard]:
    """The shards with the documents to keep: one of each content, and corpus.max_documents in total.

    The sources take turns: the first document of each, then the second of each, and so on. The first document of a
    content is kept, with corpus.validation_paths before corpus.test_paths, and both before corpus.paths, so that no
    held-out text is trained on. Documents of corpus.test_paths do not count, and are all kept: the validation split is
    the same without them. `read` yields the `hashes` of some shards in order and is consumed as far as needed. Holds
    their bytes. With near duplicates all is read, because a document may join groups that were different before.
    """
    if not plan:
        return []
    most = corpus.max_documents
    tests = [number for number, shard in enumerate(plan) if shard.parts[0].split == "test"]
    counted = [number for number in range(len(plan)) if number not in set(tests)]
    order = [counted[at] for at in _in_turn([plan[number] for number in counted])] if most is not None else counted
    found = _seen(plan, order, read, corpus)
    found |= {
        number: np.frombuffer(chunk, seen_type(corpus))
        for number, chunk in zip(tests, read([plan[number] for number in tests]), strict=True)
    }
    read_shards = sorted(found)
    parts = [found[number] for number in read_shards]
    seen = np.concatenate(parts) if parts else np.empty(0, seen_type(corpus))
    splits = np.repeat(
        [PRECEDENCE.index(plan[number].parts[0].split) for number in read_shards], [len(part) for part in parts]
    )
    groups = _groups(seen, corpus)
    keep = _kept(seen, groups, splits, corpus)
    if ledger is not None and corpus.deduplicate:
        ledger.update(_duplicates(seen, groups, splits, keep, corpus))
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
        found[number] = np.frombuffer(chunk, seen_type(corpus))
        left -= Counter(part.source for part in plan[number].parts)
        if most is None or corpus.deduplicate == "near" or sum(len(part) for part in found.values()) < look_at:
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


def _groups(seen: np.ndarray, corpus: CorpusConfig) -> np.ndarray:
    """For each document what it shares with its duplicates alone."""
    if corpus.deduplicate != "near":
        return seen["hash"]
    return minhash.components(seen["bands"])


def _duplicates(
    seen: np.ndarray, groups: np.ndarray, split: np.ndarray, keep: np.ndarray, corpus: CorpusConfig
) -> Counter[str]:
    """Counts of the documents left out as duplicates: those that are only nearly the same as the kept one, and those
    whose kept one is in another split, so that without corpus.deduplicate one text would be trained on and scored."""
    left_out = np.flatnonzero(~keep & np.isin(groups, groups[keep]))
    if not len(left_out):
        return Counter()
    kept_rows = np.flatnonzero(keep)
    kept_rows = kept_rows[np.argsort(groups[kept_rows], kind="stable")]
    first = kept_rows[np.searchsorted(groups[kept_rows], groups[left_out])]
    low, high = held_out(corpus)
    sides = np.where(seen["hash"] < low, 0, np.where(seen["hash"] >= high, 1, 2))
    sides = np.where(split == PRECEDENCE.index("train"), sides, split)
    counts = {
        "duplicates: near": int(np.sum(seen["hash"][left_out] != seen["hash"][first])),
        # By passages a document is in several splits.
        "duplicates: of another split": int(np.sum(sides[left_out] != sides[first])) * (corpus.split_by != "passage"),
    }
    return Counter({what: count for what, count in counts.items() if count})


def _kept(seen: np.ndarray, groups: np.ndarray, split: np.ndarray, corpus: CorpusConfig) -> np.ndarray:
    """Which documents to keep, as bools. `split`: that of each, as an index of PRECEDENCE."""
    most = corpus.max_documents
    order = np.arange(len(seen)) if most is None else np.argsort(_turns(seen["source"]), kind="stable")
    is_test = split[order] == PRECEDENCE.index("test")
    order, tests = order[~is_test], order[is_test]
    if not corpus.deduplicate:
        order = np.concatenate([order[:most], tests])
    else:
        firsts = np.sort(np.unique(groups[order], return_index=True)[1])
        order = order if most is None or len(firsts) <= most else order[: firsts[most]]
        order = np.concatenate([order, tests])
        order = order[np.argsort(split[order], kind="stable")]
        order = order[np.unique(groups[order], return_index=True)[1]]
    keep = np.zeros(len(seen), bool)
    keep[order] = True
    return keep
