"""Commands as jobs of a cluster: what goes along, what is refused; and, slow, a real head that asks for a token."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import TOKEN, mlflow_server
from mlflow import MlflowClient
from test_nodes import until

from raylm import config, submit, tracking
from raylm.cluster import submission
from raylm.errors import ConfigError, StorageError


@pytest.fixture
def no_token(monkeypatch):
    """As where Ray finds none. What Ray itself finds stays as it is: a process connected to a cluster that asks for a
    token is ended by Ray's core once there is none."""
    monkeypatch.setattr(submission, "has_token", lambda: False)


OPEN = ["http://10.0.0.5:8265", "http://head.example:8265", "http://0.0.0.0:8265"]
"""Dashboards that others than their user reach."""


@pytest.mark.parametrize("address", OPEN)
def test_a_cluster_that_anybody_may_use_is_refused(no_token, address):
    with pytest.raises(ConfigError, match="have the cluster ask for a token"):
        submission.find_dashboard(address)


@pytest.mark.parametrize("address", OPEN)
def test_a_cluster_that_asks_for_a_token_is_not_refused(monkeypatch, address):
    monkeypatch.setattr(submission, "has_token", lambda: True)
    assert submission.find_dashboard(address).value == address


def test_the_token_is_looked_for_where_ray_does(command, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    address = "--address=http://10.255.255.1:8265"  # of nobody
    without = command("submit", address, "tune")
    assert (without.returncode, "have the cluster ask for a token" in without.stderr) == (2, True), without.stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("t" * 64)
    having = command("submit", address, "tune")
    assert "no Ray cluster answers there" in having.stderr, having.stderr


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "http://localhost:1", "http://[::1]:2", "https://head:3"])
def test_addresses_that_others_cannot_listen_to(no_token, address):
    assert submission.find_dashboard(address).value == address


@pytest.mark.parametrize("address", ["ray://head:10001", "head:8265", "127.0.0.1"])
def test_what_is_not_a_dashboard_is_named(address):
    with pytest.raises(ConfigError, match=f"^--address={address}: must be the dashboard's, http://HOST:8265"):
        submission.find_dashboard(address)


def test_the_address_of_the_environment_is_taken(no_token, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert submission.find_dashboard(None) == (submission.DASHBOARD, "--address"), "RAY_ADDRESS is a head's"
    monkeypatch.setenv("RAY_ADDRESS", "https://cluster:8")
    assert submission.find_dashboard(None) == ("https://cluster:8", "RAY_ADDRESS")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "https://cluster:9")
    assert submission.find_dashboard(None) == ("https://cluster:9", "RAY_API_SERVER_ADDRESS")
    assert submission.find_dashboard("https://cluster:10") == ("https://cluster:10", "--address")


def test_a_dashboard_that_does_not_answer_is_named_with_the_reason(no_token, monkeypatch):
    monkeypatch.setattr(submission, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(StorageError, match=f"^--address={address}: no Ray cluster answers there within 0.5 s"):
            submission.connect_client(submission.find_dashboard(address))
    with pytest.raises(StorageError, match=f"^--address={address}: no Ray cluster answers there: .*refused"):
        submission.connect_client(submission.find_dashboard(address))


def test_files_that_are_named_go_along(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "sweep.yaml").write_text("name: x")
    target = tmp_path / "packed"
    target.mkdir()
    arguments = ["--config", str(tmp_path / "a" / "sweep.yaml"), "train.seed=3", "corpus.paths=s3://b/c"]
    assert submission.copy_files(arguments, target) == [
        "--config",
        "sweep.yaml",
        "train.seed=3",
        "corpus.paths=s3://b/c",
    ]
    assert [file.name for file in target.iterdir()] == ["sweep.yaml"]
    with pytest.raises(ConfigError, match=r"sweep\.yaml: two files of this name"):
        submission.copy_files(arguments, target)
    with pytest.raises(ConfigError, match="is a directory of this machine, and only files are sent with a job"):
        submission.copy_files([str(tmp_path)], target)


def test_callbacks_of_the_working_directory_go_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "steps.py").write_text("")
    (tmp_path / "single.py").write_text("")
    (tmp_path / "own.yaml").write_text("train: {callbacks: [own.steps:Steps, single:Early, json.decoder:Of]}")
    with submission.pack(["train", "--config", "own.yaml", "train.seed=3"], "http://127.0.0.1:1") as packed:
        files = sorted(str(path.relative_to(packed.directory)) for path in packed.directory.rglob("*.py"))
    assert files == ["own/steps.py", "single.py"]
    with submission.pack(["tune", "--config", "/on/the/cluster.yaml"], "http://127.0.0.1:1") as packed:
        assert list(packed.directory.iterdir()) == []


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


SECRETS = ("HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY")
"""Variables of the environment with a secret in them."""


class Cluster(NamedTuple):
    """Of processes that were started by `ray start`, as its user meets it."""

    dashboard: str
    head: str
    """The address that commands connect to."""
    environment: dict[str, str]
    """Of whoever uses it, on the machine of the head: HOME, with the token in it, and nothing of Ray."""
    processes: list[subprocess.Popen]
    """The head first."""
    session: Path
    """Where Ray keeps its logs and the files of jobs."""


def somebody(home):
    """The environment of a user with this HOME, who has set nothing of Ray's authentication."""
    ours = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def with_token(home, token=None):
    """A HOME with a token of Ray's in it, another one each time unless it is given."""
    (home / ".ray").mkdir(parents=True)
    file = home / ".ray" / "auth_token"
    file.write_text(token or uuid.uuid4().hex * 2)
    file.chmod(0o600)
    return home


@contextlib.contextmanager
def started(home, free_port, cpus, nodes=(), secrets=None):
    """A cluster on loopback ports, with token authentication if its user has a token. The head and each of the other
    nodes have so many CPUs, and the secrets in their environment."""
    environment = somebody(home)
    port, dashboard = free_port(), free_port()
    # A path of more than 107 characters is none for a socket.
    session = f"/tmp/raylm-{uuid.uuid4().hex[:8]}"
    processes = []

    def start(*options, **more):
        process = subprocess.Popen(
            ["ray", "start", "--block", f"--dashboard-agent-listen-port={free_port()}", *options],
            env={**environment, **(secrets or {}), **more},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        processes.append(process)
        return process

    of_head = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={session}"]
    cluster = Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", environment, processes, Path(session))
    try:
        wait_for(cluster.dashboard, start("--head", f"--num-cpus={cpus}", *of_head))
        for number in nodes:
            start(f"--address={cluster.head}", f"--num-cpus={number}", RAY_AUTH_MODE="token")
        yield cluster
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
        subprocess.run(["rm", "-rf", session], check=True)


@pytest.fixture(scope="module")
def head(tmp_path_factory, free_port):
    """A Cluster with two CPUs that asks for a token, as `ray start --head` makes it where there is one. Its nodes have
    secrets in their environment, all of them TOKEN."""
    home = with_token(tmp_path_factory.mktemp("user") / "home")
    with started(home, free_port, 2, secrets=dict.fromkeys(SECRETS, TOKEN)) as cluster:
        yield cluster


@pytest.fixture
def submitted(head, tiny, tmp_path):
    """(arguments...) -> the finished process of `raylm submit` with tiny's experiment; its MLflow lies in tmp_path."""
    experiment = config.override(
        tiny(), {"storage": str(tmp_path / "runs"), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    )
    config.save(experiment, tmp_path / "words.yaml")

    return lambda *arguments, detach=False: run_submit(head, tmp_path, *arguments, detach=detach)


def run_submit(cluster, cwd, *arguments, detach=False, environment=None):
    """The finished process of `raylm submit`, in the environment of the cluster's user unless another is given."""
    first = ["--detach", "--json"] if detach else []
    command = [sys.executable, "-m", "raylm.submit", "--address", cluster.dashboard, *first, *arguments]
    environment = environment or cluster.environment
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=500)


JOBS = """
import sys
from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient(sys.argv[1])
for job in client.list_jobs():
    print(job, client.get_job_logs(job.submission_id) if job.submission_id else "")
"""
"""Prints all that a dashboard tells of jobs: entrypoint, runtime environment, metadata, message and logs."""


@pytest.mark.slow
def test_a_secret_is_in_nothing_that_ray_tells_of_a_job(head, tiny, tmp_path):
    """Neither one of the user, whose command with it is refused, nor one of the nodes, which the job uses."""
    canary = f"canary{uuid.uuid4().hex}"
    environment = {**head.environment, **dict.fromkeys(SECRETS, canary)}
    config.save(tiny(f"storage={tmp_path}/runs", "tracking.uri=http://127.0.0.1:9"), tmp_path / "words.yaml")
    command = ("train", "--config", "words.yaml")
    refused = run_submit(head, tmp_path, *command, f"tracking.uri=http://me:{canary}@127.0.0.1:9")
    assert refused.returncode == 2
    done = run_submit(head, tmp_path, *command, environment=environment)
    assert done.returncode == 0, done.stderr
    by_token = {**head.environment, "RAY_AUTH_MODE": "token"}
    told = subprocess.run(
        [sys.executable, "-c", JOBS, head.dashboard], env=by_token, capture_output=True, text=True, timeout=120
    )
    assert told.returncode == 0, told.stderr
    assert "python -m raylm.train --config words.yaml" in told.stdout
    assert "perplexity" in told.stdout, "the logs are there"
    seen = {"refused": refused.stderr, "stdout": done.stdout, "stderr": done.stderr, "jobs": told.stdout}
    for path in [*head.session.rglob("*"), *tmp_path.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            seen[str(path)] = path.read_bytes().decode("latin-1")
    assert any("job-driver-" in name for name in seen)
    assert [name for name, content in seen.items() if canary in content or TOKEN in content] == []


@pytest.mark.slow
def test_a_token_is_sent_and_a_missing_one_is_reported(head, tmp_path):
    done = run_submit(head, tmp_path, "inspect", "--help")
    assert (done.returncode, "raylm.inspect" in done.stdout) == (0, True), done.stderr
    others = {
        "it asks for a token, and there is none in ~/.ray/auth_token: `ray get-auth-token` on": somebody(tmp_path),
        "it does not take the token of ~/.ray/auth_token": somebody(with_token(tmp_path / "other")),
        "it asks for a token, and RAY_AUTH_MODE=disabled holds": {**head.environment, "RAY_AUTH_MODE": "disabled"},
        "it asks for a token, and there is none in RAY_AUTH_TOKEN_PATH=none": {
            **head.environment,
            "RAY_AUTH_TOKEN_PATH": "none",
        },
    }
    for problem, environment in others.items():
        refused = run_submit(head, tmp_path, "inspect", "--help", environment=environment)
        assert refused.returncode == 5
        assert refused.stderr.startswith(f"error: --address={head.dashboard}: {problem}")
        assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_what_would_go_with_the_job_is_refused(submitted, tmp_path):
    """Ray runs a job in a directory of its own, where relative paths lead to."""
    kept = ["tune", "--config", tmp_path / "words.yaml"]
    for setting in ("storage=runs", "tracking.uri=sqlite:///mlflow.db"):
        done = submitted(*map(str, kept), setting)
        assert done.returncode == 2, done.stderr
        key, _, place = setting.replace("sqlite:///", "").partition("=")
        told = rf"error: {key}=\S+/working_dir_files/\S+/{place}: the directory in which Ray runs this job"
        assert re.search(told, done.stdout + done.stderr), done.stdout + done.stderr


@pytest.mark.slow
def test_a_cluster_that_asks_for_no_token_is_used_with_and_without_one(tiny, tmp_path, free_port):
    (tmp_path / "none").mkdir()
    config.save(tiny(), tmp_path / "words.yaml")
    with started(tmp_path / "none", free_port, 1) as cluster:
        for home in (tmp_path / "none", with_token(tmp_path / "some")):
            done = run_submit(cluster, tmp_path, "inspect", "--help", environment=somebody(home))
            assert done.returncode == 0, done.stderr
            found = doctor(cluster, tmp_path, somebody(home))
            assert found["cluster"]["found"] == f"cluster.address={cluster.head}: 1 node, 1 CPU, 0 GPUs"
            settings = [f"storage={home}/runs", f"cluster.address={cluster.head}"]
            done = subprocess.run(  # tasks, whose workers have to reach the driver
                [sys.executable, "-m", "raylm.prepare", "--config", "words.yaml", *settings],
                env=somebody(home), cwd=tmp_path, capture_output=True, text=True, timeout=200,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr


def doctor(cluster, cwd, environment):
    """What `raylm doctor` finds, by its name, of a cluster that cluster.address names."""
    settings = [f"cluster.address={cluster.head}", "tracking.uri=null"]
    done = subprocess.run(
        [sys.executable, "-m", "raylm.doctor", "--json", *settings],
        env=environment, cwd=cwd, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert "gcs_client" not in done.stderr
    return {finding["what"]: finding for finding in json.loads(done.stdout)["findings"]}


@pytest.mark.slow
def test_commands_that_connect_show_the_token_too(head, tmp_path):
    found = doctor(head, tmp_path, head.environment)
    assert found["cluster"]["found"] == f"cluster.address={head.head}: 1 node, 2 CPUs, 0 GPUs"
    found = doctor(head, tmp_path, somebody(tmp_path))
    problem = f"cluster.address={head.head}: it asks for a token, and there is none in ~/.ray/auth_token"
    assert found["cluster.address"]["found"].startswith(problem)
    found = doctor(head, tmp_path, {**somebody(tmp_path), "RAY_AUTH_MODE": "token"})
    assert found["cluster.address"]["found"].startswith(problem), "where Ray's own core would abort"


@pytest.mark.slow
def test_a_job_has_its_commands_output_and_exit_code(submitted, tmp_path):
    refused = submitted("train", "--config", "words.yaml", "train.batch_tokens=100")
    assert refused.returncode == 2
    assert "train.batch_tokens: must be a multiple of blocks.block_size" in refused.stderr, "and nothing was submitted"
    failed = submitted("train", "--config", "words.yaml", "corpus.paths=/nowhere")
    assert failed.returncode == 3
    assert "corpus.paths: /nowhere" in failed.stdout
    done = submitted("train", "--config", "words.yaml")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    assert "INFO" not in done.stderr, "Ray's client names each package that it uploads"
    (model,) = tmp_path.glob("runs/tiny/train-*/model")
    assert (model / "model.safetensors").exists()


@pytest.mark.slow
def test_a_stopped_job_leaves_no_run_running_and_resumes_when_submitted_again(head, submitted, tmp_path):
    environment = {**head.environment, "RAY_AUTH_MODE": "token"}  # which Ray's own command needs
    long = ("train", "--config", "words.yaml", "train.max_tokens=256000", "train.eval_every_tokens=5120")
    job = json.loads(submitted(*long, detach=True).stdout)["job"]
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/tiny/train-*/checkpoints/step_*/manifest.json")):
        assert time.monotonic() < deadline, "it never saved"
        time.sleep(0.5)
    stop = subprocess.run(
        ["ray", "job", "stop", "--address", head.dashboard, job],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert stop.returncode == 0, stop.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["KILLED"]
    again = submitted(*long)
    assert again.returncode == 0, again.stderr
    assert "resuming from step" in again.stdout
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_whose_head_is_lost_resumes_when_submitted_to_another(tiny, tmp_path, free_port, monkeypatch):
    """All processes of the head are killed, the job's among them; its worker, on another node, goes on a while."""
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # seconds after which a head is lost, of 60
    long = ("train", "--config", "words.yaml")
    with mlflow_server(tmp_path, free_port()) as uri:
        sizes = ("train.max_tokens=256000", "train.eval_every_tokens=12800")
        config.save(
            tiny(f"storage={tmp_path}/runs", "name=words", f"tracking.uri={uri}", *sizes), tmp_path / "words.yaml"
        )
        place = tmp_path / "runs" / "words"
        home = with_token(tmp_path / "home")
        with started(home, free_port, 0, [1]) as cluster:
            lost = cluster.processes[0]
            assert run_submit(cluster, tmp_path, *long, detach=True).returncode == 0
            until(lambda: len(list(place.glob("train-*/checkpoints/*/manifest.json"))) > 1)
            for process in [*psutil.Process(lost.pid).children(recursive=True), lost]:
                process.kill()
            with started(home, free_port, 0, [1]) as cluster:
                again = run_submit(cluster, tmp_path, *long)
                assert again.returncode == 0, again.stdout + again.stderr
                whole = run_submit(cluster, tmp_path, *long, "name=whole")
                assert whole.returncode == 0, whole.stdout + whole.stderr
        saved = int(re.search(r"resuming from step ([\d,]+) of 1,000", again.stdout)[1].replace(",", ""))
        assert 50 <= saved < 1000
        (ours,), (theirs,) = place.glob("train-*"), (tmp_path / "runs" / "whole").glob("train-*")
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (ours, theirs)]
        assert weights[0] == weights[1]
        assert tracking.Run(str(ours)).metric_history() == tracking.Run(str(theirs)).metric_history()
        client = MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
        assert run.info.status == "FINISHED"
        for key, points in tracking.Run(str(ours)).metric_history().items():
            stored = client.get_metric_history(run.info.run_id, key)
            assert sorted((point.step, point.value) for point in stored) == points, key
