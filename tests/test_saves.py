"""Storage that fails a run: it refuses to make one checkpoint, or all from some step on, or to read one."""

import contextlib
import math

import numpy as np
import pytest

from raylm import checkpoint, cluster, storage
from raylm.errors import StorageError
from raylm.training import trainer

SCORES = {2: 9.0, 4: 7.0, 6: 5.0, 8: 6.0, 10: 6.5}
"""Step -> perplexity: the evaluation after step 6 is the best."""


@pytest.fixture
def failing(monkeypatch):
    """(steps) -> nothing: no checkpoint of these steps can be made."""
    monkeypatch.setattr(storage.retries, "RETRIES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(storage.retries, "_last_failure", -storage.retries.PAUSE_SECONDS)
    commit = checkpoint.CheckpointManager.commit

    def score(self, documents):
        return np.array([[math.log(SCORES[self.state.global_step]) * 100, 100, 100, 0, 0]])

    monkeypatch.setattr(trainer._Trainer, "_score", score)

    def fail(*steps):
        def refuse(self, step, files):
            if step in steps:
                raise OSError("503 SlowDown")
            return commit(self, step, files)

        monkeypatch.setattr(checkpoint.CheckpointManager, "commit", refuse)

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
    """The same command resumes from the one before, instead of ending without its last checkpoint."""
    failing(10)
    with pytest.raises(StorageError, match="step_00000010 cannot be written.* the same command resumes"):
        train_run(tiny())


def stopped(train_run, experiment, monkeypatch):
    """A run that was stopped after step 8, whose best checkpoint is that of step 6."""
    channel = cluster.ProgressChannel()
    keep = trainer._Trainer.commit_checkpoint

    def kept(self):
        keep(self)
        if self.state.global_step == 8:
            channel.stopping, self.next_check = True, 9

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Trainer, "commit_checkpoint", kept)
        outcome, job = train_run(experiment, channel=channel)
    assert (outcome.stopped, outcome.step, outcome.best["step"]) == (True, 9, 6)
    return job


def test_the_best_checkpoint_stays_where_it_can_not_be_read_for_a_moment(failing, train_run, tiny, monkeypatch):
    experiment = tiny("train.keep_checkpoints=1")
    job = stopped(train_run, experiment, monkeypatch)
    plain, failed = storage.files.reading, []

    @contextlib.contextmanager
    def reading(path):
        if "step_00000006/model.safetensors" in path and not failed:
            failed.append(path)
            raise OSError("503 SlowDown")
        with plain(path) as stream:
            yield stream

    monkeypatch.setattr(storage.files, "reading", reading)
    outcome = train_run.go_on(job, experiment)
    assert failed
    assert (outcome.best["step"], outcome.best["perplexity"]) == (6, pytest.approx(5.0))
    assert job.checkpoints.complete() == [6, 10]


def test_a_damaged_best_checkpoint_is_reported(failing, train_run, tiny, monkeypatch):
    experiment, channel = tiny("train.keep_checkpoints=1"), cluster.ProgressChannel()
    job = stopped(train_run, experiment, monkeypatch)
    storage.remove_file(f"{job.checkpoints.path(6)}/model.safetensors")
    outcome = train_run.go_on(job, experiment, channel)
    assert f"the best checkpoint is lost: {job.checkpoints.path(6)}: model.safetensors: missing" in channel.said
    assert outcome.best["step"] == 10
