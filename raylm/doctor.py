"""python -m raylm.doctor: what this machine and the cluster have, and what is missing or unsafe, on one screen."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from raylm import cli, console
from raylm.config import Experiment
from raylm.errors import ConfigError, RaylmError

if TYPE_CHECKING:
    from rich.table import Table

MARKS = {"good": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}


class Finding(NamedTuple):
    what: str
    verdict: str
    """good; note: it works, but could be better or is not there; bad: something will not work, or is unsafe."""
    found: str
    way_out: str = ""


def doctor(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended without asking: file permissions.")
    ] = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Look at this machine, the cluster, storage and MLflow of an experiment; exit code 2 if something is bad."""
    experiment = cli.experiment(config, settings)
    parts: list[Callable[[], Iterator[Finding]]] = [
        machine,
        libraries,
        lambda: token(fix),
        lambda: ray_cluster(experiment),
        lambda: storage_of(experiment),
        lambda: tracking_of(experiment),
    ]
    findings: list[Finding] = []
    with console.task("Looking"):
        for part in parts:
            try:
                findings += part()
            except RaylmError as error:
                findings.append(Finding(error.where or "?", "bad", error.message))
    bad = [finding for finding in findings if finding.verdict == "bad"]
    record = {"findings": [finding._asdict() for finding in findings], "bad": len(bad)}
    return cli.CommandResult(record, _table(findings), exit_code=ConfigError.exit_code if bad else 0)


def machine() -> Iterator[Finding]:
    import psutil

    from raylm import cluster

    version = platform.python_version()
    yield Finding(
        "python", "good" if sys.version_info >= (3, 11) else "bad", version, "raylm needs Python 3.11 or newer"
    )
    memory = psutil.virtual_memory()
    yield Finding("cpus", "good", f"{cluster.cpus_here()}, {platform.machine()}")
    yield Finding("memory", "good", f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free")
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding("gpus", "note", "none", "this torch was built without CUDA" if built is None else "")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        bf16 = "computes in bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bfloat16"
        yield Finding(f"gpu {number}", "good", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {bf16}")


def libraries() -> Iterator[Finding]:
    """What raylm asks for, against what is installed."""
    from packaging.requirements import Requirement

    extras: dict[str, list[str]] = {}
    wrong = []
    for line in importlib.metadata.requires("raylm") or []:
        asked = Requirement(line)
        if asked.marker is not None and "dev" in str(asked.marker):
            continue
        try:
            there = importlib.metadata.version(asked.name)
        except importlib.metadata.PackageNotFoundError:
            if asked.marker is None:
                wrong.append(f"{asked.name} is missing")
            elif "all" not in str(asked.marker):
                extras.setdefault(str(asked.marker).split('"')[1], []).append(asked.name)
            continue
        if asked.marker is None and not asked.specifier.contains(there, prereleases=True):
            wrong.append(f"{asked.name} {there}, wanted {asked.specifier}")
    shown = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("ray", "transformers", "torch", "mlflow")
    )
    yield Finding("libraries", "bad" if wrong else "good", "; ".join(wrong) or shown, "pip install --upgrade raylm")
    if extras:
        yield Finding(
            "extras",
            "note",
            f"not installed: {', '.join(sorted(extras))}",
            f"pip install 'raylm[{','.join(sorted(extras))}]'",
        )


def token(fix: bool) -> Iterator[Finding]:
    """Ray writes its token so that every user of the machine can read it (2.60)."""
    if os.environ.get("RAY_AUTH_TOKEN"):  # which Ray takes before a file's
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
    from raylm import cluster

    section = experiment.cluster
    address = cluster.address_of(section)
    if address is None:
        resources = cluster.planned_resources(section)
        assert resources is not None
        yield Finding("cluster", "good", f"this machine; a worker takes {_amounts(resources.per_worker)}")
        return
    with cluster.connect(section) as resources:
        import ray

        nodes, total = [node for node in ray.nodes() if node["Alive"]], ray.cluster_resources()
        there = f"{len(nodes)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs"
        yield Finding("cluster", "good", f"{address}: {there}")
        yield Finding(
            "workers", "good", f"{resources.most_runs} runs at a time; a worker takes {_amounts(resources.per_worker)}"
        )


def storage_of(experiment: Experiment) -> Iterator[Finding]:
    from raylm import storage

    place = experiment.storage
    if storage.is_remote(place):
        storage.check(place)
        yield Finding("storage", "good", f"{place}, can be written")
        return
    there = next(parent for parent in (Path(place), *Path(place).parents) if parent.exists())
    if not os.access(there, os.W_OK):
        yield Finding("storage", "bad", f"{there} cannot be written", "set storage to a directory of yours")
        return
    free = shutil.disk_usage(there).free
    scarce = "three checkpoints of a model take nine times the memory of its weights"
    yield Finding("storage", "note" if free < 5e9 else "good", f"{place}, {free / 1e9:.0f} GB free", scarce)


def tracking_of(experiment: Experiment) -> Iterator[Finding]:
    from raylm import cluster, tracking

    uri = experiment.tracking.uri
    if uri is None:
        yield Finding("mlflow", "note", "nothing is tracked", "set tracking.uri")
        return
    shown = tracking.display_uri(uri)
    if uri.startswith("http"):
        problem = tracking.problem(uri)
        way_out = "runs go on without it: raylm sync" if problem else ""
        yield Finding("mlflow", "bad" if problem else "good", problem or shown, way_out)
    elif uri.startswith("sqlite") and not cluster.is_local(experiment.cluster):
        yield Finding("mlflow", "bad", f"{shown} is a file of one machine", "set tracking.uri to a server")
    else:
        yield Finding("mlflow", "good", shown)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def _table(findings: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        way_out = finding.way_out if finding.verdict != "good" else ""
        table.add_row(Text.from_markup(MARKS[finding.verdict]), finding.what, finding.found, Text(way_out, style="dim"))
    return table


def main() -> None:
    cli.run(doctor)


if __name__ == "__main__":
    from raylm.doctor import main  # by its real name, so that Ray ships functions by reference

    main()
