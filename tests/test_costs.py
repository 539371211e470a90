"""What a training costs beside its steps, measured in this process."""

import contextlib
import json
import time
from pathlib import Path

import pytest
import torch

from raylm import scorer
from raylm.training import costs, peak_flops
from raylm.training.costs import Costs
from raylm.training.trainer import PROGRESS, _Trainer

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


def test_mfu_is_of_timed_steps_alone(monkeypatch):
    """Ten FLOPs a step and 20 a second: by hand."""
    now = [0.0]
    monkeypatch.setattr(costs.time, "monotonic", lambda: now[0])
    found = Costs(CPU)
    found.flops_of_a_step, found.peak_flops = 10.0, 20.0

    def steps(*seconds):
        for each in seconds:
            now[0] += each
            found.step()

    steps(100)  # the first compiles
    assert found.mfu is None
    steps(1, 1)
    for cost in (found.evaluating, found.saving):
        with cost():
            now[0] += 50
    assert found.mfu == 20 / 40
    steps(4)
    with found.evaluating():
        now[0] += 50
    assert found.mfu == 30 / 120
    assert found.figures(None) == {"evaluation_seconds": 100, "saving_seconds": 50, "mfu": 0.25}
    resumed = Costs(CPU)
    resumed.resume(found.record())
    assert resumed.mfu == 0.25, "of another machine the steps are added to those of this one"
    resumed.flops_of_a_step, resumed.peak_flops = 10.0, None
    resumed.step()
    resumed.step()
    with resumed.saving():
        pass
    assert resumed.mfu == 0.25, "a device of which nothing is known adds nothing"


def test_a_run_logs_its_mfu_and_adds_to_it_when_it_resumes(train_run, tiny):
    experiment = tiny("train.peak_flops=1e12")
    _, job = train_run(experiment)
    assert 0 < job.run.figures()["mfu"] < 0.1, "a model of 8,000 parameters, of a device that one core is not"
    *_, before, last = job.checkpoints.complete()
    progress = json.loads(Path(job.checkpoints.path(before), PROGRESS).read_text())
    a_step = progress["done_flops"] / (before - 1)  # without the first
    assert a_step > 6 * 256 * 5000
    job.checkpoints.discard(last)
    train_run.go_on(job, experiment)
    resumed = json.loads(Path(job.checkpoints.path(last), PROGRESS).read_text())
    assert resumed["done_flops"] == pytest.approx(progress["done_flops"] + (last - before - 1) * a_step)
    assert resumed["possible_flops"] > progress["possible_flops"]
    assert job.run.figures()["mfu"] == pytest.approx(resumed["done_flops"] / resumed["possible_flops"])


def test_weights_are_the_same_without_mfu(train_run, tiny, monkeypatch):
    def weights():
        outcome, job = train_run(tiny("train.max_tokens=1024"))
        return Path(job.checkpoints.path(outcome.step), "model.safetensors").read_bytes()

    measured = []
    plain = peak_flops._of_core.__wrapped__
    monkeypatch.setattr(peak_flops, "_of_core", lambda kind: measured.append(kind) or plain(kind))
    with_mfu = weights()
    assert measured == ["float32"]
    monkeypatch.setattr(_Trainer, "measure_peak", lambda self: None)
    assert weights() == with_mfu


def test_the_speed_of_a_core_is_measured_in_the_arithmetic_of_training():
    torch.manual_seed(0)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    assert 1e9 < peak_flops.find(CPU, "float32") < 1e14 * threads
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    arithmetic = peak_flops.arithmetic
    assert arithmetic(CPU, autocast="no", weights=torch.float32) == "float32"
    assert arithmetic(CPU, autocast="no", weights=torch.bfloat16) == "bfloat16"
    assert arithmetic(CPU, autocast="fp16", weights=torch.float32) == "float16"


def test_tf32_is_another_arithmetic_on_a_gpu():
    gpu, before = torch.device("cuda"), torch.backends.fp32_precision
    try:
        for on, kind in ((True, "tf32"), (False, "float32")):
            scorer.set_tf32(on)
            assert peak_flops.arithmetic(gpu, autocast="no", weights=torch.float32) == kind
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize(
    ("name", "kind", "peak"),
    [
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("Tesla T4", "float32", 8.1e12),
        ("NVIDIA A10G", "tf32", 35e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA A100 80GB PCIe", "tf32", 156e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 67e12),
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "float32", 40e12),
    ],
)
def test_the_peak_of_a_gpu(name, kind, peak):
    assert peak_flops.of_name(name, kind) == peak
