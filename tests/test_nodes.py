"""Runs on several nodes, which are raylets of their own on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from raylm import config

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes():
    """A cluster whose head has no CPU: other nodes are for the test to add."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


EMPTY = """
    setup_commands head_setup_commands worker_setup_commands initialization_commands head_start_ray_commands
    worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter
"""


@pytest.fixture
def growing(tmp_path, free_port, monkeypatch):
    """The address of a cluster without CPUs, whose autoscaler adds at most two nodes of one CPU."""
    import ray

    address = f"{ray.util.get_node_ip_address()}:{free_port()}"
    head = "f" * 51 + "00000"
    described = {
        "cluster_name": "growing",
        "max_workers": 2,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": head,
            "launch_multiple": True,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "ray.head.default",  # as the provider calls it
        "idle_timeout_minutes": 5,
        "upscaling_speed": 100,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{key: [] for key in EMPTY.split()},
        "file_mounts_sync_continuously": False,
    }
    file = tmp_path / "growing.json"
    file.write_text(json.dumps(described))
    session = f"/tmp/raylm-{uuid.uuid4().hex[:8]}"  # a path of more than 107 characters is none for a socket
    command = [
        "start", "--head", "--block", "--num-cpus=0", f"--temp-dir={session}", f"--autoscaling-config={file}",
        f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--ray-client-server-port={free_port()}",
        f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    as_launched = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head,
        "RAY_CLOUD_INSTANCE_ID": head,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }
    started = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", *command],
        env={**os.environ, **as_launched},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: list(Path(session).glob("session_*/logs/monitor.log")))
        yield address
    finally:
        started.kill()
        started.wait()
        end(session)  # and the nodes that the autoscaler has added


def end(session):
    """Kill what was started with this temporary directory of Ray's, and remove it."""
    for process in psutil.process_iter(["cmdline"]):
        if any(session in part for part in process.info["cmdline"] or ()):
            process.kill()
    shutil.rmtree(session, ignore_errors=True)


def until(found):
    """Wait for something to be found, and return it."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if there := found():
            return there
        time.sleep(0.1)
    raise AssertionError("it was waited for in vain")


def drain(address, node_id):
    """Have a node be taken away as a spot instance is: in two minutes."""
    why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot")
    ray = Path(sys.executable).with_name("ray")
    subprocess.run(
        [ray, "drain-node", "--address", address, "--node-id", node_id, *why, "--deadline-remaining-seconds", "120"],
        check=True,
        timeout=100,
    )


@pytest.mark.timeout(600)
def test_a_trial_whose_node_is_taken_away_resumes_when_there_is_another(nodes, tiny, start_command, tmp_path):
    """A trial of two workers on two nodes: with too little left it waits for a node, and is no trial that is over."""
    going = [nodes.add_node(num_cpus=1).node_id for _ in range(2)][1]
    file = tmp_path / "words.yaml"
    sizes = ("train.max_tokens=256000", "train.eval_every_tokens=25600", "tune.num_samples=1", "tune.scheduler=none")
    config.save(tiny(f"storage={tmp_path}/runs", "name=words", *sizes, "cluster.num_workers=2"), file)
    started = start_command("tune", "--config", file, "--json", f"cluster.address={nodes.address}")
    until(lambda: list((tmp_path / "runs" / "words").glob("tune-*/*/checkpoints/*/manifest.json")))
    drain(nodes.address, going)
    nodes.add_node(num_cpus=1)
    told = started.wait()
    assert told.returncode == 0, told.stderr
    assert re.search(r"trial_00000: a node is being taken away; resuming without it from step [\d,]+", told.stderr)
    (trial,) = json.loads(told.stdout)["trials"]
    assert (trial["status"], trial["tokens"]) == ("completed", 256000)


@pytest.mark.timeout(600)
def test_a_node_that_is_taken_away_costs_no_step(nodes, tiny, start_command, tmp_path):
    """Two workers on two nodes, one of which is drained as a spot instance is: exit 75; then on with what is left."""
    going = [nodes.add_node(num_cpus=1).node_id for _ in range(2)][1]
    address = nodes.address
    file = tmp_path / "words.yaml"
    sizes = ("train.max_tokens=256000", "train.eval_every_tokens=25600")
    config.save(tiny(f"storage={tmp_path}/runs", "name=words", *sizes), file)
    argv = ("train", "--config", file, "--json", f"cluster.address={address}")

    started = start_command(*argv, "cluster.num_workers=2")
    place = tmp_path / "runs" / "words"
    until(lambda: list(place.glob("train-*/checkpoints/*/manifest.json")))
    drain(address, going)
    told = started.wait()
    assert told.returncode == 75, told.stderr
    saved = max(int(found.name[-8:]) for found in place.glob("train-*/checkpoints/*"))
    assert saved < 1000
    assert f"stopped after step {saved}, which is saved" in json.loads(told.stdout)["error"]

    ended = start_command(*argv, "cluster.num_workers=[1, 2]").wait()
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["resumed_from"] == saved
    assert f"resuming from step {saved} of 1,000 with 1 worker instead of 2" in ended.stderr


@pytest.mark.timeout(600)
def test_a_node_that_joins_works_along(nodes, tiny, start_command, tmp_path):
    """Ray looks once a minute whether there is room for more workers."""
    nodes.add_node(num_cpus=1)
    file = tmp_path / "words.yaml"
    sizes = ("train.max_tokens=25600000", "train.eval_every_tokens=128000")
    config.save(tiny(f"storage={tmp_path}/runs", "name=words", *sizes), file)
    started = start_command(
        "train", "--config", file, "--json", f"cluster.address={nodes.address}", "cluster.num_workers=[1, 2]"
    )
    place = tmp_path / "runs" / "words"

    def with_workers(number):
        whole = [found.parent for found in place.glob("train-*/checkpoints/*/manifest.json")]
        return [it for it in whole if json.loads((it / "progress.json").read_text())["world_size"] == number]

    until(lambda: with_workers(1))
    nodes.add_node(num_cpus=1)
    until(lambda: with_workers(2))
    started.terminate()
    told = started.wait()
    assert told.returncode == 75, told.stderr
    assert re.search(r"resuming from step [\d,]+ of 100,000 with 2 workers instead of 1", told.stderr)


@pytest.fixture
def losing(nodes, tiny, start_command, command, tmp_path):
    """(verb, settings, settings on the cluster, files to wait for) -> two endings of a command: as ever, with --json.

    Of the first one a node is killed in the middle; the other has this machine alone, and storage of its own.
    """

    def run(verb, settings, spread, pattern):
        made = [tmp_path / name for name in ("lost.yaml", "whole.yaml")]
        for file in made:
            config.save(tiny(f"storage={tmp_path}/{file.stem}", "name=words", *settings), file)
        nodes.add_node(num_cpus=1)
        going = nodes.add_node(num_cpus=1)
        started = start_command(verb, "--config", made[0], "--json", f"cluster.address={nodes.address}", *spread)
        until(lambda: list((tmp_path / "lost").glob(pattern)))
        nodes.remove_node(going, allow_graceful=False)
        lost = started.wait()
        assert lost.returncode == 0, lost.stderr
        whole = command(verb, "--config", made[1], "--json")
        assert whole.returncode == 0, whole.stderr
        return lost, json.loads(lost.stdout), json.loads(whole.stdout)

    return run


@pytest.mark.timeout(600)
def test_tokens_are_the_same_though_a_node_is_lost(losing, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(24):
        texts = (f"Document {number} says {k} times {k * number} is {k * k}." * 20 for k in range(4000))
        (corpus / f"{number:02}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    _, lost, whole = losing("prepare", [f"corpus.paths={corpus}"], [], "tokens/*/progress/*.json")
    assert not lost["reused"]
    assert lost["fingerprint"] == whole["fingerprint"]
    files = {path.relative_to(whole["store"]): path for path in Path(whole["store"]).rglob("*.arrow")}
    assert len(files) > 4
    for name, path in files.items():
        assert (Path(lost["store"]) / name).read_bytes() == path.read_bytes(), name


@pytest.mark.timeout(600)
def test_a_training_that_loses_a_node_resumes_on_the_others(losing):
    sizes = ("train.max_tokens=256000", "train.eval_every_tokens=25600")
    ended, lost, whole = losing(
        "train", sizes, ["cluster.num_workers=[1, 2]"], "words/train-*/checkpoints/*/manifest.json"
    )
    assert lost["steps"] == whole["steps"] == 1000
    assert re.search(r"resuming from step [\d,]+ of 1,000 with 1 worker instead of 2", ended.stderr)
    assert lost["perplexity"] == pytest.approx(whole["perplexity"], rel=0.1), "dropout draws for each worker"


@pytest.mark.timeout(600)
def test_a_sweep_that_loses_a_node_ends_with_the_same_table(losing):
    settings = (
        "train.max_tokens=128000", "train.eval_every_tokens=12800", "tune.num_samples=4", "tune.scheduler=none",
        "tune.space={train.learning_rate: {loguniform: [1e-3, 1e-1]}}",
    )  # fmt: skip
    _, lost, whole = losing("tune", settings, [], "words/tune-*/*/checkpoints/*/manifest.json")
    ours, theirs = (
        [{key: trial[key] for key in ("trial_id", "status", "tokens", "perplexity")} for trial in found["trials"]]
        for found in (lost, whole)
    )
    assert [trial["status"] for trial in ours] == ["completed"] * 4, lost["trials"][-1]["failure"]
    assert ours == theirs


@pytest.mark.timeout(900)
def test_a_run_whose_cluster_is_gone_resumes_in_another_one(nodes, tiny, start_command, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    nodes.add_node(num_cpus=1)
    file = tmp_path / "words.yaml"
    sizes = ("train.max_tokens=256000", "train.eval_every_tokens=12800")
    config.save(tiny(f"storage={tmp_path}/runs", "name=words", *sizes), file)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # seconds after which a head is lost, of 60
    started = start_command("train", "--config", file, "--json", f"cluster.address={nodes.address}")
    manifests = tmp_path / "runs" / "words"
    until(lambda: list(manifests.glob("train-*/checkpoints/*/manifest.json")))
    nodes.remove_node(nodes.head_node, allow_graceful=False)
    assert started.wait().returncode != 0

    other = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ended = start_command("train", "--config", file, "--json", f"cluster.address={other.address}").wait()
    finally:
        other.shutdown()
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["resumed_from"] >= 50
    assert result["steps"] == 1000
    assert len(list(manifests.glob("train-*"))) == 1


@pytest.fixture
def another_network(free_port, monkeypatch):
    """The address of a cluster whose only CPUs are of a node with a network of its own."""
    ray, bridge, there = str(Path(sys.executable).with_name("ray")), "10.77.3.1", "10.77.3.2"
    name = f"raylm{os.getpid()}"
    inside = ["ip", "netns", "exec", name]
    session = f"/tmp/raylm-{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    address = f"{bridge}:{free_port()}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    set_up = (
        f"ip netns add {name}", f"ip link add {name}a type veth peer name {name}b",
        f"ip link set {name}b netns {name}", f"ip addr add {bridge}/24 dev {name}a", f"ip link set {name}a up",
        f"{' '.join(inside)} ip addr add {there}/24 dev {name}b", f"{' '.join(inside)} ip link set {name}b up",
        f"{' '.join(inside)} ip link set lo up",
    )  # fmt: skip
    started = []
    try:
        for line in set_up:
            subprocess.run(line.split(), check=True, capture_output=True)
        head = ["--head", f"--port={address.split(':')[1]}", "--num-cpus=0", "--include-dashboard=false"]
        ports = [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
        common = ["--block", f"--temp-dir={session}"]
        started.append(subprocess.Popen([ray, "start", *head, *ports, *common, f"--node-ip-address={bridge}"], **quiet))
        until(lambda: list(Path(session).glob("session_*/logs/gcs_server.out")))
        other = [*inside, ray, "start", f"--address={address}", f"--node-ip-address={there}", "--num-cpus=2", "--block"]
        started.append(subprocess.Popen(other, **quiet))
        asking = f"import ray; ray.init('{address}', logging_level=50); print(ray.cluster_resources().get('CPU'))"
        until(lambda: subprocess.run([sys.executable, "-c", asking], capture_output=True).stdout == b"2.0\n")
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
        end(session)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"{name}a"], check=False, capture_output=True)


# Only root may make a network namespace, and with iproute2's ip alone it can be entered by name.
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2")
@pytest.mark.timeout(600)
def test_workers_are_reached_in_another_network(another_network, tiny, command, tmp_path):
    """Head and command have another address than the node of both workers, and nothing listens on loopback for it."""
    file = tmp_path / "words.yaml"
    config.save(tiny(f"storage={tmp_path}/runs", "name=words"), file)
    ended = command("train", "--config", file, "--json", f"cluster.address={another_network}", "cluster.num_workers=2")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] == 10


def test_a_directory_that_other_nodes_do_not_see_is_refused(nodes, tiny, command, tmp_path):
    """/proc/self/cwd is another directory in each process, as a local one is on each node."""
    nodes.add_node(num_cpus=1)
    file = tmp_path / "words.yaml"
    config.save(tiny("storage=/proc/self/cwd/runs", "name=words"), file)
    ended = command("train", "--config", file, "--json", f"cluster.address={nodes.address}", cwd=tmp_path)
    assert ended.returncode == 5, ended.stderr
    assert json.loads(ended.stdout)["where"] == "storage"
    assert "not the same directory" in ended.stderr
    assert not (tmp_path / "runs" / "tokens").exists(), "before anything is prepared"


@pytest.mark.timeout(600)
def test_a_cluster_grows_by_what_a_run_needs(growing, tiny, tmp_path):
    """There is no CPU at first; tokens are prepared and two workers train on the nodes that the autoscaler adds."""
    file = tmp_path / "words.yaml"
    config.save(tiny(f"storage={tmp_path}/runs", "name=words"), file)
    spread = ("cluster.num_workers=2", "cluster.placement_strategy=STRICT_SPREAD")
    command = [sys.executable, "-m", "raylm.train", "--config", file, "--json", f"cluster.address={growing}", *spread]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 CPUs are needed and the cluster has 0: waiting for nodes" in done.stderr
    assert json.loads(done.stdout)["perplexity"] > 1
