"""Hosts that have a network of their own: a head and two nodes, each in a network namespace, on one bridge.

Each node is started by `ray start` and has /tmp for itself; all share the directory of the storage, as of an NFS. A
link is taken down, a host is killed and comes back, the head starts again.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from raylm import config

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6399
HEAD, ONE, OTHER = range(3)


def run(line, check=True):
    return subprocess.run(line.split(), check=check, capture_output=True, text=True)


def possible():
    """Whether namespaces, pairs of links and bridges can be made here."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    name = f"raylm{os.getpid()}"
    made = [run(line, check=False).returncode for line in (f"ip netns add {name}", f"ip link add {name}b type bridge")]
    for line in (f"ip netns del {name}", f"ip link del {name}b"):
        run(line, check=False)
    return not any(made)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not possible(), reason="no network namespaces can be made here: it takes root and iproute2"),
]


class Hosts:
    """Three hosts on a bridge, and what runs on them."""

    def __init__(self, shared):
        self.shared, self.bridge = Path(shared), f"rl{os.getpid()}"
        self.names = [f"{self.bridge}h{number}" for number in range(3)]
        self.started = {}

    def address(self, number):
        return f"10.77.4.{number + 2}"

    def plug_in(self):
        run(f"ip link add {self.bridge} type bridge")
        run(f"ip link set {self.bridge} up")
        for number, name in enumerate(self.names):
            run(f"ip netns add {name}")
            run(f"ip link add {self.bridge}v{number} type veth peer name eth0 netns {name}")
            run(f"ip link set {self.bridge}v{number} master {self.bridge} up")
            run(f"ip netns exec {name} ip addr add {self.address(number)}/24 dev eth0")
            for device in ("eth0", "lo"):
                run(f"ip netns exec {name} ip link set {device} up")

    def link(self, number, state):
        run(f"ip link set {self.bridge}v{number} {state}")

    def on(self, number, *command, **how):
        """Start a command on a host, whose /tmp is its own."""
        private = self.shared / f"tmp{number}"
        private.mkdir(exist_ok=True)
        script = 'mount --bind "$1" /tmp && shift && exec "$@"'
        inside = [
            "ip",
            "netns",
            "exec",
            self.names[number],
            "unshare",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
            str(private),
        ]
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.Popen([*inside, *map(str, command)], env=environment, start_new_session=True, **how)

    def start(self, number):
        """Start Ray on a host: its head without a CPU, or a node with one."""
        place = ["--head", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
        if number != HEAD:
            place = [f"--address={self.address(HEAD)}:{PORT}", "--num-cpus=1"]
        log = open(self.shared / f"ray{number}.log", "a")  # noqa: SIM115 - as long as it runs
        command = [RAY, "start", *place, "--block", f"--node-ip-address={self.address(number)}"]
        self.started[number] = self.on(number, *command, stdout=log, stderr=log)

    def boot(self):
        """Start Ray on all hosts, and wait for their CPUs."""
        self.start(HEAD)
        until(lambda: list(self.shared.glob("tmp0/ray/session_*/logs/gcs_server.out")))
        for number in (ONE, OTHER):
            self.start(number)
            self.wait_for(number)

    def kill(self, number):
        """Kill all that runs on a host, at once."""
        pids = run(f"ip netns pids {self.names[number]}", check=False).stdout.split()
        for pid in map(int, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if number in self.started:
            self.started.pop(number).wait(60)

    def cpus(self):
        """The CPUs that Ray has, asked on the head."""
        asking = (
            f"import ray; ray.init('{self.address(HEAD)}:{PORT}', logging_level=50);"
            "print(ray.cluster_resources().get('CPU', 0))"
        )
        found = self.on(HEAD, sys.executable, "-c", asking, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return found.communicate()[0].decode().strip()

    def wait_for(self, cpus):
        """Wait for Ray's CPUs; a node that a busy machine did not start within Ray's 30 s is started again."""

        def are_there():
            for number in [number for number, process in self.started.items() if process.poll() is not None]:
                self.kill(number)
                self.start(number)
            return self.cpus() == f"{cpus:.1f}"

        until(are_there)

    def command(self, verb, *argv):
        """Start a command of raylm on the head."""
        at = [f"cluster.address={self.address(HEAD)}:{PORT}", "--json"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return self.on(HEAD, sys.executable, "-m", f"raylm.{verb}", *argv, *at, **pipes)

    def unplug(self):
        for number in range(3):
            self.kill(number)
            run(f"ip link del {self.bridge}v{number}", check=False)  # a namespace takes its own along only later
        for name in self.names:
            run(f"ip netns del {name}", check=False)
        run(f"ip link del {self.bridge}", check=False)


def until(found):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        if there := found():
            return there
        time.sleep(0.5)
    raise AssertionError("it was waited for in vain")


@contextlib.contextmanager
def running(kind=Hosts):
    """Hosts that have started, with a directory that they share; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="raylm", dir="/var/tmp", ignore_cleanup_errors=True) as shared:
        made = kind(shared)
        try:
            made.plug_in()
            made.boot()
            yield made
        finally:
            made.unplug()


@pytest.fixture
def hosts():
    with running() as made:
        yield made


def experiment(hosts, text_directory, tiny, *settings):
    """The file of an experiment whose corpus and storage every host sees."""
    shutil.copytree(text_directory, hosts.shared / "text", dirs_exist_ok=True)
    file = hosts.shared / "words.yaml"
    places = (f"storage={hosts.shared}/runs", f"corpus.paths={hosts.shared}/text", "name=words")
    config.save(tiny(*places, *settings), file)
    return file


def ended(process):
    stdout, stderr = process.communicate(timeout=900)
    return process.returncode, json.loads(stdout or "{}"), stderr


SIZES = ("train.max_tokens=256000", "train.eval_every_tokens=25600")


def test_a_training_whose_link_to_a_host_is_cut_resumes_on_the_other(hosts, text_directory, tiny):
    """Two workers on two hosts, and nothing says that one is gone but its silence."""
    file = experiment(hosts, text_directory, tiny, *SIZES)
    started = hosts.command("train", "--config", file, "cluster.num_workers=[1, 2]")
    place = hosts.shared / "runs" / "words"
    until(lambda: list(place.glob("train-*/checkpoints/*/manifest.json")) or started.poll() is not None)
    hosts.link(OTHER, "down")
    code, result, told = ended(started)
    assert code == 0, told
    assert result["steps"] == 1000
    assert re.search(r"resuming from step [\d,]+ of 1,000 with 1 worker instead of 2", told)


def test_a_sweep_goes_on_without_a_host_that_is_lost_and_with_it_when_it_is_back(hosts, text_directory, tiny):
    settings = (*SIZES, "tune.num_samples=6", "tune.scheduler=none")
    space = "tune.space={train.learning_rate: {loguniform: [1e-3, 1e-1]}}"
    file = experiment(hosts, text_directory, tiny, *settings, space)
    prepared = hosts.command("prepare", "--config", file)
    until(lambda: list(hosts.shared.glob("runs/tokens/*/*")) or prepared.poll() is not None)
    hosts.kill(OTHER)
    code, store, told = ended(prepared)
    assert code == 0, told
    hosts.start(OTHER)
    hosts.wait_for(2)

    started = hosts.command("tune", "--config", file)
    place = hosts.shared / "runs" / "words"
    until(lambda: list(place.glob("tune-*/*/checkpoints/*/manifest.json")) or started.poll() is not None)
    hosts.kill(OTHER)
    hosts.start(OTHER)
    code, result, told = ended(started)
    assert code == 0, told
    assert [(trial["status"], trial["tokens"]) for trial in result["trials"]] == [("completed", 256000)] * 6
    assert store["store"].startswith(str(hosts.shared))


def test_the_same_command_resumes_on_a_head_that_started_again(hosts, text_directory, tiny):
    """The host of head and command is lost, and with them the cluster."""
    file = experiment(hosts, text_directory, tiny, *SIZES)
    hosts.command("train", "--config", file)
    place = hosts.shared / "runs" / "words"
    until(lambda: list(place.glob("train-*/checkpoints/*/manifest.json")))
    for number in (HEAD, ONE, OTHER):
        hosts.kill(number)
    shutil.rmtree(hosts.shared / "tmp0" / "ray")
    hosts.boot()
    code, result, told = ended(hosts.command("train", "--config", file))
    assert code == 0, told
    assert result["resumed_from"] >= 100
    assert result["steps"] == 1000
    assert len(list(place.glob("train-*"))) == 1
