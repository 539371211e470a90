"""System metrics, named as by MLflow's own monitor, so that MLflow's page shows them in their own tab.

MLflow's monitor logs from a thread and drops points when a call fails; these points go through the journal.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time

import psutil

PREFIX = "system/"
SECONDS = 10.0
"""Between two points; reading the values takes 0.2 ms."""


class SystemMonitor:
    def __init__(self) -> None:
        self._next: float | None = None

    def metrics(self) -> dict[str, float]:
        """CPU use since the last point, and memory and GPU use now; empty until it is time for the next point.

        The first call starts the measurement and the second returns the first point, however soon, so that short runs
        have values where MLflow compares runs.
        """
        if self._next is None:
            self._next = time.monotonic()
            psutil.cpu_percent()
            return {}
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + SECONDS
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            **_gpu(),
        }
        return {f"{PREFIX}{name}": round(value, 1) for name, value in values.items()}


def _gpu() -> dict[str, float]:
    """Use of the GPU of this process; empty if it has none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info()
    values = {
        f"gpu_{index}_memory_usage_megabytes": (total - free) / 1e6,
        f"gpu_{index}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(Exception):  # without nvidia-ml-py
        values[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization()
    return values


@functools.cache
def monitor(directory: str) -> SystemMonitor:
    """The monitor of this process for the run in a directory."""
    return SystemMonitor()
