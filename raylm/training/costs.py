"""What a training costs: seconds of evaluating and saving, memory, and how well its steps use the devices.

MFU (model FLOPs utilization, Chowdhery et al. 2022, arXiv:2204.02311) is the floating-point operations of the model's
training over those that the devices could have done meanwhile. It is of steps alone, without evaluations and saving,
and without the first step of each start, which compiles and allocates.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class Costs:
    """The costs of one rank from now on, added to those before it resumed."""

    def __init__(self, device: torch.device):
        self.device = device
        self.evaluation_seconds = 0.0
        self.saving_seconds = 0.0
        self.earlier_peak = 0
        self.knows_peak = _reset_peak(device)
        self.done_flops = 0.0
        """Floating-point operations of the timed steps."""
        self.possible_flops = 0.0
        """What the devices of all workers could have done meanwhile."""
        self.flops_of_a_step = 0.0
        self.peak_flops: float | None = None
        """Floating-point operations a second of the devices of all workers; None if they are not known."""
        self._timed_from: float | None = None
        """When the steps began that are timed now."""
        self._timed_steps = 0

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return self._counting("evaluation_seconds")

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return self._counting("saving_seconds")

    @contextlib.contextmanager
    def _counting(self, what: str) -> Iterator[None]:
        """Inside, seconds are added to this cost, and not to those of steps."""
        is_timed = self._timed_from is not None
        self._count_steps()
        start = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            setattr(self, what, getattr(self, what) + end - start)
            self._timed_from = end if is_timed else None

    def step(self) -> None:
        """Called after each optimizer step."""
        if self._timed_from is None:
            self._wait()
            self._timed_from = time.monotonic()
        else:
            self._timed_steps += 1

    def _count_steps(self) -> None:
        """Add the steps that are timed now to what was done and possible."""
        self._wait()
        if self._timed_from is not None and self._timed_steps and self.peak_flops is not None:
            self.done_flops += self._timed_steps * self.flops_of_a_step
            self.possible_flops += (time.monotonic() - self._timed_from) * self.peak_flops
        self._timed_steps = 0

    def _wait(self) -> None:
        """Have a GPU do what it was given: the host is ahead of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def mfu(self) -> float | None:
        """The fraction of the devices' floating-point operations that steps have used; None if it is not known."""
        return self.done_flops / self.possible_flops if self.possible_flops else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory at a time since the training started: on a GPU that of tensors, on a CPU that of the process,
        with what it already had. None if the system does not tell it."""
        peak = _peak(self.device) if self.knows_peak else None
        return None if peak is None else max(self.earlier_peak, peak)

    def record(self) -> dict[str, Any]:
        """What a resumed training adds its costs to."""
        return {
            "evaluation_seconds": self.evaluation_seconds,
            "saving_seconds": self.saving_seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "done_flops": self.done_flops,
            "possible_flops": self.possible_flops,
        }

    def figures(self, peak_memory_bytes: int | None) -> dict[str, float]:
        """What is known of the costs so far, by the names of tracking.COSTS, with the most memory of all workers."""
        found = {
            "evaluation_seconds": self.evaluation_seconds,
            "saving_seconds": self.saving_seconds,
            "peak_memory_bytes": peak_memory_bytes,
            "mfu": self.mfu,
        }
        return {name: value for name, value in found.items() if value is not None}

    def resume(self, record: Mapping[str, Any]) -> None:
        """Continue from the record of a checkpoint, which may be of an older version and have no costs."""
        self.evaluation_seconds += record.get("evaluation_seconds", 0.0)
        self.saving_seconds += record.get("saving_seconds", 0.0)
        self.earlier_peak = record.get("peak_memory_bytes") or 0
        self.done_flops += record.get("done_flops", 0.0)
        self.possible_flops += record.get("possible_flops", 0.0)


def _reset_peak(device: torch.device) -> bool:
    """Start to measure the peak anew, because the process of a trial has trained others before. Whether that is
    possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR_REFS.write_text("5")  # resets VmHWM (proc_pid_clear_refs(5)); getrusage has no such reset
    except OSError:  # not Linux, or not permitted
        return False
    return True


def _peak(device: torch.device) -> int | None:
    """The peak since it was reset, in bytes; None of a kernel that does not tell it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return None if found is None else 1024 * int(found[1])
