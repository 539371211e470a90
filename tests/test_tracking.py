import math

import pytest
from mlflow import MlflowClient

from raylm import tracking
from raylm.config import TrackingConfig
from raylm.errors import ConfigError


@pytest.fixture
def section(tmp_path):
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="words")


def test_children_hang_under_their_parent_and_are_found_again(section):
    parent = tracking.start(section, experiment="words", name="sweep", tags={})
    child = parent.child("trial_00000")
    assert parent.child("trial_00000") == child, "an interrupted trial goes on in the run it had"
    other = parent.child("trial_00001")
    assert parent.children() == {"trial_00000": child, "trial_00001": other}
    tags = MlflowClient(section.uri).get_run(child.run_id).data.tags
    assert tags["mlflow.parentRunId"] == parent.run_id


def test_a_run_that_goes_on_is_running_until_it_is_ended(section):
    client = MlflowClient(section.uri)
    parent = tracking.start(section, experiment="words", name="sweep", tags={})
    child = parent.child("trial_00000")
    child.end("KILLED")
    parent.child("trial_00000")
    assert client.get_run(child.run_id).info.status == "RUNNING"
    child.end_if_running("FAILED")
    child.end_if_running("FINISHED")
    assert client.get_run(child.run_id).info.status == "FAILED"


def test_metrics_parameters_tags_and_texts_arrive(section):
    run = tracking.start(section, experiment="words", name="one", tags={"raylm.verb": "train"})
    run.metrics({"eval/perplexity": 8.5, "train/loss": math.inf, "train/grad_norm": math.nan}, step=7)
    run.parameters({f"key{number}": number for number in range(150)} | {"long": "x" * 7000})
    run.text("name: x\n", "experiment.yaml")
    client = MlflowClient(section.uri)
    data = client.get_run(run.run_id).data
    assert data.metrics == {"eval/perplexity": 8.5}, "what is not finite would be stored as 1.8e308"
    assert client.get_metric_history(run.run_id, "eval/perplexity")[0].step == 7
    assert len(data.params) == 151
    assert data.tags["raylm.verb"] == "train"
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["experiment.yaml"]


def test_without_a_uri_nothing_is_tracked_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tracking.start(TrackingConfig(uri=None), experiment="words", name="one", tags={})
    run.metrics({"a": 1.0}, step=1)
    run.parameters({"a": 1})
    run.tags({"a": 1})
    run.text("a", "a.txt")
    run.child("trial_00000").end()
    run.end_if_running("FAILED")
    assert run.children() == {}
    assert list(tmp_path.iterdir()) == []


def test_artifacts_lie_beside_the_database(section, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracking.start(section, experiment="words", name="one", tags={}).text("a", "a.txt")
    assert (tmp_path / "mlartifacts").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_uri_that_cannot_be_used_is_named():
    with pytest.raises(ConfigError, match="tracking.uri=nonsense://x cannot be used"):
        tracking.start(TrackingConfig(uri="nonsense://x"), experiment="words", name="one", tags={})


def test_the_command_that_opens_mlflow(section):
    assert tracking.how_to_look(section).endswith(f" -m mlflow ui --backend-store-uri {section.uri}")
    assert tracking.how_to_look(TrackingConfig(uri="http://host:5000")) == "http://host:5000"
    assert tracking.how_to_look(TrackingConfig(uri=None)) is None
