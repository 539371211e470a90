"""A timeline has the phases of all processes, also of one that is killed; without one nothing is recorded."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from raylm import config, timeline
from raylm.errors import ConfigError


def phases(events, pid):
    """The phases of a process in the order in which they started, each with its duration; None if it has not ended."""
    open_, found = {}, []
    for event in (event for event in events if event["pid"] == pid):
        stack = open_.setdefault(event["tid"], [])
        if event["ph"] == "B":
            found.append([event["name"], None])
            stack.append((found[-1], event["ts"]))
        elif event["ph"] == "E":
            phase, started = stack.pop()
            assert phase[0] == event["name"], "phases are nested"
            phase[1] = event["ts"] - started
    return dict(found)


def processes(events):
    """Name -> process id."""
    return {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}


def recorded(tmp_path, work):
    file = tmp_path / "timeline.json"
    with timeline.recorded(file):
        work()
    return json.loads(file.read_text())["traceEvents"]


@pytest.fixture(autouse=True)
def _imports_as_before(monkeypatch):
    monkeypatch.setattr("builtins.__import__", __import__)


def test_phases_are_nested_and_have_a_start_and_an_end(tmp_path):
    def work():
        with timeline.phase("outer"), timeline.phase("inner"):
            timeline.mark("something")

    events = recorded(tmp_path, work)
    found = phases(events, os.getpid())
    assert list(found) == ["outer", "inner"]
    assert found["outer"] >= found["inner"]
    assert [event["name"] for event in events if event["ph"] == "i"] == ["something"]
    assert processes(events) == {"command": os.getpid()}


def test_the_trace_is_written_after_an_error_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        recorded(tmp_path, lambda: 1 / 0)
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]


def test_without_a_timeline_nothing_is_recorded(tmp_path):
    before = __import__
    timeline.start("command")
    with timeline.phase("outer"):
        timeline.mark("something")
    assert __import__ is before
    assert not timeline.is_recorded()


def test_what_a_killed_process_has_begun_is_kept(tmp_path):
    program = """
        import os, signal
        from raylm import config, timeline
        timeline.start("worker")
        with timeline.phase("train"):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = []

    def work():
        ended.append(subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode)

    events = recorded(tmp_path, work)
    assert ended == [-signal.SIGKILL]
    assert phases(events, processes(events)["worker"]) == {"train": None}


def test_imports_that_take_long_are_recorded_with_those_inside_of_them(tmp_path, monkeypatch):
    (tmp_path / "slow_outer.py").write_text("import slow_inner\n")
    (tmp_path / "slow_inner.py").write_text("import time\ntime.sleep(0.05)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def work():
        import slow_outer  # noqa: F401

    events = recorded(tmp_path, work)
    imports = {event["name"]: event for event in events if event["name"].startswith("import slow")}
    assert list(imports) == ["import slow_inner", "import slow_outer"]
    assert imports["import slow_outer"]["ts"] <= imports["import slow_inner"]["ts"]


def test_a_file_that_cannot_be_written_is_named_before_anything_starts(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"--timeline .*/missing/t.json: cannot be written: No such file"),
        timeline.recorded(tmp_path / "missing" / "t.json"),
    ):
        raise AssertionError("started")


def test_a_training_has_the_phases_of_its_command_its_worker_and_ray(command, tmp_path, tiny):
    file = tmp_path / "tiny.yaml"
    file.write_text(config.dump(tiny(f"storage={tmp_path}/runs", "train.max_tokens=1024")))
    done = command("train", "--config", file, "--timeline", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    named = processes(events)
    assert {"command", "worker 0"} <= set(named)
    assert {"Preparing tokens", "Training"} <= set(phases(events, named["command"]))
    assert {"import what a training needs", "train"} <= set(phases(events, named["worker 0"]))
    assert any(event["ph"] == "X" and str(event["tid"]).startswith("worker:") for event in events), "Ray's tasks"
    assert any(event["ph"] == "i" and "train/loss" in event["name"] for event in events)
