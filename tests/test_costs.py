"""What a training costs beside its steps, measured in this process."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch

from raylm.training import costs
from raylm.training.costs import Costs
from raylm.training.trainer import PROGRESS

CPU = torch.device("cpu")
MEGABYTE = 1 << 20

needs_reset = pytest.mark.skipif(not costs._reset_peak(CPU), reason="the kernel does not let a process reset its peak")


@needs_reset
def test_the_peak_of_a_process_is_that_of_its_present_training():
    first = Costs(CPU)
    torch.ones(400 * MEGABYTE // 4)
    second = Costs(CPU)
    torch.ones(100 * MEGABYTE // 4)
    assert first.peak_memory_bytes == second.peak_memory_bytes, "one process trains one model at a time"
    del first
    alone = second.peak_memory_bytes
    third = Costs(CPU)
    assert 50 * MEGABYTE < alone - third.peak_memory_bytes < 200 * MEGABYTE, "not the 400 MB of the first"


@needs_reset
def test_a_resumed_training_adds_to_what_it_had_cost():
    before = {"evaluation_seconds": 100.0, "saving_seconds": 10.0, "peak_memory_bytes": 1 << 50}
    found = Costs(CPU)
    found.resume(before)
    with found.evaluating():
        time.sleep(0.01)
    record = found.record()
    assert 100.01 <= record["evaluation_seconds"] < 110
    assert (record["saving_seconds"], record["peak_memory_bytes"]) == (10.0, 1 << 50)
    older = Costs(CPU)
    older.resume({"seconds": 3.0})
    assert older.record()["evaluation_seconds"] == 0


def test_seconds_until_an_error_count():
    found = Costs(CPU)
    with contextlib.suppress(OSError), found.saving():
        time.sleep(0.01)
        raise OSError
    assert found.saving_seconds >= 0.01


def test_a_system_that_does_not_tell_the_peak(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    assert Costs(CPU).record()["peak_memory_bytes"] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_on_a_gpu_is_that_of_tensors():
    device = torch.device("cuda")
    torch.ones(400 * MEGABYTE // 4, device=device)
    found = Costs(device)
    before = torch.cuda.memory_allocated(device)
    torch.ones(100 * MEGABYTE // 4, device=device)
    assert found.peak_memory_bytes - before == 100 * MEGABYTE


def test_a_run_logs_its_costs_and_adds_to_them_when_it_resumes(train_run, tiny):
    experiment = tiny()
    outcome, job = train_run(experiment)
    found = job.run.figures()
    assert found["evaluation_seconds"] > 0 < found["saving_seconds"]
    assert found["evaluation_seconds"] < outcome.last["seconds"]
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 100 * MEGABYTE, "torch alone has more"
    assert not [name for name in job.run.metric_history() if "cost" in name], "they differ each time"
    *_, before, last = job.checkpoints.complete()
    progress = json.loads(Path(job.checkpoints.path(before), PROGRESS).read_text())
    job.checkpoints.discard(last)
    train_run.go_on(job, experiment)
    resumed = job.run.figures()
    for name in ("evaluation_seconds", "saving_seconds"):
        assert resumed[name] > progress[name] > 0, "four evaluations before, and one since"
