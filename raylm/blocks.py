"""Token store -> training examples of block_size tokens, cut when they are read.

    documents   [5 6 7] [8 9] [10 11 12 13]        token ids, any length
    join        5 6 7 E 8 9 E 10 11 12 13 E        E = end-of-text id, after every document
    cut at 4    [5 6 7 E] [8 9 E 10] [11 12 13 E]  one row = one training example

The store has no end-of-text tokens, so the joined stream is never written anywhere: a block is found by arithmetic on
the number of tokens and documents before it, and copied out of the memory map.
"""

from __future__ import annotations

import bisect
import hashlib
from itertools import accumulate

import numpy as np

from raylm.config import BlocksConfig
from raylm.errors import DataError
from raylm.tokens import Split


def cut(values: np.ndarray, offsets: np.ndarray, start: int, stop: int, eos_id: int) -> np.ndarray:
    """Positions start:stop of the documents joined by `eos_id`, int64.

    `values` are the ids of all documents without anything between them, document j being
    values[offsets[j]:offsets[j + 1]]; in the joined stream it begins at offsets[j] + j, j end-of-text tokens later.
    """
    first = bisect.bisect_right(range(len(offsets)), start, key=lambda j: offsets[j] + j) - 1
    last = bisect.bisect_left(range(len(offsets)), stop, lo=first, key=lambda j: offsets[j] + j)
    # Documents first .. last - 1 lie in the window, whole or in part; the end of document j is at offsets[j + 1] + j.
    ends = offsets[first + 1 : last + 1].astype(np.int64) + np.arange(first, last) - start
    ends = ends[ends < stop - start]
    block = np.empty(stop - start, np.int64)
    is_token = np.ones(stop - start, bool)
    is_token[ends] = False
    block[ends] = eos_id
    block[is_token] = values[start - first : stop - first - len(ends)]
    return block


class Packed:
    """A sequence of blocks over a split: documents joined by end-of-text tokens and cut across.

    The tail that does not fill a block is dropped: at most block_size - 1 tokens of the whole split.
    """

    def __init__(self, split: Split, section: BlocksConfig, eos_id: int):
        self.split = split
        self.block_size = section.block_size
        self.eos_id = eos_id
        self._first = [0, *accumulate(tokens + documents for documents, tokens in split.shards)]
        """Where each shard begins in the joined stream."""

    def __len__(self) -> int:
        return self._first[-1] // self.block_size

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 of shape (block_size,)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start, stop = index * self.block_size, (index + 1) * self.block_size
        shard = bisect.bisect_right(self._first, start) - 1
        parts = []
        while start < stop:
            begin, end = self._first[shard], min(stop, self._first[shard + 1])
            parts.append(cut(*self.split.arrays(shard), start - begin, end - begin, self.eos_id))
            start, shard = end, shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Stream:
    """`length` training examples: epoch after epoch of the blocks, each epoch shuffled anew.

    Example k is a function of the seed and k alone, not of the number of workers, and costs no list of indices: a keyed
    permutation computes it.
    """

    def __init__(self, blocks: Packed, seed: int, length: int):
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
    """Where a keyed permutation of range(size) sends the position.

    A Feistel network of four rounds (Luby and Rackoff 1988) permutes the next even power of two; positions that land
    outside range(size) go through again until they are inside, less than four times on average.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            digest = hashlib.blake2b(b"%d %d %d %d" % (*key, turn, right), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        position = left << half | right
        if position < size:
            return position
