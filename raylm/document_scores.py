"""The score of each document in an evaluation, kept in the run's directory: by them differences are tested.

    <run>/scores/step_N.npz    of the evaluation after step N: nll, tokens, bytes (a number for each document, in order)
                               and documents, a hash of their ids
                 whole.npz     of the best model on the whole validation split, if evaluations score a part of it
                 test_step_N.npz    the same of the test split, if the model after step N was scored on it

Scores of two models are compared document by document only if they are of the same documents.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from raylm import statistics, storage

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST_DOCUMENTS = 100_000
"""Of an evaluation of which the scores are kept: 2.4 MB. Of more, none are, because their total alone tells enough."""


class Ids(Protocol):
    """Documents that have ids, such as a split of a token store."""

    def document_id(self, index: int) -> int: ...


class DocumentScores:
    """Of an evaluation: negative log-likelihood in nats (float64), tokens and bytes of each document, in order."""

    def __init__(self, nll: np.ndarray, tokens: np.ndarray, num_bytes: np.ndarray, documents: str):
        self.nll, self.tokens, self.bytes, self.documents = nll, tokens, num_bytes, documents

    @classmethod
    def of(cls, rows: np.ndarray, documents: Ids) -> DocumentScores:
        """Of the rows of `perplexity.score_documents` for the first of these documents; see `of_ids`."""
        return cls.of_ids(rows, [documents.document_id(index) for index in range(len(rows))])

    @classmethod
    def of_ids(cls, rows: np.ndarray, ids: Sequence[int]) -> DocumentScores:
        """Of the rows of `perplexity.score_documents` for documents with these ids.

        Copies of one text have the same id, and a model scores them alike. They are one document here, with the sums of
        their rows, because a hundred copies of a license tell no more than one.
        """
        first, copy_of = different(ids)
        sums = np.zeros((len(first), 3))
        np.add.at(sums, copy_of, rows[:, :3])
        nll, tokens, num_bytes = sums.T
        return cls(nll, tokens, num_bytes, hash_of(ids[index] for index in first))

    def __len__(self) -> int:
        return len(self.nll)


def intervals(scores: DocumentScores | None, measure: str) -> dict[str, float | None]:
    """The 95 % intervals of perplexity (called `measure`) and bits per byte: perplexity_low, perplexity_high,
    bits_per_byte_low, bits_per_byte_high; None without scores or for fewer than six documents."""
    if scores is None:
        return {**ends(measure, None), **ends("bits_per_byte", None)}
    return {
        **ends(measure, statistics.of_perplexity(scores.nll, scores.tokens)),
        **ends("bits_per_byte", statistics.of_bits_per_byte(scores.nll, scores.bytes)),
    }


def ends(name: str, interval: statistics.Interval | None) -> dict[str, float | None]:
    """The ends of an interval by their names in records: perplexity_low, perplexity_high."""
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def different(ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(the index of the first document with each id, in order; for each document which of these it is or repeats)"""
    _, first, number = np.unique(np.array(ids, np.uint64), return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[number]


def hash_of(ids: Iterable[int]) -> str:
    """A hash of ids in their order."""
    return hashlib.blake2b(np.fromiter(ids, np.uint64).tobytes(), digest_size=8).hexdigest()


Evaluated = int | Literal["whole"]
"""The evaluation after a step, or that of the best model on the whole validation split."""


def path(directory: str, step: Evaluated, split: str = "validation") -> str:
    """The file of an evaluation of the run in `directory`."""
    name = "whole" if step == "whole" else f"step_{step}"
    return f"{directory}/scores/{'' if split == 'validation' else f'{split}_'}{name}.npz"


def write(directory: str, step: Evaluated, scores: DocumentScores, split: str = "validation") -> None:
    """Keep the scores of an evaluation, unless they are of more than MOST_DOCUMENTS documents."""
    if len(scores) > MOST_DOCUMENTS:
        return
    file = io.BytesIO()
    np.savez(file, nll=scores.nll, tokens=scores.tokens, bytes=scores.bytes, documents=np.array(scores.documents))
    storage.write(path(directory, step, split), file.getvalue())


def read(directory: str, step: Evaluated, split: str = "validation") -> DocumentScores | None:
    """The scores of an evaluation; None if they were not kept, or are damaged."""
    content = storage.read(path(directory, step, split))
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return DocumentScores(found["nll"], found["tokens"], found["bytes"], str(found["documents"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
