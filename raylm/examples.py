"""Which block is training example k: a function of k and the seed alone, whatever the number of workers.

    one text     example     0   1   2   3 | 4   5   6   7 | 8     4 blocks, epoch after epoch in another order each
                 block       2   0   3   1 | 1   3   0   2 | 0

    a mixture    example     0   1   2   3   4   5   6             blocks.mixture={books: 2, code: 1}
                 source      b   c   b   b   c   b   b             each source has epochs of its own
                 its block   7   2   0   3   0   5   1

Nothing is listed or shuffled: a keyed permutation and the counts of a source in WINDOW examples are computed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from raylm import blocks
from raylm.blocks import Blocks
from raylm.config import BlocksConfig
from raylm.errors import DataError
from raylm.tokenizer import Frame
from raylm.tokens import SourceSplit, Split

WINDOW = 1000
"""Examples in which the shares of a mixture are exact to one example."""


class Examples(Protocol):
    """The training examples of a run, in order."""

    def __len__(self) -> int: ...
    def rows(self, numbers: Sequence[int]) -> Sequence[np.ndarray]:
        """The examples of these numbers, read together: int64 of shape (block_size,), or shorter where padded."""

    def marks(self, numbers: Sequence[int]) -> Sequence[np.ndarray] | None:
        """blocks.ANSWER and END for each of their tokens, uint8; None in a store without prompts."""


def of_sources(split: Split, section: BlocksConfig, frame: Frame) -> dict[str, Blocks]:
    """The blocks of each source that blocks.mixture gives a weight; without a mixture those of the whole split, under
    the key "".

    DataError if a source has no block.
    """
    if not section.mixture:
        return {"": blocks.build(split, section, frame)}
    found = {}
    for name in (name for name, weight in section.mixture.items() if weight):
        found[name] = blocks.build(SourceSplit(split, name), section, frame)
        if not len(found[name]):
            raise DataError(
                f"blocks.mixture.{name}: its training text has less than one block of blocks.block_size="
                f"{section.block_size} tokens; give it more text, or the weight 0",
                f"blocks.mixture.{name}",
            )
    return found


def build(split: Split, section: BlocksConfig, frame: Frame, *, seed: int, length: int) -> Examples:
    """The first `length` training examples of a split."""
    found = of_sources(split, section, frame)
    if not section.mixture:
        return Stream(found[""], seed=seed, length=length)
    streams = [Stream(cut, seed=seed, length=length, number=number) for number, cut in enumerate(found.values())]
    return Mixture(streams, [section.mixture[name] for name in found], length)


def shares(section: BlocksConfig) -> dict[str, float]:
    """The share of each source of a mixture in the training examples."""
    total = sum(section.mixture.values())
    return {name: weight / total for name, weight in section.mixture.items() if weight}


class Stream:
    """`length` examples: the blocks, epoch after epoch, each in another random order.

    `number`: of the source in a mixture, so that sources of equally many blocks have orders of their own.
    """

    def __init__(self, cut: Blocks, seed: int, length: int, number: int = 0):
        if not len(cut):
            tokens = cut.split.num_tokens + len(cut.split)
            raise DataError(
                f"blocks.block_size: the split has {tokens} tokens, not enough for one block of {cut.block_size}",
                "blocks.block_size",
            )
        self.blocks = cut
        self.seed, self.number = seed, number
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> np.ndarray:
        if not 0 <= k < self.length:
            raise IndexError(k)
        return self.blocks[self.index(k)]

    def rows(self, numbers: Sequence[int]) -> Sequence[np.ndarray]:
        return self.blocks.rows([self.index(k) for k in numbers])

    def marks(self, numbers: Sequence[int]) -> Sequence[np.ndarray] | None:
        return self.blocks.marks([self.index(k) for k in numbers])

    def index(self, k: int) -> int:
        """The block that is example k."""
        epoch, position = divmod(k, len(self.blocks))
        # Without the number of the first source, so that a run without a mixture keeps the order that it had.
        key = (self.seed, epoch, self.number) if self.number else (self.seed, epoch)
        return permuted(position, len(self.blocks), key)


class _Window(NamedTuple):
    """WINDOW examples of a mixture."""

    number: int
    before: np.ndarray
    """Examples of each source before the window."""
    counts: np.ndarray
    """Examples of each source in it."""
    places: list[tuple[int, int]]
    """The source of each example, and which of the examples of that source it is."""


class Mixture:
    """`length` examples of several sources, in shares that follow from weights.

    In every window of WINDOW examples each source has its share, rounded up or down. Which, is decided for all sources
    at once by systematic sampling (Madow 1949): the shares are laid end to end, and source i has as many examples as
    there are whole numbers in its part once all is moved by an offset below 1. The offsets are multiples of the golden
    ratio, so that shares are right in the long run, too: of a share of 0.3334, three windows in five have 333 examples
    and two have 334. Inside a window the examples of a source are evenly spaced.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], length: int):
        self.streams = streams
        self.length = length
        self._ends = WINDOW * np.cumsum(weights) / sum(weights)
        self._ends[-1] = WINDOW
        self._window = _Window(-1, np.empty(0, np.int64), np.empty(0, np.int64), [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k: int) -> np.ndarray:
        if not 0 <= k < self.length:
            raise IndexError(k)
        return self.rows([k])[0]

    def rows(self, numbers: Sequence[int]) -> list[np.ndarray]:
        return self._of_sources(numbers, Stream.rows)

    def marks(self, numbers: Sequence[int]) -> list[np.ndarray] | None:
        has_prompts = self.streams[0].blocks.split.has_prompts
        return self._of_sources(numbers, Stream.marks) if has_prompts else None

    def _of_sources(self, numbers: Sequence[int], read: Callable[[Stream, Sequence[int]], Any]) -> list[np.ndarray]:
        places = [self.place(k) for k in numbers]
        wanted: list[list[int]] = [[] for _ in self.streams]
        for source, number in places:
            wanted[source].append(number)
        rows = [iter(read(stream, own) if own else ()) for stream, own in zip(self.streams, wanted, strict=True)]
        return [next(rows[source]) for source, _ in places]

    def place(self, k: int) -> tuple[int, int]:
        """The source of example k, and which of the examples of that source it is."""
        number, at = divmod(k, WINDOW)
        if number != self._window.number:
            self._window = self._window_of(number)
        return self._window.places[at]

    def _window_of(self, number: int) -> _Window:
        last = self._window
        follows = number == last.number + 1 and number > 0
        before = last.before + last.counts if follows else self._before(number)
        counts = self._counts(np.array([number]))[0]
        of = np.repeat(np.arange(len(counts)), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort((ranks + 0.5) / counts[of], kind="stable")
        sources = of[order]
        return _Window(
            number, before, counts, list(zip(sources.tolist(), (before[sources] + ranks[order]).tolist(), strict=True))
        )

    def _before(self, number: int) -> np.ndarray:
        total = np.zeros(len(self.streams), np.int64)
        for start in range(0, number, 100_000):
            total += self._counts(np.arange(start, min(number, start + 100_000))).sum(axis=0)
        return total

    def _counts(self, windows: np.ndarray) -> np.ndarray:
        """Examples of each source in windows: int64 of shape (windows, sources)."""
        golden = np.uint64(0x9E3779B97F4A7C15)  # its fraction of 2^64
        offsets = (windows.astype(np.uint64) * golden) / 2.0**64
        ends = np.floor(self._ends + offsets[:, None])
        ends[:, -1] = WINDOW
        return np.diff(ends, axis=1, prepend=0).astype(np.int64)


def permuted(position: int, size: int, key: tuple[int, ...]) -> int:
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


@lru_cache(maxsize=64)
def _rounds(half: int, key: tuple[int, ...]) -> list[array[int]]:
    """The random table of each round: 1 MB and 0.2 s for the blocks of 1e12 tokens."""
    mask = (1 << half) - 1
    name = " ".join(map(str, key))

    def drawn(turn: int, right: int) -> int:
        digest = hashlib.blake2b(f"{name} {turn} {right}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") & mask

    return [array("Q", (drawn(turn, right) for right in range(1 << half))) for turn in range(4)]
