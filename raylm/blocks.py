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
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np

from raylm.config import BlocksConfig
from raylm.tokenizer import Frame
from raylm.tokens import SourceSplit, Split


class _Rows:
    """The rows of a batch, copied one after another into one buffer of the store's own type.

    A row costs 4 us and no array of its own; the ids of frames are put in, and all of it is turned into int64, once for
    the batch. A row of a batch is mostly of a shard of its own, so that one indexing of NumPy for all of them does not
    exist. Takes memoryviews, which copy a slice and return an element in half the time of an array.
    """

    def __init__(self, num_rows: int, row_size: int, dtype: np.dtype, frame: Frame):
        self._frame = frame
        self._tokens = np.empty((num_rows, row_size), dtype)
        self._into = self._tokens.reshape(-1).data
        self._filled = 0
        self._ends: list[int] = []
        self._lasts: list[int] = []
        """What the last token of the document before each end has in the place of its id."""
        self._prefixes: list[int] = []

    def append_stream(self, values: memoryview, offsets: memoryview, start: int, stop: int) -> None:
        """Positions start:stop of the documents of a shard, joined with their frames.

        `values` are the concatenated ids of all documents. Document j is values[offsets[j]:offsets[j + 1]]; its frame
        starts at offsets[j] + j * frame.in_stream of the joined stream.
        """
        around = self._frame.in_stream
        document = bisect.bisect_right(range(len(offsets)), start, key=lambda j: offsets[j] + j * around) - 1
        while start < stop:
            first_token = offsets[document] + document * around + around - 1
            start = self._append(values, offsets, document, start - first_token, stop - first_token) + first_token
            document += 1

    def append_document(self, values: memoryview, offsets: memoryview, document: int, start: int, stop: int) -> None:
        """Positions start:stop of one document in its whole frame."""
        before = self._frame.prefix is not None
        self._append(values, offsets, document, start - before, stop - before)

    def _append(self, values: memoryview, offsets: memoryview, document: int, start: int, stop: int) -> int:
        """A document from `start` to `stop` or its end token, counted from its first token: -1 is its prefix.

        Returns where it stopped.
        """
        first, at = offsets[document], self._filled
        size = offsets[document + 1] - first
        if start < 0:
            self._prefixes.append(at)
            at, start = at + 1, 0
        last = stop if stop < size else size
        if last > start:
            self._into[at : at + last - start] = values[first + start : first + last]
            at, start = at + last - start, last
        if start == size and start < stop:
            self._ends.append(at)
            self._lasts.append(values[first + size - 1] if size else 0)
            at, start = at + 1, start + 1
        self._filled = at
        return start

    def finish(self) -> np.ndarray:
        """int64 of shape (rows, row size)"""
        assert self._filled == self._tokens.size
        made = self._tokens.astype(np.int64)
        made.put(self._ends, self._frame.end)
        if self._frame.prefix is not None:
            made.put(self._prefixes, self._frame.prefix)
        return made

    def finish_marks(self) -> np.ndarray:
        """uint8 of shape (rows, row size), for values that tell whether a token is of an answer.

        The end of a document is of its answer if its last token is.
        """
        assert self._filled == self._tokens.size
        self._tokens.put(self._ends, np.array(self._lasts, np.uint8) | END)
        self._tokens.put(self._prefixes, 0)
        return self._tokens


Arrays = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""A shard -> a value for each token of its documents, and the offset of each document and of the end."""


ANSWER = 1
"""The mark of a token that is learned."""

END = 2
"""The mark of the token after a document: chat templates have the same token inside of documents, too."""

IGNORED = -100
"""The label of a token that is not predicted, as in torch's cross entropy."""


class Blocks(Protocol):
    """A sequence of training examples over a split: int64 of shape (block_size,), or shorter where padded."""

    split: Split | SourceSplit
    block_size: int
    dropped_tokens: int
    """Tokens of the joined stream that are in no block."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...
    def rows(self, indices: Sequence[int]) -> Sequence[np.ndarray]:
        """Several examples, in half the time that one after another takes."""

    def marks(self, indices: Sequence[int]) -> Sequence[np.ndarray] | None:
        """For each token of these examples ANSWER, END, both or neither, uint8; None in a store without prompts."""


def build(split: Split | SourceSplit, section: BlocksConfig, frame: Frame) -> Blocks:
    """The blocks of a split, cut as the section says. Takes milliseconds because only reading a block copies it."""
    kinds: dict[str, type] = {"packed": Packed, "chunked": Chunked, "padded": Padded}
    return kinds[section.packing](split, section, frame)


class Packed:
    """Documents joined and cut across: the course's "concatenate and chunk".

    The tail that does not fill a block is dropped: at most block_size - 1 tokens of the whole split.
    """

    def __init__(self, split: Split | SourceSplit, section: BlocksConfig, frame: Frame):
        self.split = split
        self.block_size = section.block_size
        self.frame = frame
        self._first = [0, *accumulate(tokens + frame.in_stream * documents for documents, tokens in split.shards)]
        """Start of each shard in the joined stream."""
        self.dropped_tokens = self._first[-1] % self.block_size

    def __len__(self) -> int:
        return self._first[-1] // self.block_size

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        return self._filled(indices, self.split.arrays).finish()

    def marks(self, indices: Sequence[int]) -> np.ndarray | None:
        return self._filled(indices, self.split.answer_arrays).finish_marks() if self.split.has_prompts else None

    def _filled(self, indices: Sequence[int], arrays: Arrays) -> _Rows:
        made = _Rows(len(indices), self.block_size, arrays(0)[0].dtype, self.frame)
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(index)
            start, stop = index * self.block_size, (index + 1) * self.block_size
            shard = bisect.bisect_right(self._first, start) - 1
            while start < stop:
                begin, end = self._first[shard], min(stop, self._first[shard + 1])
                values, offsets = arrays(shard)
                made.append_stream(values.data, offsets.data, start - begin, end - begin)
                start, shard = end, shard + 1
        return made


class Chunked:
    """Windows inside a document and its frame; a tail shorter than block_size is dropped.

    Holds 8 bytes a document.
    """

    def __init__(self, split: Split | SourceSplit, section: BlocksConfig, frame: Frame):
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
        return self.rows([index])[0]

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        return self._filled(indices, self.split.arrays).finish()

    def marks(self, indices: Sequence[int]) -> np.ndarray | None:
        return self._filled(indices, self.split.answer_arrays).finish_marks() if self.split.has_prompts else None

    def _filled(self, indices: Sequence[int], arrays: Arrays) -> _Rows:
        made = _Rows(len(indices), self.block_size, arrays(0)[0].dtype, self.frame)
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(index)
            shard = bisect.bisect_right(self._first, index) - 1
            number, blocks = index - self._first[shard], self._blocks[shard].data
            document = bisect.bisect_right(blocks, number)
            start = (number - (blocks[document - 1] if document else 0)) * self.block_size
            values, offsets = arrays(shard)
            made.append_document(values.data, offsets.data, document, start, start + self.block_size)
        return made


class Padded:
    """A document and its frame, cut off after block_size tokens."""

    def __init__(self, split: Split | SourceSplit, section: BlocksConfig, frame: Frame):
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

    def rows(self, indices: Sequence[int]) -> list[np.ndarray]:
        return [self[index] for index in indices]

    def marks(self, indices: Sequence[int]) -> list[np.ndarray] | None:
        if not self.split.has_prompts:
            return None
        before = np.zeros(int(self.frame.prefix is not None), np.uint8)
        found = []
        for index in indices:
            answers = self.split.answers(index)
            assert answers is not None
            end = np.array([END | (answers[-1] if len(answers) else 0)], np.uint8)
            found.append(np.concatenate([before, answers, end])[: self.block_size])
        return found


def warnings(split: Split, section: BlocksConfig, frame: Frame) -> Iterator[str]:
    """A warning if answers start so late that no block has them together with the beginning of their prompt."""
    late = 0
    for shard in range(len(split.shards) if split.has_prompts else 0):
        marks, offsets = split.answer_arrays(shard)
        answers = np.append(np.flatnonzero(marks), len(marks))
        first = answers[np.searchsorted(answers, offsets[:-1])] - offsets[:-1]
        late += int((first + (frame.prefix is not None) >= section.block_size).sum())
    if late:
        what = "are not learned" if section.packing == "padded" else "are learned without the beginning of their prompt"
        yield (
            f"blocks.block_size: {late:,} of {len(split):,} training documents have a prompt of {section.block_size} "
            f"tokens or more, so that their answers {what}; raise it"
        )


def batch(
    rows: Sequence[np.ndarray],
    section: BlocksConfig,
    frame: Frame,
    marks: Sequence[np.ndarray] = (),
) -> dict[str, np.ndarray]:
    """Rows as a model takes them, each int64 of shape (len(rows), longest row):

    input_ids        shorter rows are filled with end-of-text tokens
    labels           the same ids, and IGNORED for tokens without prediction: padding, a token with nothing before it, a
                     prefix, without a prefix the first token of a document, and with `marks` all without ANSWER
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
    ends = input_ids == frame.end
    answers = np.ones_like(real)
    for number, row in enumerate(marks):
        ends[number, : len(row)] = row & END
        answers[number, : len(row)] = row & ANSWER
    begins = np.zeros_like(real)  # a frame
    if frame.prefix == frame.end:
        begins |= ends
    elif frame.prefix is None or len(marks):
        begins[:, 1:] = ends[:, :-1]
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
    made["labels"] = np.where(real & ~unpredicted & answers, input_ids, IGNORED)
    return made
