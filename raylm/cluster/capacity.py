"""The resources of a cluster, with those that autoscaling may add, and of a run."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from raylm import console
from raylm.config import ClusterConfig, is_local
from raylm.errors import ConfigError

NODE_GROUP = "ray.io/node-group"
"""The label of nodes that an autoscaler or KubeRay has added."""

ACCELERATOR = "accelerator_type:"
"""The prefix of Ray's resource for nodes with a kind of accelerator."""

Nodes = Sequence[tuple[float, Mapping[str, float]]]
"""(most nodes of a kind, resources of each)"""


@dataclass(frozen=True)
class Resources:
    """The resources of a cluster and of one worker of a run, by Ray's names and units."""

    total: Mapping[str, float]
    per_worker: Mapping[str, float]
    num_workers: int
    """The fewest workers, if cluster.num_workers is a range."""
    most_workers: int
    placement_strategy: str = "PACK"

    @property
    def cpus_per_worker(self) -> float:
        return self.per_worker["CPU"]

    @property
    def gpus_per_worker(self) -> float:
        return self.per_worker.get("GPU", 0)

    @property
    def described(self) -> str:
        """The resources of a worker in words: 2 CPUs, 1 GPU."""
        return ", ".join(amount_of(amount, kind) for kind, amount in self.per_worker.items())

    @property
    def options(self) -> dict[str, Any]:
        """The resources of a worker as options of Ray's tasks and actors."""
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        found: dict[str, Any] = {named[kind]: amount for kind, amount in self.per_worker.items() if kind in named}
        custom = {kind: amount for kind, amount in self.per_worker.items() if kind not in named}
        return {**found, "resources": custom} if custom else found

    def without(self, nodes: Collection[str]) -> Resources:
        """The same with the resources that the cluster has now, without the nodes of these ids."""
        import ray  # as in `capacity`: only a connected process has nodes

        left = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in nodes]
        return replace(self, total={kind: sum(each.get(kind, 0) for each in left) for kind in self.per_worker})

    @property
    def needed(self) -> dict[str, float]:
        """Resources of the smallest run."""
        return {kind: self.num_workers * amount for kind, amount in self.per_worker.items()}

    @property
    def most_runs(self) -> int:
        """Number of concurrent runs of `num_workers` workers that fit."""
        return int(min(1e9, *(self.total.get(kind, 0) / wanted for kind, wanted in self.needed.items())) + 1e-6)


def resources(
    section: ClusterConfig,
    total: Mapping[str, float],
    nodes: Nodes = (),
    *,
    trials: int = 1,
    decided: float | None = None,
) -> Resources:
    """The resources of a cluster and of a worker; ConfigError if the run can never fit.

    cluster.cpus_per_worker: auto becomes what was `decided` when the run started, if that fits; else the CPUs of the
    `nodes` (default: one with all of them) divided by the workers of `trials` concurrent trials.
    """
    use_gpu = section.use_gpu if section.use_gpu is not None else total.get("GPU", 0) > 0
    gpus = section.gpus_per_worker if use_gpu else 0
    if gpus > 1 or (section.most_workers > 1 and not float(gpus).is_integer()):
        raise ConfigError(
            f"cluster.gpus_per_worker must be 1, or a fraction with cluster.num_workers=1, got "
            f"{gpus:g} with {console.counted(section.most_workers, 'worker')}: a worker trains on one GPU",
            where="cluster.gpus_per_worker",
        )
    others = {**({"GPU": gpus} if gpus else {}), **_others(section)}
    cpus = section.cpus_per_worker
    if cpus == "auto":
        usable = [
            (count, node)
            for count, node in nodes or [(1, total)]
            if all(node.get(kind, 0) >= amount for kind, amount in others.items())
        ]
        if decided is not None and _room(usable, decided) >= section.fewest_workers:
            cpus = decided
        else:
            cpus = _divided(usable, section.most_workers * trials, gpus)
    per_worker = {"CPU": cpus, **others}
    found = Resources(total, per_worker, section.fewest_workers, section.most_workers, section.placement_strategy)
    for kind, wanted in sorted(found.needed.items(), key=lambda item: item[0] == "CPU"):  # auto divides CPUs
        if wanted > total.get(kind, 0):
            if ACCELERATOR in kind:
                there = [each.removeprefix(ACCELERATOR) for each in total if ACCELERATOR in each]
                raise ConfigError(
                    f"cluster.accelerator_type={section.accelerator_type}: no node of the cluster has one; "
                    f"it has {', '.join(there) or 'no accelerators'}",
                    where="cluster.accelerator_type",
                )
            each = f"{section.fewest_workers} x {per_worker[kind]:g}"
            no_gpu = ", or set cluster.use_gpu=false" if kind == "GPU" else ""
            raise ConfigError(
                f"cluster.num_workers x {_setting(kind)} = {each} needs {amount_of(wanted, kind)}, the cluster has "
                f"{total.get(kind, 0):g}; lower one of them{no_gpu}",
                where="cluster.num_workers",
            )
    return found


def planned_resources(section: ClusterConfig, *, trials: int = 1, decided: float | None = None) -> Resources | None:
    """The resources of a run on this machine, without starting Ray; None for a cluster elsewhere."""
    return resources(section, this_machine(), trials=trials, decided=decided) if is_local(section) else None


def _divided(nodes: Nodes, num_workers: int, gpus: float) -> float:
    """The most whole CPUs that each of so many concurrent workers can have; at least one.

    With GPUs, the CPUs of a node are divided by its GPUs, so that no GPU is left without CPUs.
    """
    if gpus:
        return max(1, int(gpus * min((node.get("CPU", 0) / node["GPU"] for _, node in nodes), default=1)))
    largest = max((int(node.get("CPU", 0)) for _, node in nodes), default=1)
    return next((cpus for cpus in range(largest, 1, -1) if _room(nodes, cpus) >= num_workers), 1)


def _room(nodes: Nodes, cpus: float) -> float:
    """Number of workers with so many CPUs that fit on the nodes."""
    return sum(count * fit for count, node in nodes if (fit := node.get("CPU", 0) // cpus))


def _others(section: ClusterConfig) -> dict[str, float]:
    """Resources of a worker besides CPUs and GPUs."""
    kind = f"{ACCELERATOR}{section.accelerator_type}"  # 1 on each node that has it
    return {**section.resources_per_worker, **({kind: 0.001} if section.accelerator_type else {})}


def _setting(kind: str) -> str:
    return f"cluster.{kind.lower()}s_per_worker" if kind in ("CPU", "GPU") else f"cluster.resources_per_worker.{kind}"


def amount_of(number: float, kind: str) -> str:
    """1 CPU, 2 GPUs, 1e+09 memory, nodes with A10G."""
    if ACCELERATOR in kind:
        return f"nodes with {kind.removeprefix(ACCELERATOR)}"
    return f"{number:g} {kind}{'s' * (kind in ('CPU', 'GPU') and number != 1)}"


def capacity(section: ClusterConfig) -> tuple[Mapping[str, float], Nodes]:
    """The resources of the cluster in total and by node, with those that autoscaling may add."""
    import ray  # 0.5 s, which `planned_resources` does without

    now = ray.cluster_resources()
    nodes = [(1.0, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if not any(NODE_GROUP in node["Labels"] for node in ray.nodes() if node["Alive"]):
        return now, nodes
    launched = _launched()
    if launched is not None:
        most, nodes = _sum(launched), launched
    else:  # no limit is known, so any request may be met
        most = {"CPU": math.inf, "GPU": math.inf if section.use_gpu or now.get("GPU") else 0}
    most = dict.fromkeys(_others(section), math.inf) | most  # the launcher's file need not list memory, for example
    return {kind: max(now.get(kind, 0), most.get(kind, 0)) for kind in {*now, *most}}, nodes


def _launched() -> list[tuple[float, Mapping[str, float]]] | None:
    """The most nodes of each kind, from the file that Ray's cluster launcher writes on the head; None without it."""
    try:
        launcher = yaml.safe_load(Path("~/ray_bootstrap_config.yaml").expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    most = launcher.get("max_workers", math.inf)
    return [
        (min(most, node.get("max_workers", most)) + (name == launcher["head_node_type"]), node.get("resources", {}))
        for name, node in launcher["available_node_types"].items()
    ]


def _sum(nodes: Nodes) -> dict[str, float]:
    found: dict[str, float] = {}
    for count, node in nodes:
        for kind, amount in node.items():
            found[kind] = found.get(kind, 0) + count * amount
    return found


# This machine --------------------------------------------------------------------------------------------------------


def this_machine() -> dict[str, float]:
    """The resources that `ray.init` will find here, with `cpus_here` CPUs."""
    found = {"CPU": cpus_here(), "GPU": 0, "memory": psutil.virtual_memory().available}
    if not _has_nvidia_driver():  # Ray would find no GPU, and its import takes 0.5 s
        return found
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    accelerator = NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()
    found["GPU"] = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    return {**found, **({f"{ACCELERATOR}{accelerator}": 1} if accelerator else {})}


@functools.cache
def _has_nvidia_driver() -> bool:
    """Whether the library by which Ray finds GPUs is here; outside of Linux only Ray knows its place."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def cpus_here() -> int:
    """CPUs that this process may use, from its affinity (taskset, Slurm, a cpuset) and its container's quota.

    Ray (2.60) ignores the affinity.
    """
    if sys.version_info >= (3, 13):
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS
        count = os.cpu_count() or 1
    return max(1, int(min([count, *_quotas()])))


def _quotas(groups: Path = Path("/proc/self/cgroup"), tree: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """The CPU quotas of the control groups around this process, in CPUs."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = tree / "cpu" if controllers else tree  # version 1 has a tree for each controller
        group = Path(name.lstrip("/"))
        for place in (group, *group.parents):  # in a container only its own, the last, may exist
            try:
                if controllers:
                    quota, period = ((top / place / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                else:
                    quota, period = (top / place / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota.strip() not in ("max", "-1"):
                yield int(quota) / int(period)
