"""What a training costs beside its steps: seconds of evaluating and saving, and memory."""

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

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return self._counting("evaluation_seconds")

    def saving(self) -> contextlib.AbstractContextManager[None]:
        return self._counting("saving_seconds")

    @contextlib.contextmanager
    def _counting(self, what: str) -> Iterator[None]:
        """Inside, seconds are added to this cost."""
        start = time.monotonic()
        try:
            yield
        finally:
            setattr(self, what, getattr(self, what) + time.monotonic() - start)

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
        }

    def resume(self, record: Mapping[str, Any]) -> None:
        """Continue from the record of a checkpoint, which may be of an older version and have no costs."""
        self.evaluation_seconds += record.get("evaluation_seconds", 0.0)
        self.saving_seconds += record.get("saving_seconds", 0.0)
        self.earlier_peak = record.get("peak_memory_bytes") or 0


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
