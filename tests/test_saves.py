"""Saves that fail: the storage refuses to make one checkpoint, or all from some step on."""

import math

import pytest

from raylm import checkpoint
from raylm.errors import StorageError
from raylm.loop import saves, trainer
from raylm.perplexity import Score

SCORES = {2: 9.0, 4: 7.0, 6: 5.0, 8: 6.0, 10: 6.5}
"""Step -> perplexity: the evaluation after step 6 is the best."""


@pytest.fixture
def failing(monkeypatch):
    """(steps) -> nothing: no checkpoint of these steps can be made."""
    monkeypatch.setattr(saves, "RETRIES_SECONDS", (0.01, 0.01))
    commit = checkpoint.Series.commit
    score = lambda self, documents: Score(math.log(SCORES[self.state.global_step]) * 100, 100, 100)  # noqa: E731
    monkeypatch.setattr(trainer._Trainer, "_score", score)

    def fail(*steps):
        def refuse(self, step, files):
            if step in steps:
                raise OSError("503 SlowDown")
            return commit(self, step, files)

        monkeypatch.setattr(checkpoint.Series, "commit", refuse)

    return fail


def test_the_best_evaluation_is_the_best_of_those_whose_checkpoint_is_there(failing, train_run, tiny):
    failing(6)
    outcome, job = train_run(tiny("train.keep_checkpoints=1"))
    assert (outcome.best["step"], outcome.best["perplexity"]) == (8, pytest.approx(6.0))
    assert job.checkpoints.complete() == [8, 10]
    assert checkpoint.read_record(job.checkpoints.path(10))["best"]["step"] == 8


def test_the_one_before_stays_the_best_if_none_after_it_is_better(failing, train_run, tiny, monkeypatch):
    monkeypatch.setitem(SCORES, 8, 7.5)
    monkeypatch.setitem(SCORES, 10, 8.0)
    failing(6)
    outcome, job = train_run(tiny("train.keep_checkpoints=1"))
    assert outcome.best["step"] == 4
    assert job.checkpoints.complete() == [4, 10]


def test_the_first_save_may_fail(failing, train_run, tiny):
    failing(2)
    outcome, _ = train_run(tiny())
    assert outcome.best["step"] == 6


def test_the_last_save_has_no_other_after_it(failing, train_run, tiny):
    """The same command goes on from the one before, instead of ending without its last checkpoint."""
    failing(10)
    with pytest.raises(StorageError, match="step_00000010 cannot be written.* the same command goes on"):
        train_run(tiny())
