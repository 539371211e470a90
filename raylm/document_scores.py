"""The score of each document in an evaluation, kept in the run's directory: by them differences are tested.

    <run>/scores/step_N.npz    of the evaluation after step N: nll, tokens, bytes (a number for each document, in order)
                               and documents, a hash of their ids

Scores of two models are compared document by document only if they are of the same documents.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import TYPE_CHECKING, Protocol

import numpy as np

from raylm import storage

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        """Of the rows of `perplexity.score_documents` for the first of these documents."""
        nll, tokens, num_bytes = rows.T[:3]
        return cls(nll, tokens, num_bytes, hash_of(documents.document_id(index) for index in range(len(rows))))

    def __len__(self) -> int:
        return len(self.nll)


def hash_of(ids: Iterable[int]) -> str:
    """A hash of ids in their order."""
    return hashlib.blake2b(np.fromiter(ids, np.uint64).tobytes(), digest_size=8).hexdigest()


def path(directory: str, step: int) -> str:
    """The file of the evaluation after a step of the run in `directory`."""
    return f"{directory}/scores/step_{step}.npz"


def write(directory: str, step: int, scores: DocumentScores) -> None:
    """Keep the scores of an evaluation, unless they are of more than MOST_DOCUMENTS documents."""
    if len(scores) > MOST_DOCUMENTS:
        return
    file = io.BytesIO()
    np.savez(file, nll=scores.nll, tokens=scores.tokens, bytes=scores.bytes, documents=np.array(scores.documents))
    storage.write(path(directory, step), file.getvalue())


def read(directory: str, step: int) -> DocumentScores | None:
    """The scores of an evaluation; None if they were not kept, or are damaged."""
    content = storage.read(path(directory, step))
    if content is None:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            return DocumentScores(found["nll"], found["tokens"], found["bytes"], str(found["documents"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
