"""Commands as jobs of a cluster: what goes along, what is refused; and, slow, a real head that asks for a token."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import psutil
import pytest
from conftest import mlflow_server
from mlflow import MlflowClient
from test_nodes import until

from raylm import config, submit, tracking
from raylm.errors import ConfigError


@pytest.fixture
def no_token(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))


@pytest.mark.parametrize("address", ["http://10.0.0.5:8265", "http://head.example:8265", "http://0.0.0.0:8265"])
def test_a_cluster_that_anybody_may_use_is_refused(no_token, monkeypatch, address):
    with pytest.raises(ConfigError, match="have the cluster ask for a token"):
        submit._address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t")
    assert submit._address(address) == address


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "http://localhost:1", "http://[::1]:2", "https://head:3"])
def test_addresses_that_others_cannot_listen_to(no_token, address):
    assert submit._address(address) == address


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "127.0.0.1"])
def test_what_is_not_a_dashboard_is_named(address):
    with pytest.raises(ConfigError, match=f"must be the dashboard's, http://HOST:8265, got {address}"):
        submit._address(address)


def test_the_address_of_the_environment_is_taken(no_token, monkeypatch):
    assert submit._address(None) == submit.DASHBOARD
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://cluster:9")
    assert submit._address(None) == "https://cluster:9"


def test_files_that_are_named_go_along(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "sweep.yaml").write_text("name: x")
    target = tmp_path / "packed"
    target.mkdir()
    arguments = ["--config", str(tmp_path / "a" / "sweep.yaml"), "train.seed=3", "corpus.paths=s3://b/c"]
    assert submit._packed(arguments, target) == ["--config", "sweep.yaml", "train.seed=3", "corpus.paths=s3://b/c"]
    assert [file.name for file in target.iterdir()] == ["sweep.yaml"]
    with pytest.raises(ConfigError, match=r"sweep\.yaml: two files of this name"):
        submit._packed(arguments, target)
    with pytest.raises(ConfigError, match="is a directory of this machine, and only files go along"):
        submit._packed([str(tmp_path)], target)


def test_what_is_no_command_is_named():
    with pytest.raises(
        ConfigError, match="tun: not a command of raylm that can be submitted; these can: prepare, train"
    ):
        submit.submit(["tun"])


def test_options_after_the_verb_are_the_verbs_own(command, tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text("name: x")
    result = command("submit", "--json", "--dry-run", "tune", "--config", file, "--strict", "--dry-run", "train.seed=3")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["entrypoint"] == "python -m raylm.tune --config words.yaml --strict --dry-run train.seed=3"
    assert record["files"] == ["words.yaml"]


# A cluster -----------------------------------------------------------------------------------------------------------


def wait_for(address, process):
    """Until a server answers there, whatever it says."""
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, "ray start has ended"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
        except urllib.error.HTTPError:  # it asks for a token
            return
        except OSError:
            assert time.monotonic() < deadline, f"no dashboard at {address}"
            time.sleep(0.5)
        else:
            return


@contextlib.contextmanager
def started(home, free_port, cpus, nodes=()):
    """A cluster with token authentication, on loopback ports: its dashboard's address, the environment of whoever uses
    it, and the processes of its nodes, the head first. Head and other nodes have so many CPUs."""
    token = home / "token"
    token.write_text(uuid.uuid4().hex * 2)
    token.chmod(0o600)
    port, dashboard = free_port(), free_port()
    bin_directory = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{bin_directory}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    # A path of more than 107 characters is none for a socket.
    session = f"/tmp/raylm-{uuid.uuid4().hex[:8]}"
    address = f"http://127.0.0.1:{dashboard}"
    processes = []

    def start(*options):
        process = subprocess.Popen(
            ["ray", "start", "--block", f"--dashboard-agent-listen-port={free_port()}", *options],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        processes.append(process)
        return process

    of_head = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={session}"]
    try:
        wait_for(address, start("--head", f"--num-cpus={cpus}", *of_head))
        for number in nodes:
            start(f"--address=127.0.0.1:{port}", f"--num-cpus={number}")
        yield address, environment, processes
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
        subprocess.run(["rm", "-rf", session], check=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory, free_port):
    """(dashboard's address, environment) of a head with two CPUs."""
    with started(Path(os.path.realpath(tmp_path_factory.mktemp("h"))), free_port, 2) as (address, environment, _):
        yield address, environment


@pytest.fixture
def submitted(head, tiny, tmp_path):
    """(arguments...) -> the finished process of `raylm submit` with tiny's experiment; its MLflow lies in tmp_path."""
    address, environment = head
    experiment = config.override(
        tiny(), {"storage": str(tmp_path / "runs"), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    )
    config.save(experiment, tmp_path / "words.yaml")

    return lambda *arguments, detach=False: submission(address, environment, tmp_path, *arguments, detach=detach)


def submission(address, environment, cwd, *arguments, detach=False):
    """The finished process of `raylm submit`."""
    first = ["--detach", "--json"] if detach else []
    command = [sys.executable, "-m", "raylm.submit", "--address", address, *first, *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_a_job_has_its_commands_output_and_exit_code(submitted, tmp_path):
    refused = submitted("train", "--config", "words.yaml", "train.batch_tokens=100")
    assert refused.returncode == 2
    assert "train.batch_tokens: must be a multiple of blocks.block_size" in refused.stdout
    done = submitted("train", "--config", "words.yaml")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    (model,) = tmp_path.glob("runs/tiny/train-*/model")
    assert (model / "model.safetensors").exists()


@pytest.mark.slow
def test_a_stopped_job_leaves_no_run_running_and_goes_on_when_submitted_again(head, submitted, tmp_path):
    address, environment = head
    long = ("train", "--config", "words.yaml", "train.max_tokens=256000", "train.eval_every_tokens=5120")
    job = json.loads(submitted(*long, detach=True).stdout)["job"]
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/tiny/train-*/checkpoints/step_*/manifest.json")):
        assert time.monotonic() < deadline, "it never saved"
        time.sleep(0.5)
    stop = subprocess.run(
        ["ray", "job", "stop", "--address", address, job], env=environment, capture_output=True, text=True, timeout=120
    )
    assert stop.returncode == 0, stop.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["KILLED"]
    again = submitted(*long)
    assert again.returncode == 0, again.stderr
    assert "going on from step" in again.stdout
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_head_is_lost_goes_on_when_submitted_to_another(tiny, tmp_path, free_port, monkeypatch):
    """All processes of the head are killed, the job's among them; its worker, on another node, goes on a while."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # seconds after which a head is lost, of 60
    long = ("train", "--config", "words.yaml")
    with mlflow_server(tmp_path, free_port()) as uri:
        sizes = ("train.max_tokens=256000", "train.eval_every_tokens=12800")
        config.save(
            tiny(f"storage={tmp_path}/runs", "name=words", f"tracking.uri={uri}", *sizes), tmp_path / "words.yaml"
        )
        place = tmp_path / "runs" / "words"
        with started(tmp_path, free_port, 0, [1]) as (address, environment, (lost, _)):
            assert submission(address, environment, tmp_path, *long, detach=True).returncode == 0
            until(lambda: len(list(place.glob("train-*/checkpoints/*/manifest.json"))) > 1)
            for process in [*psutil.Process(lost.pid).children(recursive=True), lost]:
                process.kill()
            with started(tmp_path, free_port, 0, [1]) as (address, environment, _):
                again = submission(address, environment, tmp_path, *long)
                assert again.returncode == 0, again.stdout + again.stderr
                whole = submission(address, environment, tmp_path, *long, "name=whole")
                assert whole.returncode == 0, whole.stdout + whole.stderr
        saved = int(re.search(r"going on from step ([\d,]+) of 1,000", again.stdout)[1].replace(",", ""))
        assert 50 <= saved < 1000
        (ours,), (theirs,) = place.glob("train-*"), (tmp_path / "runs" / "whole").glob("train-*")
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (ours, theirs)]
        assert weights[0] == weights[1]
        assert tracking.Run(str(ours)).series() == tracking.Run(str(theirs)).series()
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
        assert run.info.status == "FINISHED"
        for key, points in tracking.Run(str(ours)).series().items():
            stored = client.get_metric_history(run.info.run_id, key)
            assert sorted((point.step, point.value) for point in stored) == points, key
