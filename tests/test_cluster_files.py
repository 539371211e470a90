"""The cluster files: by Ray's schema for its launcher; field by field for KubeRay, whose schema no package has."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import ray
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import symmetric_run
from ruamel.yaml import YAML

from raylm import config, tune

ROOT = Path(__file__).parents[1]


def read(name):
    return YAML(typ="safe", pure=True).load(ROOT / name)


@pytest.fixture
def launcher():
    return read("cluster.yaml")


def test_the_launcher_takes_the_file(launcher):
    prepared = prepare_config(launcher)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["max_workers"] == 8


def test_a_schema_that_finds_nothing_would_find_this(launcher):
    launcher["max_wrokers"] = 3
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(prepare_config(launcher))


def test_the_head_is_small_and_closed_and_workers_are_spot_instances(launcher):
    head, gpu = launcher["available_node_types"]["head"], launcher["available_node_types"]["gpu"]
    assert head["resources"]["CPU"] == 0
    assert gpu["resources"]["GPU"] >= 1
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0
    (start,) = [line for line in launcher["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    for line in (start, launcher["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in line
    assert "~/.ray/auth_token" in launcher["file_mounts"].values()
    assert any("raylm[all]" in line for line in launcher["setup_commands"])
    assert launcher["docker"]["image"].split(":")[1].startswith(ray.__version__), "the same Ray as the project's"


def test_the_rayjob():
    job = read("configs/cluster/kuberay_rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    known = {
        "entrypoint", "submissionMode", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
        "rayClusterSpec",
    }  # fmt: skip
    assert set(spec) == known
    assert spec["entrypoint"].startswith(f"python -m {tune.__name__} --config /config/sweep.yaml storage=s3://")
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    pods = [cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert all("value" not in variable for variable in container.get("env", [])), "secrets come from a Secret"
        assert container["envFrom"] == [{"secretRef": {"name": "raylm-s3"}}]
    volumes = {volume["name"] for volume in pods[0]["volumes"]}
    assert {mount["name"] for mount in pods[0]["containers"][0]["volumeMounts"]} <= volumes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_image_has_the_project_s_ray_and_all_that_is_installed():
    """hatchling needs the files that pyproject.toml names, and raylm/tiny.yaml is a link into configs."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert f"ARG RAY={ray.__version__}" in lines
    assert any(re.fullmatch(r"ARG PYTHON=py31[1-9]", line) for line in lines)
    assert "FROM rayproject/ray:${RAY}-${PYTHON}-${DEVICE}" in lines
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[2:-1]]
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "configs", "raylm"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [line.removeprefix("!") for line in sent if line.startswith("!")] == copied
    assert "--constraint constraints.txt" in next(line for line in lines if line.startswith("RUN "))


def test_the_slurm_job_starts_ray_and_a_sweep():
    script = (ROOT / "configs" / "cluster" / "slurm.sbatch").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert len(script.splitlines()) <= 15
    command = next(line for line in script.replace("\\\n", " ").splitlines() if line.startswith("srun "))
    words = shlex.split(re.sub(r"\$\{\w+[^}]*\}|\$\w+", "7", command.replace("$head", "node1")))
    start, entry = words[words.index("symmetric-run") + 1 : words.index("--")], words[words.index("--") + 1 :]
    options = symmetric_run.symmetric_run.make_context("ray", [*start, "--", *entry]).params
    assert (options["address"], options["min_nodes"]) == ("node1:6379", 7)
    symmetric_run.curate_and_validate_ray_start_args(start)
    assert entry[:4] == ["env", "RAY_ADDRESS=node1:6379", "raylm", tune.__name__.removeprefix("raylm.")]
    assert entry[4:6] == ["--config", "sweep.yaml"]
    assert config.load(None, entry[6:]).storage == "/shared/raylm"
