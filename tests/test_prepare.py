import json
import subprocess
import sys

import pytest


def raylm_prepare(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "raylm.prepare", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def settings(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(20):
        (directory / f"{number}.txt").write_text(f"Document {number} says hello. " * 20)
    return [
        f"corpus.paths={directory}",
        f"storage={tmp_path}/runs",
        "tokenizer.train={vocab_size: 300}",
        "corpus.validation_fraction=0.3",
    ]


def test_prepare_writes_a_store_and_then_finds_it(settings, tmp_path):
    plan = json.loads(raylm_prepare(*settings, "--dry-run", "--json").stdout)
    assert not (tmp_path / "runs").exists()
    assert plan["sources"] == [{"name": str(tmp_path / "corpus"), "files": 20, "bytes": 20 * 20 * 23 + 10 * 20}]
    first = json.loads(raylm_prepare(*settings, "--json").stdout)
    assert first["store"] == plan["store"]
    assert not first["reused"]
    assert first["train"]["documents"] + first["validation"]["documents"] == 20
    assert first["train"]["bytes"] + first["validation"]["bytes"] == 20 * 20 * 23 + 10 * 20
    again = json.loads(raylm_prepare(*settings, "--json").stdout)
    assert again == {**first, "reused": True}


def test_a_path_that_matches_nothing_ends_before_anything_is_written(tmp_path):
    ended = raylm_prepare(f"corpus.paths={tmp_path}/nothing", f"storage={tmp_path}/runs", "--json")
    assert ended.returncode == 3
    assert json.loads(ended.stdout) == {
        "error": f"corpus.paths: {tmp_path}/nothing: no such file, directory or glob",
        "where": "corpus.paths",
        "exit_code": 3,
    }
    assert list(tmp_path.iterdir()) == []
