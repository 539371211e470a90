import os
import socket
import subprocess
import sys

import pytest

from raylm import hub
from raylm.errors import ConfigError, DataError


def test_what_is_seen_of_a_path_without_loading(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "q4.gguf").touch()
    assert hub.problem(str(tmp_path / "gone")) == "there is no such directory"
    assert hub.problem("a/b/c") == "there is no such directory"
    assert hub.problem("with a space") == "there is no such directory"
    assert hub.problem("owner/name") is None
    assert hub.problem(str(tmp_path / "empty")) == "the directory is empty"
    assert hub.problem(str(tmp_path / "file")) == f"it is a file; give the directory that it is in: {tmp_path}"
    assert hub.problem(str(tmp_path / "file"), or_file=True) is None
    packed = str(tmp_path / "packed")
    assert hub.problem(packed, gguf_file="q4.gguf") is None
    assert hub.problem(packed, gguf_file="q8.gguf") == "there is no q8.gguf in it; its GGUF files: q4.gguf"

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)  # the tests may run as root, who may read everything
    assert hub.problem(packed) == "it cannot be read: Permission denied"


def load(kind, key, path, error):
    with hub.loading(kind, key, str(path)):
        raise error


def test_what_goes_wrong_names_the_setting_and_the_damaged_file(tmp_path):
    (tmp_path / "config.json").write_text('{"a": 1')
    told = OSError("something about a config file\nand more")
    with pytest.raises(ConfigError, match=rf"^model.path={tmp_path}: config.json is damaged: Expecting .*\Z") as raised:
        load(ConfigError, "model.path", tmp_path, told)
    assert raised.value.where == "model.path"
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=rf"^{tmp_path}: something about a config file$"):
        load(DataError, None, tmp_path, told)
    with pytest.raises(DataError, match=rf"^{tmp_path}: it cannot be loaded: KeyError: 'added_tokens'$"):
        load(DataError, None, tmp_path, KeyError("added_tokens"))


def test_offline_a_name_that_was_not_downloaded_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"model.path=owner/name: .*not in this machine's cache.*HF_HUB_OFFLINE=1"):
        load(ConfigError, "model.path", "owner/name", OSError("We couldn't connect"))


@pytest.mark.parametrize("listens", [False, True])
def test_a_hub_that_does_not_answer_is_asked_once_and_shortly(tmp_path, listens):
    """Neither refused nor silent connections lead to huggingface_hub's own six tries of each file."""
    (tmp_path / "one.yaml").write_text(
        "corpus: {paths: a.txt}\nmodel: {path: owner/name}\nstorage: runs\ntracking: {uri: null}\n"
    )
    (tmp_path / "a.txt").write_text("A line of text.\n\n" * 200)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        given = {key: value for key, value in os.environ.items() if not key.upper().endswith(("_PROXY", "_OFFLINE"))}
        environment = {"HF_ENDPOINT": address, "HF_HUB_ETAG_TIMEOUT": "1", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "raylm.train", "--config", "one.yaml", "--dry-run"]
        done = subprocess.run(command, cwd=tmp_path, env=given | environment, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("Looking at", "The text is"))]
    assert done.returncode == 3
    assert lines[0].startswith(f"{address} cannot be reached: ")
    assert lines[0].endswith("; what was downloaded before is used")
    assert lines[-1].startswith("error: model.path=owner/name: there is no such directory, and it is not in this")
    assert "HF_HUB_OFFLINE=1" in lines[-1]
    assert len(lines) <= 3, done.stderr
    assert "Retrying" not in done.stderr
