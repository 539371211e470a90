import signal
import time

import pytest

from raylm import cluster
from raylm.config import ClusterConfig
from raylm.errors import ConfigError


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
        assert found.cpus == 2
    assert ray.is_initialized()


def test_whoever_watches_sees_what_a_worker_puts_and_says(ray_cluster):
    import ray

    seen, said = [], []

    @ray.remote
    def work(board):
        ray.get([board.put.remote(5.0), board.say.remote("half of it")])

    with cluster.watch(seen.append, said.append) as board:
        ray.get(work.remote(board))
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.1)
    assert seen[0] == 5.0
    assert said == ["half of it"], "once"


def test_a_signal_tells_the_workers_to_stop_and_a_second_ctrl_c_ends_the_command(ray_cluster):
    import ray

    said = []
    with pytest.raises(KeyboardInterrupt), cluster.signals(said.append), cluster.watch(print, print) as board:  # noqa: PT012
        assert not ray.get(board.is_stopping.remote())
        signal.raise_signal(signal.SIGINT)
        deadline = time.monotonic() + 60
        while not ray.get(board.is_stopping.remote()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert cluster.stopped_by() == signal.SIGINT
        assert ray.get(board.is_stopping.remote())
        signal.raise_signal(signal.SIGINT)
    assert "Ctrl-C stops at once" in said[0]
    assert cluster.stopped_by() is None
