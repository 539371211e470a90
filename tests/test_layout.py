"""The layout is flat and ordered: a module imports only from those above it; each outside library has one home."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PARTS = """
    errors redaction config scratch timeline console local_worker cluster storage hub corpus tokenizer tokens blocks
    examples transfer lora shards model objective probe scorer perplexity statistics document_scores samples checkpoint
    runs tracking budget cost summary export generation training tasks sweep derived plan results scaling estimate
    cleaning pipeline api diagnosis views cli
""".split()
VERBS = """
    init prepare train tune evaluate generate inspect push sync ls clean report compare scale submit doctor
""".split()
ORDER = [*PARTS, *VERBS, "__main__"]

HOMES = {  # the pattern of a dotted name -> the modules that may use it
    "mlflow": {"tracking"},
    "ray.tune": {"sweep"},
    "optuna": {"results", "sweep"},
    "lm_eval": {"tasks"},
    "matplotlib": {"results"},
    "plotly": {"results"},
    "ray.data": {"corpus", "generation", "tokens"},  # the passes over documents
    "transformers.*TrainingArguments": {"training"},
    "ruamel": {"config"},
}

LIGHT = {"errors", "redaction", "timeline", "console", "cli", *VERBS}
"""What a verb may import at its top: `--help` runs it."""

HEAVY = {
    "ray", "torch", "transformers", "tokenizers", "huggingface_hub", "datasets", "accelerate", "mlflow", "pyarrow",
    "numpy", "pandas", "matplotlib",
}  # fmt: skip


def sources(package: Path) -> list[tuple[str, Path]]:
    """(module, file) of each file but `__init__.py`; config/files.py is of the module config."""
    files = sorted(package.rglob("*.py"))
    modules = [(file.relative_to(package).parts[0].removesuffix(".py"), file) for file in files]
    return [(module, file) for module, file in modules if module != "__init__"]


def imported(node: ast.AST) -> list[str]:
    """The dotted names an import statement may load: a.b.c of `from a.b import c`; relative ones start with raylm."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = ".".join(filter(None, ["raylm" if node.level else "", node.module or ""]))
        return [f"{base}.{alias.name}" for alias in node.names]
    return []


def mentioned(tree: ast.AST) -> list[str]:
    """Every dotted name that is imported anywhere or written out, as in `ray.data.read_text(...)`."""
    names = []
    for node in ast.walk(tree):
        names += imported(node)
        if isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return names


def inner(name: str) -> str | None:
    """blocks of raylm.blocks.batch; None of any other name."""
    parts = name.split(".")
    return parts[1] if parts[0] == "raylm" and len(parts) > 1 else None


def order_faults(module: str, source: str) -> list[str]:
    """What a module imports, at its top or in a function, that does not stand above it."""
    if module not in ORDER:
        return [f"{module} has no place in the order"]
    allowed = ORDER[: ORDER.index(module) + 1]
    names = {inner(name) for node in ast.walk(ast.parse(source)) for name in imported(node)}
    return [f"{module} imports {name}, which stands below it" for name in ORDER if name in names - set(allowed)]


def home_faults(module: str, source: str) -> list[str]:
    names = mentioned(ast.parse(source))
    return [
        f"{module} uses {library}, whose home is {' and '.join(sorted(homes))}"
        for library, homes in HOMES.items()
        if module not in homes and any(re.match(rf"{library}\b", name) for name in names)
    ]


def weight_faults(module: str, source: str) -> list[str]:
    """What a verb imports at its top, outside of `if TYPE_CHECKING`, that takes long to load."""
    top = []
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        top += imported(node)
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        if not for_types and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return [
        f"{module} imports {name} at its top"
        for name in sorted(top)
        if name.split(".")[0] in HEAVY or (inner(name) in set(ORDER) - LIGHT)
    ]


def tree_of(readme: str) -> list[str]:
    """The entries of the tree under `raylm/`: modules, and packages as `config/`; the commands stand in one line."""
    block = re.search(r"^( *)raylm/\n((?:\1 +\S.*\n)+)", readme, re.MULTILINE)
    assert block, "README.md shows no tree: a line raylm/ and its files, indented, under it"
    lines = [re.split(r"  +", line.strip(), maxsplit=1) for line in block[2].splitlines()]
    assert [line[0] for line in lines if len(line) == 1] == [], "each line has a gloss"
    return [name for line in lines for name in line[0].split()]


def imports_of(module: str, file: Path, modules: set[str], exported: dict[str, dict[str, str]]) -> set[str]:
    """The modules of raylm that a module needs, for types too; of a package the module that has what it takes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for name in imported(node):
            package, _, last = name.rpartition(".")
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(exported.get(package, {}).get(last, name))
    return found & modules - {module}


def circles(package: Path) -> list[str]:
    """Modules that need each other, in whatever package they are."""
    files = {
        ".".join(("raylm", *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): file
        for file in package.rglob("*.py")
    }
    inits = {name: file for name, file in files.items() if file.name == "__init__.py"}
    exported: dict[str, dict[str, str]] = {}
    for name, file in inits.items():
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        of_parts = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        exported[name] = {alias.name: str(node.module) for node in of_parts for alias in node.names}
    graph = {
        name: imports_of(name, file, files.keys() - inits.keys(), exported)
        for name, file in files.items()
        if name not in inits
    }
    while free := {name for name, needs in graph.items() if not needs & graph.keys()}:  # those at the end of every path
        graph = {name: needs for name, needs in graph.items() if name not in free}
    while free := {name for name in graph if not any(name in needs for needs in graph.values())}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    return sorted(graph)


# This package ------------------------------------------------------------------------------------------------------

FILES = pytest.mark.parametrize(
    ("module", "file"),
    sources(ROOT / "raylm"),
    ids=[str(file.relative_to(ROOT)) for _, file in sources(ROOT / "raylm")],
)


@FILES
def test_modules_import_only_from_those_above(module, file):
    assert order_faults(module, file.read_text(encoding="utf-8")) == []


@FILES
def test_each_outside_library_has_one_home(module, file):
    assert home_faults(module, file.read_text(encoding="utf-8")) == []


@FILES
def test_verbs_import_nothing_heavy_at_their_top(module, file):
    if module in (*VERBS, "__main__"):
        assert weight_faults(module, file.read_text(encoding="utf-8")) == []


def test_the_package_itself_imports_nothing():
    assert mentioned(ast.parse((ROOT / "raylm" / "__init__.py").read_text(encoding="utf-8"))) == []


def test_no_module_is_a_drawer():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "lib", "tools"}
    assert [str(file) for file in (ROOT / "raylm").rglob("*") if file.stem.strip("_") in drawers] == []


def test_no_modules_need_each_other():
    assert circles(ROOT / "raylm") == []


def test_the_readme_shows_every_module_and_package_in_reading_order():
    shown = tree_of((ROOT / "README.md").read_text(encoding="utf-8"))
    files = [
        path
        for path in (ROOT / "raylm").iterdir()
        if path.suffix in (".py", ".yaml") or (path / "__init__.py").exists()
    ]
    on_disk = [f"{path.name}/" if path.is_dir() else path.name for path in files]
    assert sorted(shown) == sorted(
        name.removesuffix(".py") if name.removesuffix(".py") in VERBS else name for name in on_disk
    )
    modules = [name for name in (re.sub(r"(\.py|/)$", "", name) for name in shown) if name in ORDER[:-1]]
    assert modules == sorted(modules, key=ORDER.index)


# The rules themselves, on modules that break them ------------------------------------------------------------------

IMPORTS_BELOW = [
    ("blocks", "from raylm import training", "blocks imports training, which stands below it"),
    ("blocks", "import raylm.training as l", "blocks imports training, which stands below it"),
    ("blocks", "from raylm.training import TrainTask", "blocks imports training, which stands below it"),
    ("blocks", "from . import training", "blocks imports training, which stands below it"),
    ("blocks", "from .training import TrainTask", "blocks imports training, which stands below it"),
    ("blocks", "def f():\n    from raylm import training", "blocks imports training, which stands below it"),
    (
        "blocks",
        "class A:\n    def f(self):\n        import raylm.training",
        "blocks imports training, which stands below it",
    ),
    ("results", "from raylm.train import train", "results imports train, which stands below it"),
    ("train", "from raylm.tune import sweep", "train imports tune, which stands below it"),
    ("helpers", "", "helpers has no place in the order"),
]


@pytest.mark.parametrize(("module", "source", "fault"), IMPORTS_BELOW)
def test_an_import_from_below_is_found(module, source, fault):
    assert order_faults(module, source) == [fault]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training", "from raylm import blocks, checkpoint\nfrom raylm.tracking import Run"),
        ("tune", "from raylm.train import train\nfrom raylm import training"),
        ("tune", "from raylm.tune import main"),
        ("config", "from raylm.config.experiment import Experiment"),
        ("blocks", "import training\nfrom other.training import TrainTask\nfrom raylm import __version__"),
    ],
)
def test_an_import_from_above_is_none_of_its_business(module, source):
    assert order_faults(module, source) == []


ARGUMENTS = "train uses transformers.*TrainingArguments, whose home is training"
DATA = "blocks uses ray.data, whose home is corpus and generation and tokens"
AWAY_FROM_HOME = [
    ("training", "import mlflow", "training uses mlflow, whose home is tracking"),
    ("training", "def f():\n    from mlflow.entities import Param", "training uses mlflow, whose home is tracking"),
    ("train", "from ray import tune", "train uses ray.tune, whose home is sweep"),
    ("train", "from ray.tune.integration.ray_train import X", "train uses ray.tune, whose home is sweep"),
    ("blocks", "import ray\nray.data.read_text('a')", DATA),
    ("train", "from transformers import TrainingArguments", ARGUMENTS),
    ("train", "from transformers.training_args import TrainingArguments as A", ARGUMENTS),
    ("train", "import transformers\ntransformers.TrainingArguments()", ARGUMENTS),
    ("checkpoint", "from ruamel.yaml import YAML", "checkpoint uses ruamel, whose home is config"),
]


@pytest.mark.parametrize(("module", "source", "fault"), AWAY_FROM_HOME)
def test_a_library_away_from_home_is_found(module, source, fault):
    assert home_faults(module, source) == [fault]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tracking", "import mlflow"),
        ("sweep", "from ray import tune"),
        ("tokens", "import ray.data"),
        ("training", "from transformers import TrainingArguments"),
        ("training", "import ray.train\nfrom raylm import tracking\nself.mlflow.run\nray.database"),
        ("config", "from ruamel.yaml import YAML"),
    ],
)
def test_a_library_at_home_is_welcome(module, source):
    assert home_faults(module, source) == []


@pytest.mark.parametrize(
    ("source", "faults"),
    [
        ("import torch", ["tune imports torch at its top"]),
        ("from ray import tune", ["tune imports ray.tune at its top"]),
        ("from raylm import training", ["tune imports raylm.training at its top"]),
        ("try:\n    import torch\nexcept ImportError:\n    pass", ["tune imports torch at its top"]),
        ("class A:\n    import torch", ["tune imports torch at its top"]),
        ("def f():\n    import torch", []),
        ("if TYPE_CHECKING:\n    from raylm.training import TrainTask", []),
        ("from raylm import cli\nfrom raylm.train import run_name\nimport typer", []),
    ],
)
def test_a_heavy_import_at_the_top_of_a_verb_is_found(source, faults):
    assert weight_faults("tune", source) == faults


TREE = """\
    raylm/
        errors.py          the errors a user can cause and fix
        config/            one YAML file = one experiment
        train tune    the commands

    tests/
"""


@pytest.mark.parametrize("readme", [TREE, f"```\n{TREE.replace('    ', '  ')}```\n"], ids=["indented", "fenced"])
def test_the_tree_of_a_readme(readme):
    assert tree_of(f"# raylm\n\n{readme}") == ["errors.py", "config/", "train", "tune"]


def test_a_readme_without_a_tree_or_a_gloss_is_found():
    with pytest.raises(AssertionError, match=r"README.md shows no tree"):
        tree_of("# raylm\n")
    with pytest.raises(AssertionError, match=r"each line has a gloss\nassert \['cli.py'\]"):
        tree_of(TREE.replace("train tune    the commands", "cli.py"))


@pytest.mark.parametrize("package", sorted((ROOT / "raylm").rglob("__init__.py")), ids=lambda file: file.parent.name)
def test_a_package_says_what_each_of_its_modules_is(package):
    docstring = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^ *(\w+)   *\S", docstring, re.MULTILINE)
    modules = [path.stem for path in package.parent.iterdir() if path.suffix == ".py" and path != package]
    if package.parent != ROOT / "raylm":  # which README.md shows
        assert sorted({*modules} - {*listed}) == [], "not in its docstring"
        assert [
            name
            for name in listed
            if not (package.parent / f"{name}.py").exists() and not (package.parent / name).is_dir()
        ] == []


def test_every_file_that_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([a-z_/]+(?:\.py|/))`", text)
    assert len(named) > 20
    assert [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "raylm"))] == []
