"""Runs on several nodes, which are raylets of their own on this machine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raylm import config

pytestmark = pytest.mark.slow


@pytest.fixture
def two_nodes():
    """(address, node ids, add a node) of a cluster with a head that has no CPU and two nodes with one each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster.address, [node.node_id for node in nodes]
    cluster.shutdown()


@pytest.mark.timeout(600)
def test_a_node_that_is_taken_away_costs_no_step(two_nodes, tiny, start_command, tmp_path):
    """Two workers on two nodes, one of which is drained as a spot instance is: exit 75; then on with what is left."""
    address, (_, going) = two_nodes
    file = tmp_path / "words.yaml"
    sizes = ("train.max_tokens=256000", "train.eval_every_tokens=25600")
    config.save(tiny(f"storage={tmp_path}/runs", "name=words", *sizes), file)
    argv = ("train", "--config", file, "--json", f"cluster.address={address}")

    started = start_command(*argv, "cluster.num_workers=2")
    place = tmp_path / "runs" / "words"
    deadline = time.monotonic() + 200
    while not list(place.glob("train-*/checkpoints/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
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
    assert f"going on from step {saved} of 1,000 with 1 workers instead of 2" in ended.stderr
