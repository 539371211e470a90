"""The scores of single documents are kept with a run, whole or not at all."""

import numpy as np

from raylm import document_scores, storage
from raylm.document_scores import DocumentScores


class Numbered:
    def document_id(self, index):
        return index * 7


ROWS = np.array([[1.5, 3, 10, 0, 0], [2.25, 4, 12, 0, 0], [0.0, 0, 0, 0, 0]])


def test_what_is_written_is_read(tmp_path):
    document_scores.write(str(tmp_path), 40, DocumentScores.of(ROWS, Numbered()))
    found = document_scores.read(str(tmp_path), 40)
    assert found.nll.tolist() == [1.5, 2.25, 0]
    assert found.tokens.tolist() == [3, 4, 0]
    assert found.bytes.tolist() == [10, 12, 0]
    assert found.documents == document_scores.hash_of([0, 7, 14])
    assert document_scores.read(str(tmp_path), 41) is None
    before = (tmp_path / "scores" / "step_40.npz").read_bytes()
    document_scores.write(str(tmp_path), 40, DocumentScores.of(ROWS, Numbered()))
    assert (tmp_path / "scores" / "step_40.npz").read_bytes() == before, "a run that resumes writes the same bytes"


def test_other_documents_have_another_hash():
    assert len({document_scores.hash_of(ids) for ids in ([1, 2], [2, 1], [1, 2, 3], [])}) == 4


def test_what_is_torn_counts_as_not_kept(tmp_path):
    document_scores.write(str(tmp_path), 1, DocumentScores.of(ROWS, Numbered()))
    path = document_scores.path(str(tmp_path), 1)
    whole = storage.read(path)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        storage.write(path, whole[:size])
        assert document_scores.read(str(tmp_path), 1) is None


def test_very_many_documents_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(document_scores, "MOST_DOCUMENTS", 2)
    document_scores.write(str(tmp_path), 1, DocumentScores.of(ROWS, Numbered()))
    assert list(tmp_path.iterdir()) == []
