"""What a person gets who installs raylm without its repository: what it declares that it needs, and nothing else."""

import ast
import email
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import trove_classifiers
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {extra: needs for extra, needs in PROJECT["optional-dependencies"].items() if extra not in ("all", "dev")}


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


# What is imported is declared ----------------------------------------------------------------------------------------


def imported(file):
    """The top-level modules that a file imports, at its top or in a function."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {module for node in nodes for module in imported_by(node)} - set(sys.stdlib_module_names) - {"raylm"}


def imported_by(node):
    """The top-level modules of an import statement."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


def test_every_import_is_of_a_declared_dependency():
    declared = names([*PROJECT["dependencies"], *(line for needs in EXTRAS.values() for line in needs)])
    declared.add("pydantic-core")  # pydantic's other half, in the one version that pydantic takes
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        module: str(file.relative_to(ROOT))
        for file in (ROOT / "raylm").rglob("*.py")
        for module in imported(file)
        if not declared & {canonicalize_name(name) for name in distributions.get(module, [])}
    }
    assert undeclared == {}


def test_what_an_extra_brings_is_imported_where_its_absence_is_told():
    """In a function, in a file that names the extra: everywhere else raylm must do without."""
    modules = {name: extra for extra, needs in EXTRAS.items() for name in names(needs)}
    for file in (ROOT / "raylm").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        at_top = {canonicalize_name(module) for node in ast.parse(text).body for module in imported_by(node)}
        assert not at_top & modules.keys(), file
        for module in {canonicalize_name(name) for name in imported(file)} & modules.keys():
            assert f"raylm[{modules[module]}]" in text, f"{file} imports {module}"


UNSTABLE = ["accelerate", "datasets", "mlflow", "peft", "ray", "torch", "transformers"]
"""What raylm uses by names that may change with a minor version: see test_upstream.py."""


def test_what_may_change_is_taken_up_to_the_minor_version_that_is_tested():
    lines = [*PROJECT["dependencies"], *(line for needs in EXTRAS.values() for line in needs)]
    asked = {canonicalize_name(Requirement(line).name): Requirement(line).specifier for line in lines}
    for name in UNSTABLE:
        here = Version(importlib.metadata.version(name))
        assert asked[name].contains(here.base_version), f"{name} {here} is installed, {asked[name]} declared"
        assert not asked[name].contains(f"{here.major}.{here.minor + 1}"), f"{name}{asked[name]} takes untested ones"


def test_what_is_pinned_is_what_is_declared():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    every = [*PROJECT["dependencies"], *(line for needs in PROJECT["optional-dependencies"].values() for line in needs)]
    for asked in map(Requirement, every):
        if asked.name != "raylm":
            assert asked.specifier.contains(pinned[canonicalize_name(asked.name)]), asked


def test_every_extra_is_one_of_all_but_that_of_tasks():
    """Which brings some thirty packages."""
    light = [extra for extra in EXTRAS if extra != "tasks"]
    assert PROJECT["optional-dependencies"]["all"] == [f"raylm[{','.join(light)}]"]


def test_the_index_knows_every_classifier_and_the_tested_python_is_one():
    given = PROJECT["classifiers"]
    assert set(given) <= trove_classifiers.classifiers
    assert given == sorted(given)
    assert f"Programming Language :: Python :: {PROJECT['requires-python'].removeprefix('>=')}" in given


# An installed wheel --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this tree, and the wheel that is built from the sdist."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", directory, cwd=ROOT)
    (sdist,) = directory.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", directory, sdist, cwd=directory)
    (wheel,) = directory.glob("*.whl")
    return sdist, wheel


def run(*command, cwd, env=None):
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def closure(requirements):
    """The distributions that pip would install for these requirements, as they are installed here."""
    todo, seen, found = [Requirement(line) for line in requirements], set(), {}
    while todo:
        wanted = todo.pop()
        name = canonicalize_name(wanted.name)
        if (name, *sorted(wanted.extras)) in seen:
            continue
        seen.add((name, *sorted(wanted.extras)))
        found[name] = importlib.metadata.distribution(name)
        for line in found[name].requires or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *wanted.extras)):
                todo.append(needed)
    return found


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The programs of a virtual environment that has the wheel, and sees links to what it declares: no extra,
    no package of the tests."""
    root = tmp_path_factory.mktemp("environment")
    needed = closure(PROJECT["dependencies"])
    assert not names(line for needs in EXTRAS.values() for line in needs) & set(needed)
    assert not {"pytest", "moto", "lm-eval", "mypy", "ruff"} & set(needed)
    links = root / "needed"
    links.mkdir()
    for distribution in needed.values():
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not top.endswith(".pth") and not (links / top).exists():
                (links / top).symlink_to(distribution.locate_file(top))
    venv.create(root / "venv", with_pip=False)
    python = root / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", built[1], cwd=root)
    (packages,) = (root / "venv").glob("lib/python*/site-packages")
    (packages / "needed.pth").write_text(f"{links}\n")
    return python.parent


@pytest.fixture
def raylm(environment, tmp_path):
    """(*arguments) -> the record that the installed command answers with, in an empty directory with an empty home."""
    (tmp_path / "home").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "AWS_"))}
    env = {**kept, "HOME": str(tmp_path / "home"), "PATH": f"{environment}:/usr/bin:/bin"}
    (tmp_path / "project").mkdir()

    def call(*arguments):
        return json.loads(run("raylm", *arguments, "--json", cwd=tmp_path / "project", env=env))

    return call


@pytest.mark.slow
def test_the_built_in_experiment_is_in_sdist_and_wheel(built):
    sdist, wheel = built
    own = (ROOT / "configs" / "tiny.yaml").read_bytes()
    with tarfile.open(sdist) as archive:
        (link,) = [name for name in archive.getnames() if name.endswith("raylm/tiny.yaml")]
        assert archive.extractfile(link).read() == own
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("raylm/tiny.yaml") == own
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"raylm"}


@pytest.mark.slow
def test_the_wheel_says_what_a_page_of_an_index_shows(built):
    """The README as Markdown, the license's file, the classifiers; `make release-check` has twine look at it, too."""
    with zipfile.ZipFile(built[1]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert [each for each in archive.namelist() if each.endswith(".dist-info/licenses/LICENSE")]
        metadata = email.message_from_string(archive.read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]


@pytest.mark.slow
def test_the_installed_command_plans_the_built_in_sweep(raylm):
    assert raylm("tune", "--dry-run")["trials"] == 8


@pytest.mark.slow
def test_the_installed_doctor_finds_all_that_is_needed(raylm):
    findings = {finding["what"]: finding for finding in raylm("doctor")["findings"]}
    assert findings["libraries"]["verdict"] == "good"
    for extra in EXTRAS:
        assert extra in findings["extras"]["found"]
    assert {finding["verdict"] for finding in findings.values()} <= {"good", "note"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_installed_command_sweeps(raylm, text_directory):
    answer = raylm(
        "tune",
        f"corpus={{paths: {text_directory}, validation_fraction: 0.2}}",
        "tokenizer={train: {vocab_size: 300}}",
        "blocks.block_size=32",
        "model.config={model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}",
        "train={batch_tokens: 256, max_tokens: 2560, eval_every_tokens: 512}",
        "tune={space: {train.learning_rate: {grid: [2e-2, 1e-5]}}, num_samples: 1, scheduler: none}",
    )
    assert answer["best"]["settings"] == {"train.learning_rate": 2e-2}
    assert Path(answer["report"]).exists()
