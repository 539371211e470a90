"""What a cluster has, or may come to have, and what a run takes of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
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


def resources(section: ClusterConfig, total: Mapping[str, float]) -> Resources:
    """What the cluster has, or may come to have, and a worker takes; ConfigError if the run can never fit."""
    use_gpu = section.use_gpu if section.use_gpu is not None else total.get("GPU", 0) > 0
    gpus = section.gpus_per_worker if use_gpu else 0
    if gpus > 1 or (section.most_workers > 1 and not float(gpus).is_integer()):
        raise ConfigError(
            f"cluster.gpus_per_worker must be 1, or a fraction with cluster.num_workers=1, got "
            f"{gpus:g} with {workers(section.most_workers)}: a worker trains on one GPU",
            where="cluster.gpus_per_worker",
        )
    per_worker = {"CPU": section.cpus_per_worker, **({"GPU": gpus} if gpus else {}), **_others(section)}
    found = Resources(total, per_worker, section.fewest_workers, section.most_workers, section.placement_strategy)
    for kind, wanted in found.needed.items():
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


def workers(number: int) -> str:
    """1 worker, 2 workers."""
    return f"{number} worker{'s' * (number != 1)}"


def capacity(section: ClusterConfig) -> Mapping[str, float]:
    """What the cluster has; or may come to have, where nodes are added as they are asked for."""
    now = ray.cluster_resources()
    if not any(NODE_GROUP in node["Labels"] for node in ray.nodes() if node["Alive"]):
        return now
    most = _launched()
    if most is None:  # nobody tells how far it grows, so whatever is asked for may come
        most = {"CPU": math.inf, "GPU": math.inf if section.use_gpu or now.get("GPU") else 0}
    most = dict.fromkeys(_others(section), math.inf) | most  # memory, say, need not be in the launcher's file
    return {kind: max(now.get(kind, 0), most.get(kind, 0)) for kind in {*now, *most}}


def _launched() -> dict[str, float] | None:
    """What the cluster may come to have by the file that Ray's cluster launcher leaves on the head."""
    try:
        launcher = yaml.safe_load(Path("~/ray_bootstrap_config.yaml").expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    most = launcher.get("max_workers", math.inf)
    found: dict[str, float] = {}
    for name, node in launcher["available_node_types"].items():
        nodes = min(most, node.get("max_workers", most)) + (name == launcher["head_node_type"])
        for kind, amount in node.get("resources", {}).items():
            found[kind] = found.get(kind, 0) + nodes * amount
    return found


def this_machine() -> dict[str, float]:
    """What `ray.init` will find here."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
    from ray._private.utils import get_num_cpus

    accelerator = NvidiaGPUAcceleratorManager.get_current_node_accelerator_type()
    return {
        "CPU": get_num_cpus(),
        "GPU": NvidiaGPUAcceleratorManager.get_current_node_num_accelerators(),
        "memory": psutil.virtual_memory().available,
        **({f"{ACCELERATOR}{accelerator}": 1} if accelerator else {}),
    }


def cpus_here() -> int:
    """CPUs that this process may use."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())
