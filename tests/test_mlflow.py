"""What needs more of MLflow than a run: its models and registry, and its own server with passwords."""

import shutil
import sys
from pathlib import Path

import mlflow.transformers
import pytest
import torch
from conftest import PLAIN, copied, mlflow_server
from mlflow import MlflowClient
from transformers import BertConfig, BertForMaskedLM

from raylm import checkpoint, config, export, tokenizer, tracking
from raylm.config import TrackingConfig
from raylm.tracking import uploader

PASSWORD = "canaryCanary77"


@pytest.fixture
def uri(tmp_path, tmp_path_factory, monkeypatch):
    """Of a SQLite file: a copy of an empty one, since MLflow takes seconds to make one."""
    monkeypatch.setattr(uploader, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(uploader, "TIMEOUT_SECONDS", 1.0)
    empty = tmp_path_factory.getbasetemp() / "empty.db"
    if not empty.exists():
        MlflowClient(f"sqlite:///{empty}").search_experiments()
    shutil.copy(empty, tmp_path / "mlflow.db")
    yield f"sqlite:///{tmp_path}/mlflow.db"
    end_threads()


def end_threads():
    for each in uploader._uploaders.values():
        each.close(10)
    uploader._uploaders.clear()


def start(section, directory):
    return tracking.start(section, experiment="words", name="one", tags={}, directory=directory)


# Models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("masked")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=270, max_position_embeddings=16, **sizes)).save_pretrained(directory)
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    trained = tokenizer.train(["a b c"], config.TrainedTokenizer(vocab_size=270, special_tokens=list(special.values())))
    trained.add_special_tokens(special)
    trained.save_pretrained(directory)
    return directory


def loaded(uri, model):
    """The pipeline that MLflow makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        return mlflow.transformers.load_model(model)


def test_the_best_model_is_logged_with_its_run_and_registered(uri, trained_directory, tmp_path):
    client = MlflowClient(uri)
    section = TrackingConfig(uri=uri, register_as="words")
    versions = []
    for name in ("first", "second"):
        run = start(section, tmp_path / name)
        run.log_parameters({"train.learning_rate": 3e-4})
        run.log_metrics({"train/loss": 2.0}, 6)
        run.log_metrics({"train/loss": 1.5}, 7)
        run.log_metrics({"best/eval_perplexity": 8.5}, 0)
        directory = copied(trained_directory, tmp_path / name / "model", PLAIN)
        for _ in range(2):  # as a command that goes on does
            run.log_model(directory, section, 7)
        found = client.get_logged_model(client.get_run(run.run_id).outputs.model_outputs[0].model_id)
        assert (str(found.status), found.name, found.params) == ("READY", "model", {"train.learning_rate": "0.0003"})
        linked = {metric.key: metric.value for metric in found.metrics}
        assert linked == {"best/eval_perplexity": 8.5, "train/loss": 1.5}
        assert len(client.get_metric_history(run.run_id, "best/eval_perplexity")) == 1
        champion = client.get_model_version_by_alias("words", "champion")
        assert champion.run_id == run.run_id
        versions.append(champion)
    assert [version.version for version in client.search_model_versions("name = 'words'")] == [2, 1]
    end_threads()
    (tmp_path / "first" / "mlflow.json").unlink()
    assert start(section, tmp_path / "first").upload(20)
    assert client.get_model_version_by_alias("words", "champion").version == versions[1].version, "the newest"
    requirements = (tmp_path / "mlartifacts").glob("models/*/artifacts/requirements.txt")
    assert all(f"torch=={torch.__version__.partition('+')[0]}\n" in file.read_text() for file in requirements)
    pipeline = loaded(uri, "models:/words@champion")
    assert pipeline("a", max_new_tokens=1)[0]["generated_text"].startswith("a")


def test_a_masked_model_on_remote_storage_is_logged_as_what_it_is(uri, masked_directory, tmp_path):
    section = TrackingConfig(uri=uri, log_model=True)
    run = start(section, f"file://{tmp_path}/run")  # a local one, as far as raylm knows
    copied(masked_directory, tmp_path / "run" / "model")
    run.log_model(f"file://{tmp_path}/run/model", section, 1)
    assert MlflowClient(uri).search_registered_models() == []
    pipeline = loaded(uri, f"runs:/{run.run_id}/model")
    assert pipeline.task == "fill-mask"
    assert len(pipeline("a [MASK] c")) == 5


def test_an_adapter_is_logged_without_its_base_model(uri, trained_directory, lora_directory, tmp_path):
    section = TrackingConfig(uri=uri, log_model=True)
    run = start(section, tmp_path / "run")
    exported = Path(export.export(lora_directory, tmp_path / "run" / "model"))
    run.log_model(exported, section, 7)
    (artifacts,) = (tmp_path / "mlartifacts").glob("models/*/artifacts")
    assert [file.relative_to(artifacts).as_posix() for file in artifacts.rglob("*.safetensors")] == [
        "peft/adapter_model.safetensors"
    ]
    assert str(trained_directory) in (artifacts / "MLmodel").read_text()
    pipeline = loaded(uri, f"runs:/{run.run_id}/model")
    given = torch.arange(8)[None]
    expected = checkpoint.load(exported).model(given).logits
    torch.testing.assert_close(pipeline.model(given).logits, expected, rtol=1e-4, atol=1e-5)
    assert pipeline("a", max_new_tokens=1)[0]["generated_text"].startswith("a")


def test_a_model_is_not_logged_unless_one_says_so(uri, trained_directory, tmp_path):
    section = TrackingConfig(uri=uri)
    run = start(section, tmp_path / "run")
    run.log_model(copied(trained_directory, tmp_path / "run" / "model", PLAIN), section, 1)
    assert run.upload(20)
    assert not MlflowClient(uri).get_run(run.run_id).outputs.model_outputs


def test_a_model_that_mlflow_does_not_take_is_logged_later(uri, trained_directory, tmp_path, capsys):
    section = TrackingConfig(uri=uri, log_model=True)
    run = start(section, tmp_path / "run")
    (tmp_path / "mlartifacts").write_text("not a directory")
    run.log_model(copied(trained_directory, tmp_path / "run" / "model", PLAIN), section, 1)
    messages = capsys.readouterr().err
    assert f"not in MLflow yet; upload it with: {sys.executable} -m raylm.sync {tmp_path}/run" in messages
    assert "does not store artifacts: [Errno 20] Not a directory" in messages
    (tmp_path / "mlartifacts").unlink()
    assert run.upload(20)
    client = MlflowClient(uri)
    found = client.search_logged_models([client.get_run(run.run_id).info.experiment_id])
    assert [str(model.status) for model in found] == ["READY"], "what was cut off is gone"


def test_a_model_that_was_removed_is_wanted_no_more(uri, tmp_path, capsys):
    section = TrackingConfig(uri=uri, log_model=True)
    run = start(section, tmp_path / "run")
    run.log_model(tmp_path / "run" / "model", section, 1)
    assert run.pending() == 0
    assert "warning" not in capsys.readouterr().err


# The environment -----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A database that MLflow's variables name, with an experiment and a run; the settings say otherwise."""
    database = tmp_path / "elsewhere.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    return database


def test_variables_of_mlflow_send_no_run_elsewhere(uri, elsewhere, trained_directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = TrackingConfig(uri=uri, register_as="words")
    run = start(section, tmp_path / "run")
    run.log_metrics({"best/eval_perplexity": 8.5}, 0)
    run.log_text("a: 1", "experiment.yaml")
    run.log_model(copied(trained_directory, tmp_path / "run" / "model", PLAIN), section, 7)
    run.start_trial("trial_00000").finish()
    run.finish()
    assert run.upload(20)
    client = MlflowClient(uri)
    assert {found.name for found in client.search_experiments()} == {"Default", "words"}
    assert client.get_model_version_by_alias("words", "champion").run_id == run.run_id
    assert not elsewhere.exists()
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tracked", [True, False])
def test_nor_do_trials_and_their_trainers(tracked, uri, elsewhere, tiny, command, tmp_path):
    experiment = tiny(f"storage={tmp_path}/runs", "tracking.experiment=words")
    file = tmp_path / "experiment.yaml"
    file.write_text(config.dump(experiment))
    done = command("tune", "--config", file, f"tracking.uri={uri if tracked else 'null'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {each.name for each in MlflowClient(uri).search_experiments()}
    assert found == ({"Default", "words"} if tracked else {"Default"})
    assert not elsewhere.exists()
    assert not (tmp_path / "mlruns").exists()


# Passwords -----------------------------------------------------------------------------------------------------------


def server_with_passwords(root, free_port):
    (root / "auth.ini").write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{root}/auth.db\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 60\n"  # to check a password takes 0.1 s of CPU, and every call has one
    )
    password = {
        "MLFLOW_AUTH_CONFIG_PATH": f"{root}/auth.ini",
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
    }
    return mlflow_server(
        root, free_port(), "--app-name", "basic-auth", "--artifacts-destination", f"{root}/artifacts", **password
    )


@pytest.mark.slow
def test_a_server_with_passwords(uri, trained_directory, tmp_path, monkeypatch, capfd, free_port):
    """`uri`: of its database, which is there already."""
    (tmp_path / "root").mkdir()
    shutil.move(tmp_path / "mlflow.db", tmp_path / "root" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with server_with_passwords(tmp_path / "root", free_port) as address:
        section = TrackingConfig(uri=address, register_as="words")
        run = start(section, tmp_path / "run")
        run.log_metrics({"best/eval_perplexity": 8.5}, 7)
        told = ""
        while "refuses access" not in told:  # nobody answers at first
            run.upload(1)
            told += capfd.readouterr().err
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
        run.log_text("a: 1\n", "experiment.yaml")
        assert run.upload(60)
        run.log_model(copied(trained_directory, tmp_path / "run" / "model", PLAIN), section, 7)
        run.finish()
        assert run.upload(60)
        client = MlflowClient(address)
        found = client.get_run(run.run_id)
        assert (found.info.status, found.data.metrics) == ("FINISHED", {"best/eval_perplexity": 8.5})
        assert [file.path for file in client.list_artifacts(run.run_id)] == ["experiment.yaml"]
        assert client.get_model_version_by_alias("words", "champion").run_id == run.run_id
        end_threads()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"mlflow.db", "auth.db", "tracking.jsonl", "MLmodel"} <= {file.name for file in files}
    assert [file for file in files if PASSWORD.encode() in file.read_bytes()] == []
    told = capfd.readouterr()
    assert PASSWORD not in told.out + told.err
