"""Runs that are killed, stopped, or run out of something: real worker groups, real signals."""

import contextlib
import dataclasses
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cloudpickle
import psutil
import pytest
import ray
import torch
from ray.train import ControllerError, WorkerGroupError

from raylm import checkpoint, cluster, config, tracking, training
from raylm.config import override
from raylm.errors import ConfigError, Diverged, OutOfMemory, StorageError, TrainingError, WorkerFailed
from raylm.training import launch, worker_errors, worker_group
from raylm.training.worker_errors import UncountedFailure

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


def left(directory, step):
    """Of a run's checkpoint: file -> SHA-256, but for files that hold times and places."""
    manifest = json.loads((Path(directory) / "checkpoints" / f"step_{step:08d}" / "manifest.json").read_text())
    names = [name for name in manifest["files"] if name.endswith((".safetensors", ".pt", ".pth"))]
    return {name: manifest["files"][name]["sha256"] for name in names}


def patched(patch, base=training.RayTrainSession):
    """A session in whose process `patch(trainer class, rank)` is called before anything else."""

    class Patched(base):
        def __init__(self):
            super().__init__()
            from raylm.training import trainer

            patch(trainer._Trainer, self.rank)

    return Patched


@pytest.fixture
def with_patch(train_run, monkeypatch):
    """(patch, experiment, channel) -> train_run in this process, its Trainer patched by `patch(its class, rank)`."""
    from raylm.training import trainer

    def run(patch, experiment, channel=None):
        class Patched(trainer._Trainer):
            pass

        patch(Patched, 0)
        monkeypatch.setattr(trainer, "_Trainer", Patched)
        return train_run(experiment, channel=channel)

    return run


def dying(places: list[tuple[int, int]], marks: Path, base=training.RayTrainSession):
    """A session whose workers die, each once, at (rank, step): in the middle of that optimizer step."""

    def patch(trainer, rank):
        plain = trainer.training_step

        def training_step(self, *args, **kwargs):
            step = self.state.global_step
            mark = marks / f"{rank}-{step}"
            if (rank, step) in places and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(self, *args, **kwargs)

        trainer.training_step = training_step

    return patched(patch, base)


@pytest.fixture(scope="module")
def two_workers(ray_cluster, tiny):
    """An experiment with dropout, accumulation and two workers; 12 steps, a checkpoint after every second."""
    return tiny(
        "cluster.num_workers=2", "cluster.cpus_per_worker=0.5", "train.max_tokens=3072", "train.micro_batch_tokens=64"
    )


@pytest.fixture(scope="module")
def untouched(two_workers, train_run):
    return train_run(two_workers)


def ends_as(untouched, outcome, job):
    """Whether a run ended as the one that nobody touched."""
    expected, reference = untouched
    assert outcome.best == expected.best
    assert left(job.directory, 12) == left(reference.directory, 12)
    assert job.run.metric_history() == reference.run.metric_history()


def randomly(number):
    """(rank, step) of so many deaths; the same each time."""
    drawn = random.Random(0)
    return drawn.sample([(rank, step) for rank in (0, 1) for step in range(12)], number)


@pytest.mark.parametrize("number", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_workers_killed_at_random_steps_end_with_the_same_bytes(untouched, two_workers, train_run, tmp_path, number):
    places = randomly(number)
    outcome, job = train_run(override(two_workers, {"cluster.max_failures": number}), dying(places, tmp_path))
    assert len(list(tmp_path.iterdir())) == number, "each of them died"
    ends_as(untouched, outcome, job)


def test_the_only_worker_of_this_machine_begins_again_where_it_was_killed(tiny, train_run, tmp_path):
    alone = tiny("train.max_tokens=3072", "train.micro_batch_tokens=64", "cluster.max_failures=1")
    untouched, said = train_run(alone), []
    with cluster.progress_channel(lambda value: None, said.append) as channel:
        outcome, job = train_run(alone, dying([(0, 5)], tmp_path, training.SingleProcess), channel)
    ends_as(untouched, outcome, job)
    assert [line.split(",")[0] for line in said] == ["worker 0 was killed", "resuming from step 4 of 12"]
    assert said[0].endswith("; starting again, attempt 2 of at most 2")
    (tmp_path / "again").mkdir()
    once = (
        r"^worker 0 was killed, most likely because the machine ran out of memory; lower .* \(tried once: cluster.max_"
    )
    with pytest.raises(TrainingError, match=once):
        train_run(
            override(alone, {"cluster.max_failures": 0}), dying([(0, 0)], tmp_path / "again", training.SingleProcess)
        )


def test_a_training_that_was_asked_to_stop_starts_no_worker_again_for_it(tiny, train_run, tmp_path):
    """Its only worker dies after the checkpoint of step 4, and the command is asked to stop at that moment."""

    class Stopped(cluster.ProgressChannel):
        def is_stopping(self):
            return any(tmp_path.iterdir())

    channel = Stopped()
    alone = tiny("train.max_tokens=3072", "train.micro_batch_tokens=64", "cluster.max_failures=1")
    outcome, _ = train_run(alone, dying([(0, 5)], tmp_path, training.SingleProcess), channel)
    assert (outcome.step, outcome.stopped) == (4, True)
    assert channel.read()[1] == [], "nobody has started again"


LOST = "The actor is dead because its worker process has died."


def died(text=f"\tclass_name: RayTrainWorker\n\tpid: 7\n\tip: 10.0.0.2\n{LOST}", **kwargs):
    return ray.exceptions.RayActorError(error_msg=text, **kwargs)


CLOSED = RuntimeError("Connection closed by peer")
"""What torch has for a rank whose neighbour died."""


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (WorkerGroupError("", {1: died()}), WorkerFailed, "worker 1 (process 7 on 10.0.0.2) died; if memory ran out,"),
        (WorkerGroupError("", {1: died("its node has died")}), WorkerFailed, "worker 1 died with its node"),
        (WorkerGroupError("", {0: CLOSED, 1: died()}), WorkerFailed, "worker 1 (process 7 on 10.0.0.2) died"),
        (WorkerGroupError("", {0: CLOSED}), WorkerFailed, "worker 0 failed: RuntimeError: Connection closed by peer"),
        (
            WorkerGroupError("", {0: died(preempted=True)}),
            UncountedFailure,
            "worker 0 died with its node, which was",
        ),
        (
            ray.exceptions.ActorUnschedulableError("The node specified via NodeAffinity does not exist any more"),
            UncountedFailure,
            "a node was taken away while",
        ),
        (ControllerError(died()), WorkerFailed, "a worker (process 7 on 10.0.0.2) died"),
        (died("class_name: TrainController"), WorkerFailed, "Ray Train's controller died"),
        (WorkerGroupError("", {0: ImportError("no torch"), 1: CLOSED}), TrainingError, "worker 0 failed: ImportError"),
        (ControllerError(died(actor_init_failed=True)), TrainingError, "a process of the worker group failed"),
        (
            WorkerGroupError("", {0: CLOSED, 1: ConfigError("no such model", "model.name")}),
            ConfigError,
            "no such model",
        ),
    ],
)
def test_deaths_are_distinguished_from_errors_that_would_recur(error, kind, told):
    found = worker_errors.cause(error, "here")
    assert type(found) is kind
    assert str(found).startswith(told)


def test_failures_are_counted_over_all_attempts_and_reported_in_one_line():
    said, endings = (
        [],
        [WorkerFailed("one died"), UncountedFailure("a node went"), WorkerFailed("two died"), "trained"],
    )

    def attempt():
        ending = endings.pop(0)
        if isinstance(ending, Exception):
            raise ending
        return ending

    assert launch._with_retries(attempt, 2, said.append, "here") == "trained"
    assert said == [
        "one died; starting again, attempt 2 of at most 3",
        "a node went; starting again, attempt 2 of at most 3",
        "two died; starting again, attempt 3 of at most 3",
    ]
    endings += [WorkerFailed("one died"), WorkerFailed("two died")]
    with pytest.raises(WorkerFailed, match=r"^two died \(tried 2 times: cluster.max_failures=1\)$") as failed:
        launch._with_retries(attempt, 1, said.append, "here")
    assert failed.value.where == "here"
    endings += [ConfigError("no such model")]
    with pytest.raises(ConfigError):
        launch._with_retries(attempt, 3, said.append, "here")


def loading(marks: Path):
    """A session whose worker says in `marks` that it loads the training function, and stays while "hold" is there.

    Loading takes a fraction of a second: who only looks at titles of processes misses it.
    """

    class Loading:
        def __setstate__(self, state):
            if "run_train_fn" in " ".join(psutil.Process().cmdline()):
                (marks / f"{os.getpid()}").touch()
                while (marks / "hold").exists():
                    time.sleep(0.005)

    class Loaded(training.RayTrainSession):
        loading = Loading()

    Loaded.loading.state = "so that pickle has something to set"
    return Loaded


class Killer(threading.Thread):
    """Kills processes of Ray Train's, one an attempt: those of STARTS."""

    def __init__(self, points, marks):
        super().__init__(daemon=True)
        self.points = points
        self.marks = marks
        self.killed = []
        self.is_over = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        self.join()

    def run(self):
        gone = set()
        for kind, title, seconds, which in self.points:
            first_seen = {}
            if (title, seconds) == ("run_train_fn", 0):
                (self.marks / "hold").touch()
            while not self.is_over.wait(0.002):
                seen = {pid: told for pid, told in self.titles(f"ray::{kind}") if pid not in gone}
                for pid, told in seen.items():
                    if title in told or (title == "run_train_fn" and (self.marks / f"{pid}").exists()):
                        first_seen.setdefault(pid, time.monotonic())
                found = sorted(first_seen.keys() & seen.keys())  # not one that an earlier attempt has left
                if len(found) <= which:
                    continue
                pid = found[which]
                if time.monotonic() - first_seen[pid] >= seconds:
                    os.kill(pid, signal.SIGKILL)
                    self.killed.append((kind, title, seconds, which))
                    gone |= seen.keys()  # the others of this attempt, which end in a moment
                    break
            (self.marks / "hold").unlink(missing_ok=True)

    @staticmethod
    def titles(beginning):
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if (told := " ".join(process.cmdline()).strip()).startswith(beginning):
                    yield process.pid, told


def killed_at(points, untouched, two_workers, train_run, marks):
    points = sorted(points, key=lambda point: point[2])
    with Killer(points, marks) as killer:
        outcome, job = train_run(override(two_workers, {"cluster.max_failures": len(points)}), loading(marks))
    assert killer.killed == points[: len(killer.killed)]
    # On a quick machine the training is over 4 s after it began: a worker that is killed then leaves nothing to kill.
    assert {point for point in points if point[2] < 4} <= {*killer.killed}
    ends_as(untouched, outcome, job)
    groups = ray.util.placement_group_table().values()
    assert [each for each in groups if each["state"] != "REMOVED"] == []


@pytest.mark.slow  # 40 s
def test_a_worker_killed_while_its_group_starts_ends_with_the_same_bytes(untouched, two_workers, train_run, tmp_path):
    killed_at([("RayTrainWorker", "run_train_fn", 0, 1)], untouched, two_workers, train_run, tmp_path)


WORKER = "RayTrainWorker"

STARTS = [
    *[(WORKER, title, 0, which) for title in ("", "get_metadata", "init_train_context") for which in (0, 1)],
    *[("execute", "", 0, which) for which in (0, 1)],  # a worker's title while it joins the others
    *[(WORKER, "run_train_fn", seconds, which) for seconds in (0, 1, 2, 4, 8) for which in (0, 1)],
    *[("TrainController", "", seconds, 0) for seconds in (0, 1, 2, 4, 8, 12)],
]
"""What is killed (a title's beginning), when (what the title holds, and how long after), and which of them."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("points", [STARTS[part::4] for part in range(4)], ids=range(4))  # 6 attempts each: 90 s
def test_workers_and_controllers_killed_while_they_start(untouched, two_workers, train_run, points, tmp_path):
    killed_at(points, untouched, two_workers, train_run, tmp_path)


def dying_late(places: list[tuple[int, str]], marks: Path):
    """A session whose workers die, one an attempt, at (rank, "in an evaluation" or "at the end")."""

    def patch(trainer, rank):
        waiting = [number for number in range(len(places)) if not (marks / f"{number}").exists()]

        def dies_after(name, point):
            plain = getattr(trainer, name)

            def call(*args):
                result = plain(*args)
                if waiting and places[waiting[0]] == (rank, point):
                    (marks / f"{waiting[0]}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(trainer, name, call)

        dies_after("_score", "in an evaluation")
        dies_after("run", "at the end")

    return patched(patch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_killed_in_an_evaluation_and_at_the_end(untouched, two_workers, train_run, tmp_path):
    """5 attempts, 75 s. In the last one nobody trains: the newest checkpoint is that of the last step."""
    places = [(rank, point) for point in ("in an evaluation", "at the end") for rank in (0, 1)]
    experiment = override(two_workers, {"cluster.max_failures": len(places)})
    outcome, job = train_run(experiment, dying_late(places, tmp_path))
    assert len(list(tmp_path.iterdir())) == len(places), "each of them died"
    ends_as(untouched, outcome, job)


def leaving(place):
    """A session whose only node is to be taken away, as it is told once."""

    class Leaving(training.RayTrainSession):
        def lost_nodes(self):
            told = place / str(self.rank)
            if told.exists():
                return []
            told.touch()
            return [ray.get_runtime_context().get_node_id()]

    place.mkdir()
    return Leaving


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_resumes_after_its_node_was_taken_away(two_workers, train_run, ray_cluster, tmp_path):
    """Where nothing is left a command ends; a trial has nobody who begins it again, and waits for room itself."""
    outcome, job = train_run(two_workers, leaving(tmp_path / "command"))
    assert (outcome.stopped, outcome.step) == (True, 1)
    resources = cluster.resources(two_workers.cluster, ray.cluster_resources())
    trial = dataclasses.replace(job, session=leaving(tmp_path / "trial"))
    outcome = launch.fit(trial, resources, callbacks=[ray.train.UserCallback()])
    assert (outcome.stopped, outcome.step) == (False, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "seconds"), [([], worker_group.WAIT_SECONDS), (["train.arguments.ddp_timeout=77"], 77)]
)
def test_how_long_a_rank_waits_for_another_one(ray_cluster, tiny, tmp_path, settings, seconds):
    def waits():
        processes = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        return processes.options._timeout.total_seconds()

    experiment = tiny("cluster.num_workers=2", "cluster.cpus_per_worker=0.5", *settings)
    resources = cluster.resources(experiment.cluster, ray.cluster_resources())
    assert worker_group.run(waits, experiment, resources, str(tmp_path)) == seconds


def raising(error: Exception):
    """A session whose last worker has an error of its own."""

    def patch(trainer, rank):
        def run(self):
            if rank == 1:
                raise error
            return plain(self)

        plain, trainer.run = trainer.run, run

    return patched(patch)


@pytest.mark.slow  # 15 s each
@pytest.mark.parametrize("error", [ImportError("no module named nothing"), ConfigError("no such model", "model.name")])
def test_what_would_come_again_is_not_tried_again(two_workers, train_run, error):
    said = []
    with (
        cluster.progress_channel(lambda value: None, said.append) as channel,
        pytest.raises((TrainingError, ConfigError)) as failed,
    ):
        train_run(two_workers, raising(error), channel)
    assert said == []
    assert str(error) in failed.value.message


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_dies_too_often_is_reported_in_one_line(two_workers, train_run, tmp_path):
    experiment = override(two_workers, {"cluster.max_failures": 1})
    told = r"^worker [01] .* \(tried 2 times: cluster.max_failures=1\)$"
    with pytest.raises(WorkerFailed, match=told):
        train_run(experiment, dying([(0, 1), (1, 2)], tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_whose_workers_and_controllers_are_killed_end_with_the_same_table(tiny, command, tmp_path):
    """A trial's own process first, while it starts its group, then three of Ray Train's; two sweeps, 150 s."""
    settings = {
        "cluster.num_workers": 2,
        "cluster.max_failures": 3,
        "tune.space": {"train.learning_rate": {"grid": [2e-2, 1e-2]}},
        "tune.scheduler": "none",
        "tune.num_samples": 1,
    }
    trains = [(WORKER, "get_metadata", 0, 1), (WORKER, "run_train_fn", 1, 0), ("TrainController", "", 8, 0)]
    tables = []
    for points in ([], [("ImplicitFunc", "", 8, 0), *trains]):
        config.save(override(tiny(f"storage={tmp_path}/{len(points)}"), settings), tmp_path / "sweep.yaml")
        with Killer(points, tmp_path) as killer:
            ended = command("tune", "--config", tmp_path / "sweep.yaml", "--json")
        assert ended.returncode == 0, ended.stderr
        assert killer.killed == points
        assert ended.stderr.count("starting again") == (len(trains) if points else 0)
        rows = json.loads(ended.stdout)["trials"]
        tables.append([(row["trial_id"], row["status"], row["perplexity"], row["tokens"]) for row in rows])
    assert tables[0] == tables[1]
    assert {row[1] for row in tables[0]} == {"completed"}


@pytest.mark.slow
def test_a_worker_that_is_killed_as_its_node_ran_out_of_memory_is_reported_so(tiny, command, tmp_path, monkeypatch):
    """Ray's own monitor, told that there are 3 GB more than now; the worker takes four."""
    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", str((memory.total - memory.available + 3e9) / memory.total))
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    sizes = {"model.config.n_layer": 12, "model.config.n_head": 16, "model.config.n_embd": 1024}
    large = override(tiny(f"storage={tmp_path}/runs"), {**sizes, "cluster.num_workers": 2, "cluster.max_failures": 0})
    config.save(large, tmp_path / "large.yaml")
    ended = command("train", "--config", tmp_path / "large.yaml", "--json")
    assert ended.returncode == 4, ended.stderr
    (told,) = (line for line in ended.stderr.splitlines() if line.startswith("error: "))
    killed = (
        r"(worker [01]|a process of the worker group) was killed, because its node ran out of memory "
        r"\([\d.]+GB, [\d.]+GB used / [\d.]+GB"
    )
    assert re.search(killed, told)
    lower = "lower train.micro_batch_tokens, eval.batch_tokens or the size of the model"
    assert told.endswith(f"; {lower} (tried once: cluster.max_failures=0)")


def dying_in_a_save(places: list[tuple[int, str]], marks: Path):
    """A session whose workers die, one a time, at (rank, point of a save)."""

    def patch(trainer, rank):
        from raylm import checkpoint, storage

        target = next(
            ((number, place) for number, place in enumerate(places) if not (marks / f"{number}").exists()), None
        )
        agreements = -1000  # those of the beginning are of no save

        def at(point, before_it=lambda: None):
            if target is not None and target[1] == (rank, point):
                before_it()
                (marks / f"{target[0]}").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def around(holder, name, before=None, after=None, half=None, when=lambda *_: True):
            plain = getattr(holder, name)

            def call(*args, **kwargs):
                if when(*args):
                    at(before)
                    at(half, lambda: half_of(args))
                result = plain(*args, **kwargs)
                if when(*args):
                    at(after)
                return result

            def half_of(args):
                content, path = (
                    (args[0].read_bytes(), args[1]) if isinstance(args[0], Path) else (b"half of it", args[-1])
                )
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_bytes(content[: len(content) // 2])

            setattr(holder, name, call)

        def is_manifest(path, *_):
            return str(path).endswith("manifest.json")

        gathered, save = training.session.gathered, trainer._save_checkpoint

        def counted(session, value):
            nonlocal agreements
            agreements += 1
            at(f"before agreement {agreements}")
            result = gathered(session, value)
            at(f"after agreement {agreements}")
            return result

        def begun(self, *args):
            nonlocal agreements
            agreements = 0
            at("begin")
            save(self, *args)
            at("written here")

        training.trainer.gathered = training.checkpoint_writer.gathered = counted
        trainer._save_checkpoint = begun
        around(torch, "save", half="half of a state")
        around(storage, "upload", after="a file uploaded", half="half of a file uploaded")
        around(storage, "write", "before the manifest", "after the manifest", when=is_manifest)
        around(os, "replace", "half of the manifest", when=lambda _, path: is_manifest(path))
        around(checkpoint.CheckpointManager, "prune", "before removing older ones", "after removing older ones")
        around(storage, "remove_file", after="half removed")
        around(training.RayTrainSession, "report", "before the report", "after the report")

    return patched(patch)


BOTH = [
    "begin", "half of a state", "written here",
    *(f"{when} agreement {number}" for number in range(1, 5) for when in ("before", "after")),
    "half of a file uploaded", "a file uploaded", "before the report", "after the report",
]  # fmt: skip
FIRST = [
    "before the manifest", "half of the manifest", "after the manifest", "before removing older ones", "half removed",
    "after removing older ones",
]  # fmt: skip


POINTS = [(rank, point) for point in BOTH for rank in (0, 1)] + [(0, point) for point in FIRST]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("places", [POINTS[part::4] for part in range(4)], ids=range(4))
def test_a_worker_killed_at_any_point_of_a_save_leaves_no_torn_checkpoint(
    untouched, two_workers, train_run, tmp_path, places
):
    experiment = override(two_workers, {"cluster.max_failures": len(places)})
    outcome, job = train_run(experiment, dying_in_a_save(places, tmp_path))
    assert len(list(tmp_path.iterdir())) == len(places), "each of them died"
    ends_as(untouched, outcome, job)


@pytest.mark.slow
def test_another_number_of_workers_resumes_with_the_same_examples_in_the_same_steps(two_workers, train_run):
    """No dropout, since each worker draws its own; what is left is the rounding of sums."""
    still = {f"model.config.{name}": 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    two = override(two_workers, still)
    one = override(two, {"cluster.num_workers": 1})
    said = []
    with cluster.progress_channel(lambda value: None, said.append) as channel:
        channel.stop()  # after the first step, then
        stopped, job = train_run(two, channel=channel)
    assert (stopped.step, stopped.stopped) == (1, True)
    with cluster.progress_channel(lambda value: None, said.append) as channel:
        outcome = train_run.go_on(job, one, channel)
    assert said == [
        "resuming from step 1 of 12 with 1 worker instead of 2: the same examples in the same steps, but not the same "
        "bits"
    ]
    whole, reference = train_run(one)
    assert outcome.best["perplexity"] == pytest.approx(whole.best["perplexity"], rel=1e-4)
    losses = dict(reference.run.metric_history()["train/loss"])
    assert dict(job.run.metric_history()["train/loss"]) == pytest.approx(losses, rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_command_resumes_where_it_was_killed_or_stopped(tiny, start_command, train_run, tmp_path):
    """SIGKILL, then SIGTERM, then to the end: as if nothing had happened. Other settings are refused meanwhile."""
    file = tmp_path / "words.yaml"
    experiment = tiny(
        f"storage={tmp_path}/runs", "name=words", "train.max_tokens=102400", "train.eval_every_tokens=5120"
    )
    config.save(experiment, file)
    place = tmp_path / "runs" / "words"
    argv = ("train", "--config", file, "--json")

    def after(step):
        """Wait for a checkpoint of that step or a later one."""
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            if any(int(found.parent.name[-8:]) >= step for found in place.glob("train-*/checkpoints/*/manifest.json")):
                return
            time.sleep(0.05)
        raise AssertionError(f"no checkpoint of step {step}")

    killed = start_command(*argv)
    after(20)
    killed.kill()
    assert killed.wait().returncode == -signal.SIGKILL

    refused = start_command(*argv, "blocks.block_size=16").wait()
    assert refused.returncode == 2
    assert "blocks.block_size: 32 then, 16 now" in json.loads(refused.stdout)["error"]

    stopped = start_command(*argv)
    after(100)
    stopped.terminate()
    told = stopped.wait()
    assert told.returncode == 75, told.stderr
    saved = max(int(found.name[-8:]) for found in place.glob("train-*/checkpoints/*"))
    assert f"stopped after step {saved}, which is saved" in json.loads(told.stdout)["error"]

    ended = start_command(*argv).wait()
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["resumed_from"] == saved
    assert f"resuming from step {saved} of 400" in ended.stderr
    (directory,) = place.glob("train-*")

    outcome, job = train_run(override(experiment, {"storage": str(tmp_path / "untouched")}))
    assert result["perplexity"] == outcome.best["perplexity"]
    assert left(directory, 400) == left(job.directory, 400)
    series = tracking.Run(str(directory)).metric_history()
    # The command also scores the model before training.
    trained = {key: [point for point in points if point[0]] for key, points in series.items()}
    assert {key: trained[key] for key in job.run.metric_history()} == job.run.metric_history()
    assert not list(place.glob("*/checkpoints/*/*.bin")), "no pickles"


ON_SOME_CPUS = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(sys.argv.pop(1))])
from raylm.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(cluster.cpus_here() < 2, reason="needs two CPUs")
def test_a_run_resumes_with_the_threads_it_started_with_where_they_fit(tiny, train_run, tmp_path):
    def started(name, cpus):
        """`raylm train` on so many CPUs, and where it is."""
        made = tiny(f"storage={tmp_path}/runs", f"name={name}", *sizes, "cluster.cpus_per_worker=auto")
        config.save(made, tmp_path / f"{name}.yaml")
        argv = [sys.executable, "-c", ON_SOME_CPUS, str(cpus), "--config", f"{tmp_path}/{name}.yaml", "--json"]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def killed(name, cpus):
        """One that has a checkpoint."""
        process, deadline = started(name, cpus), time.monotonic() + 200
        while not list(tmp_path.glob(f"runs/{name}/train-*/checkpoints/*/manifest.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.kill()
        process.communicate()

    def resumed(name, cpus):
        stdout, stderr = started(name, cpus).communicate(timeout=300)
        result = json.loads(stdout)
        assert result["resumed_from"]
        (directory,) = tmp_path.glob(f"runs/{name}/train-*")
        return checkpoint.read_experiment(result["checkpoint"]).cluster.cpus_per_worker, directory, stderr

    sizes = ("train.max_tokens=51200", "train.eval_every_tokens=5120")
    killed("few", 1)
    threads, directory, _ = resumed("few", 2)
    _, job = train_run(tiny(*sizes, "cluster.cpus_per_worker=1"))
    assert threads == 1
    assert left(directory, 200) == left(job.directory, 200)
    killed("many", 2)
    threads, _, said = resumed("many", 1)
    assert threads == 1
    assert "cluster.cpus_per_worker=2, as when the run started, does not fit here: 1 instead" in said


def test_a_gradient_that_nobody_waits_for_stops_the_run_before_it_changes_a_weight(tiny, with_patch, monkeypatch):
    """As on a GPU: the third step's gradient is not a number, the first look at it is after the sixth."""
    from raylm.training import guards

    seen, trainers, check = [], [], guards.GradientGuard.check

    def patch(trainer, rank):
        compute_loss = trainer.compute_loss

        def poisoned(self, *args, **kwargs):
            trainers.append(self)
            loss = compute_loss(self, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

        trainer.compute_loss = poisoned

    def checked(finite):
        weights = trainers[-1].model.parameters()
        seen.append((trainers[-1].state.global_step, all(weight.isfinite().all() for weight in weights)))
        check(finite)

    monkeypatch.setattr(guards.GradientGuard, "runs_ahead", lambda *_: True)
    monkeypatch.setattr(guards.GradientGuard, "check", checked)
    settings = ("train.arguments.logging_steps=6", "train.eval_every_tokens=1536")
    with pytest.raises(Diverged, match="the gradient is not finite at step 3; lower train.learning_rate=0.02"):
        with_patch(patch, tiny(*settings))
    assert seen == [(6, True)]


def test_a_step_that_does_not_fit_is_done_in_smaller_pieces(tiny, ray_cluster, with_patch):
    """What torch raises on a GPU, whenever more than two examples are held at once."""

    def patch(trainer, rank):
        plain = trainer.compute_loss

        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return plain(self, model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss

    said = []
    experiment = tiny("train.max_tokens=1024", "train.eval_every_tokens=1024", "train.micro_batch_tokens=128")
    with cluster.progress_channel(lambda value: None, said.append) as channel:
        outcome, _ = with_patch(patch, experiment, channel)
    assert outcome.step == 4, "the same steps of the same tokens"
    assert [message.split("; ")[1] for message in said] == ["resuming with 64, and 256 a step as before"]


def test_one_block_that_does_not_fit_is_an_error_that_names_it(tiny, with_patch):
    def patch(trainer, rank):
        def compute_loss(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        trainer.compute_loss = compute_loss

    with pytest.raises(OutOfMemory, match="a single block of blocks.block_size=32 tokens.*gradient_checkpointing"):
        with_patch(patch, tiny("train.micro_batch_tokens=32"))


def test_an_evaluation_that_does_not_fit_names_the_setting(tiny, with_patch):
    def patch(trainer, rank):
        def _score(self, documents):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        trainer._score = _score

    with pytest.raises(OutOfMemory, match="in an evaluation with eval.batch_tokens=4096 .*; lower it"):
        with_patch(patch, tiny())


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tiny, train_run):
    """RLIMIT_FSIZE while the second checkpoint is uploaded: the system refuses to write as on a full disk."""

    def patch(trainer, rank):
        from raylm import checkpoint

        plain = checkpoint.CheckpointManager.upload

        def upload(self, step, local):
            if step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            return plain(self, step, local)

        checkpoint.CheckpointManager.upload = upload

    with pytest.raises(StorageError, match=r"step_00000004/\S+: no room for [\d,]+ bytes, [\d,]+ are free") as full:
        train_run(tiny(), patched(patch, training.SingleProcess))
    series = checkpoint.CheckpointManager(str(Path(full.value.where).parents[1]))
    assert series.steps() == [2], "what was half written is gone"
    assert series.damage(2) is None
