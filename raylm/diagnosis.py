"""A check of this machine and the cluster of an experiment for missing or unsafe parts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from packaging.requirements import Requirement

from raylm import cluster, console, storage, tracking
from raylm.config import Experiment, address_of, is_local
from raylm.errors import RaylmError


class Finding(NamedTuple):
    what: str
    """What was checked."""
    verdict: str
    """good; note: it works, but could be better, or is absent; bad: something will not work, or is unsafe."""
    found: str
    """The result of the check."""
    way_out: str = ""
    """What to do if the verdict is not good."""


def findings(experiment: Experiment, fix: bool = False) -> list[Finding]:
    """All findings; `fix` repairs what needs no decision of the user."""
    parts: list[Callable[[], Iterator[Finding]]] = [
        machine,
        libraries,
        lambda: token(fix),
        lambda: ray_cluster(experiment),
        lambda: storage_of(experiment),
        lambda: tracking_of(experiment),
    ]
    everything: list[Finding] = []
    with console.task("Looking"):
        for part in parts:
            try:
                everything += part()
            except RaylmError as error:
                everything.append(Finding(error.where or "?", "bad", error.message))
    return everything


def machine() -> Iterator[Finding]:
    """Python, CPUs, memory and GPUs of this machine."""
    version = platform.python_version()
    yield Finding(
        "python", "good" if sys.version_info >= (3, 11) else "bad", version, "raylm needs Python 3.11 or newer"
    )
    memory = psutil.virtual_memory()
    yield Finding("cpus", "good", f"{cluster.cpus_here()}, {platform.machine()}")
    yield Finding("memory", "good", f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding("gpus", "note", "none", "this torch was built without CUDA" if built is None else "")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bf16 = "computes in bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        yield Finding(f"gpu {number}", "good", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bf16}")


def libraries() -> Iterator[Finding]:
    """The requirements of raylm, compared with what is installed."""
    extras: set[str] = set()
    wrong = []
    for line in importlib.metadata.requires("raylm") or []:
        requirement = Requirement(line)
        name, marker = requirement.name, requirement.marker
        if marker is not None and "dev" in str(marker):
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if marker is None:
                wrong.append(f"{name} is missing")
            elif "all" not in str(marker):
                extras.add(str(marker).split('"')[1])
            continue
        if marker is None and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version}, wanted {requirement.specifier}")
    main = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("ray", "transformers", "torch", "mlflow")
    )
    yield Finding("libraries", "bad" if wrong else "good", "; ".join(wrong) or main, "pip install --upgrade raylm")
    if extras:
        yield Finding(
            "extras",
            "note",
            f"not installed: {', '.join(sorted(extras))}",
            f"pip install 'raylm[{','.join(sorted(extras))}]'",
        )


def token(fix: bool) -> Iterator[Finding]:
    """Ray's token, which Ray 2.60 writes readable for every user of the machine."""
    if os.environ.get("RAY_AUTH_TOKEN"):  # Ray prefers it to a file
        yield Finding("ray token", "good", "RAY_AUTH_TOKEN")
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not path.exists():
        yield Finding(
            "ray token", "note", "none", "`ray get-auth-token --generate`, for clusters that others can reach"
        )
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077 and fix:
        path.chmod(0o600)
        mode = 0o600
    readable = bool(mode & 0o077)
    yield Finding(
        "ray token",
        "bad" if readable else "good",
        f"{path}, mode {mode:04o}",
        "others can read it: --fix, or chmod 600",
    )


def ray_cluster(experiment: Experiment) -> Iterator[Finding]:
    """The cluster that the experiment names, and the resources of a worker."""
    section = experiment.cluster
    address = address_of(section)
    if address is None:
        resources = cluster.planned_resources(section)
        assert resources is not None
        yield Finding("cluster", "good", f"this machine; a worker takes {resources.described}")
        return
    with cluster.connect(section) as resources:
        import ray

        nodes, total = [node for node in ray.nodes() if node["Alive"]], ray.cluster_resources()
        amounts = _amounts({kind: total.get(kind, 0) for kind in ("CPU", "GPU")})
        yield Finding("cluster", "good", f"{address}: {console.counted(len(nodes), 'node')}, {amounts}")
        yield Finding("workers", "good", f"{resources.most_runs} runs at a time; a worker takes {resources.described}")


def storage_of(experiment: Experiment) -> Iterator[Finding]:
    """The directory of all runs: whether it can be written, and its free space."""
    place = experiment.storage
    if storage.is_remote(place):
        storage.check(place)
        yield Finding("storage", "good", f"{place}, can be written")
        return
    existing = next(parent for parent in (Path(place), *Path(place).parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        yield Finding("storage", "bad", f"{existing} cannot be written", "set storage to a directory of yours")
        return
    free = shutil.disk_usage(existing).free
    scarce = "three checkpoints of a model take nine times the memory of its weights"
    yield Finding("storage", "note" if free < 5e9 else "good", f"{place}, {free / 1e9:.0f} GB free", scarce)


def tracking_of(experiment: Experiment) -> Iterator[Finding]:
    """MLflow: whether it answers, and whether all nodes reach it."""
    uri = experiment.tracking.uri
    if uri is None:
        yield Finding("mlflow", "note", "nothing is tracked", "set tracking.uri")
        return
    shown = tracking.display_uri(uri)
    if uri.startswith("http"):
        problem = tracking.problem(uri)
        way_out = "runs continue without it; raylm sync uploads later" if problem else ""
        yield Finding("mlflow", "bad" if problem else "good", problem or shown, way_out)
    elif uri.startswith("sqlite") and not is_local(experiment.cluster):
        yield Finding("mlflow", "bad", f"{shown} is a file of one machine", "set tracking.uri to a server")
    else:
        yield Finding("mlflow", "good", shown)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(cluster.amount_of(amount, kind) for kind, amount in resources.items())
