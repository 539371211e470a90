"""Token store -> training examples of block_size tokens, cut when they are read.

    documents   [5 6 7] [8 9] [10 11 12 13]        token ids, any length
    joined      5 6 7 E 8 9 E 10 11 12 13 E        E = end-of-text id, after every document and so before the next

    packed      [5 6 7 E] [8 9 E 10] [11 12 13 E]  cut at 4, across documents: one row = one training example
    chunked     [E 5 6 7] [E 10 11 12]             cut at 4 inside each document, the shorter tails dropped
    padded      [E 5 6 7] [E 8 9 E] [E 10 11 12]   a document a row, cut off at 4; padded when rows make a batch

If documents have another token in front, B (tokenizer.Frame), the joined stream is B 5 6 7 E B 8 9 E.

The store has no such tokens, and the joined stream is never written: a block is found by the number of tokens and
documents before it, and copied from the memory map.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np

from raylm.config import BlocksConfig
from raylm.errors import DataError
from raylm.tokenizer import Frame
from raylm.tokens import Split


def cut(values: np.ndarray, offsets: np.ndarray, start: int, stop: int, frame: Frame) -> np.ndarray:
    """Positions start:stop of the documents joined with their frames, int64.

    `values` are the concatenated ids of all documents. Document j is values[offsets[j]:offsets[j + 1]]; its frame
    starts at offsets[j] + j * frame.in_stream of the joined stream.
    """
    size, around = stop - start, frame.in_stream
    position = offsets.data  # a memoryview returns an element in half the time of an array
    first = bisect.bisect_right(range(len(offsets)), start, key=lambda j: position[j] + j * around) - 1
    # The end of document j is at offsets[j + 1] + (j + 1) * around - 1; a window of this size has at most so many.
    ends = offsets[first + 1 : first + 1 + size]
    ends = ends + np.arange((first + 1) * around - 1 - start, len(ends) * around + first * around - start, around)
    ends = ends[: ends.searchsorted(size)]
    begins = ends[:0]
    if around == 2:
        begins = np.concatenate(([position[first] + 2 * first - start], ends + 1))
        begins = begins[(begins >= 0) & (begins < size)]
    before = first * around + (around == 2 and start > position[first] + 2 * first)
    tokens = values[start - before : stop - before - len(ends) - len(begins)]
    if not len(ends) + len(begins):
        return tokens.astype(np.int64)
    block = np.empty(size, np.int64)
    is_token = np.ones(size, bool)
    is_token[ends] = is_token[begins] = False
    block[ends] = frame.end
    block[begins] = frame.prefix if frame.prefix is not None else frame.end  # where there are any, it is
    block[is_token] = tokens
    return block


IGNORED = -100
"""The label of a token that is not predicted, as in torch's cross entropy."""


class Blocks(Protocol):
    """A sequence of training examples over a split: int64 of shape (block_size,), or shorter where padded."""

    split: Split
    block_size: int
    dropped_tokens: int
    """Tokens of the joined stream that are in no block."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...


def build(split: Split, section: BlocksConfig, frame: Frame) -> Blocks:
    """The blocks of a split, cut as the section says. Takes milliseconds because only reading a block copies it."""
    kinds: dict[str, type] = {"packed": Packed, "chunked": Chunked, "padded": Padded}
    return kinds[section.packing](split, section, frame)


class Packed:
    """Documents joined and cut across: the course's "concatenate and chunk".

    The tail that does not fill a block is dropped: at most block_size - 1 tokens of the whole split.
    """

    def __init__(self, split: Split, section: BlocksConfig, frame: Frame):
        self.split = split
        self.block_size = section.block_size
        self.frame = frame
        self._first = [0, *accumulate(tokens + frame.in_stream * documents for documents, tokens in split.shards)]
        """Start of each shard in the joined stream."""
        self.dropped_tokens = self._first[-1] % self.block_size

    def __len__(self) -> int:
        return self._first[-1] // self.block_size

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = index * self.block_size, (index + 1) * self.block_size
        shard = bisect.bisect_right(self._first, start) - 1
        parts = []
        while start < stop:
            begin, end = self._first[shard], min(stop, self._first[shard + 1])
            parts.append(cut(*self.split.arrays(shard), start - begin, end - begin, self.frame))
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Chunked:
    """Windows inside a document and its frame; a tail shorter than block_size is dropped.

    Holds 8 bytes a document.
    """

    def __init__(self, split: Split, section: BlocksConfig, frame: Frame):
        self.split = split
        self.block_size = section.block_size
        self.frame = frame
        around = len(frame.around(()))
        self._blocks = [np.cumsum((lengths + around) // self.block_size, dtype=np.int64) for lengths in split.lengths()]
        """For each shard, the number of blocks up to and including each document."""
        self._first = [0, *accumulate(int(blocks[-1]) for blocks in self._blocks)]
        self.dropped_tokens = split.num_tokens + around * len(split) - len(self) * self.block_size

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._first, index) - 1
        number, blocks = index - self._first[shard], self._blocks[shard]
        document = int(np.searchsorted(blocks, number, side="right"))
        before = int(blocks[document - 1]) if document else 0
        values, offsets = self.split.arrays(shard)
        framed = self.frame.around(values[offsets[document] : offsets[document + 1]])
        start = (number - before) * self.block_size
        return framed[start : start + self.block_size]


class Padded:
    """A document and its frame, cut off after block_size tokens."""

    def __init__(self, split: Split, section: BlocksConfig, frame: Frame):
        self.split = split
        self.block_size = section.block_size
        self.frame = frame

    @cached_property
    def dropped_tokens(self) -> int:
        around = len(self.frame.around(()))
        return sum(int(np.maximum(lengths + around - self.block_size, 0).sum()) for lengths in self.split.lengths())

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.frame.around(self.split[index][: self.block_size])[: self.block_size]


def batch(rows: Sequence[np.ndarray], section: BlocksConfig, frame: Frame) -> dict[str, np.ndarray]:
    """Rows as a model takes them, each int64 of shape (len(rows), longest row):

    input_ids        shorter rows are filled with end-of-text tokens
    labels           the same ids, and IGNORED for tokens without prediction: padding, a token with nothing before it, a
                     prefix, and without a prefix the first token of a document
    attention_mask   if padded: 0 for padding
    position_ids     if documents are isolated: they restart at 0 with each frame, which limits attention. There is no
    attention mask then, and the model must be called with use_cache=False: with a mask or a cache
    transformers silently ignores the restarts.
    """
    longest = max(len(row) for row in rows)
    input_ids = np.full((len(rows), longest), frame.end, np.int64)
    real = np.zeros((len(rows), longest), bool)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = row
        real[number, : len(row)] = True
    begins = np.zeros_like(real)  # a frame
    if frame.prefix is None:
        begins[:, 1:] = input_ids[:, :-1] == frame.end
    else:
        begins |= input_ids == frame.prefix
    # An end-of-text token that is also the next prefix is predicted, by the last token of the document before it.
    unpredicted = np.zeros_like(real) if frame.prefix == frame.end else begins.copy()
    begins[:, 0] = unpredicted[:, 0] = True
    made = {"input_ids": input_ids}
    if section.packing == "padded":
        made["attention_mask"] = real.astype(np.int64)
    elif section.isolate_documents:
        columns = np.arange(longest)
        made["position_ids"] = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    made["labels"] = np.where(real & ~unpredicted, input_ids, IGNORED)
    return made


class Stream:
    """`length` training examples: the blocks, epoch after epoch, each in another random order.

    Example k depends on the seed and k alone, not on the number of workers. A keyed permutation computes it without a
    list of indices.
    """

    def __init__(self, blocks: Blocks, seed: int, length: int):
        if not len(blocks):
            tokens = blocks.split.num_tokens + len(blocks.split)
            raise DataError(
                f"blocks.block_size: the split has {tokens} tokens, not enough for one block of {blocks.block_size}",
                "blocks.block_size",
            )
        self.blocks = blocks
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> np.ndarray:
        if not 0 <= k < self.length:
            raise IndexError(k)
        return self.blocks[self.index(k)]

    def index(self, k: int) -> int:
        """The block that is example k."""
        epoch, position = divmod(k, len(self.blocks))
        return permuted(position, len(self.blocks), (self.seed, epoch))


def permuted(position: int, size: int, key: tuple[int, int]) -> int:
    """The image of a position under a keyed permutation of range(size).

    A Feistel network of four rounds (Luby and Rackoff 1988) permutes the next even power of two; positions that land
    outside range(size) are permuted again until they are inside, less than four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = _rounds(half, key)
    while True:
        left, right = position >> half, position & mask
        for drawn in rounds:
            left, right = right, left ^ drawn[right]
        position = left << half | right
        if position < size:
            return position


@lru_cache(maxsize=4)
def _rounds(half: int, key: tuple[int, int]) -> list[array[int]]:
    """The random table of each round: 1 MB and 0.2 s for the blocks of 1e12 tokens."""
    mask = (1 << half) - 1

    def drawn(turn: int, right: int) -> int:
        digest = hashlib.blake2b(b"%d %d %d %d" % (*key, turn, right), digest_size=8).digest()
        return int.from_bytes(digest, "little") & mask

    return [array("Q", (drawn(turn, right) for right in range(1 << half))) for turn in range(4)]
