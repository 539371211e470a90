"""How busy the machine of a process is, under the names of MLflow's own monitor, for which its page has a tab.

That monitor has a thread that asks MLflow and drops what MLflow does not take; these points go by the journal.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time

import psutil

PREFIX = "system/"
SECONDS = 10.0
"""Between two points: asking takes 0.2 ms."""


class SystemMonitor:
    def __init__(self) -> None:
        self._next = time.monotonic() + SECONDS
        psutil.cpu_percent()  # from now on

    def metrics(self) -> dict[str, float]:
        """The CPUs since the last point, memory and GPU as they are; nothing if the last point is not long ago."""
        if time.monotonic() < self._next:
            return {}
        self._next = time.monotonic() + SECONDS
        memory = psutil.virtual_memory()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            **_gpu(),
        }
        return {f"{PREFIX}{name}": round(value, 1) for name, value in found.items()}


def _gpu() -> dict[str, float]:
    """Of the GPU of this process, if it has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    index = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info()
    found = {
        f"gpu_{index}_memory_usage_megabytes": (total - free) / 1e6,
        f"gpu_{index}_memory_usage_percentage": 100 * (total - free) / total,
    }
    with contextlib.suppress(Exception):  # without nvidia-ml-py
        found[f"gpu_{index}_utilization_percentage"] = torch.cuda.utilization()
    return found


@functools.cache
def monitor(directory: str) -> SystemMonitor:
    """The one of a run in this process."""
    return SystemMonitor()
