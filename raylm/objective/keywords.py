"""Keywords in token ids: their places in a row, and which of them the training split lacks.

A keyword counts with and without a space before it, and as a sequence if it has several tokens:

    keywords      fit, plt             as tokens      f i t    _fit    plt    _plt
    row           _plt . f i t ( x )   _plt and f i t are keywords: 4 tokens of 7, 2 occurrences
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from raylm.config import ObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from raylm.tokens import Split, Store

CHUNK = 1 << 20
"""Tokens of a shard that are searched together, so that they stay in the processor's cache for all keywords."""


class Keywords:
    """Words, to find in token ids; may be empty."""

    def __init__(self, words: Iterable[str], tokenizer: PreTrainedTokenizerBase):
        def ids(text: str) -> tuple[int, ...]:
            return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

        self.words = tuple(words)
        self.spellings = [{ids(word), ids(f" {word}")} - {()} for word in self.words]
        """For each word, its tokens at the start of a line and after a space."""

    def occurrences(self, row: np.ndarray) -> int:
        """Number of keywords in a row; two spellings that end at the same token count once."""
        return sum(
            len({start + len(spelling) for spelling in spellings for start in _starts(row, spelling)})
            for spellings in self.spellings
        )

    def marked(self, row: np.ndarray) -> np.ndarray:
        """Which tokens of a row belong to a keyword, bool of shape (len(row),)."""
        marks = np.zeros(len(row), bool)
        for spelling in set().union(*self.spellings):
            for start in _starts(row, spelling):
                marks[start : start + len(spelling)] = True
        return marks

    def absent(self, split: Split) -> list[str]:
        """The words that no document of a split has. Reads its memory map until all are found.

        A billion tokens in memory take 1 s for one absent word, 3 s for five (one core).
        """
        missing = dict(zip(self.words, self.spellings, strict=True))
        for values, offsets in _chunks(split, max((len(s) for each in self.spellings for s in each), default=1)):
            missing = {
                word: spellings
                for word, spellings in missing.items()
                if not any(_inside(values, offsets, spelling) for spelling in spellings)
            }
            if not missing:
                break
        return list(missing)


def warnings(section: ObjectiveConfig, store: Store) -> Iterator[str]:
    """A warning for each keyword that no document of the training split has."""
    if section.keywords:
        for word in Keywords(section.keywords, store.tokenizer).absent(store.train):
            yield (
                f"objective.keywords: no document of the training split has {word!r}, so it makes no difference; "
                "is it written as the text has it, upper and lower case too?"
            )


def _starts(row: np.ndarray, spelling: tuple[int, ...]) -> Iterator[int]:
    """The places in a row at which a sequence of tokens starts."""
    if len(spelling) > len(row):
        return iter(())
    windows = np.lib.stride_tricks.sliding_window_view(row, len(spelling))
    return iter(np.flatnonzero((windows == np.array(spelling)).all(axis=1)).tolist())


def _chunks(split: Split, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks (ids, starts of documents) of about CHUNK tokens, each with longest - 1 tokens of the next one."""
    for shard in range(len(split.shards)):
        values, offsets = split.arrays(shard)
        for start in range(0, len(values), CHUNK):
            stop = min(len(values), start + CHUNK + longest - 1)
            first, last = np.searchsorted(offsets, [start, stop])
            yield values[start:stop], offsets[first:last] - start


def _inside(values: np.ndarray, begins: np.ndarray, spelling: tuple[int, ...]) -> bool:
    """Whether a sequence of tokens is inside one of the documents that are concatenated in `values`."""
    starts = np.flatnonzero(values[: max(0, len(values) - len(spelling) + 1)] == spelling[0])
    for place, token in enumerate(spelling[1:], 1):
        starts = starts[values[starts + place] == token]
    document = np.searchsorted(begins, [starts, starts + len(spelling) - 1], side="right")
    return bool((document[0] == document[1]).any())
