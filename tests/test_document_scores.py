"""The scores of single documents are kept with a run, whole or not at all."""

import numpy as np
import pytest

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


def test_copies_of_a_text_count_as_one_document():
    """Else an interval over many copies of one text would be much too narrow."""
    ids = [9, 4, 9, 2, 9]
    rows = np.array([[1.5, 3, 10, 0, 0], [2.0, 4, 12, 0, 0], [1.5, 3, 10, 0, 0], [5, 6, 7, 0, 0], [1.5, 3, 10, 0, 0]])
    found = DocumentScores.of_ids(rows, ids)
    assert (found.nll.tolist(), found.tokens.tolist(), found.bytes.tolist()) == ([4.5, 2, 5], [9, 4, 6], [30, 12, 7])
    assert found.documents == document_scores.hash_of([9, 4, 2])
    generator = np.random.default_rng(0)
    rows = np.stack([generator.gamma(8, 10, 8), *np.full((4, 8), 50)], axis=1)
    alone = document_scores.intervals(DocumentScores.of_ids(rows, range(8)), "perplexity")
    copied = DocumentScores.of_ids(rows.repeat(9, axis=0), np.arange(8).repeat(9))
    assert document_scores.intervals(copied, "perplexity") == pytest.approx(alone)
    assert list(document_scores.intervals(None, "perplexity").values()) == [None] * 4
    assert list(alone) == ["perplexity_low", "perplexity_high", "bits_per_byte_low", "bits_per_byte_high"]


def test_the_scores_of_the_best_model_on_the_whole_split_are_kept_beside(tmp_path):
    document_scores.write(str(tmp_path), "whole", DocumentScores.of(ROWS, Numbered()))
    assert len(document_scores.read(str(tmp_path), "whole")) == 3
    assert (tmp_path / "scores" / "whole.npz").exists()


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
