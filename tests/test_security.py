"""What must not get out, and what must not be let in."""

import contextlib
import json
import os
import pickle
import shutil
import sqlite3
import uuid
from pathlib import Path

import pytest
from conftest import answers, mlflow_server

from raylm import config, corpus, training
from raylm.config import override
from raylm.errors import ConfigError

SECRET = f"canary{uuid.uuid4().hex}"

ENVIRONMENT = (
    "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "WANDB_API_KEY",
)  # fmt: skip


def test_secrets_of_the_environment_and_of_addresses_are_found_nowhere_afterwards(
    command, tiny, tmp_path, monkeypatch, request
):
    """A sweep on the command line, whose MLflow does not answer: files, database, output and temporary files."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, SECRET)
    temporary = Path(f"/tmp/{uuid.uuid4().hex[:8]}")  # a path of more than 107 characters is none for Ray's sockets
    temporary.mkdir()
    request.addfinalizer(lambda: shutil.rmtree(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    file = tmp_path / "words.yaml"
    config.save(override(tiny(), {"storage": str(tmp_path / "runs"), "tune.num_samples": 1}), file)
    uri = f"tracking.uri=http://somebody:{SECRET}@127.0.0.1:9"
    result = command("tune", "--config", file, uri, "train.max_tokens=512")
    assert result.returncode == 0, result.stderr
    seen = {"stdout": result.stdout, "stderr": result.stderr}
    for path in [*tmp_path.rglob("*"), *temporary.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            seen[str(path)] = path.read_bytes().decode("latin-1")
    assert len(seen) > 20
    assert [name for name, content in seen.items() if SECRET in content] == []


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "tune"])
def test_secrets_of_settings_are_found_nowhere_in_a_working_mlflow(
    command, tiny, tmp_path, monkeypatch, free_port, verb
):
    """A command that is tracked under an address with a password, one of whose settings has the secret of a bucket:
    every table of the server's database, its artifacts, and the run's own files."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")  # which is sent instead of the password of the address
    file, port = tmp_path / "words.yaml", free_port()
    config.save(override(tiny("tune.num_samples=1"), {"storage": f"{tmp_path}/runs", "train.max_tokens": 512}), file)
    settings = [f"tracking.uri=http://somebody:{SECRET}@127.0.0.1:{port}", f"objective.keywords=[cat, '{KEY}']"]
    artifacts = f"--artifacts-destination={tmp_path}/artifacts"
    with mlflow_server(tmp_path, port, artifacts, **dict.fromkeys(ENVIRONMENT, "")) as uri:
        answers(f"{uri}/health")
        result = command(verb, "--config", file, *settings, "tracking.log_model=true", "--json")
        assert result.returncode == 0, result.stderr
    seen = {"stdout": result.stdout, "stderr": result.stderr}
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = {name: database.execute(f'SELECT * FROM "{name}"').fetchall() for name in tables}
    seen |= {f"table {name} of MLflow": repr(content) for name, content in rows.items()}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            seen[str(path)] = path.read_bytes().decode("latin-1")
    assert "FINISHED" in seen["table runs of MLflow"]
    saved = [name for name, content in seen.items() if "s3://key@bucket/words" in content]
    assert any("/artifacts/" in name for name in saved), "the setting is there, without its secret"
    assert [name for name, content in seen.items() if SECRET in content] == []


ADDRESSES = [f"https://somebody:{SECRET}@mlflow.example", f"postgresql://somebody:{SECRET}/{SECRET}@db.example/mlflow"]
KEY = f"s3://key:{SECRET}/{SECRET}@bucket/words"


@pytest.mark.parametrize("uri", ADDRESSES)
@pytest.mark.parametrize("option", ["--dry-run", "--print-config"])
@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_password_is_not_printed(command, tiny, tmp_path, uri, option, as_json):
    file = tmp_path / "words.yaml"
    config.save(tiny(f"storage={tmp_path}/runs"), file)
    result = command("train", "--config", file, f"tracking.uri={uri}", option, *as_json)
    assert result.returncode == 0, result.stderr
    assert "example" in result.stdout
    assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize("uri", ADDRESSES)
def test_a_password_is_in_no_error(command, uri):
    result = command("train", "--json", f"tracking.uri={uri}", f"corpus.paths={uri}", f"tokenizer.path={uri}")
    assert result.returncode != 0
    assert "example" in result.stdout
    assert SECRET not in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (f"tracking.uri={ADDRESSES[0]}", "tracking.uri: must come without the secret of https://mlflow.example"),
        (f"corpus.paths=[{KEY}]", "corpus.paths: must come without the secret of s3://key@bucket/words"),
        (f"train.arguments={{hub_token: {SECRET}}}", "train.arguments: must come without the secret of hub_token"),
        (f"train.arguments.hub_token={SECRET}", "train.arguments.hub_token: must come without the secret of hub_token"),
    ],
)
def test_a_secret_is_not_sent_to_a_cluster_with_a_command(command, setting, told):
    result = command("submit", "evaluate", setting)
    assert result.returncode == 2
    assert f"{told}, because Ray shows a job's command line to anyone who asks; give it in" in result.stderr
    assert SECRET not in result.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"objective: {{keywords: ['{KEY}']}}", "s3://key@bucket/words"),
        (f"train: {{arguments: {{'hub_token': {SECRET}}}}}", "hub_token"),
    ],
)
def test_a_secret_is_not_sent_to_a_cluster_in_a_file(command, tmp_path, text, told):
    (tmp_path / "words.yaml").write_text(text)
    result = command("submit", "tune", "--config", tmp_path / "words.yaml")
    assert result.returncode == 2
    assert f"words.yaml: must come without the secret of {told}, because Ray keeps the file; give it" in result.stderr
    assert SECRET not in result.stderr


def test_a_password_of_a_corpus_is_refused():
    experiment = config.load(None, [f"corpus.paths=s3://key:{SECRET}@bucket/words"])
    with pytest.raises(
        ConfigError, match=r"corpus\.paths: s3://key@bucket/words: must come without the pass"
    ) as caught:
        corpus.list_sources(experiment.corpus)
    assert SECRET not in caught.value.message


def test_a_password_in_an_address_is_not_written_down():
    experiment = config.load(
        None, [f"tracking.uri=https://me:{SECRET}@mlflow.example", f"corpus.paths=[s3://k:{SECRET}@b/c]"]
    )
    for comments in (False, True):
        text = config.dump(experiment, comments=comments)
        assert SECRET not in text
        assert "https://mlflow.example" in text
        assert "s3://k@b/c" in text
    assert SECRET in experiment.tracking.uri, "it is used all the same"


@pytest.mark.parametrize("name", ["hub_token", "push_to_hub"])
def test_tokens_are_not_taken_from_an_experiment(name):
    experiment = config.load(None, [f"train.arguments={{{name}: {SECRET}}}"])
    with pytest.raises(ConfigError, match=f"train.arguments.{name} is derived by raylm") as caught:
        training.check_settings(experiment.train)
    assert SECRET not in caught.value.message


# Let in --------------------------------------------------------------------------------------------------------------


class Malicious:
    """A pickle that leaves a file behind where it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", *(pytest.param(each, marks=pytest.mark.slow) for each in ("scheduler.pt", "rng_state.pth"))],
)
def test_a_pickle_in_a_checkpoint_is_not_run(train_run, tiny, tmp_path, name):
    experiment = tiny("train.max_tokens=1024", "cluster.max_failures=0")
    _, job = train_run(experiment)
    series, mark = job.checkpoints, tmp_path / "was-here"
    series.discard(series.newest()[0])
    step = series.newest()[0]
    victim = next(Path(series.path(step)).glob(f"{Path(name).stem}*"))
    victim.write_bytes(pickle.dumps(Malicious(mark)))
    local = tmp_path / "tampered"
    os.rename(series.path(step), local)
    series.replace(local, step)
    assert series.damage(step) is None, "it looks whole"
    with pytest.raises(Exception, match="weights_only|Weights only|unpickl|Unsupported"):
        train_run.go_on(job, experiment, None)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", "a\\b", ""])
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(ConfigError, match="name: must be letters, digits"):
        config.load(None, [f"name={json.dumps(name)}"])
