import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from raylm import scratch

HOLDING = """
import sys, time
from pathlib import Path
from raylm import scratch
session = Path(sys.argv[1], "ray", "session_1")
session.mkdir(parents=True, exist_ok=True)
scratch.hold_session(str(session))
with scratch.directory("tune") as path:
    print(path, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A temporary directory of this test's own."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_directory_goes_with_what_it_was_for(elsewhere):
    with scratch.directory("tune") as path:
        assert Path(path).is_dir()
        assert scratch.abandoned() == []
    assert list(elsewhere.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(elsewhere):
    (elsewhere / "ray").mkdir()
    (elsewhere / "ray" / "session_latest").symlink_to("session_1")  # as Ray has it
    others = [elsewhere / "raylm-tune-1-notours", elsewhere / "raylm-rank0-abc", elsewhere / "ray" / "session_2"]
    for each in others:  # of a process that lives (1), of no process, of a Ray that raylm did not start
        each.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, str(elsewhere)], stdout=subprocess.PIPE, text=True)
    path = holder.stdout.readline().strip()
    assert Path(path).is_dir()
    scratch.clear()
    assert Path(path).is_dir(), "its process lives"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    session = str(elsewhere / "ray" / "session_1")
    assert scratch.abandoned() == sorted([path, session])
    scratch.clear()
    assert not Path(path).exists()
    assert not Path(session).exists()
    assert all(each.is_dir() for each in others)


def test_a_lock_that_another_process_holds_protects_whatever_the_process_id_says(elsewhere):
    """Containers that share a temporary directory have process ids of their own."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (elsewhere / f"raylm-rank0-{dead.pid}-x").mkdir()
    (elsewhere / f"raylm-rank1-{dead.pid}-x").mkdir()
    script = (
        "import fcntl, os, sys, time; at = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(at, fcntl.LOCK_EX); "
        "print('held', flush=True); time.sleep(100)"
    )
    held = elsewhere / f"raylm-rank1-{dead.pid}-x"
    holder = subprocess.Popen([sys.executable, "-c", script, str(held)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    try:
        assert scratch.abandoned() == [str(elsewhere / f"raylm-rank0-{dead.pid}-x")]
    finally:
        holder.kill()
        holder.wait()
