import shutil
import sys

import pytest
from mlflow import MlflowClient

from raylm import cli, tracking
from raylm.config import TrackingConfig
from raylm.sync import sync
from raylm.tracking import journal, uploader


@pytest.fixture
def uri(tmp_path, tmp_path_factory, monkeypatch):
    """Of a SQLite file that is not there yet: a copy of an empty one, since MLflow takes seconds to make one."""
    monkeypatch.setattr(uploader, "POLL_SECONDS", 0.05)
    monkeypatch.setattr("raylm.sync.TIMEOUT_SECONDS", 0.2)
    empty = tmp_path_factory.getbasetemp() / "empty.db"
    if not empty.exists():
        MlflowClient(f"sqlite:///{empty}").search_experiments()
    shutil.copy(empty, tmp_path / "mlflow.db")
    yield f"sqlite:///{tmp_path}/mlflow.db"
    for each in uploader._uploaders.values():
        each.close(10)
    uploader._uploaders.clear()


def journaled(directory, uri):
    """A run and a trial of it as a process leaves them that was killed before anything was uploaded: 6 entries each."""
    journal.start(str(directory), uri, experiment="words", metric="m", name="sweep", tags={}, is_child=False)
    run = tracking.Run(str(directory), None)
    child = run.start_trial("trial_00000")
    for one in (run, child):
        journal.start(one.directory, uri, experiment="words", name="", tags={}, is_child=False)
        one.log_parameters({"train.seed": 0, "train.learning_rate": 1e-3})
        one.log_metrics({"train/loss": 2.0, "train/tokens": 256}, 1)
        one.log_text("a: 1\n", "experiment.yaml")
        one.finish()
    return run, child


def synced(*arguments, dry_run=False):
    answer = sync([str(argument) for argument in arguments], dry_run=dry_run)
    return answer.exit_code, answer.record


def test_what_mlflow_has_missed_is_uploaded_once(uri, tmp_path):
    parent, child = journaled(tmp_path / "runs" / "words" / "tune-1", uri)
    assert synced(tmp_path / "runs", dry_run=True) == (0, {"runs": 2, "uploaded": 0, "pending": 12})
    assert synced(tmp_path / "runs") == (0, {"runs": 2, "uploaded": 12, "pending": 0})
    assert synced(f"storage={tmp_path}/runs") == (0, {"runs": 2, "uploaded": 0, "pending": 0})
    client = MlflowClient(uri)
    parent, child = (client.get_run(tracking.Run(run.directory, uri).run_id) for run in (parent, child))
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for found in (parent, child):
        assert found.data.metrics == {"train/loss": 2.0, "train/tokens": 256.0}
        assert found.info.status == "FINISHED"
        assert len(client.get_metric_history(found.info.run_id, "train/loss")) == 1


def test_where_the_newest_run_is_seen(uri, tmp_path):
    journaled(tmp_path / "runs" / "words" / "tune-1", uri)
    newest, _ = journaled(tmp_path / "runs" / "words" / "tune-0", uri)
    view = sync([f"{tmp_path}/runs"]).view
    assert f"start MLflow  {sys.executable} -m mlflow server --backend-store-uri {uri}" in view
    assert f"newest run    http://127.0.0.1:5000/{tracking.Run(newest.directory, uri).path}" in view


def test_runs_that_were_not_tracked_are_uploaded_to_the_given_uri(uri, tmp_path):
    run, _ = journaled(tmp_path / "runs" / "tune-1", None)
    assert synced(tmp_path / "runs") == (0, {"runs": 0, "uploaded": 0, "pending": 0})
    assert synced(tmp_path / "runs", f"tracking.uri={uri}") == (0, {"runs": 2, "uploaded": 12, "pending": 0})
    assert tracking.Run(run.directory, uri).run_id is not None


def test_what_cannot_be_uploaded_is_counted_and_the_exit_code_says_so(uri, tmp_path, monkeypatch, capsys):
    journaled(tmp_path / "runs" / "tune-1", "http://127.0.0.1:9")
    journaled(tmp_path / "runs" / "tune-2", "http://127.0.0.1:9")
    assert synced(tmp_path / "runs") == (5, {"runs": 4, "uploaded": 0, "pending": 24})
    monkeypatch.setattr("sys.argv", ["raylm sync", f"{tmp_path}/runs/tune-1"])
    with pytest.raises(SystemExit, match="5"):
        cli.run(sync)
    told = capsys.readouterr()
    assert told.err.count("cannot be reached: [Errno 111] Connection refused") == 1
    assert f"{tmp_path}/runs/tune-1/trial_00000: 6 entries are not in MLflow yet" in told.out
    assert synced(tmp_path / "runs", f"tracking.uri={uri}") == (0, {"runs": 4, "uploaded": 24, "pending": 0})


def test_a_running_run_is_uploaded_by_the_first_process_that_can(uri, tmp_path):
    section = TrackingConfig(uri=uri, experiment="words")
    run = tracking.start(section, experiment="words", name="one", tags={}, directory=tmp_path / "run")
    run.log_metrics({"train/loss": 2.0}, 1)
    code, record = synced(tmp_path)
    assert (code, record["pending"]) == (0, 0)
    run.log_metrics({"train/loss": 1.0}, 2)
    assert run.upload(20)
    assert [point.value for point in MlflowClient(uri).get_metric_history(run.run_id, "train/loss")] == [2.0, 1.0]
