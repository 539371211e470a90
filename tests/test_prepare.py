import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_nodes import until


@pytest.fixture
def settings(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(20):
        (directory / f"{number}.txt").write_text(f"Document {number} says hello. " * 20)
    return [
        "corpus.keep_any=[]",
        f"corpus.paths={directory}",
        f"storage={tmp_path}/runs",
        "tokenizer.train={vocab_size: 300}",
        "corpus.validation_fraction=0.3",
        "corpus.split_by=document",
    ]


def test_a_command_lists_its_corpus_once(tiny, text_directory, tmp_path, monkeypatch):
    """To make the plan, whether there is a token store or not; an evaluation set, too."""
    from raylm import config
    from raylm.corpus import listing
    from raylm.train import train

    experiment = tiny(f"storage={tmp_path}/runs", f"eval.paths={text_directory}/00.txt")
    config.save(experiment, tmp_path / "own.yaml")
    listed, find = [], listing.find
    monkeypatch.setattr(listing, "find", lambda key, *args, **how: (listed.append(key), find(key, *args, **how))[1])
    for _ in range(2):
        train(config=tmp_path / "own.yaml", resume="never")
        assert listed == ["corpus.paths", "eval.paths"]
        listed.clear()


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("tokenizer.eos_token=zzz", "tokenizer.eos_token=zzz: it is not among the 257 tokens of "),
        ("tokenizer.prefix=bos", "tokenizer.prefix=bos: the tokenizer has no begin-of-text token"),
    ],
)
def test_a_setting_that_does_not_fit_the_tokenizer_is_told_before_any_work(command, settings, tmp_path, setting, error):
    from raylm import tokenizer
    from raylm.config import TrainedTokenizer

    made = tokenizer.train(["a"], TrainedTokenizer(vocab_size=257))
    made.bos_token = None
    made.save_pretrained(tmp_path / "tokenizer")
    kept = [given for given in settings if not given.startswith("tokenizer.")]
    more = [f"tokenizer.path={tmp_path}/tokenizer", setting, "model.config={model_type: gpt2}"]
    for verb in (["prepare"], ["prepare", "--dry-run"], ["train", "blocks.block_size=8", "--dry-run"]):
        ended = command(*verb, *kept, *more, "--json")
        answer = json.loads(ended.stdout)
        assert answer["error"].startswith(error)
        assert (answer["where"], ended.returncode) == (setting.partition("=")[0], 2)
        assert "Ray" not in ended.stderr
        assert not (tmp_path / "runs").exists()


def test_prepare_writes_a_store_and_then_finds_it(command, settings, tmp_path):
    plan = json.loads(command("prepare", *settings, "--dry-run", "--json").stdout)
    assert not (tmp_path / "runs").exists()
    assert plan["sources"] == [{"name": str(tmp_path / "corpus"), "files": 20, "bytes": 20 * 20 * 23 + 10 * 20}]
    first = json.loads(command("prepare", *settings, "--json").stdout)
    assert first["store"] == plan["store"]
    assert not first["reused"]
    assert first["train"]["documents"] + first["validation"]["documents"] == 20
    assert first["train"]["bytes"] + first["validation"]["bytes"] == 20 * 20 * 23 + 10 * 20
    again = json.loads(command("prepare", *settings, "--json").stdout)
    assert again == {**first, "reused": True}
    verified = json.loads(command("prepare", *settings, "--verify", "--json").stdout)
    assert verified == {"store": first["store"], "fingerprint": first["fingerprint"], "verified": True, "shards": 2}
    (tmp_path / "runs" / "tokens" / first["fingerprint"] / "train" / "shard-00000.arrow").write_bytes(b"torn")
    ended = command("prepare", *settings, "--verify", "--json")
    assert ended.returncode == 3
    assert "train/shard-00000.arrow: 4 of" in json.loads(ended.stdout)["error"]
    assert (
        "damaged, to be written again: train/shard-00000.arrow: 4 of"
        in command("prepare", *settings, "--dry-run").stdout
    )
    ended = command("prepare", *settings, "--json")
    assert json.loads(ended.stdout) == first
    assert "train/shard-00000.arrow: 4 of" in ended.stderr


def test_a_path_that_matches_nothing_ends_before_anything_is_written(command, tmp_path):
    ended = command("prepare", f"corpus.paths={tmp_path}/nothing", f"storage={tmp_path}/runs", "--json")
    assert ended.returncode == 3
    assert json.loads(ended.stdout) == {
        "error": f"corpus.paths: {tmp_path}/nothing: no such file, directory or glob",
        "where": "corpus.paths",
        "exit_code": 3,
    }
    assert list(tmp_path.iterdir()) == []


def test_verify_checks_what_is_there_and_writes_nothing(command, settings, tmp_path):
    ended = command("prepare", *settings, "--verify", "--json")
    assert ended.returncode == 3
    assert "no token store there; run raylm prepare" in json.loads(ended.stdout)["error"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_prepare_that_is_killed_again_and_again_ends_with_the_same_bytes(command, tmp_path):
    """kill -9 of the command and all it started as soon as some shards are there; SIGTERM; then it runs to its end."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(8):
        rows = (json.dumps({"text": f"Row {row} of {number} says hello. " * 9}) for row in range(60_000))
        (directory / f"{number}.jsonl").write_text("\n".join(rows))
    settings = [f"corpus.paths={directory}", "tokenizer.train={vocab_size: 300}"]
    whole = json.loads(command("prepare", *settings, f"storage={tmp_path}/whole", "--json").stdout)
    torn = tmp_path / "torn" / "tokens" / whole["fingerprint"]
    for deadly in (True, True, False):
        line = [sys.executable, "-m", "raylm.prepare", *settings, f"storage={tmp_path}/torn"]
        running = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        before = len(list(torn.glob("progress/*.json")))
        while running.poll() is None and len(list(torn.glob("progress/*.json"))) < before + 2:
            time.sleep(0.02)
        assert running.poll() is None, running.stderr.read()
        if deadly:
            os.killpg(running.pid, signal.SIGKILL)
        else:
            running.terminate()
        _, told = running.communicate(timeout=60)
        assert deadly or running.returncode == 75, told
        assert b"Traceback" not in told, "nor Ray's own, of the signal or of Ray Data"
        assert b"***" not in told
    assert not (torn / "manifest.json").exists()
    again = json.loads(command("prepare", *settings, f"storage={tmp_path}/torn", "--json").stdout)
    assert again["train"] == whole["train"]
    assert again["fingerprint"] == whole["fingerprint"]
    files = sorted(path.relative_to(torn) for path in torn.rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (torn / file).read_bytes() == (tmp_path / "whole" / "tokens" / whole["fingerprint"] / file).read_bytes()


@pytest.mark.parametrize(
    ("line", "seconds"), [("Starting Ray", 0.0), ("Starting Ray", 0.5), ("Starting Ray", 1.0), ("Training a", 0.3)]
)
def test_a_command_that_is_terminated_while_ray_starts_or_works_says_so(start_command, settings, line, seconds):
    running = start_command("prepare", *settings)
    until(lambda: running.stderr.exists() and line in running.stderr.read_text())
    time.sleep(seconds)
    running.terminate()
    ended = running.wait()
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        75,
        "terminated; the same command resumes from there",
    )


def raylm_in_c(*arguments, cwd):
    """A command in the C locale, where Python itself knows only ASCII, and with a terminal that refuses the rest."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8:strict"}
    command = [sys.executable, "-m", f"raylm.{arguments[0]}", *arguments[1:]]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


NAMES = {"not-utf8": "caf\udce9 \"x\" 'y'\n.txt", "not-ascii": "語é.txt"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_any_bytes_is_shown_in_any_locale(tmp_path, name):
    (tmp_path / NAMES[name]).write_text("text " * 1000)
    done = raylm_in_c("prepare", "--dry-run", f"corpus.paths={NAMES[name]}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 file, 5.0 KB" in done.stdout


def test_prepare_and_inspect_say_the_size_of_the_test_split(command, settings):
    settings = [*settings, "corpus.test_fraction=0.3"]
    prepared = json.loads(command("prepare", *settings, "--json").stdout)
    splits = {name: prepared[name] for name in ("train", "validation", "test")}
    assert sum(split["documents"] for split in splits.values()) == prepared["ledger"]["kept"] == 20
    assert splits["test"]["tokens"] > 0
    assert json.loads(command("inspect", *settings, "--json").stdout)["splits"] == splits
    shown = command("inspect", *settings).stdout
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("test ")] == [
        str(splits["test"]["documents"])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_text_whose_name_is_of_any_bytes_is_trained_on_in_any_locale(tmp_path, name):
    paragraphs = (" ".join(f"w{number * factor % 97}" for factor in range(60)) for number in range(150))
    (tmp_path / NAMES[name]).write_text("\n\n".join(paragraphs))
    settings = (
        "corpus.split_by=passage",
        "corpus.validation_fraction=0.2",
        "corpus.keep_any=[]",
        "tokenizer.train={vocab_size: 300}",
        "name=any",
    )
    sizes = ("blocks.block_size=32", "train.batch_tokens=512", "train.max_tokens=1024")
    done = raylm_in_c("train", f"corpus.paths={NAMES[name]}", *settings, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    (card,) = tmp_path.glob("runs/any/train-*/model/README.md")
    assert "perplexity" in card.read_text(encoding="utf-8")
