"""Journals need no MLflow. What is uploaded is asked of MLflow's own server, here in this process, behind a gate."""

import base64
import contextlib
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.server.security_utils import INVALID_HOST_MSG
from werkzeug.serving import make_server

from raylm import storage, tracking
from raylm.config import TrackingConfig
from raylm.errors import ConfigError, StorageError
from raylm.tracking import journal, uploader
from raylm.tracking.server import Server
from raylm.tracking.upload import Upload

NOWHERE = TrackingConfig(uri=None)
LOSSES = {step: 5 - step / 10 for step in range(1, 9)}


def start(section, directory, name="one", tags=None, **options):
    return tracking.start(section, experiment="words", name=name, tags=tags or {}, directory=directory, **options)


def stored(uri, run, key="train/loss"):
    """(step, value) of a metric in MLflow, as often as it is there."""
    history = MlflowClient(uri).get_metric_history(run.run_id, key)
    return sorted((point.step, point.value) for point in history)


def datasets(uri, run):
    """What MLflow has as a run's dataset inputs."""
    return [
        (one.dataset.name, one.dataset.digest, one.dataset.source_type, json.loads(one.dataset.source),
         json.loads(one.dataset.profile), *(tag.value for tag in one.tags if tag.key == "mlflow.data.context"))
        for one in MlflowClient(uri).get_run(run.run_id).inputs.dataset_inputs
    ]  # fmt: skip


def artifact(uri, run, name):
    return Path(MlflowClient(uri).download_artifacts(run.run_id, name)).read_text()


def in_fork(work):
    """A process of its own that does this and ends without a farewell; its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_in_a_new_process(run):
    journal.json_lines(run.directory, journal.METRICS_FILE).close()
    journal.json_lines.cache_clear()
    journal.metric_writer.cache_clear()


def eventually(check):
    """Wait until it holds, on a busy machine too."""
    end = time.monotonic() + 60
    while not check() and time.monotonic() < end:
        time.sleep(0.02)
    assert check()


# MLflow ------------------------------------------------------------------------------------------------------------


class Gate:
    """MLflow's server on a port of this machine, and what goes wrong on the way to it."""

    def __init__(self, app):
        self.app = app
        self.port = 0
        self.fault = None
        self.calls = []
        self.released = threading.Event()
        self.open()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self.port}"

    def open(self):
        self.server = make_server("127.0.0.1", self.port, self, threaded=True)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def close(self):
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def __call__(self, environ, respond):
        fault = self.fault
        self.calls.append(environ["PATH_INFO"])
        if fault == "hangs":
            self.released.wait(20)
        elif fault == "is slow":
            time.sleep(0.3)
        elif fault == "loses answers":
            b"".join(self.app(environ, lambda *_: None))  # done, and nobody hears of it
            fault = "500 Internal Server Error"
        elif fault == "answers HTML":
            respond("200 OK", [("Content-Type", "text/html")])
            return [b"<html>Please sign in</html>"]
        elif fault == "wrong host":
            respond("403 Forbidden", [("Content-Type", "text/plain")])
            return [INVALID_HOST_MSG.encode()]
        if fault and fault[0].isdigit():
            respond(fault, [("Content-Type", "text/plain")])
            return [b"no"]
        return self.app(environ, respond)


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """With a database of its own."""
    root = tmp_path_factory.mktemp("server")
    shutil.copy(database(tmp_path_factory), root / "server.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{root}/server.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", f"{root}/artifacts")
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        from mlflow.server import app

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        opened = Gate(app)
        MlflowClient(opened.uri).search_experiments()  # the first answer takes seconds
        yield opened
        opened.close()


def database(tmp_path_factory):
    """An empty database of MLflow's: to make one takes seconds, to copy it does not."""
    path = tmp_path_factory.getbasetemp() / "empty.db"
    if not path.exists():
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def server(gate):
    """The section of a server that is well, and its gate."""
    gate.fault = None
    gate.calls.clear()
    gate.released.clear()
    yield TrackingConfig(uri=gate.uri)
    gate.released.set()


@pytest.fixture
def section(tmp_path, tmp_path_factory):
    """The section of a SQLite file."""
    shutil.copy(database(tmp_path_factory), tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="words")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Threads that look every moment, and none left over."""
    monkeypatch.setattr(uploader, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(uploader, "TIMEOUT_SECONDS", 20.0)
    yield
    end_threads()


def end_threads():
    """As if the process were another one."""
    for each in uploader._uploaders.values():
        each.close(10)
    uploader._uploaders.clear()


# The journal -------------------------------------------------------------------------------------------------------


def test_the_journal_is_written_whether_or_not_anything_is_uploaded(tmp_path):
    run = start(NOWHERE, tmp_path / "run")
    run.log_metrics({"train/loss": 2.5, "train/tokens": 256}, 1)
    run.log_metrics({"train/loss": 2.25, "train/grad_norm": math.inf}, 2)
    assert run.metric_history() == {
        "train/grad_norm": [(2, math.inf)],
        "train/loss": [(1, 2.5), (2, 2.25)],
        "train/tokens": [(1, 256.0)],
    }
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "time": lines[0]["time"], "metrics": {"train/loss": 2.5, "train/tokens": 256.0}}
    assert run.upload(0)
    assert run.run_id is None


def test_a_run_without_a_journal_takes_everything_and_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tracking.Run()
    run.log_metrics({"a": 1.0}, step=1)
    run.rewind(0)
    run.flush()
    run.log_parameters({"a": 1})
    run.set_tags({"a": 1})
    run.log_text("a", "a.txt")
    run.log_file("a.txt", "a.txt")
    run.log_dataset("a", digest="a", source="a", profile={}, context="training")
    run.log_system_metrics(1)
    run.log_model("a", TrackingConfig(log_model=True), 1)
    run.start_trial("trial_00000").finish()
    run.trial("trial_00000").upload_in_background()
    run.finish_if_running("FAILED")
    assert run.trials() == {}
    assert run.metric_history() == {}
    assert list(tmp_path.iterdir()) == []


METRICS = st.dictionaries(st.text(max_size=4), st.floats() | st.integers(-(2**60), 2**60), min_size=1, max_size=2)


@settings(max_examples=10, deadline=None)
@given(before=METRICS, torn=METRICS, after=METRICS)
def test_a_line_that_is_torn_at_any_byte_spoils_no_other(tmp_path_factory, before, torn, after):
    run = tracking.Run(str(tmp_path_factory.mktemp("torn")))
    file = Path(run.directory, "metrics.jsonl")
    run.log_metrics(before, 1)
    begins = file.stat().st_size
    run.log_metrics(torn, 2)
    content = file.read_bytes()
    for end in range(begins, len(content)):
        file.write_bytes(content[:end])
        as_in_a_new_process(run)
        run.log_metrics(after, 3)
        whole = {2: torn} if end == len(content) - 1 else {}  # all but the line's end
        assert same(run.metric_history(), {1: before, **whole, 3: after})


def test_a_reader_that_comes_while_a_line_is_written_sees_it_whole_the_next_time(tmp_path):
    file, log = tmp_path / "log", journal.JsonLines(str(tmp_path / "log"))
    file.write_bytes(b'{"step": 1}\n{"st')
    assert log.read() == ([{"step": 1}], 12)
    file.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert log.read(12) == ([{"step": 2}], 23)
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    assert log.read(23) == ([{"step": 3}], 36)


def same(series, told):
    """Whether a series has just these points; NaN is itself."""
    found = {(step, key): repr(value) for key, points in series.items() for step, value in points}
    return found == {(step, key): repr(float(value)) for step, values in told.items() for key, value in values.items()}


def test_a_writer_that_is_killed_leaves_whole_lines(tmp_path):
    run = start(NOWHERE, tmp_path / "run")

    def write():
        for step in range(10**9):
            run.log_metrics({"train/loss": 1 / (step + 1)}, step)

    for _ in range(3):
        child = in_fork(write)
        before = len(run.metric_history().get("train/loss", ()))
        while len(run.metric_history().get("train/loss", ())) < before + 50:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        steps = [step for step, _ in run.metric_history()["train/loss"]]
        assert steps == list(range(len(steps)))
        run.rewind(len(steps) // 2)


def test_a_disk_that_fills_up_loses_nothing_once_there_is_room(tmp_path, capfd):
    run = start(NOWHERE, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        for step, loss in LOSSES.items():
            if step == 7:  # room for some of what waits
                resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
            run.log_metrics({"train/loss": loss, "train/some_other_long_name": loss, "train/tokens": step}, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        run.log_metrics({"train/loss": 0.0}, 99)

    assert ended(in_fork(write)) == 0
    assert run.metric_history()["train/loss"] == [*LOSSES.items(), (99, 0.0)]
    assert run.metric_history()["train/tokens"] == [(step, step) for step in LOSSES]
    assert capfd.readouterr().err.count("metrics are kept in memory until they can be written: File too large") == 1


def test_a_run_that_rewinds_makes_its_points_again(tmp_path):
    run = start(NOWHERE, tmp_path / "run")
    for step, loss in LOSSES.items():
        run.log_metrics({"train/loss": loss}, step)
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for again in (3, 5):
        as_in_a_new_process(run)
        run.rewind(again)
        assert run.metric_history() == {"train/loss": [(step, LOSSES[step]) for step in range(1, again + 1)]}
        for step in range(again, 9):  # the step of the checkpoint once more, too
            run.log_metrics({"train/loss": LOSSES[step]}, step)
        assert run.metric_history() == {"train/loss": list(LOSSES.items())}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines == [*first, '{"rewind": 3}', *first[3:], '{"rewind": 5}', *first[5:]], "with their old times"


def test_a_run_that_rewinds_keeps_what_its_machine_did(tmp_path):
    """It is not the same again, and MLflow would have two points of a step."""
    run = start(NOWHERE, tmp_path / "run")
    run.log_metrics({"train/loss": 1.0, "system/cpu_utilization_percentage": 50.0}, 2)
    as_in_a_new_process(run)
    run.rewind(1)
    run.log_metrics({"train/loss": 1.0, "system/cpu_utilization_percentage": 70.0}, 2)
    as_in_a_new_process(run)
    run.rewind(1)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["metrics"] for line in lines if "metrics" in line] == [
        {"train/loss": 1.0, "system/cpu_utilization_percentage": 50.0},
        {"train/loss": 1.0},
    ]
    assert run.metric_history() == {}
    run.rewind(1)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(lines), "nothing is left to rewind"


def test_a_run_whose_directory_was_removed_begins_anew(tmp_path):
    for _ in range(2):
        run = start(NOWHERE, tmp_path / "run")
        assert run.metric_history() == {}
        run.log_metrics({"train/loss": 2.5}, 1)
        assert run.metric_history() == {"train/loss": [(1, 2.5)]}
        shutil.rmtree(tmp_path / "run")


def test_a_journal_on_remote_storage(tmp_path, section):
    run = start(section, f"file://{tmp_path}/run")  # a local one, as far as raylm knows
    for step, loss in LOSSES.items():
        run.log_metrics({"train/loss": loss}, step)
    run.flush()
    run.rewind(4)
    run.log_metrics({"train/loss": 9.0}, 5)
    child = run.start_trial("trial_00000")
    child.finish()
    run.flush()
    assert run.metric_history()["train/loss"] == [*list(LOSSES.items())[:4], (5, 9.0)]
    assert run.upload(20)
    assert stored(section.uri, run) == run.metric_history()["train/loss"]
    assert tracking.find_runs(f"file://{tmp_path}") == [run, child]
    (tmp_path / "page").write_text("here")
    run.log_file(tmp_path / "page", "report/page.html")
    assert run.upload(20)
    assert artifact(section.uri, run, "report/page.html") == "here"


def test_a_journal_on_remote_storage_that_does_not_grow_is_hardly_asked_for(tmp_path, section, monkeypatch):
    """A trial that waits at a rung: its journal is looked at after 5 s, 10, 20 and every 30, and read when it grows."""
    parent = start(section, f"file://{tmp_path}/run")
    run = parent.start_trial("trial_00000", uploads=False)
    run.log_metrics({"train/loss": 2.5}, 1)
    run.flush()
    requests, clock = [], [1000.0]

    def counted(name, plain):
        def call(path):
            if path.startswith(run.directory):
                requests.append(name)
            return plain(path)

        monkeypatch.setattr(storage, name, call)

    for name in ("read", "size", "sizes"):
        counted(name, getattr(storage, name))
    monkeypatch.setattr("raylm.tracking.upload.time", SimpleNamespace(monotonic=lambda: clock[0]))
    upload = Upload(run.directory, uploader.get(section.uri).server, lambda _: parent.run_id)
    upload.run()
    assert stored(section.uri, run) == [(1, 2.5)]
    requests.clear()
    looks = []
    for _ in range(120):
        clock[0] += 1
        if upload.is_due:
            looks.append(clock[0] - 1000)
            upload.run()
    assert looks == [5, 15, 35, 65, 95]
    assert requests == ["sizes"] * len(looks)
    run.log_metrics({"train/loss": 2.25}, 2)
    run.flush()
    upload.check_soon()
    assert upload.is_due
    upload.run()
    assert stored(section.uri, run) == [(1, 2.5), (2, 2.25)]
    clock[0] += 5
    assert upload.is_due, "there may be more soon"


def test_a_place_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=f"{tmp_path}/file/run: the run's journal cannot be written"):
        start(NOWHERE, tmp_path / "file" / "run")


# What arrives ------------------------------------------------------------------------------------------------------


def test_metrics_parameters_tags_and_texts_arrive(section, tmp_path):
    run = start(section, tmp_path / "run", tags={"raylm.command": "train"})
    assert run.run_id is not None, "a server that answers has the run when start returns"
    run.log_metrics({"eval/perplexity": 8.5, "train/loss": math.inf, "train/grad_norm": math.nan}, step=7)
    run.log_parameters({f"key{number}": number for number in range(150)} | {"train.learning_rate": 3e-4, "none": None})
    run.log_text("name: x\n", "experiment.yaml")
    run.set_tags({"raylm.checkpoint": tmp_path, "long": "x" * 9000})
    run.finish()
    assert run.upload(20)
    client = MlflowClient(section.uri)
    found = client.get_run(run.run_id)
    assert found.data.metrics == {"eval/perplexity": 8.5}, "what is not finite would be stored as 1.8e308"
    assert stored(section.uri, run, "eval/perplexity") == [(7, 8.5)]
    assert len(found.data.params) == 152
    assert (found.data.params["train.learning_rate"], found.data.params["none"]) == ("0.0003", "None")
    assert (found.data.tags["raylm.command"], found.data.tags["raylm.checkpoint"]) == ("train", str(tmp_path))
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["experiment.yaml"]
    assert (found.info.status, found.info.run_name) == ("FINISHED", "one")
    assert run.pending() == 0


def test_opening_mlflow_is_said_once_in_a_command(section, tmp_path, caplog):
    with caplog.at_level("INFO", "raylm"):
        for name in ("abandoned", "run"):
            start(section, tmp_path / name)
    assert [message for message in caplog.messages if "MLflow" in message] == [f"Opening MLflow at {section.uri} …"]


def test_mlflow_is_opened_beside_the_work_of_a_command(section, tmp_path):
    run = start(section, tmp_path / "run", waits=False)
    assert (tmp_path / "run" / "tracking.jsonl").exists()
    tracking.wait_until_open(run)
    assert tracking.problem_of(run) is None
    assert MlflowClient(section.uri).get_run(run.run_id).info.run_name == "one"


def test_what_is_wrong_with_mlflow_is_raised_to_whoever_waits_until_it_is_open(section, tmp_path):
    client = MlflowClient(section.uri)
    client.delete_experiment(client.create_experiment("words"))
    run = start(section, tmp_path / "run", waits=False)
    with pytest.raises(ConfigError, match="its experiment words is deleted"):
        tracking.wait_until_open(run)
    assert isinstance(tracking.problem_of(run), ConfigError), "which stops a training"
    tracking.wait_for_upload(run)  # which does not wait


def test_a_parameter_that_is_long_or_has_parts_is_whole_in_an_artifact(section, tmp_path):
    run = start(section, tmp_path / "run")
    run.log_parameters({"corpus.keep_any": ["plt", "pd"], "prompt": "x" * 7000})
    assert run.upload(20)
    client = MlflowClient(section.uri)
    found = client.get_run(run.run_id)
    assert found.data.params == {"corpus.keep_any": '["plt", "pd"]', "prompt": "x" * 5999 + "…"}
    artifacts = tmp_path / "mlartifacts" / run.run_id / "artifacts" / "parameters"
    assert json.loads((artifacts / "corpus.keep_any.json").read_text()) == ["plt", "pd"]
    assert (artifacts / "prompt.txt").read_text() == "x" * 7000


def test_what_a_run_reads_is_told_with_what_it_is_for(section, tmp_path):
    run = start(section, tmp_path / "run")
    for name, context, count in (("words train", "training", 9), ("words validation", "validation", 1)):
        for times in (1, 2):  # a run that goes on tells again
            profile = {"documents": count * times}
            run.log_dataset(name, digest="f" * 16, source="s3://me:s3cret@bucket/f", profile=profile, context=context)
    assert run.pending() == 2
    assert run.upload(20)
    assert datasets(section.uri, run) == [
        ("words train", "f" * 16, "s3", {"uri": "s3://me@bucket/f"}, {"documents": 9}, "training"),
        ("words validation", "f" * 16, "s3", {"uri": "s3://me@bucket/f"}, {"documents": 1}, "validation"),
    ]


def test_a_file_is_as_it_was_last(section, tmp_path):
    run = start(section, tmp_path / "run")
    (tmp_path / "elsewhere.html").write_text("one")
    for _ in range(2):
        run.log_file(tmp_path / "elsewhere.html", "report/report.html")
    assert run.pending() == 1
    assert run.upload(20)
    assert artifact(section.uri, run, "report/report.html") == "one"
    kept = tmp_path / "run" / "report" / "report.html"
    assert kept.read_text() == "one"
    kept.write_text("two")
    run.log_file(kept, "report/report.html")
    (tmp_path / "run" / "gone.png").touch()
    run.log_file(tmp_path / "run" / "gone.png", "gone.png")
    (tmp_path / "run" / "gone.png").unlink()
    assert run.upload(20)
    assert artifact(section.uri, run, "report/report.html") == "two"
    assert [file.path for file in MlflowClient(section.uri).list_artifacts(run.run_id)] == ["report"]


def test_how_busy_the_machine_is(section, tmp_path):
    run = start(section, tmp_path / "run")
    for step in (1, 2, 3):
        run.log_system_metrics(step)
    assert run.upload(20)
    found = MlflowClient(section.uri).get_run(run.run_id).data.metrics
    assert set(found) == {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/system_memory_usage_percentage",
    }
    assert 0 < found["system/system_memory_usage_percentage"] <= 100
    points = [step for step, _ in stored(section.uri, run, "system/cpu_utilization_percentage")]
    assert points == [2], "a short run has one, and the next not until its time has come"
    assert run.metric_history() == {}, "what differs each time is no result of the training"


def test_tags_tell_where_a_run_is_from_and_how_often_it_was_begun(section, tmp_path, monkeypatch):
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\necho 1234abcd")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_7"}}')
    parent = start(section, tmp_path / "sweep", name="tune-1", tags={"raylm.command": "tune"})
    git.unlink()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    parent.start_trial("trial_00000")
    child = parent.start_trial("trial_00000")
    assert parent.upload(20)
    client = MlflowClient(section.uri)
    shared = {
        "mlflow.source.name": "raylm tune",
        "mlflow.source.git.commit": "1234abcd",
        "raylm.ray_job": "raysubmit_7",
    }
    assert shared.items() <= client.get_run(parent.run_id).data.tags.items()
    told = {"raylm.trial": "trial_00000", "raylm.sweep": "tune-1", "raylm.attempts": "2", **shared}
    assert told.items() <= client.get_run(child.run_id).data.tags.items()
    other = start(section, tmp_path / "other")
    origin = shared.keys() - {"raylm.ray_job"}  # the tests' own Ray, if another of them has begun it
    assert not origin & journal.run_state(other.directory).run["tags"].keys()


def test_an_experiment_that_is_made_opens_on_its_runs_and_one_that_was_there_is_left_alone(section, tmp_path):
    client = MlflowClient(section.uri)
    tracking.start(section, experiment="", name="", tags={}, directory=tmp_path / "a", metric="best/eval_bits_per_byte")
    assert client.get_experiment_by_name("words").tags == {
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.experiment.primaryMetric.name": "best/eval_bits_per_byte",
        "mlflow.experiment.primaryMetric.greaterIsBetter": "false",
    }
    client.create_experiment("mine", str(tmp_path), {"owner": "me"})
    start(TrackingConfig(uri=section.uri, experiment="mine"), tmp_path / "b")
    assert client.get_experiment_by_name("mine").tags == {"owner": "me"}


def test_a_run_that_goes_on_is_the_same_run(section, tmp_path):
    client = MlflowClient(section.uri)
    run = start(section, tmp_path / "run", tags={"raylm.command": "train"})
    run.log_parameters({"train.learning_rate": 3e-4, "train.seed": 0})
    run.log_metrics({"train/loss": 5.0}, 1)
    run.finish("KILLED")
    assert run.upload(20)
    info = client.get_run(run.run_id).info
    assert (info.status, info.end_time) == ("KILLED", journal.run_state(run.directory).time)
    end_threads()
    again = start(section, tmp_path / "run", name="other", tags={"raylm.command": "train", "raylm.host": "b"})
    again.log_parameters({"train.learning_rate": 1e-4, "train.seed": 0, "cluster.num_workers": 2})
    again.log_metrics({"train/loss": 5.0}, 1)
    again.log_metrics({"train/loss": 4.0}, 2)
    assert again.upload(20)
    found = client.get_run(again.run_id)
    assert (again.run_id, found.info.status, found.info.run_name) == (run.run_id, "RUNNING", "one")
    assert found.info.end_time == info.end_time, "it has not ended again"
    assert found.data.params == {"train.learning_rate": "0.0003", "train.seed": "0", "cluster.num_workers": "2"}
    assert found.data.tags["resume.1.changed"] == "train.learning_rate: 0.0003 -> 0.0001"
    assert found.data.tags["raylm.host"] == "b"
    assert stored(section.uri, run) == [(1, 5.0), (2, 4.0)]
    again.finish_if_running("FAILED")
    again.finish_if_running("FINISHED")
    assert again.upload(20)
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_children_hang_under_their_parent_and_are_found_again(section, tmp_path):
    client = MlflowClient(section.uri)
    parent = start(section, tmp_path / "sweep", name="sweep")
    child = parent.start_trial("trial_00000")
    child.finish("KILLED")
    assert parent.upload(20)
    assert client.get_run(child.run_id).info.status == "KILLED"
    assert parent.start_trial("trial_00000") == child, "an interrupted trial goes on in the run it had"
    other = parent.start_trial("trial_00001", directory=f"{parent.directory}/elsewhere")
    assert parent.trials() == {"trial_00000": child, "trial_00001": other}
    assert parent.upload(20), "a parent's upload waits for its trials"
    assert client.get_run(child.run_id).info.status == "RUNNING"
    for run in (child, other):
        assert client.get_run(run.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert len(client.search_runs([client.get_experiment_by_name("words").experiment_id])) == 3


def test_artifacts_lie_beside_the_database(section, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = start(section, tmp_path / "run")
    run.log_text("a", "a.txt")
    assert run.upload(20)
    assert (tmp_path / "mlartifacts").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []


# What goes wrong ---------------------------------------------------------------------------------------------------


def trained(run, upto=9):
    """What a training tells, while MLflow is as it is."""
    run.log_parameters({"train.learning_rate": 3e-4})
    run.log_dataset("words", digest="f", source="/f", profile={"tokens": 9}, context="training")
    page = Path(run.directory, "report", "page.html")
    page.parent.mkdir(exist_ok=True)
    page.write_text("a page")
    run.log_file(page, "report/page.html")
    for step in range(1, upto):
        run.log_metrics({"train/loss": LOSSES[step], "train/tokens": 256 * step}, step)
    run.log_text("a: 1\n", "experiment.yaml")
    run.finish("FINISHED")


def is_whole(uri, run):
    """Whether MLflow has what `trained` told, each point once, and one run of it."""
    client = MlflowClient(uri)
    found = client.get_run(run.run_id)
    assert stored(uri, run) == list(LOSSES.items())
    assert stored(uri, run, "train/tokens") == [(step, 256.0 * step) for step in LOSSES]
    assert found.data.params == {"train.learning_rate": "0.0003"}
    assert found.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["experiment.yaml", "report"]
    assert datasets(uri, run) == [("words", "f", "local", {"uri": "/f"}, {"tokens": 9}, "training")]
    journal_id = found.data.tags["raylm.journal"]
    assert len(client.search_runs([found.info.experiment_id], f"tags.`raylm.journal` = '{journal_id}'")) == 1
    return True


FAULTS = ["500 Internal Server Error", "429 Too Many Requests", "404 Not Found", "answers HTML", "loses answers",
          "is slow", "hangs"]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("when", ["from the beginning", "in between"])
def test_a_server_that_fails_costs_no_point_and_doubles_none(fault, when, server, gate, tmp_path, monkeypatch):
    monkeypatch.setattr(uploader, "TIMEOUT_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    gate.fault = fault if when == "from the beginning" else None
    run = start(server, tmp_path / "run")
    run.log_metrics({"train/loss": LOSSES[1]}, 1)
    if when == "in between":
        assert run.upload(20)
        gate.fault = fault
    trained(run)
    run.upload(0.2)
    gate.fault = None
    gate.released.set()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_a_server_that_is_gone_and_comes_back(server, gate, tmp_path, capsys):
    gate.close()
    run = start(server, tmp_path / "run")
    assert run.run_id is None
    trained(run, upto=4)
    child = run.start_trial("trial_00000")
    child.log_metrics({"train/loss": 1.0}, 1)
    assert not run.upload(0.2)
    gate.open()
    assert run.upload(20)
    gate.close()
    trained(run)
    assert not run.upload(0.2)
    gate.open()
    end_threads()
    assert run.upload(20)
    assert is_whole(server.uri, run)
    assert MlflowClient(server.uri).get_run(child.run_id).data.tags["mlflow.parentRunId"] == run.run_id
    warned = capsys.readouterr().err
    assert warned.count("warning: MLflow at") == 1
    assert f"MLflow at {server.uri} cannot be reached: [Errno 111] Connection refused; training continues" in warned


@pytest.mark.slow
def test_mlflow_server_itself_killed_and_started_again(tmp_path, tmp_path_factory):
    """As `mlflow server` it is seven processes, which take 7 s to start, and a minute on a busy machine."""
    shutil.copy(database(tmp_path_factory), tmp_path / "mlflow.db")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path)]

    @contextlib.contextmanager
    def served():
        server = subprocess.Popen([*command, *stores], start_new_session=True, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    run = start(TrackingConfig(uri=uri), tmp_path / "run")
    run.log_metrics({"train/loss": LOSSES[1]}, 1)
    with served():
        assert run.upload(200)
        run.log_metrics({"train/loss": LOSSES[2]}, 2)
    trained(run)
    assert not run.upload(2)
    with served():
        assert run.upload(200)
        assert is_whole(uri, run)


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_refusal_names_the_variables_and_not_their_values(status, server, gate, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "s3cret")
    gate.fault = status
    run = start(server, tmp_path / "run")
    trained(run)
    assert not run.upload(0.2)
    warned = capsys.readouterr().err
    assert warned.count("warning") == 1
    assert f"MLflow at {server.uri} refuses access: check MLFLOW_TRACKING_TOKEN" in warned
    assert "s3cret" not in warned
    gate.fault = None
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_a_trial_that_waits_has_ended_and_runs_again_when_it_goes_on(server, tmp_path):
    client = MlflowClient(server.uri)
    parent = start(server, tmp_path / "run")
    ends = []
    for step in (1, 2):
        child = parent.start_trial("trial_00000")
        child.log_metrics({"train/loss": LOSSES[step]}, step)
        assert parent.upload(20)
        assert client.get_run(child.run_id).info.status == "RUNNING"
        child.finish()
        assert parent.upload(20)
        info = client.get_run(child.run_id).info
        assert info.status == "FINISHED"
        ends.append(info.end_time)
        time.sleep(0.01)
    assert ends[0] < ends[1]
    parent.start_trial("trial_00000").finish()  # all of it before anything is uploaded
    assert parent.upload(20)
    assert client.get_run(child.run_id).info.end_time > ends[1]


def test_a_run_that_nobody_ended_ends_when_it_told_its_last(section, tmp_path):
    parent = start(section, tmp_path / "run")
    child = parent.start_trial("trial_00000")
    child.log_metrics({"train/loss": 2.0}, 1)
    ((record,), _) = journal.json_lines(child.directory, journal.METRICS_FILE).read()
    time.sleep(0.01)
    child.finish_if_running("KILLED")
    child.finish_late("FINISHED")  # as the sweep has found it to be, later
    parent.trial("trial_00001").finish_late("FINISHED")  # it never began
    assert parent.upload(20)
    info = MlflowClient(section.uri).get_run(child.run_id).info
    assert (info.status, info.end_time) == ("FINISHED", record["time"])
    assert list(parent.trials()) == ["trial_00000"]


def test_a_server_that_does_not_know_its_name_is_not_told_as_one_that_wants_a_password(server, gate, tmp_path, capsys):
    gate.fault = "wrong host"
    run = start(server, tmp_path / "run")
    trained(run)
    assert not run.upload(0.2)
    problem = tracking.problem(server.uri)
    assert problem.startswith(f"MLflow at {server.uri} answers 'Invalid Host header'")
    assert problem.endswith(f"start it with --allowed-hosts 127.0.0.1:{gate.port}")
    warned = capsys.readouterr().err
    assert f"warning: {problem}; training continues" in warned
    assert "MLFLOW_TRACKING_TOKEN" not in warned
    gate.fault = None
    assert tracking.problem(server.uri) is None
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_a_server_that_was_down_and_then_refuses_is_told_of_too(server, gate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(uploader, "TIMEOUT_SECONDS", 0.2)
    gate.close()
    run = start(server, tmp_path / "run")
    gate.fault = "401 Unauthorized"
    gate.open()
    assert not run.upload(0.2)
    eventually(lambda: any(call.endswith("get-by-name") for call in gate.calls))
    eventually(lambda: uploader.get(server.uri).failure is not None)
    warned = capsys.readouterr().err
    assert (warned.count("cannot be reached"), warned.count("refuses access")) == (1, 1)


def test_a_password_in_the_address_is_told_nobody(server, gate, tmp_path, capsys):
    section = TrackingConfig(uri=server.uri.replace("//", "//me:s3cret@"))
    gate.close()
    run = start(section, tmp_path / "run")
    trained(run)
    assert not run.upload(0.2)
    gate.open()
    assert run.upload(20)
    assert is_whole(server.uri, run)
    written = "".join(file.read_text() for file in (tmp_path / "run").rglob("*") if file.is_file())
    shown = (
        written
        + capsys.readouterr().err
        + repr(run)
        + "".join(tracking.how_to_open(section.uri, run.path, "MLflow").values())
    )
    assert "s3cret" not in shown
    assert tracking.find_runs(tmp_path)[0].uri == server.uri


@pytest.mark.parametrize(
    ("uri", "there"),
    [
        ("postgresql://me:s3cret@host/mlflow?sslmode=require&password=s3cret", "postgresql://me@host/mlflow"),
        ("https://s3cret@host:5000/path", "https://host:5000/path"),
        ("sqlite:////tmp/a@b:c/mlflow.db", "sqlite:////tmp/a@b:c/mlflow.db"),
        ("databricks", "databricks"),
    ],
)
def test_what_of_an_address_is_shown(uri, there):
    assert tracking.display_uri(uri) == there


def test_several_uploaders_of_one_journal_upload_it_once(server, gate, tmp_path):
    gate.close()
    run = start(server, tmp_path / "run")
    trained(run)
    others = [uploader.Uploader(Server(server.uri)) for _ in range(2)]
    for other in others:
        other.add(run.directory)
    gate.fault = "is slow"
    gate.open()
    for other in others:
        assert other.upload([run.directory], 60)
        other.close(10)
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_without_locks_mlflow_itself_drops_what_it_has(server, tmp_path, monkeypatch):
    run = start(server, tmp_path / "run")
    trained(run)
    monkeypatch.setattr(journal, "lock", lambda directory: contextlib.nullcontext(True))
    uploads = [Upload(run.directory, uploader.get(server.uri).server, pytest.fail) for _ in range(3)]
    for upload in uploads:
        upload._stored = set()  # as they would be if they had asked at the same time
    barrier = threading.Barrier(len(uploads))

    def at_once(upload):
        barrier.wait()
        with contextlib.suppress(Exception):  # of two that insert a parameter one fails, and tries again
            upload.run()

    threads = [threading.Thread(target=at_once, args=(upload,)) for upload in uploads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.upload(20)
    assert is_whole(server.uri, run)


@pytest.mark.parametrize("lost", ["the offsets", "the offset of the metrics", "the offsets before the run"])
def test_an_uploader_that_was_killed_before_it_recorded_its_offsets(lost, server, tmp_path):
    run = start(server, tmp_path / "run")
    offsets = tmp_path / "run" / "mlflow.json"
    created = offsets.read_text()
    trained(run)
    assert run.upload(20)
    end_threads()
    if lost == "the offset of the metrics":
        offsets.write_text(created)
    else:
        offsets.unlink()
    run.rewind(4)  # and the points after it are not made again before this
    assert start(server, run.directory).upload(20)
    trained(run)
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_a_process_that_is_killed_while_it_uploads(server, tmp_path, gate):
    gate.fault = "is slow"  # or it would be over before it can be killed
    run = start(server, tmp_path / "run")
    end_threads()
    trained(run)
    for milliseconds in (200, 500, 800):
        child = in_fork(lambda: run.upload(20))
        time.sleep(milliseconds / 1000)
        os.kill(child, signal.SIGKILL)
        ended(child)
    gate.fault = None
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_what_arrived_though_nobody_heard_of_it_is_not_sent_again(server, gate, tmp_path):
    run = start(server, tmp_path / "run")
    gate.fault = "loses answers"
    run.log_metrics(dict.fromkeys(("train/loss", "train/tokens"), 1.0), 1)
    eventually(lambda: any(call.endswith("log-batch") for call in gate.calls))
    eventually(lambda: uploader.get(server.uri).failure is not None)
    gate.fault = None
    gate.calls.clear()
    assert run.upload(20)
    assert stored(server.uri, run) == [(1, 1.0)]
    assert [call for call in gate.calls if call.endswith("log-batch")] == []


def test_a_point_that_comes_out_otherwise_the_second_time_stays_as_it_was(server, tmp_path):
    run = start(server, tmp_path / "run")
    trained(run)
    assert run.upload(20)
    end_threads()
    (tmp_path / "run" / "mlflow.json").unlink()
    run.rewind(4)
    for step in range(5, 9):  # on another number of workers, say
        run.log_metrics({"train/loss": LOSSES[step] + 1e-6}, step)
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_points_that_are_made_again_are_not_uploaded_again(server, gate, tmp_path):
    run = start(server, tmp_path / "run")
    trained(run, upto=7)
    assert run.upload(20)
    run.rewind(3)
    trained(run, upto=6)
    assert run.upload(20)
    gate.close()
    run.rewind(4)
    trained(run, upto=6)
    run.rewind(2)
    gate.open()
    trained(run)
    assert run.upload(20)
    assert is_whole(server.uri, run)


def test_a_point_that_was_rewound_before_it_was_uploaded_is_not_uploaded(server, gate, tmp_path):
    gate.close()
    run = start(server, tmp_path / "run")
    run.log_metrics({"train/loss": 5.0}, 1)
    run.log_metrics({"train/loss": 4.0}, 2)
    run.rewind(1)
    gate.open()
    assert run.upload(20)
    assert stored(server.uri, run) == [(1, 5.0)]


def test_what_mlflow_never_takes_holds_nothing_up(server, tmp_path, capsys):
    run = start(server, tmp_path / "run")
    run.log_metrics({"train/loss": 5.0, "no such name?": 1.0, "train/tokens": 256}, 1)
    run.set_tags({"": "no name"})
    run.finish()
    assert run.upload(20)
    found = MlflowClient(server.uri).get_run(run.run_id)
    assert found.data.metrics == {"train/loss": 5.0, "train/tokens": 256.0}
    assert found.info.status == "FINISHED"
    assert capsys.readouterr().err.count(f"warning: MLflow at {server.uri} refuses an entry") == 1


def test_an_artifact_store_that_fails_holds_nothing_else_up(section, tmp_path, capsys):
    run = start(section, tmp_path / "run")
    (tmp_path / "mlartifacts").write_text("not a directory")
    trained(run)
    eventually(lambda: MlflowClient(section.uri).get_run(run.run_id).info.status == "FINISHED")
    assert stored(section.uri, run) == list(LOSSES.items())
    assert not run.upload(0.2)
    eventually(lambda: uploader.get(section.uri).failure is not None)
    assert "does not store artifacts: [Errno 20] Not a directory" in capsys.readouterr().err
    (tmp_path / "mlartifacts").unlink()
    assert run.upload(20)
    assert is_whole(section.uri, run)


def test_a_run_that_was_deleted_in_mlflow_gets_no_more(section, tmp_path, capsys):
    client = MlflowClient(section.uri)
    run = start(section, tmp_path / "run")
    client.delete_run(run.run_id)
    trained(run)
    assert run.upload(20)
    assert "is deleted; nothing more is uploaded to it" in capsys.readouterr().err
    client.restore_run(run.run_id)
    assert client.get_run(run.run_id).data.metrics == {}


def test_a_database_that_was_removed_gets_everything_anew(section, tmp_path, tmp_path_factory):
    run = start(section, tmp_path / "run")
    before = run.run_id
    trained(run, upto=4)
    assert run.upload(20)
    end_threads()
    (tmp_path / "other").mkdir()
    shutil.copy(database(tmp_path_factory), tmp_path / "other" / "mlflow.db")
    moved = TrackingConfig(uri=f"sqlite:///{tmp_path}/other/mlflow.db")
    offsets = tmp_path / "run" / "mlflow.json"
    offsets.write_text(offsets.read_text().replace(section.uri, moved.uri))  # the file is another, the name is not
    uploader.get(moved.uri).server._experiment_ids["words"] = "77"  # as it was in the file that is gone
    run = start(moved, tmp_path / "run")
    trained(run)
    assert run.upload(20)
    assert run.run_id != before
    assert is_whole(moved.uri, run)


def test_four_processes_write_one_sqlite_file(section, tmp_path):
    def work(number):
        run = start(section, tmp_path / f"run{number}")
        trained(run)
        assert run.upload(60)

    children = [in_fork(lambda number=number: work(number)) for number in range(4)]
    assert [ended(child) for child in children] == [0, 0, 0, 0]
    for number in range(4):
        assert is_whole(section.uri, tracking.Run(f"{tmp_path}/run{number}", section.uri))


def test_a_trial_that_was_killed_is_uploaded_by_the_sweep(server, tmp_path):
    parent = start(server, tmp_path / "sweep")

    def trial():
        run = parent.start_trial("trial_00000")
        trained(run)
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(in_fork(trial)) == -signal.SIGKILL
    assert parent.upload(20)
    assert is_whole(server.uri, parent.trials()["trial_00000"])


def test_a_trial_may_leave_the_upload_to_the_sweep(server, tmp_path):
    parent = start(server, tmp_path / "sweep")
    uploaders_of_the_sweep = dict(uploader._uploaders)
    uploader._uploaders.clear()  # as in a process of its own
    child = parent.start_trial("trial_00000", uploads=False)
    trained(child)
    assert uploader._uploaders == {}
    uploader._uploaders.update(uploaders_of_the_sweep)
    parent.trial("trial_00000").upload_in_background()
    eventually(lambda: child.pending() == 0)
    assert is_whole(server.uri, child)


def test_what_is_not_uploaded_at_the_end_is_counted_and_the_command_named(server, gate, tmp_path, monkeypatch, capsys):
    run = start(server, tmp_path / "run")
    trained(run)
    monkeypatch.setattr(uploader, "TIMEOUT_SECONDS", 10.0)
    tracking.wait_for_upload(run)
    assert "not in MLflow yet" not in capsys.readouterr().err
    monkeypatch.setattr(uploader, "TIMEOUT_SECONDS", 0.1)
    gate.close()
    run.log_metrics({"train/loss": 1.0}, 99)
    run.start_trial("trial_00000")
    tracking.wait_for_upload(run)
    gate.open()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("warning: 2 entries are not in MLflow yet; upload them with: ")
    assert line.endswith(f" -m raylm.sync {tmp_path}/run")


# Addresses that never work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "nonsense://x",
        "sqlite:////proc/no/mlflow.db",
        "sqlite:////etc/passwd",
        "sqlite:////usr",
        "./mlruns",
        "none",
        "None",
        "localhost:5000",
        "sqlite:mlflow.db",
        "redis://x",
        "http:/x",
    ],
)
def test_an_address_that_can_never_work_is_an_error_before_anything_is_written(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        start(TrackingConfig(uri=uri), tmp_path / "run")
    assert re.fullmatch(
        rf"tracking.uri={uri} cannot be used: [^\n]*[^.… ]; give sqlite:///FILE, or [^\n]*; "
        "tracking.uri=null tracks nothing",
        caught.value.message,
    )
    assert len(caught.value.message) < 400, "a line that is read"
    assert list(tmp_path.iterdir()) == []


def test_an_experiment_that_was_deleted_in_mlflow_is_an_error(section, tmp_path):
    client = MlflowClient(section.uri)
    client.delete_experiment(client.create_experiment("words"))
    with pytest.raises(ConfigError, match="its experiment words is deleted"):
        start(section, tmp_path / "run")


def view(server, parent):
    """The state of MLflow's page that compares a sweep's trials."""
    client = MlflowClient(server.uri)
    experiment = client.get_experiment(client.get_run(parent.run_id).info.experiment_id)
    value = experiment.tags[f"mlflow.sharedViewState.{Path(parent.path).name.rpartition('=')[2]}"]
    assert len(value) < 5000
    return json.loads(zlib.decompress(base64.b64decode(value.removeprefix("deflate;"))))


def test_the_page_of_a_sweep_compares_its_trials_by_their_score_and_the_swept_settings(server, tmp_path):
    assert start(NOWHERE, tmp_path / "untracked").path is None
    parent = start(server, tmp_path / "sweep", name="tune-1")
    settings = ["train.learning_rate", "blocks.block_size", *(f"model.config.n_{number}" for number in range(12))]
    parent.log_comparison("best/eval_perplexity", "eval/perplexity", settings)
    parent.describe(f"best of all\n\n[Compare the trials]({tracking.COMPARISON})")
    for number, score in enumerate([7.0, 5.0, 6.0]):
        trial = parent.start_trial(f"trial_0000{number}")
        trial.log_metrics({"best/eval_perplexity": score}, 8)
    assert parent.upload(20)
    client = MlflowClient(server.uri)
    run = client.get_run(parent.run_id)
    page = (
        f"#/experiments/{run.info.experiment_id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
        "&viewStateShareKey=tune-1"
    )
    assert parent.path == page
    assert run.data.tags["mlflow.note.content"] == f"best of all\n\n[Compare the trials]({page})"
    assert trial.path == f"#/experiments/{run.info.experiment_id}/runs/{trial.run_id}?workflowType=machine_learning"
    state = view(server, parent)
    parallel, *scatter, line = state["compareRunCharts"]
    assert (parallel["selectedParams"], parallel["selectedMetrics"]) == (settings, ["best/eval_perplexity"])
    assert [(one["xaxis"]["key"], one["yaxis"]["key"]) for one in scatter] == [
        (key, "best/eval_perplexity") for key in settings
    ]
    assert line["metricKey"] == "eval/perplexity"
    order = f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"
    found = client.search_runs([run.info.experiment_id], state["searchFilter"], order_by=[order])
    assert [one.info.run_name for one in found] == ["trial_00001", "trial_00002", "trial_00000"], "not the parent"


def test_a_sweep_that_ran_without_mlflow_has_its_page_once_it_is_uploaded(server, gate, tmp_path):
    gate.fault = "503"
    parent = start(server, tmp_path / "sweep", name="tune-2")
    parent.log_comparison("best/eval_perplexity", "eval/perplexity", ["train.learning_rate"])
    parent.describe(f"[Compare the trials]({tracking.COMPARISON})")
    assert parent.path is None
    gate.fault = None
    assert parent.upload(20)
    assert view(server, parent)["compareRunCharts"][0]["selectedParams"] == ["train.learning_rate"]
    description = MlflowClient(server.uri).get_run(parent.run_id).data.tags["mlflow.note.content"]
    assert description == f"[Compare the trials]({parent.path})"


def test_how_a_page_of_mlflow_is_opened():
    path = "#/experiments/1/runs/2?workflowType=machine_learning"
    assert tracking.how_to_open(None, None, "MLflow") == {}
    assert tracking.how_to_open("http://me:secret@host:5000/", path, "MLflow") == {"MLflow": f"http://host:5000/{path}"}
    listed = tracking.how_to_open("http://host:5000", None, "MLflow")["MLflow"]
    assert listed == "http://host:5000/#/experiments?workflowType=machine_learning", "not the page about agents"
    shown = tracking.how_to_open("sqlite:////tmp/my notes/mlflow.db", path, "compare trials")
    command = f"{sys.executable} -m mlflow server --backend-store-uri 'sqlite:////tmp/my notes/mlflow.db'"
    assert shown == {"start MLflow": command, "compare trials": f"http://127.0.0.1:5000/{path}"}
