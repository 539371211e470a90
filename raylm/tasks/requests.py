"""What a task asks of a model -> windows of tokens to score.

A request is a context and its continuation, or a whole text. The model reads it behind the prefix of its documents, as
it does in training; of a request that is longer than the model's context, the end:

    prefix P, context 4, "a b" and its continuation "c d"    reads  P a b c    scores  c d
    "a b c d" and its continuation "e"                       reads  a b c d    scores  e

Requests that read the same tokens, such as the letters of a multiple choice, are one window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from raylm import perplexity
from raylm.tokenizer import Frame


class Window(NamedTuple):
    """Tokens that the model reads at once, and what is scored of its outputs."""

    ids: np.ndarray
    places: np.ndarray
    """Positions of the scored outputs; one may stand there several times, for different targets."""
    targets: np.ndarray
    """The tokens to predict."""
    slots: np.ndarray
    """Where in the result each of them is added."""


class Requests:
    """The windows of many requests, and which parts of a result belong to each request."""

    def __init__(self, encode: Callable[[str], list[int]], frame: Frame, context: int, stride: int | None):
        self.encode, self.frame, self.context, self.stride = encode, frame, context, stride or context
        self.request_of_slot: list[int] = []
        """A request has a slot for each of its windows."""
        self.number = 0
        self._windows: dict[bytes, list[tuple[np.ndarray, ...]]] = {}

    def add_continuation(self, context: str, continuation: str) -> None:
        """A request for the likelihood of a continuation."""
        # For most tokenizers the space between both is part of the continuation's first word; lm-eval does so, too.
        before, whole = self.encode(context.rstrip()), self.encode(context + continuation)
        ids = self._framed(whole)
        first = len(ids) - (len(whole) - len(before))
        self._add(ids, max(1, first))

    def add_text(self, text: str) -> None:
        """A request for the likelihood of a whole text: each token once, in the windows of perplexity."""
        ids = self._framed(self.encode(text))
        for start, end, scored in perplexity.windows(len(ids) - 1, self.context, self.stride):
            self._window(ids, start, end, scored)
        self.number += 1

    def _framed(self, ids: Sequence[int]) -> np.ndarray:
        return self.frame.around(ids)[:-1]

    def _add(self, ids: np.ndarray, first: int) -> None:
        """Score the tokens from `first` on in one window that ends with the last; in several if it is too short."""
        end = len(ids) - 1
        while (left := end + 1 - first) > 0:
            scored = min(left, self.context)
            self._window(ids, max(0, end - self.context), end, scored)
            end -= scored
        self.number += 1

    def _window(self, ids: np.ndarray, start: int, end: int, scored: int) -> None:
        places = np.arange(end - scored, end)
        slots = np.full(scored, len(self.request_of_slot))
        read = ids[start:end]
        self._windows.setdefault(read.tobytes(), []).append((read, places - start, ids[places + 1], slots))
        self.request_of_slot.append(self.number)

    def windows(self) -> list[Window]:
        return [
            Window(parts[0][0], *(np.concatenate(each) for each in list(zip(*parts, strict=True))[1:]))
            for parts in self._windows.values()
        ]

    def totals(self, slots: np.ndarray) -> list[tuple[float, bool]]:
        """(log-likelihood, whether its tokens are the likeliest ones) of each request; `slots`: nll and misses."""
        of = np.array(self.request_of_slot, np.int64)
        nll, misses = (np.bincount(of, slots[:, column], minlength=self.number) for column in (0, 1))
        return [(-value, not missed) for value, missed in zip(nll.tolist(), misses.tolist(), strict=True)]
