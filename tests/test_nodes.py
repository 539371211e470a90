"""Runs on several nodes, which are raylets of their own on this machine."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

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
