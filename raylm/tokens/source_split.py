"""The documents of one source of a split, for a mixture of sources."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from raylm.tokens.store import Split


class SourceSplit:
    """A split with the documents of one source alone, of which a shard is a run of rows of a shard of the split.

    Shards hold the documents of a file one after another, so runs are about as many as shards and files.
    """

    def __init__(self, split: Split, source: str):
        self.split, self.source = split, source
        self.has_prompts = split.has_prompts
        self._runs = [
            (shard, int(first), int(last))
            for shard in range(len(split.shards))
            for first, last in _runs(split.is_of(source, shard))
        ]
        """(shard, first row, row after the last one)"""
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._first = [0, *accumulate(last - first for _, first, last in self._runs)]
        lengths = [int(self.arrays(run)[1][-1]) for run in range(len(self._runs))]
        self.shards = [(last - first, tokens) for (_, first, last), tokens in zip(self._runs, lengths, strict=True)]
        """(documents, tokens) of each run."""
        self.num_tokens = sum(lengths)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        run, row = self._locate(index)
        values, offsets = self.arrays(run)
        return values[offsets[row] : offsets[row + 1]]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        run = bisect.bisect_right(self._first, index) - 1
        return run, index - self._first[run]

    def arrays(self, run: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all documents of a run, offset of each document and of the end)."""
        if run not in self._arrays:
            shard, first, last = self._runs[run]
            values, offsets = self.split.arrays(shard)
            begin = offsets[first]
            self._arrays[run] = values[begin : offsets[last]], offsets[first : last + 1] - begin
        return self._arrays[run]

    def answers(self, index: int) -> np.ndarray | None:
        """Whether each token of a document is of an answer, bool; None without prompts."""
        if not self.has_prompts:
            return None
        run, row = self._locate(index)
        values, offsets = self.answer_arrays(run)
        return values[offsets[row] : offsets[row + 1]].astype(bool)

    def answer_arrays(self, run: int) -> tuple[np.ndarray, np.ndarray]:
        """As `arrays`, with uint8 in the place of each id: whether it is of an answer. Only with prompts."""
        shard, first, last = self._runs[run]
        values, offsets = self.split.answer_arrays(shard)
        return values[offsets[first] : offsets[last]], self.arrays(run)[1]

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, run by run."""
        for run in range(len(self._runs)):
            yield np.diff(self.arrays(run)[1])

    def __reduce__(self) -> tuple:
        return SourceSplit, (self.split, self.source)


def _runs(mask: np.ndarray) -> np.ndarray:
    """(first, after the last) of each run of True: int64 of shape (runs, 2)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return edges.reshape(-1, 2)
