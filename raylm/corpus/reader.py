"""Shards of files -> documents: hashed, filtered, counted, and each in one split.

A hash of the content decides the split of a document or passage, so duplicates fall in the same split in any order and
process:

    0                validation_fraction                       1 - test_fraction                1    of all hashes
    |   validation   |                 training                |             test              |

Each of the two is the same, whatever the other one is. The ledger counts all that is left out, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from raylm.config import CorpusConfig, SplitName
from raylm.corpus.columns import Answered
from raylm.corpus.file_part import BadDocument, FilePart
from raylm.corpus.formats import split, texts, whole_file
from raylm.corpus.passages import passages
from raylm.corpus.sources import File, Source
from raylm.errors import DataError

Ledger = Counter  # what happened to documents -> how many; "bytes" are UTF-8 bytes of the documents that were read


class Shard(NamedTuple):
    """What one task reads and writes."""

    parts: tuple[FilePart, ...]
    num_bytes: int
    """On disk."""
    keep: bytes | None = None
    """Which of the documents that pass the filters to keep, as bits of numpy.packbits; default all."""
    num_bits: int = 0
    """Number of documents that `keep` covers; with corpus.max_documents no document after them is read."""

    @property
    def sources(self) -> list[int]:
        """The indices of its sources, in the order of its parts."""
        return list(dict.fromkeys(part.source for part in self.parts))


class Document(NamedTuple):
    """A document; with corpus.split_by: passage a held-out passage, or the text between two of them."""

    text: str
    num_bytes: int
    """UTF-8 bytes of the text, or of its answers."""
    hash: int
    """64 bits of blake2b of the text, with prompts of text and answer, of a conversation of its messages: the same
    everywhere, and with every tokenizer."""
    source: int
    split: SplitName
    file: File
    answers: tuple[tuple[int, int], ...] | None = None
    """(first character, one after the last) of each part of the text that is learned and scored; None: all of it."""

    @property
    def prompt(self) -> str:
        """What stands before the first answer; without answers all of the text."""
        return self.text[: self.answers[0][0]] if self.answers else self.text


def nothing_left(ledger: Mapping[str, int]) -> DataError:
    """The error for a corpus without a document to train on, with what became of those that were read."""
    why = ", ".join(f"{what}: {count:,}" for what, count in ledger.items()) or "documents: 0"
    return DataError(f"corpus: no document is left to train on; of what was read, {why}", "corpus")


# Shards --------------------------------------------------------------------------------------------------------------


def shards(sources: list[Source]) -> list[Shard]:
    """The work of each task, in the order of the sources: a function of the files alone, not of the cluster.

    A file that is added or removed changes the shards next to it alone, because names and sizes of files decide where a
    shard ends: so a corpus that has grown shares its other shards with what it was.
    """
    # Without corpus.test_paths, so that the shards of the other splits are the same with it.
    most = _most_bytes(sum(source.num_bytes for source in sources if source.split != "test"))
    made: list[Shard] = []
    parts: list[FilePart] = []
    size = 0
    is_last = False
    for index, source in enumerate(sources):
        for file in source.files:
            for part, num_bytes in split(whole_file(file, index, source), most):
                if parts and (is_last or size + num_bytes > most or part.split != parts[-1].split):
                    made.append(Shard(tuple(parts), size))
                    parts, size = [], 0
                parts.append(part)
                size += num_bytes
                is_last = _is_last(part, num_bytes, most)
    return [*made, Shard(tuple(parts), size)]


def _most_bytes(total: int) -> int:
    """Of a shard, on disk, by those of the corpus: one of six sizes, so that it stays the same while a corpus grows."""
    # 8 MB keep a laptop's cores busy on 30 MB of text. Each shard is a memory map, so there are at most some thousand.
    sizes = [8_000_000 * 2**power for power in range(6)]
    return next((size for size in sizes if size * 2048 >= total), sizes[-1])


def _is_last(part: FilePart, num_bytes: int, most: int) -> bool:
    """Whether a shard ends with this part, by a hash of its name: on average once in `most` bytes."""
    name = f"{os.path.basename(part.file.path)} {part.file.size} {part.start}"
    return content_hash(name.encode(errors="surrogateescape")) * most < 2**64 * num_bytes


# Documents -----------------------------------------------------------------------------------------------------------


def documents(
    shard: Shard,
    corpus: CorpusConfig,
    ledger: Ledger,
    reject: Callable[[File, BadDocument], None] = lambda file, fault: None,
) -> Iterator[Document]:
    """The documents of a shard in the order of its files, each in one split.

    With corpus.split_by: passage each document of corpus.paths is cut into parts; joined in order they are its text.
    """
    validation_below, test_from = held_out(corpus)

    def split_of(digest: int) -> SplitName:
        return "validation" if digest < validation_below else "test" if digest >= test_from else "train"

    by_passage = corpus.split_by == "passage" and (validation_below or test_from < 2**64)
    for part, text, encoded in kept(shard, corpus, ledger, reject):
        if by_passage and part.split == "train":
            yield from _split(text, part, split_of, ledger)
            continue
        digest = content_hash(encoded)
        split = split_of(digest) if part.split == "train" else part.split
        if isinstance(text, Answered):
            own = text.answer.encode()
            digest = content_hash(encoded + b"\0" + own)  # another document than the text as a whole
            answers = ((text.answer_at, len(text)),)
            yield Document(text, len(own), digest, part.source, split, part.file, answers)
        else:
            yield Document(text, len(encoded), digest, part.source, split, part.file)


def held_out(corpus: CorpusConfig) -> tuple[float, float]:
    """(below which hash a unit of corpus.paths is in the validation split, from which on it is in the test split)."""
    validation_below = 0.0 if corpus.validation_paths else corpus.validation_fraction * 2**64
    test_from = (1.0 if corpus.test_paths else 1 - corpus.test_fraction) * 2**64
    return validation_below, test_from


def _split(text: str, part: FilePart, split_of: Callable[[int], SplitName], ledger: Ledger) -> Iterator[Document]:
    """Each held-out passage as a document of its own, the text between two of them as a training document.

    Training passages are joined, so that the model sees long stretches of text, with an end-of-text token only where a
    passage is held out. Held-out passages are never joined, not even neighbours, because scores are compared document
    by document.
    """

    def document(text: str, split: SplitName) -> Document:
        encoded = text.encode()
        return Document(text, len(encoded), content_hash(encoded), part.source, split, part.file)

    training: list[str] = []
    for passage in passages(text):
        ledger["passages"] += 1
        split = split_of(content_hash(passage.encode()))
        if split == "train":
            training.append(passage)
            continue
        if training:
            yield document("".join(training), "train")
            training = []
        yield document(passage, split)
    if training:
        yield document("".join(training), "train")


def kept(
    shard: Shard,
    corpus: CorpusConfig,
    ledger: Ledger,
    reject: Callable[[File, BadDocument], None] = lambda file, fault: None,
) -> Iterator[tuple[FilePart, str, bytes]]:
    """(part, text, UTF-8 bytes) of the documents of a shard that pass the filters and are selected, in order.

    The ledger counts every document that was read. A bad document is a DataError; with corpus.on_bad_row: skip it is
    counted and passed to `reject`.
    """
    keep = None
    if shard.keep is not None:
        keep = np.unpackbits(np.frombuffer(shard.keep, np.uint8), count=shard.num_bits).astype(bool).tolist()
    left_out = _filters(corpus)
    passed = 0
    for part in shard.parts:
        for text in texts(part, corpus):
            if keep is not None and passed == len(keep) and corpus.max_documents is not None:
                return
            if isinstance(text, BadDocument):
                # The standard library has files in bad encodings for its own tests, which a user cannot repair; and the
                # user did not name the files of a directory that turn out not to be text.
                is_asked_for = part.format != "python" and not (part.format == "text" and part.is_found)
                if corpus.on_bad_row == "error" and is_asked_for:
                    raise text.error(part.file)
                ledger["bad rows"] += 1
                reject(part.file, text)
                continue
            try:
                encoded = text.encode()
            except UnicodeEncodeError:  # JSON can escape half of a surrogate pair, which is not a character
                text = _repaired(text)
                encoded = text.encode()
                ledger["repaired: lone surrogates"] += 1
            ledger["documents"] += 1
            ledger["bytes"] += len(encoded)
            if reason := left_out(text):
                ledger[reason] += 1
                continue
            passed += 1
            if keep is not None and not keep[passed - 1]:
                ledger["filtered: duplicates"] += 1
                continue
            ledger["kept"] += 1
            ledger["kept bytes"] += len(encoded)
            yield part, text, encoded


def _repaired(text: str) -> str:
    """Text with a replacement character for each half of a surrogate pair."""
    if isinstance(text, Answered):
        return Answered.of(_repaired(text.prompt), _repaired(text.answer))
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def content_hash(encoded: bytes) -> int:
    """64 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")


def _filters(corpus: CorpusConfig) -> Callable[[str], str | None]:
    """A function of a text: why it is left out, or None."""
    pattern = re.compile(corpus.keep_matching) if corpus.keep_matching is not None else None

    def left_out(text: str) -> str | None:
        if not text or text.isspace():
            return "empty"
        if isinstance(text, Answered) and not text.answer.strip():
            return "empty completion"
        if corpus.min_chars is not None and len(text) < corpus.min_chars:
            return "filtered: min_chars"
        if corpus.max_chars is not None and len(text) > corpus.max_chars:
            return "filtered: max_chars"
        if corpus.keep_any and not any(keyword in text for keyword in corpus.keep_any):
            return "filtered: keep_any"
        if pattern is not None and not pattern.search(text):
            return "filtered: keep_matching"
        return None

    return left_out


def kept_fraction(ledger: dict[str, int]) -> float:
    """Fraction of the documents that were kept, as in "3.26% of data after filtering"."""
    return ledger.get("kept", 0) / max(1, ledger.get("documents", 0))


def counted_as(ledger: Mapping[str, int]) -> str | None:
    """A note on what a split's documents are if the corpus is split by passages; None otherwise."""
    if "passages" not in ledger:
        return None
    return (
        "corpus.split_by=passage, so a held-out document is one passage, and one of the training split is the rest of "
        "a document that was read"
    )
