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
        for process in psutil.process_iter(["cmdline"]):  # its own, and those of nodes that the autoscaler has added
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
    drain = (
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--deadline-remaining-seconds",
        "120",
        "--reason-message",
        "spot",
    )
    ray = Path(sys.executable).with_name("ray")
    subprocess.run([ray, "drain-node", "--address", address, "--node-id", going, *drain], check=True, timeout=100)
    told = started.wait()
    assert told.returncode == 75, told.stderr
    saved = max(int(found.name[-8:]) for found in place.glob("train-*/checkpoints/*"))
    assert saved < 1000
    assert f"stopped after step {saved}, which is saved" in json.loads(told.stdout)["error"]

    ended = start_command(*argv, "cluster.num_workers=[1, 2]").wait()
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["resumed_from"] == saved
    assert f"going on from step {saved} of 1,000 with 1 worker instead of 2" in ended.stderr


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
    assert re.search(r"going on from step [\d,]+ of 100,000 with 2 workers instead of 1", told.stderr)


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
