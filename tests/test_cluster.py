import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from raylm import cluster, config
from raylm.config import ClusterConfig
from raylm.errors import ConfigError, TrainingError


def resources(total, **settings):
    return cluster.resources(ClusterConfig(**settings), total)


def test_gpus_are_taken_where_there_are_any():
    assert resources({"CPU": 8, "GPU": 2}).per_worker == {"CPU": 1, "GPU": 1}
    assert resources({"CPU": 8}).per_worker == {"CPU": 1}
    assert resources({"CPU": 8, "GPU": 2}, use_gpu=False).per_worker == {"CPU": 1}


def test_runs_side_by_side_are_limited_by_what_is_scarcest():
    assert resources({"CPU": 8, "GPU": 2}).most_runs == 2
    assert resources({"CPU": 8, "GPU": 2}, gpus_per_worker=0.25).most_runs == 8
    assert resources({"CPU": 8}, num_workers=3).most_runs == 2


def test_more_workers_than_the_cluster_can_give_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="cluster.num_workers.* = 3 x 1 needs 3 CPUs, the cluster has 2"):
        resources({"CPU": 2}, num_workers=3)
    with pytest.raises(ConfigError, match=r"needs 1 GPUs, the cluster has 0; .*cluster.use_gpu=false"):
        resources({"CPU": 2}, use_gpu=True)


def test_whatever_ray_knows_can_be_reserved_for_a_worker():
    found = resources({"CPU": 8, "disk": 3}, num_workers=2, resources_per_worker={"disk": 1})
    assert found.per_worker == {"CPU": 1, "disk": 1}
    assert found.options == {"num_cpus": 1, "resources": {"disk": 1}}
    assert found.most_runs == 1
    with pytest.raises(
        ConfigError, match=r"cluster.resources_per_worker.memory = 2 x 1.6e\+10 needs 3.2e\+10 memory, the"
    ):
        resources({"CPU": 8, "memory": 3e10}, num_workers=2, resources_per_worker={"memory": 16e9})
    with pytest.raises(ConfigError, match="must not have GPU: that is cluster.gpus_per_worker"):
        config.load(settings=["cluster.resources_per_worker={GPU: 1}"])


def test_workers_go_where_the_accelerators_are_that_were_asked_for():
    found = resources({"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, accelerator_type="A10G")
    assert found.per_worker == {"CPU": 1, "GPU": 1, "accelerator_type:A10G": 0.001}
    with pytest.raises(ConfigError, match=r"accelerator_type=H100: no node of the cluster has one; it has A10G"):
        resources({"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, accelerator_type="H100")


def test_a_cluster_of_the_launcher_may_grow_as_far_as_its_file_says(tmp_path, monkeypatch):
    from raylm.cluster import capacity

    monkeypatch.setenv("HOME", str(tmp_path))
    assert capacity._launched() is None
    launched = (Path(__file__).parents[1] / "cluster.yaml").read_text()
    (tmp_path / "ray_bootstrap_config.yaml").write_text(launched)
    assert capacity._launched() == {"CPU": 8 * 16, "GPU": 8}
    assert resources(capacity._launched()).most_runs == 8, "of a head that has no CPU and no GPU"
    with pytest.raises(ConfigError, match="9 x 1 needs 9 GPUs, the cluster has 8"):
        resources(capacity._launched(), num_workers=9)


def test_a_worker_trains_on_one_gpu():
    with pytest.raises(ConfigError, match="cluster.gpus_per_worker must be 1, .* got 2 with 1 worker:"):
        resources({"CPU": 8, "GPU": 2}, gpus_per_worker=2)
    with pytest.raises(ConfigError, match=r"got 0.5 with 2 workers"):
        resources({"CPU": 8, "GPU": 2}, gpus_per_worker=0.5, num_workers=2)


def test_a_submitted_job_uses_the_cluster_it_is_in(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.is_local(ClusterConfig())
    assert not cluster.is_local(ClusterConfig(address="10.0.0.1:6379"))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not cluster.is_local(ClusterConfig())
    assert cluster.is_local(ClusterConfig(address="local"))


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
cluster.ahead()
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


def test_a_ray_that_does_not_start_is_an_error_with_the_reason(tmp_path):
    script = """
from raylm import cluster
from raylm.config import ClusterConfig
with cluster.connect(ClusterConfig()):
    pass
"""
    (tmp_path / "file").touch()
    environment = {**os.environ, "RAY_TMPDIR": str(tmp_path / "file")}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    problem = f"cluster.address=local: Ray does not start on this machine: [Errno 20] Not a directory: '{tmp_path}/file"
    assert problem in told.stderr.splitlines()[-1]


def test_whoever_watches_sees_what_a_worker_puts_and_says(ray_cluster):
    import ray

    seen, said = [], []

    @ray.remote
    def work(board):
        board.put(5.0)
        board.say("half of it")

    with cluster.watch(seen.append, said.append) as board:
        ray.get(work.remote(board))
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
    assert seen[0] == 5.0
    assert said == ["half of it"], "once"


def test_a_signal_tells_the_workers_to_stop_and_a_second_ctrl_c_ends_the_command(ray_cluster):
    said = []
    with pytest.raises(KeyboardInterrupt), cluster.signals(said.append), cluster.watch(print, print) as board:  # noqa: PT012
        assert not board.is_stopping()
        signal.raise_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while not board.is_stopping() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert cluster.stopped_by() == signal.SIGINT
        assert board.is_stopping()
        signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C stops at once" in said[0]
    assert cluster.stopped_by() is None


@dataclasses.dataclass(frozen=True)
class Work:
    """What a process is given to do, as a loop.Job."""

    what: str
    board: object = None


def working(work):
    """In another process, which has no other words than those of `Work.what`."""
    import os
    import time

    if work.what == "stop":
        work.board.say("here")
        while not work.board.is_stopping():
            time.sleep(0.01)
    if work.what == "die":
        print("by itself", flush=True)
        os._exit(3)
    if work.what == "fail":
        raise ValueError("no such thing\nas this")
    if work.what == "sleep":
        time.sleep(100)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.environ["MALLOC_TOP_PAD_"], os.getpid()


def called(what, board=None):
    with cluster.process("wave") as process:
        return process.call(working, Work(what, board))


def test_a_process_of_this_machine_does_one_thing_on_one_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    cluster.begin("wave")
    gpu, kept, process = called("look")
    assert (gpu, kept) == ("2", cluster.WORKER_ENVIRONMENT["MALLOC_TOP_PAD_"])
    assert not psutil.pid_exists(process)
    board = cluster.Board()
    board.say = lambda message: board.stop()
    assert called("stop", board)[0] == "2"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for what, problem, said in (
        ("fail", "failed: ValueError: as this", "in working"),
        ("die", "ended with exit code 3", "by itself"),
    ):
        with pytest.raises(TrainingError, match=f"^worker 0 {problem}; .* has all that it said$") as error:
            called(what)
        assert said in Path(error.value.where).read_text()
    assert called("look")
    assert len(list(tmp_path.iterdir())) == 2, "one of each that failed"


ORPHAN = """
from pathlib import Path
import os, signal, sys, threading, time
from raylm import cluster
from raylm.config import ClusterConfig
sys.path.insert(0, sys.argv[1])
import test_cluster

with cluster.process("wave") as process:
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
