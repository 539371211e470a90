"""A training as a command in environments that nobody here made; about 15 s each on a quiet machine."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WITHOUT = object()
"""A variable that is not there."""


@pytest.fixture
def train(text_directory, tmp_path):
    """(options of Python, how the command begins, variables) -> the record of a short training, which must succeed and
    say nothing odd."""
    file = tmp_path / "words.yaml"
    file.write_text(
        f"""
name: words
storage: {tmp_path}/runs
corpus: {{paths: "{text_directory}", validation_fraction: 0.2}}
tokenizer: {{train: {{vocab_size: 300}}}}
blocks: {{block_size: 32}}
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}}}}
train: {{batch_tokens: 256, max_tokens: 2560, eval_every_tokens: 1280}}
tracking: {{uri: "sqlite:///{tmp_path}/mlflow.db"}}
""",
        encoding="utf-8",
    )

    def run(*options, begin=(), **variables):
        environment = {key: value for key, value in (os.environ | variables).items() if value is not WITHOUT}
        done = subprocess.run(
            [*begin, sys.executable, *options, "-m", "raylm.train", "--config", file, "--json"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(
    "variables",
    [
        {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"HOME": WITHOUT},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"PATH": ""},
        {"MLFLOW_RUN_ID": "0123456789abcdef0123456789abcdef", "MLFLOW_EXPERIMENT_ID": "77"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_variables(train, variables):
    assert train(**variables)["steps"] == 10


@pytest.mark.parametrize("options", [["-O"], ["-I"], ["-X", "dev"]], ids=lambda options: "".join(options))
def test_options_of_python(train, options):
    assert train(*options)["steps"] == 10


def test_a_home_that_cannot_be_written(train, tmp_path):
    """Nobody's home, as in many containers; root may write wherever the file system is writable, so it is a file."""
    (tmp_path / "home").write_text("no directory")
    assert train(HOME=str(tmp_path / "home"))["steps"] == 10


def test_a_temporary_directory_in_which_nothing_can_be_executed(train, mounted):
    directory, begin = mounted("noexec")
    assert train(begin=begin, TMPDIR=str(directory))["steps"] == 10


def test_names_with_quotes_spaces_and_newlines(command, tmp_path):
    directory = tmp_path / 'it\'s "my" corpus'
    directory.mkdir()
    for number in range(60):
        (directory / f"a file\nof {number} 'lines'.txt").write_text("the cat sat on the mat\n" * 20 + str(number))
    ended = command("prepare", f"corpus.paths={json.dumps(str(directory))}", f"storage={tmp_path}/runs", "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["train"]["documents"] + found["validation"]["documents"] == 60


def test_twenty_thousand_tiny_files(command, tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(20_000):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"the cat sat on mat {number}\n")
    ended = command("prepare", f"corpus.paths={tmp_path}/corpus", f"storage={tmp_path}/runs", "--json")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["train"]["documents"] + found["validation"]["documents"] == 20_000
