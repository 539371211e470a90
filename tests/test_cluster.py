import contextlib
import dataclasses
import gc
import http.server
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from raylm import cluster, config, local_worker
from raylm.cluster.address import reachable_address
from raylm.config import ClusterConfig, address_of, is_local
from raylm.errors import ConfigError, TrainingError


def resources(total, **settings):
    return cluster.resources(ClusterConfig(**settings), total)


def test_gpus_are_taken_where_there_are_any():
    assert resources({"CPU": 8, "GPU": 2}).per_worker == {"CPU": 4, "GPU": 1}
    assert resources({"CPU": 8}).per_worker == {"CPU": 8}
    assert resources({"CPU": 8, "GPU": 2}, use_gpu=False).per_worker == {"CPU": 8}


def test_runs_side_by_side_are_limited_by_what_is_scarcest():
    assert resources({"CPU": 8, "GPU": 2}).most_runs == 2
    assert resources({"CPU": 8, "GPU": 2}, gpus_per_worker=0.25).most_runs == 8
    assert resources({"CPU": 8}, num_workers=3, cpus_per_worker=1).most_runs == 2


LAPTOP = [(1, {"CPU": 2})]
NODES = [(1, {"CPU": 4}), (3, {"CPU": 16})]
GPUS = [(1, {"CPU": 4}), (2, {"CPU": 16, "GPU": 4}), (1, {"CPU": 9, "GPU": 2, "accelerator_type:A10G": 1})]


@pytest.mark.parametrize(
    ("nodes", "settings", "trials", "cpus"),
    [
        (LAPTOP, {}, 1, 2),
        (LAPTOP, {}, 8, 1),
        (LAPTOP, {"num_workers": 2}, 1, 1),
        (LAPTOP, {"num_workers": (1, 4)}, 1, 1),
        (LAPTOP, {"cpus_per_worker": 0.5}, 8, 0.5),
        ([(1, {"CPU": 7})], {}, 2, 3),
        (NODES, {}, 1, 16),
        (NODES, {"num_workers": 4}, 1, 8),  # 5 of them fit on three nodes; 3 with 16
        (NODES, {"num_workers": 2}, 3, 8),
        (NODES, {"num_workers": 2}, 8, 3),
        (GPUS, {}, 1, 4),
        (GPUS, {}, 100, 4),
        (GPUS, {"gpus_per_worker": 0.5}, 100, 2),
        (GPUS, {"accelerator_type": "A10G"}, 1, 4),
        (GPUS, {"use_gpu": False}, 1, 16),
        ([(1, {"CPU": 2, "GPU": 8})], {}, 1, 1),
        ([(float("inf"), {"CPU": 8})], {"num_workers": 64}, 1, 8),
    ],
)
def test_cpus_are_divided_by_the_workers_that_train_at_a_time(nodes, settings, trials, cpus):
    total = {kind: sum(count * node.get(kind, 0) for count, node in nodes) for _, each in nodes for kind in each}
    found = cluster.resources(ClusterConfig(**settings), total, nodes, trials=trials)
    assert found.cpus_per_worker == cpus


def test_cpus_are_those_of_the_start_for_as_long_as_they_fit():
    def cpus(decided, **settings):
        return cluster.resources(ClusterConfig(**settings), {"CPU": 8}, decided=decided, trials=4).cpus_per_worker

    assert (cpus(None), cpus(3), cpus(8), cpus(16)) == (2, 3, 8, 2)
    assert (cpus(4, num_workers=2), cpus(6, num_workers=2)) == (4, 1)
    assert cpus(4, cpus_per_worker=1) == 1, "which was asked for"


def test_more_workers_than_the_cluster_can_give_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="cluster.num_workers.* = 3 x 1 needs 3 CPUs, the cluster has 2"):
        resources({"CPU": 2}, num_workers=3)
    with pytest.raises(ConfigError, match=r"needs 1 GPU, the cluster has 0; .*cluster.use_gpu=false"):
        resources({"CPU": 2}, use_gpu=True)


def test_whatever_ray_knows_can_be_reserved_for_a_worker():
    found = resources({"CPU": 8, "disk": 3}, num_workers=2, resources_per_worker={"disk": 1})
    assert found.per_worker == {"CPU": 4, "disk": 1}
    assert found.options == {"num_cpus": 4, "resources": {"disk": 1}}
    assert found.most_runs == 1
    with pytest.raises(
        ConfigError, match=r"cluster.resources_per_worker.memory = 2 x 1.6e\+10 needs 3.2e\+10 memory, the"
    ):
        resources({"CPU": 8, "memory": 3e10}, num_workers=2, resources_per_worker={"memory": 16e9})
    with pytest.raises(ConfigError, match="must not have GPU: that is cluster.gpus_per_worker"):
        config.load(settings=["cluster.resources_per_worker={GPU: 1}"])


def test_workers_go_where_the_accelerators_are_that_were_asked_for():
    found = resources({"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, accelerator_type="A10G")
    assert found.per_worker == {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 0.001}
    with pytest.raises(ConfigError, match=r"accelerator_type=H100: no node of the cluster has one; it has A10G"):
        resources({"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, accelerator_type="H100")


def test_a_cluster_of_the_launcher_may_grow_as_far_as_its_file_says(tmp_path, monkeypatch):
    from raylm.cluster import capacity

    monkeypatch.setenv("HOME", str(tmp_path))
    assert capacity._launched() is None
    launched = (Path(__file__).parents[1] / "cluster.yaml").read_text()
    (tmp_path / "ray_bootstrap_config.yaml").write_text(launched)
    nodes = capacity._launched()
    total = capacity._sum(nodes)
    assert total == {"CPU": 8 * 16, "GPU": 8}
    found = cluster.resources(ClusterConfig(), total, nodes)
    assert (found.most_runs, found.cpus_per_worker) == (8, 16), "of a head that has no CPU and no GPU"
    with pytest.raises(ConfigError, match="9 x 1 needs 9 GPUs, the cluster has 8"):
        resources(total, num_workers=9)


ON_ONE_CPU = """
import os
from raylm import cluster
from raylm.config import ClusterConfig
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
with cluster.connect(ClusterConfig()) as resources:
    print(cluster.cpus_here(), resources.total["CPU"], resources.cpus_per_worker)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="sched_setaffinity is a call of Linux")
def test_ray_has_the_cpus_that_the_command_may_use():
    told = subprocess.run([sys.executable, "-c", ON_ONE_CPU], capture_output=True, text=True, timeout=100)
    assert told.stdout.split() == ["1", "1.0", "1"], told.stderr


def test_cpus_are_those_of_the_machine_where_no_call_tells_more(monkeypatch):
    from raylm.cluster import capacity

    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 6, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(capacity, "_quotas", list)
    assert cluster.cpus_here() == 6
    monkeypatch.setattr(capacity, "_quotas", lambda: [2.5, 4.0])
    assert cluster.cpus_here() == 2
    monkeypatch.setattr(capacity, "_quotas", lambda: [0.25])
    assert cluster.cpus_here() == 1


@pytest.mark.parametrize(
    ("groups", "files", "quotas"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),  # a container
        ("0::/\n", {}, []),  # a machine without quotas
        (
            "0::/a.slice/b.scope\n",
            {"a.slice/b.scope/cpu.max": "max 100000", "a.slice/cpu.max": "300000 100000"},
            [3.0],
        ),
        ("0::/../other\n", {"cpu.max": "200000 100000"}, [2.0]),
        (
            "3:memory:/x\n4:cpu,cpuacct:/docker/1f\n0::/\n",  # version 1; inside, the group is the top of the tree
            {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            [0.5],
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
    ],
)
def test_the_quotas_of_control_groups(groups, files, quotas, tmp_path):
    from raylm.cluster import capacity

    (tmp_path / "groups").write_text(groups)
    for name, content in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(content)
    assert list(capacity._quotas(tmp_path / "groups", tmp_path / "tree")) == quotas
    assert list(capacity._quotas(tmp_path / "no Linux")) == []


def test_a_worker_trains_on_one_gpu():
    with pytest.raises(ConfigError, match="cluster.gpus_per_worker must be 1, .* got 2 with 1 worker:"):
        resources({"CPU": 8, "GPU": 2}, gpus_per_worker=2)
    with pytest.raises(ConfigError, match=r"got 0.5 with 2 workers"):
        resources({"CPU": 8, "GPU": 2}, gpus_per_worker=0.5, num_workers=2)


def test_a_submitted_job_uses_the_cluster_it_is_in(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_local(ClusterConfig())
    assert not is_local(ClusterConfig(address="10.0.0.1:6379"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_local(ClusterConfig())
    assert is_local(ClusterConfig(address="local"))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert is_local(ClusterConfig())


@pytest.fixture
def quick(monkeypatch):
    """A cluster has half a second to answer."""
    monkeypatch.setattr("raylm.cluster.address.ANSWER_SECONDS", 0.5)


def refused(value, problem):
    with pytest.raises(ConfigError, match=f"^cluster.address={value}: {problem}") as error:
        reachable_address(address_of(ClusterConfig(address=value)))
    assert error.value.where == "cluster.address"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("ray://head:10001", r"Ray Client \(ray://\) is not supported; .* raylm submit --address"),
        ("http://head:8265", "not an address that a command connects to; .* raylm submit --address"),
        ("head", "not an address; give the head's HOST:PORT, auto"),
        ("head:port", "not an address"),
        ("nobody.invalid:6379", "no Ray cluster can be reached there: the host name nobody.invalid is not known"),
    ],
)
def test_an_address_of_no_cluster_is_named_with_what_is_accepted(value, problem):
    refused(value, problem)


def test_a_cluster_that_does_not_exist_is_reported_before_ray_waits_for_it(quick, free_port):
    there = "no Ray cluster can be reached there: "
    refused(f"127.0.0.2:{free_port()}", f"{there}127.0.0.2 is there, and nothing listens on port")
    with socket.create_server(("127.0.0.2", 0), backlog=0) as silent:  # that takes one connection, and says nothing
        value = f"127.0.0.2:{silent.getsockname()[1]}"
        refused(value, f"{there}{value} does not answer within 0.5 s")
        with contextlib.ExitStack() as full:  # and no other: packets are swallowed
            for _ in range(2):
                waiting = full.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.2", silent.getsockname()[1]))
            refused(value, f"{there}{value} does not answer within 0.5 s")
    with http.server.HTTPServer(("127.0.0.2", 0), http.server.SimpleHTTPRequestHandler) as dashboard:
        threading.Thread(target=dashboard.serve_forever, daemon=True).start()
        refused(f"127.0.0.2:{dashboard.server_port}", f"{there}what listens on port .* is no Ray head")
        dashboard.shutdown()


def test_what_named_the_cluster_is_named(monkeypatch, command, tmp_path, free_port):
    value = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", value)
    told = command("tune", cwd=tmp_path)
    assert told.returncode == 2
    assert f"error: RAY_ADDRESS={value}: no Ray cluster can be reached there" in told.stderr
    assert list(tmp_path.iterdir()) == [], "nothing was begun for it"
    planned = command("tune", "--dry-run", cwd=tmp_path)
    assert f"{value} (RAY_ADDRESS)" in planned.stdout


def test_a_ray_that_runs_already_is_left_running(ray_cluster):
    import ray

    with cluster.connect(ClusterConfig()) as found:
        assert found.total["CPU"] == 2
    assert ray.is_initialized()


AHEAD = """
import sys
import ray
from raylm import cluster
from raylm.config import ClusterConfig
cluster.start_ray_early()
if "fails" in sys.argv:
    sys.exit("no")
with cluster.connect(ClusterConfig()):
    print(len(ray.nodes()))
print(ray.is_initialized())
"""


def test_ray_starts_while_a_command_does_something_else_and_ends_with_it():
    def run(*arguments):
        command = [sys.executable, "-c", AHEAD, *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as ended:
            return ended, ended.communicate(timeout=100)

    ended, (stdout, stderr) = run()
    assert (ended.returncode, stdout.split()) == (0, ["1", "False"]), stderr
    ended, (stdout, stderr) = run("fails")
    assert (ended.returncode, stdout, stderr) == (1, "", "no\n")
    deadline = time.monotonic() + 30
    session = f"_{ended.pid}/"  # as the name of a session ends
    while any(session in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline
        time.sleep(0.1)


LISTENING = """
import json, os
import psutil, ray
from raylm import cluster
from raylm.config import ClusterConfig
with cluster.connect(ClusterConfig()):
    ray.get(ray.remote(lambda: 0).remote())
    ours = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    sockets = [one for one in psutil.net_connections("inet") if one.pid in ours and not one.raddr]
    print(json.dumps([(psutil.Process(one.pid).name(), one.laddr.ip) for one in sockets]))
"""


def test_a_ray_of_this_machine_listens_on_loopback_alone():
    told = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, timeout=100, check=True)
    listening = json.loads(told.stdout)
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    addresses = [(name, ipaddress.ip_address(address.removeprefix("::ffff:"))) for name, address in listening]
    assert [(name, str(address)) for name, address in addresses if not address.is_loopback] == []


def test_a_ray_that_does_not_start_is_an_error_with_the_reason():
    script = """
from raylm import cluster
from raylm.config import ClusterConfig
with cluster.connect(ClusterConfig()):
    pass
"""
    environment = {**os.environ, "RAY_TMPDIR": "/dev/null"}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    problem = "cluster.address=local: Ray does not start on this machine: [Errno 20] Not a directory: '/dev/null"
    assert problem in told.stderr.splitlines()[-1]


CONNECTS = """
from raylm import cli, cluster
from raylm.config import ClusterConfig
def verb() -> cli.CommandResult:
    with cluster.connect(ClusterConfig()):
        pass
cli.run(verb)
"""


def connects(variable, directory, *, begin=()):
    """A command that starts Ray with this temporary directory, when it has ended."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_TMPDIR", "TMPDIR")}
    command = [*begin, sys.executable, "-c", CONNECTS]
    environment = {**kept, variable: str(directory)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_directory_without_room_for_ray_is_told_before_ray_waits_for_its_processes(variable, mounted):
    directory, begin = mounted("size=1m")
    told = connects(variable, directory, begin=begin)
    assert told.returncode == 5
    assert told.stderr.splitlines()[-1] == (
        f"error: {directory} has 1,048,576 bytes free and Ray needs 10,000,000 there; make room, or set RAY_TMPDIR to "
        "another directory"
    )


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_directory_that_is_too_long_for_the_sockets_of_ray_is_told_with_the_way_out(variable):
    directory = "/tmp/" + "a" * 40
    told = connects(variable, directory)
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1] == (
        f"error: {variable}={directory} must be at most 39 bytes long, got 45: Ray has sockets there, whose paths are "
        "limited; set RAY_TMPDIR to a shorter directory"
    )
    assert not os.path.exists(directory)


SAYING = """
import logging, os, sys, time
import ray
from raylm import cli, cluster
from raylm.config import ClusterConfig
from raylm.errors import TrainingError

def verb(outcome: str) -> cli.CommandResult:
    cluster.start_ray_early()
    with cluster.connect(ClusterConfig()):
        said = [file for file in os.listdir(os.environ["TMPDIR"]) if file.startswith("raylm-ray-")][0]
        ray._private.utils.push_error_to_driver(ray._private.worker.global_worker, "kind", "of another process")
        os.write(2, b"of the core\\n")
        logging.getLogger("ray.data").error("of a logger")
        until = time.monotonic() + 30
        while "of another process" not in open(f"{os.environ['TMPDIR']}/{said}").read():
            assert time.monotonic() < until
            time.sleep(0.1)
        print("of ours", file=sys.stderr)
        if outcome == "fails":
            raise TrainingError("worker 0 failed")
        if outcome == "crashes":
            raise ValueError("no value")
    os.write(2, b"later\\n")
    return cli.CommandResult({}, "done")

cli.run(verb)
"""


def test_what_ray_says_is_in_a_file_that_an_error_names(tmp_path):
    def told(outcome):
        command = [sys.executable, "-c", SAYING, outcome]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "RAY_TMPDIR": "/tmp"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)

    def files():
        return [str(file) for file in tmp_path.glob("raylm-ray-*")]

    done = told("ends")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr.splitlines()[-2:] == ["of ours", "later"]
    assert "of another" not in done.stderr
    assert files() == []
    failed = told("fails")
    (file,) = files()
    assert (failed.returncode, failed.stdout) == (4, "")
    assert failed.stderr.splitlines()[-2:] == ["of ours", f"error: worker 0 failed; {file} has the output of Ray"]
    said = Path(file).read_text()
    assert all(what in said for what in ("of another process", "of the core", "of a logger"))
    Path(file).unlink()
    crashed = told("crashes")
    (file,) = files()
    assert f"{file} has the output of Ray\nTraceback" in crashed.stderr, "a fault of ours is seen whole"
    assert crashed.stderr.endswith("error: ValueError: no value\n")


@pytest.mark.slow  # 32 s
def test_under_uv_run_workers_have_the_commands_interpreter(tmp_path, tiny):
    """Ray's hook looks for a parent process `uv run …`, and would start each worker by such a command."""
    (tmp_path / "run").write_text('"$@"\n')  # of a shell that is called uv
    config.save(tiny(f"storage={tmp_path}/runs"), tmp_path / "words.yaml")
    command = [sys.executable, "-m", "raylm.prepare", "--config", "words.yaml"]
    with subprocess.Popen(
        ["uv", "run", *command],
        executable="/bin/sh", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _, stderr = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            raise
    assert process.returncode == 0, stderr
    assert list(tmp_path.glob("runs/tokens/*/manifest.json"))


@pytest.mark.slow  # 17 s
def test_a_worker_that_does_not_start_is_warned_of():
    """Seen in a process of its own, where no worker can start: its interpreter is not there."""
    script = """
import ray, time
from raylm.cluster import connection
from raylm.config import ClusterConfig
connection.WORKER_SECONDS = 3
init = ray.init
ray.init = lambda **more: init(**{**more, "runtime_env": {"py_executable": "no-such-python"}})
with connection.connect(ClusterConfig()):
    time.sleep(6)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert "Ray has started no worker in 3 s, and this waits for one; Ray's logs: /" in told.stderr


def test_whoever_watches_sees_what_a_worker_puts_and_says(ray_cluster):
    import ray

    seen, said, reported = [], [], []

    @ray.remote
    def work(channel):
        channel.advance(5.0)
        channel.say("half of it")
        channel.report({"tokens": 5, "loss": 1.5})
        channel.report({"tokens": 5, "perplexity": 4.5})

    with cluster.progress_channel(seen.append, said.append, reported.append) as channel:
        ray.get(work.remote(channel))
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
    assert seen[0] == 5.0
    assert said == ["half of it"], "once"
    assert reported == [{"tokens": 5, "loss": 1.5}, {"tokens": 5, "perplexity": 4.5}], "each once, in order"


def test_a_signal_tells_the_workers_to_stop_and_a_second_ctrl_c_ends_the_command(ray_cluster):
    said = []
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        cluster.handle_signals(said.append),
        cluster.progress_channel(print, print) as channel,
    ):
        assert not channel.is_stopping()
        signal.raise_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while not channel.is_stopping() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert cluster.stop_signal() == signal.SIGINT
        assert channel.is_stopping()
        signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C stops at once" in said[0]
    assert cluster.stop_signal() is None


def test_workers_are_asked_to_stop_for_a_reason_of_the_command():
    with cluster.progress_channel(print, print, print, lambda: True) as channel:
        deadline = time.monotonic() + 20
        while not channel.is_stopping():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_signal_takes_effect_after_work_that_finished_in_spite_of_it():
    """As a training whose workers were asked in their last step."""
    said, heard = [], []
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.signal(number, lambda number, _: heard.append(number))
        try:
            with cluster.handle_signals(said.append):
                signal.raise_signal(number)
                assert heard == []
            assert heard.pop() == number
            with cluster.handle_signals(said.append):
                pass
            assert (heard, cluster.stop_signal()) == ([], None)
        finally:
            signal.signal(number, before)
    assert [line.split()[0] for line in said] == ["Stopping", "Stopping"]


def test_a_shared_channel_whose_process_is_killed_restarts_and_forwards_the_stop(ray_cluster):
    import ray

    seen = []
    with (  # noqa: PT012
        pytest.raises(KeyboardInterrupt),
        cluster.handle_signals(print),
        cluster.progress_channel(seen.append, print) as channel,
    ):
        os.kill(ray.get(channel.actor.__ray_call__.remote(lambda channel: os.getpid())), signal.SIGKILL)
        signal.raise_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while not ray.get(ray.remote(lambda: channel.is_stopping()).remote()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert channel.is_stopping()
        channel.advance(7.0)
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
    assert seen[0] == 7.0


def test_the_controller_of_a_worker_group_needs_no_pytorch():
    """It unpickles the settings of the process group: PyTorch would take 2 s, in which the workers wait."""
    program = "import raylm.cluster.process_group, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "False"


def test_a_training_succeeds_without_its_progress_channel(ray_cluster):
    import ray

    with cluster.progress_channel(print, print) as channel:
        ray.kill(channel.actor)
        channel.advance(7.0)
        assert not channel.is_stopping()


@dataclasses.dataclass(frozen=True)
class Work:
    """What a process is given to do, as a TrainTask."""

    what: str
    channel: object = None


def working(work):
    """In another process, which has no other words than those of `Work.what`."""
    import os
    import time

    if work.what == "stop":
        work.channel.say("here")
        while not work.channel.is_stopping():
            time.sleep(0.01)
    if work.what == "die":
        print("by itself", flush=True)
        os._exit(3)
    if work.what == "fail":
        raise ValueError("no such thing\nas this")
    if work.what == "sleep":
        time.sleep(100)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["MALLOC_TOP_PAD_"], os.getpid(), gc.get_freeze_count()


def called(what, channel=None):
    with local_worker.local_worker("wave") as process:
        return process.call(working, Work(what, channel))


def test_a_process_of_this_machine_does_one_thing_on_one_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    local_worker.start_worker_early("wave")
    gpu, kept, process, frozen = called("look")
    assert (gpu, kept) == ("2", local_worker.WORKER_ENVIRONMENT["MALLOC_TOP_PAD_"])
    assert not psutil.pid_exists(process)
    assert frozen > 10_000, "the collector looks at none of what was imported"
    channel = cluster.ProgressChannel()
    channel.say = lambda message: channel.stop()
    assert called("stop", channel)[0] == "2"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for what, problem, said in (
        ("fail", "failed: ValueError: as this", "in working"),
        ("die", "ended with exit code 3", "by itself"),
    ):
        with pytest.raises(TrainingError, match=f"^worker 0 {problem}; .* has its output$") as error:
            called(what)
        assert said in Path(error.value.where).read_text()
    assert called("look")
    assert len(list(tmp_path.iterdir())) == 2, "one of each that failed"


ORPHAN = """
from pathlib import Path
import os, signal, sys, threading, time
from raylm import local_worker
sys.path.insert(0, sys.argv[1])
import test_cluster

with local_worker.local_worker("wave") as process:
    print(process._process.pid, flush=True)
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    process.call(test_cluster.working, test_cluster.Work("sleep"))
"""


def test_a_process_does_not_outlive_a_command_that_is_killed():
    told = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(Path(__file__).parent)], capture_output=True, text=True, check=False
    )
    assert told.returncode == -signal.SIGKILL, told.stderr
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(told.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


LITTER = """
import gc, threading, time
import ray
from raylm import cluster
from raylm.config import ClusterConfig

class Cycle:
    def __init__(self, number):
        self.itself, self.ref = self, ray.put(number)

def collect():
    while ray.is_initialized():
        time.sleep(0.0002)
    gc.collect()

gc.disable()
with cluster.connect(ClusterConfig(address="local")):
    for number in range(2000):
        Cycle(number)
    threading.Thread(target=collect, daemon=True).start()
    time.sleep(0.3)
raise SystemExit(3)
"""


def test_what_ray_data_leaves_behind_does_not_end_the_command():
    """Cycles with references in them, collected by a thread while Ray shuts down: Ray ends the process with exit 1."""
    ended = subprocess.run([sys.executable, "-c", LITTER], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (3, "")
