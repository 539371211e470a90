"""How to hold out a validation split of a corpus: by documents or by passages, and how much of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from raylm.config import CorpusConfig
from raylm.corpus.file_part import FilePart
from raylm.corpus.passages import MOST_CHARS, passages
from raylm.corpus.reader import Ledger, Shard, content_hash, kept, shards
from raylm.corpus.selection import hashes, select, selected
from raylm.corpus.sources import HUB, Source

FEW_DOCUMENTS = 50
"""Fewer documents are split by passages: 5 % of them would be two documents, too few to rank trials."""

ENOUGH_UNITS = 30
"""Units of the validation split that suffice to rank trials."""

MOST_UNITS = 2_000
MOST_BYTES = 64_000_000
"""Bytes of text that are read: a few seconds at most."""


@dataclass(frozen=True)
class Holdout:
    """How a corpus is split. A unit, a document or a passage, falls on one side of the split as a whole."""

    split_by: Literal["document", "passage"]
    validation_fraction: float
    documents: int
    """Number of different kept documents: all of them if `complete`, else a lower bound."""
    units: int
    """Different units that were seen."""
    complete: bool
    """Whether all of the corpus was seen."""
    num_bytes: int
    """UTF-8 bytes of the kept text; if not `complete` estimated from the sizes of the files, 0 if none is known."""
    unit_bytes: int
    """Mean size of a unit in bytes; 0 if no unit was seen."""
    ledger: Mapping[str, int] = field(default_factory=dict)
    """What became of the documents that were read, by its name in the ledger."""


def holdout(sources: list[Source], corpus: CorpusConfig) -> Holdout:
    """How to split the corpus so that its validation split can rank trials, after a look at the text.

    The answer depends on the files and the corpus section alone. The text is read in this process, source after source,
    until MOST_UNITS units or MOST_BYTES are seen. A hub:// source is not read; it counts as many documents.

    `split_by` is corpus.split_by where that is given; else passage if there are fewer than FEW_DOCUMENTS documents.

    `validation_fraction` is corpus.validation_fraction, raised as far as needed for max(1, min(ENOUGH_UNITS, a fifth of
    the units)) different units in the validation split:

    - This is certain if all units were seen, or 5 x ENOUGH_UNITS of them, because their hashes are known. (It is only
    likely if corpus.max_documents leaves out documents of a corpus that was not seen whole.)
    - If not all were seen, and the fraction of as many as the files' sizes promise is twice ENOUGH_UNITS, it stays.
    - It holds on average if fewer were seen: then the documents are long, 64 MB of them fewer than 150.
    - A corpus of a single unit is not split: its fraction stays.

    With corpus.validation_paths, or a fraction of 0, there is nothing to decide: nothing is read and nothing changes.
    The answer is the same with and without a test split.
    """
    fraction = corpus.validation_fraction
    sources = [source for source in sources if source.split != "test"]
    on_disk = sum(source.num_bytes for source in sources if source.split == "train")
    if corpus.validation_paths or not fraction:
        return Holdout(corpus.split_by or "document", fraction, 0, 0, complete=False, num_bytes=on_disk, unit_bytes=0)
    local = [source for source in sources if not source.path.startswith(HUB)]
    # One part a shard, so that those which were not looked at can be counted.
    plan = [shard._replace(parts=(part,)) for shard in shards(local) for part in shard.parts]
    look = _look(plan, corpus)
    if look.complete and selected(corpus):
        look = _look(select(plan, lambda shards: (hashes(shard, corpus) for shard in shards), corpus), corpus)
    is_local = len(local) == len(sources)
    complete = look.complete and is_local
    num_documents = min(len(look.documents) + look.unread, corpus.max_documents or 2**63)
    if not is_local:
        num_documents = max(num_documents, FEW_DOCUMENTS)
    by_passage = num_documents < FEW_DOCUMENTS and corpus.tokens is None and not corpus.has_prompts
    split_by = corpus.split_by or ("passage" if by_passage else "document")
    units = sorted(look.passages if split_by == "passage" else look.documents)
    promised = len(units) * on_disk / look.ledger["bytes"] if is_local and look.ledger["bytes"] else 0.0
    promised = min(promised, corpus.max_documents or math.inf)
    if not complete and fraction * promised >= 2 * ENOUGH_UNITS:
        at_least = fraction
    elif len(units) > 1 and (complete or len(units) >= 5 * ENOUGH_UNITS):
        highest = units[max(1, min(ENOUGH_UNITS, len(units) // 5)) - 1]
        # In millionths, for people; one more, because the hash must be below it.
        at_least = (highest * 10**6 // 2**64 + 1) / 10**6
    elif not complete and is_local:
        fewest = num_documents if split_by == "document" else MOST_BYTES // (4 * MOST_CHARS)
        at_least = max(1, min(ENOUGH_UNITS, fewest // 5)) / fewest
    else:
        at_least = fraction
    num_bytes = seen = look.ledger["kept bytes"]
    if not complete and look.ledger["bytes"]:
        num_bytes = round(on_disk * num_bytes / look.ledger["bytes"])
    return Holdout(
        split_by,
        min(max(fraction, at_least), 1 - 1e-6),
        num_documents,
        len(units),
        complete,
        num_bytes=num_bytes or on_disk,
        unit_bytes=seen // max(1, len(units)),
        ledger=dict(look.ledger),
    )


class _Look(NamedTuple):
    documents: set[int]
    passages: set[int]
    """Content hashes; those of passages only while the corpus may be split by passages."""
    unread: int
    """A lower bound for the documents in the parts that were not read."""
    complete: bool
    ledger: Ledger


def _look(plan: list[Shard], corpus: CorpusConfig) -> _Look:
    documents: set[int] = set()
    cut: set[int] = set()
    ledger: Ledger = Ledger()

    def is_enough() -> bool:
        return ledger["bytes"] >= MOST_BYTES or len(cut if corpus.split_by == "passage" else documents) >= MOST_UNITS

    for number, shard in enumerate(plan):
        (part,) = shard.parts
        if is_enough() or (_is_document(part, corpus) and part.file.size > MOST_BYTES):
            return _Look(documents, cut, _fewest_documents(plan[number:], corpus), False, ledger)
        for _, text, encoded in kept(shard, corpus, ledger):
            documents.add(content_hash(encoded))
            if corpus.split_by == "passage" or len(documents) < FEW_DOCUMENTS:
                cut.update(content_hash(passage.encode()) for passage in passages(text))
            if is_enough():
                return _Look(documents, cut, _fewest_documents(plan[number + 1 :], corpus), False, ledger)
    return _Look(documents, cut, 0, True, ledger)


def _is_document(part: FilePart, corpus: CorpusConfig) -> bool:
    """Whether a part is one document, which is read as a whole."""
    return part.format in ("text", "python") and corpus.separator is None


def _fewest_documents(plan: list[Shard], corpus: CorpusConfig) -> int:
    parts = [part for shard in plan for part in shard.parts]
    return sum(1 if _is_document(part, corpus) else FEW_DOCUMENTS for part in parts)
