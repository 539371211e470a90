"""`raylm init`: a text and this machine -> an experiment. What is derived is tested in test_derived."""

import json

import pytest
from ruamel.yaml import YAML

from raylm import config
from raylm.derived import sizes

LINE = "The harbour was quiet, and {} boats came in before noon. Nobody wrote down why. "


@pytest.fixture
def texts(tmp_path):
    """A directory with a text of each kind."""
    notes = tmp_path / "my notes"
    notes.mkdir()
    for number in range(20):
        (notes / f"{number}.md").write_text("\n\n".join(LINE.format(number * each) * 3 for each in range(4)))
    (notes / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    chat = [{"messages": [{"role": "user", "content": LINE.format(n)}] * 2} for n in range(200)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    rows = "".join(f"{number};{LINE.format(number % 80)}\n" for number in range(200))
    (tmp_path / "harbour.csv").write_text("id;story\n" + rows)
    return tmp_path


def settings_of(file):
    return config.settings_of(file.read_text())


def test_the_file_that_is_written_is_an_experiment_that_a_sweep_takes(command, texts):
    ended = command("init", "my notes", "--json", cwd=texts)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    file = texts / "my-notes.yaml"
    assert found["file"] == file.name
    assert (found["files"], found["left_out"], found["text"]["scripts"]) == (20, "1 .png", {"LATIN": 1.0})
    settings = settings_of(file)
    assert settings == found["settings"]
    assert settings["corpus.paths"] == ["my notes"], "as it was typed"
    sections = {key.split(".")[0] for key in settings}
    assert not {"storage", "tracking", "cluster"} & sections, "nothing that belongs to a place"
    assert [path.name for path in texts.iterdir() if path.name in ("runs", "mlflow.db")] == []
    planned = command("tune", "--config", file.name, "--dry-run", "--json", cwd=texts)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["tokens"] == settings["train.max_tokens"]


@pytest.mark.parametrize(
    ("text", "column", "join"),
    [("chat.jsonl", "{messages.role}: {messages.content}", "\n"), ("harbour.csv", "story", None)],
)
def test_the_columns_of_a_table_are_found(command, texts, text, column, join):
    ended = command("init", text, cwd=texts)
    assert ended.returncode == 0, ended.stderr
    settings = settings_of(texts / f"{text.partition('.')[0]}.yaml")
    assert (settings["corpus.text"], settings.get("corpus.join")) == (column, join)


def test_duplicates_are_told_and_kept(command, texts):
    assert command("init", "harbour.csv", cwd=texts).returncode == 0
    text = (texts / "harbour.yaml").read_text()
    assert settings_of(texts / "harbour.yaml")["corpus.deduplicate"] is False
    assert "60% of 200 documents repeat another exactly; exact drops them" in text


def test_what_is_typed_stands_in_the_file(command, texts):
    arguments = ["my notes", "name=own", "train.max_tokens=1e5", "storage=elsewhere", "tune.num_samples=3"]
    ended = command("init", *arguments, "--output", "o.yaml", cwd=texts)
    assert ended.returncode == 0, ended.stderr
    settings = settings_of(texts / "o.yaml")
    assert (settings["name"], settings["storage"], settings["tune.num_samples"]) == ("own", "elsewhere", 3)
    assert "train.max_tokens" not in [key for key, value in settings.items() if isinstance(value, float)]
    assert settings["train.eval_every_tokens"] <= 100_000 / sizes.EVALUATIONS


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "give the text"),
        (["nowhere.txt"], "corpus.paths: "),
        (["harbour.csv", "train.lr=1"], "train.lr"),
        (["harbour.csv", "--from", "no/such/model"], "model.path"),
        (["harbour.csv", "--output", "harbour.csv"], "--force"),
    ],
)
def test_what_is_wrong_is_told_in_a_line_and_writes_nothing(command, texts, arguments, error):
    before = {path: path.stat().st_mtime_ns for path in texts.iterdir()}
    ended = command("init", *arguments, cwd=texts)
    assert ended.returncode in (2, 3)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert error in line
    assert {path: path.stat().st_mtime_ns for path in texts.iterdir()} == before


def test_the_file_of_an_experiment_has_comments_and_loads_to_the_same_settings():
    settings = {
        "name": "notes",
        "corpus.text": "{role}: {says}\n",
        "train.max_tokens": 81_920,
        "train.learning_rate": 3e-4,
        "tune.space": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}, "blocks.block_size": {"choice": [1, 2]}},
    }
    text = config.outline(settings, {"train.max_tokens": "about 4 epochs " * 20, "name": "yours"}, "A file.")
    assert config.settings_of(text) == settings
    assert text.startswith("# A file.\n")
    assert "\n  # about 4 epochs" in text
    assert "\n# yours\nname: notes" in text
    assert max(map(len, text.splitlines())) <= 120
    assert YAML(typ="safe", pure=True).load(text)["train"]["max_tokens"] == 81_920


@pytest.mark.parametrize("verb", ["init", "train", "tune"])
def test_filters_that_leave_no_document_are_named_before_anything_is_trained(command, texts, verb):
    (texts / "three.txt").write_text("one line\nanother\na third\n")
    ended = command(verb, "three.txt" if verb == "init" else "corpus.paths=three.txt", "corpus.min_chars=99", cwd=texts)
    assert ended.returncode == 3
    assert "no document is left to train on; of what was read, documents: 1, " in ended.stderr
    assert "filtered: min_chars: 1" in ended.stderr


def test_a_text_of_a_single_passage_is_refused_before_anything_is_measured(command, texts):
    (texts / "three.txt").write_text("one line\nanother\na third\n")
    for arguments in (("init", "three.txt"), ("tune", "corpus.paths=three.txt", "--dry-run")):
        ended = command(*arguments, cwd=texts)
        assert ended.returncode == 3
        assert "the text is a single passage, which cannot be split" in ended.stderr
        assert "Measuring" not in ended.stderr
    assert not (texts / "three.yaml").exists()


def test_a_directory_that_is_not_there_is_told_first(command, texts):
    ended = command("init", "harbour.csv", "--output", "no/o.yaml", cwd=texts)
    assert ended.returncode == 2
    assert ended.stderr == "error: --output no/o.yaml: there is no directory no\n"
