"""What a cluster has, or may come to have, and what a run takes of it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml

from raylm.config import ClusterConfig
from raylm.errors import ConfigError

NODE_GROUP = "ray.io/node-group"
"""The label of nodes that an autoscaler, or KubeRay, has made."""

ACCELERATOR = "accelerator_type:"
"""What the resource begins with by which Ray knows the nodes that have a kind of accelerator."""

Nodes = Sequence[tuple[float, Mapping[str, float]]]
"""How many nodes there are or may come to be of a kind, and what each of them has."""


@dataclass(frozen=True)
class Resources:
    """What a cluster has or can come to have, and what one worker of a run takes of it, by Ray's names and units."""

    total: Mapping[str, float]
    per_worker: Mapping[str, float]
    num_workers: int
    """The fewest, where cluster.num_workers is a range."""
    most_workers: int
    placement_strategy: str = "PACK"

    @property
    def cpus_per_worker(self) -> float:
        return self.per_worker["CPU"]

    @property
    def gpus_per_worker(self) -> float:
        return self.per_worker.get("GPU", 0)

    @property
    def options(self) -> dict[str, Any]:
        """What a worker takes, as Ray's tasks and actors are told."""
        named = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
        found: dict[str, Any] = {named[kind]: amount for kind, amount in self.per_worker.items() if kind in named}
        custom = {kind: amount for kind, amount in self.per_worker.items() if kind not in named}
        return {**found, "resources": custom} if custom else found

    def without(self, nodes: Collection[str]) -> Resources:
        """What the cluster has now but for these nodes, by their ids, which are there or gone already."""
        left = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in nodes]
        return replace(self, total={kind: sum(each.get(kind, 0) for each in left) for kind in self.per_worker})

    @property
    def needed(self) -> dict[str, float]:
        """By the smallest run."""
        return {kind: self.num_workers * amount for kind, amount in self.per_worker.items()}

    @property
    def most_runs(self) -> int:
        """Runs of `num_workers` workers that fit side by side."""
        return int(min(1e9, *(self.total.get(kind, 0) / wanted for kind, wanted in self.needed.items())) + 1e-6)


def resources(
    section: ClusterConfig,
    total: Mapping[str, float],
    nodes: Nodes = (),
    *,
    trials: int = 1,
    decided: float | None = None,
) -> Resources:
    """What the cluster has, or may come to have, and a worker takes; ConfigError if the run can never fit.

    cluster.cpus_per_worker: auto becomes what was `decided` when the run started, if that fits; else the CPUs of the
    `nodes` (default: one, which has all) divided by the workers of so many trials at a time.
    """
    use_gpu = section.use_gpu if section.use_gpu is not None else total.get("GPU", 0) > 0
    gpus = section.gpus_per_worker if use_gpu else 0
    if gpus > 1 or (section.most_workers > 1 and not float(gpus).is_integer()):
        raise ConfigError(
            f"cluster.gpus_per_worker must be 1, or a fraction with cluster.num_workers=1, got "
            f"{gpus:g} with {plural_workers(section.most_workers)}: a worker trains on one GPU",
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


def _divided(nodes: Nodes, num_workers: int, gpus: float) -> float:
    """The most whole CPUs that so many workers can have each, all of them at a time; one at least.

    With GPUs, those of a node are shared by its GPUs: whoever takes one must not leave another without CPUs.
    """
    if gpus:
        return max(1, int(gpus * min((node.get("CPU", 0) / node["GPU"] for _, node in nodes), default=1)))
    largest = max((int(node.get("CPU", 0)) for _, node in nodes), default=1)
    return next((cpus for cpus in range(largest, 1, -1) if _room(nodes, cpus) >= num_workers), 1)


def _room(nodes: Nodes, cpus: float) -> float:
    """Workers of so many CPUs that fit on the nodes; a worker is on one."""
    return sum(count * fit for count, node in nodes if (fit := node.get("CPU", 0) // cpus))


def _others(section: ClusterConfig) -> dict[str, float]:
    """What a worker takes beside CPUs and GPUs."""
    kind = f"{ACCELERATOR}{section.accelerator_type}"  # which nodes that have it have 1 of
    return {**section.resources_per_worker, **({kind: 0.001} if section.accelerator_type else {})}


def _setting(kind: str) -> str:
    return f"cluster.{kind.lower()}s_per_worker" if kind in ("CPU", "GPU") else f"cluster.resources_per_worker.{kind}"


def amount_of(number: float, kind: str) -> str:
    """3 CPUs, 2 GPUs, 1e+09 memory, nodes with A10G."""
    if ACCELERATOR in kind:
        return f"nodes with {kind.removeprefix(ACCELERATOR)}"
    return f"{number:g} {kind}{'s' * (kind in ('CPU', 'GPU'))}"


def plural_workers(number: int) -> str:
    """1 worker, 2 workers."""
    return f"{number} worker{'s' * (number != 1)}"


def capacity(section: ClusterConfig) -> tuple[Mapping[str, float], Nodes]:
    """What the cluster has, in all and on its nodes; or may come to have, where nodes are added on demand."""
    now = ray.cluster_resources()
    nodes = [(1.0, node["Resources"]) for node in ray.nodes() if node["Alive"]]
    if not any(NODE_GROUP in node["Labels"] for node in ray.nodes() if node["Alive"]):
        return now, nodes
    launched = _launched()
    if launched is not None:
        most, nodes = _sum(launched), launched
    else:  # nobody tells how far it grows, so whatever is asked for may come
        most = {"CPU": math.inf, "GPU": math.inf if section.use_gpu or now.get("GPU") else 0}
    most = dict.fromkeys(_others(section), math.inf) | most  # memory, say, need not be in the launcher's file
    return {kind: max(now.get(kind, 0), most.get(kind, 0)) for kind in {*now, *most}}, nodes


def _launched() -> list[tuple[float, Mapping[str, float]]] | None:
    """The nodes that the cluster may come to have by the file that Ray's cluster launcher leaves on the head."""
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
    """What `ray.init` will find here, told how many CPUs there are."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    accelerator = NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()
    return {
        "CPU": cpus_here(),
        "GPU": NvidiaGPUAcceleratorManager.get_current_node_num_accelerators(),
        "memory": psutil.virtual_memory().available,
        **({f"{ACCELERATOR}{accelerator}": 1} if accelerator else {}),
    }


def cpus_here() -> int:
    """CPUs that this process may use: those it may run on (taskset, Slurm, a cpuset), within its container's quota.

    Ray (2.60) counts those of the machine, within the quota.
    """
    if sys.version_info >= (3, 13):
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:  # macOS
        count = os.cpu_count() or 1
    return max(1, int(min([count, *_quotas()])))


def _quotas(groups: Path = Path("/proc/self/cgroup"), tree: Path = Path("/sys/fs/cgroup")) -> Iterator[float]:
    """How many CPUs' worth of time each control group around this process may take, of those that have a quota."""
    try:
        lines = groups.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = tree / "cpu" if controllers else tree  # version 1 has a tree for each controller
        group = Path(name.lstrip("/"))
        for place in (group, *group.parents):  # in a container only the last may be there, which is its own
            try:
                if controllers:
                    quota, period = ((top / place / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
                else:
                    quota, period = (top / place / "cpu.max").read_text().split()
            except OSError:
                continue
            if quota.strip() not in ("max", "-1"):
                yield int(quota) / int(period)
