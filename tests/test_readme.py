"""The commands and settings that README.md and docs/ show, as they stand there.

A block of commands is fenced as `sh`. What it needs beyond an installed raylm stands behind that, where no reader of
the rendered page sees it: ```sh needs a cluster. A block that needs nothing is run.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet
import pytest
import typer

from raylm import api, cli, config
from raylm.__main__ import VERBS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOME_EXPERIMENT = ROOT / "configs" / "code_from_scratch.yaml"
NEEDS = ("", "needs make", "needs the Hub", "needs a cluster", "needs a sweep", "needs uv")

FENCED = re.compile(r"^```(\w*)[ ]?(.*)\n((?:(?!```).*\n)*)```$", re.MULTILINE)
INDENTED_COMMAND = re.compile(
    r"^ {4,}(?:\$ .*|(?:\S*/)?(?:python3?|raylm|make|pip|uv|ray|mlflow|hf) .*)$", re.MULTILINE
)


class Block(NamedTuple):
    page: str
    language: str
    needs: str
    text: str


BLOCKS = [Block(page.name, *found) for page in PAGES for found in FENCED.findall(page.read_text(encoding="utf-8"))]
COMMANDS = [block for block in BLOCKS if block.language == "sh"]


def command_lines(text):
    """The words of each command line, without a comment at its end or a file that its output goes to."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words[: words.index(">")] if ">" in words else words


def fault(words):
    """What is wrong with a command line as far as that can be told without running it; None if nothing is."""
    if words[:2] == ["uv", "run"]:
        words = words[4:] if words[2] == "--with" else words[2:]
    program, *rest = words
    if os.path.basename(program) == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        unknown = set(rest) - set(targets)
        return f"the Makefile has no {unknown}" if unknown else None
    if os.path.basename(program) == "python" and rest[:1] == ["-m"]:
        program, *rest = [*rest[1].split("."), *rest[2:]]
    if program != "raylm":
        return f"{program} is not a command that this test knows"
    return verb_fault(*rest)


def verb_fault(verb, *arguments):
    if verb not in VERBS:
        return f"raylm has no verb {verb}"
    app = typer.Typer(add_completion=False)
    cli.add(app, getattr(importlib.import_module(f"raylm.{verb}"), verb))
    try:
        parsed = typer.main.get_command(app).make_context(verb, list(arguments)).params
        if verb == "submit":
            return verb_fault(*parsed["command"])
        settings = parsed.get("settings") or []
        if verb == "generate":  # which also takes those of a text, without a dot
            settings = [setting for setting in settings if "." in setting.partition("=")[0]]
        config.load(SOME_EXPERIMENT if parsed.get("config") else None, settings)
    except Exception as error:
        return getattr(error, "message", str(error))
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_fenced(page):
    assert INDENTED_COMMAND.findall(FENCED.sub("", page.read_text(encoding="utf-8"))) == []


def test_every_block_says_what_it_needs():
    assert COMMANDS, "README.md shows commands"
    assert [block for block in COMMANDS if block.needs not in NEEDS] == []
    assert {block.language for block in BLOCKS} <= {"sh", "yaml", "python", "text", ""}


@pytest.mark.parametrize(
    "words", [words for block in COMMANDS for words in command_lines(block.text)], ids=lambda words: shlex.join(words)
)
def test_a_command_line_has_a_verb_options_and_settings_that_there_are(words):
    assert fault(words) is None


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("make tests", "the Makefile has no {'tests'}"),
        ("python -m raylm.trian", "raylm has no verb trian"),
        ("raylm submit --address http://127.0.0.1:8265 tune --confg a.yaml", "No such option: --confg"),
        ("raylm train train.learning_rte=1", "train.learning_rte: unknown key"),
        ("raylm generate m top_k=3 cluster.workers=2", "cluster.workers: unknown key"),
        ("uv run --with raylm raylm tnue", "raylm has no verb tnue"),
        ("rm -r /", "rm is not a command that this test knows"),
    ],
)
def test_a_command_line_that_is_wrong_would_be_found(line, found):
    (words,) = command_lines(line)
    assert found in fault(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_inside_sentences_are_there(page):
    for span in re.findall(r"`([^`]+)`", FENCED.sub("", page.read_text(encoding="utf-8"))):
        words = span.split()
        if found := re.match(r"(?:python -m raylm\.|raylm )([a-z]+)", span):
            assert found[1] in VERBS, span
        elif words[0] == "make":
            assert fault(words) is None, span
        elif words[:2] and words[0] == "python" and words[1].startswith("benchmarks/"):
            text = (ROOT / words[1]).read_text(encoding="utf-8")
            assert [word for word in words[2:] if word.startswith("--") and f'"{word}"' not in text] == [], span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    """`tests/test_runs.py::test_name`, or the file alone."""
    named = set(re.findall(r"\b(tests/\w+\.py)(?:::(\w+))?", page.read_text(encoding="utf-8")))
    for file, name in sorted(named):
        assert not name or f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml"], ids=lambda block: block.text.split(":")[0]
)
def test_a_block_of_settings_is_an_experiment(block, tmp_path):
    file = tmp_path / "experiment.yaml"
    file.write_text(block.text, encoding="utf-8")
    config.load(file)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"])
def test_a_block_of_python_takes_what_the_api_has(block):
    nodes = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Attribute)]
    taken = {node.attr for node in nodes if ast.unparse(node.value) == "api"}
    assert taken
    assert taken <= set(api.__all__)


@pytest.fixture
def home(tmp_path):
    """A home with notes in it: the sections of these pages, a file each, in two directories."""
    sections = [part for page in PAGES for part in re.split(r"\n(?=## )", page.read_text(encoding="utf-8"))]
    for number, section in enumerate(sections):
        note = tmp_path / "home" / "notes" / ("work" if number % 2 else ".") / f"{number:02}.md"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(section, encoding="utf-8")
    return tmp_path / "home"


@pytest.fixture
def project(tmp_path):
    """A directory as the README takes it for granted: after `make`, with the files that commands name."""
    directory = tmp_path / "project"
    python = directory / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (directory / "a.txt").write_text("A text of its own.\n")
    (directory / "b").mkdir()
    (directory / "b" / "c.txt").write_text("And another.\n")
    (directory / "prompts.txt").write_text("The first line\nThe second line\n")
    questions = pa.table({"question": ["What does a trial cost?", "When does it stop?"]})
    pyarrow.parquet.write_table(questions, directory / "questions.parquet")
    return directory


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_needs_nothing_runs_in_order(home, project):
    for block in COMMANDS:
        if block.needs:
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=project,
            env={**os.environ, "HOME": str(home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
    assert (project / "answers.jsonl").read_text().count("\n") == 2
    assert (project / "scores.jsonl").stat().st_size > 0
