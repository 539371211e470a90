"""Pushed to a small server on the loopback that speaks the Hub's upload endpoints; the Hub itself is never asked."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import PLAIN, TOKEN, copied
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from raylm import checkpoint, export, push
from raylm.errors import ConfigError, StorageError

SENT = [
    "README.md",
    "config.json",
    "experiment.yaml",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


# A Hub ---------------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What of the Hub an upload without Xet asks for: create, validate, preupload, LFS batch and upload, commit."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked = []
        """(method and path, Authorization) of each request."""
        self.repositories = {}
        """Name -> {"private": ..., "files": {path: content}}."""
        self.stored = {}
        """Contents by their SHA-256, as LFS has them."""
        self.refusal = None
        """(pattern of the path, status): what is answered with this status."""

    def answer(self, method, path, body):
        """(status, JSON) of a request."""
        if self.refusal and re.search(self.refusal[0], path):
            return self.refusal[1], {"error": f"refused, {TOKEN}"}  # a server may tell what it was sent
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'someone'}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.repositories[name] = {"private": asked.get("visibility") == "private", "files": {}}
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if stored := re.fullmatch(r"/stored/(\w+)", path):
            assert hashlib.sha256(body).hexdigest() == stored[1]
            self.stored[stored[1]] = body
            return 200, {}
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/stored/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)/?(\w*).*", path)
        if asked is None or asked[1] not in self.repositories:
            return 404, {"error": "not found"}
        name, action = asked.groups()
        if action == "":
            return 200, {"id": name, "private": self.repositories[name]["private"]}
        if action == "preupload":
            modes = {True: "lfs", False: "regular"}
            files = [
                {"path": one["path"], "uploadMode": modes[one["path"].endswith(".safetensors")], "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name]["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name]["files"][value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_one(self):
        self.server.asked.append((f"{self.command} {self.path}", self.headers.get("Authorization")))
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(chunks)
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = self.server.answer(self.command, self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = handle_one

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process pushes to, with a token in the environment."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


# The whole way, as a command -----------------------------------------------------------------------------------------


def command(*arguments, cwd, **environment):
    """(exit code, the JSON object on stdout, everything that was printed)"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**inherited, "HF_HOME": str(cwd), "HF_HUB_DISABLE_XET": "1", **environment}
    line = [sys.executable, "-m", "raylm.push", *map(str, arguments), "--json"]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout), done.stdout + done.stderr


def test_a_pushed_model_loads_as_any_other(hub, trained_directory, tmp_path):
    code, answer, printed = command(
        trained_directory, "someone/tiny", "--private", cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_DEBUG="1"
    )
    assert code == 0, printed
    assert answer == {"repo": "someone/tiny", "url": f"{hub.url}/someone/tiny", "files": SENT, "dry_run": False}
    received = hub.repositories["someone/tiny"]
    assert received["private"]
    assert sorted(received["files"]) == SENT
    for name in PLAIN:
        assert received["files"][name] == (trained_directory / name).read_bytes()

    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in received["files"].items():
        (folder / name).write_bytes(content)
    network, found = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(network.transformer.wte.weight, checkpoint.load(trained_directory).model.transformer.wte.weight)
    generate = pipeline("text-generation", model=str(folder))
    assert generate("a b", max_new_tokens=3)[0]["generated_text"].startswith("a b")
    assert found("a b c")["input_ids"] == checkpoint.load(trained_directory).tokenizer("a b c")["input_ids"]

    assert TOKEN not in printed
    assert not any(TOKEN.encode() in content for content in received["files"].values())
    assert {seen for request, seen in hub.asked if request.startswith("PUT")} == {None}  # storage is another company's
    assert {seen for request, seen in hub.asked if "/tiny" in request} == {f"Bearer {TOKEN}"}


# What is sent --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(trained_directory, tmp_path_factory):
    """What --dry-run writes."""
    out = tmp_path_factory.mktemp("dry") / "folder"
    answer = push.push(str(trained_directory), "someone/tiny", dry_run=True, out=out)
    assert answer.record["folder"] == str(out)
    return out


def test_a_dry_run_asks_the_hub_for_nothing(hub, trained_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = push.push(str(trained_directory), "someone/tiny", dry_run=True)
    record = {"repo": "someone/tiny", "url": f"{hub.url}/someone/tiny", "files": SENT, "dry_run": True}
    assert answer.record == {**record, "folder": answer.record["folder"]}
    assert sorted(os.listdir(answer.record["folder"])) == SENT
    assert hub.asked == []


def test_places_and_secrets_stay_at_home(trained_directory, folder):
    for file in set(folder.iterdir()) - {folder / "model.safetensors"}:
        content = file.read_text(encoding="utf-8")
        for private in (TOKEN, str(trained_directory.parent), "mlflow.example", "me@example", "10.0.0.7", "bucket"):
            assert private not in content, file.name


def test_an_adapter_is_sent_without_the_place_of_its_base_model(lora_directory, tmp_path, capsys):
    exported = export.export(lora_directory, tmp_path / "model")
    for number, directory in enumerate((lora_directory, exported)):  # as its experiment says, as it is
        out = tmp_path / str(number)
        sent = push.push(str(directory), "someone/tiny", dry_run=True, out=out).record["files"]
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < {*sent}
        assert not {"config.json", "model.safetensors", "lora.json"} & {*sent}
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "./checkpoint"
        assert 'AutoPeftModelForCausalLM.from_pretrained("someone/tiny")' in (out / "README.md").read_text()
        assert "the adapter's base model is" in capsys.readouterr().err


def test_a_model_that_raylm_did_not_train(trained_directory, tmp_path):
    directory = copied(trained_directory, tmp_path / "model", PLAIN)
    answer = push.push(str(directory), "tiny", dry_run=True, out=tmp_path / "out")
    assert answer.record["files"] == sorted([*PLAIN, "README.md"])
    made = ModelCard.load(tmp_path / "out/README.md")
    assert "A gpt2 model of 3,096 parameters." in made.text
    assert re.findall("## (.*)", made.text) == ["How to load it"]


def test_an_edited_folder_is_pushed_as_it_is(hub, folder, tmp_path):
    directory = copied(folder, tmp_path / "edited")
    edited = (directory / "README.md").read_text().replace("library_name", "license: mit\nlibrary_name")
    (directory / "README.md").write_text(edited)
    answer = push.push(str(directory), "tiny", out=tmp_path / "out")
    assert answer.record["repo"] == "someone/tiny"
    received = hub.repositories["someone/tiny"]
    assert not received["private"]
    assert received["files"] == {file.name: file.read_bytes() for file in directory.iterdir()}
    assert received["files"] == {file.name: file.read_bytes() for file in Path(answer.record["folder"]).iterdir()}


def test_the_card_of_an_export_loads_what_was_pushed(trained_directory, tmp_path):
    exported = tmp_path / "best"
    export.export(trained_directory, exported)
    with open(exported / "README.md", "a", encoding="utf-8") as file:
        file.write('An edit: "." stays.\n')
    answer = push.push(str(exported), "someone/tiny", dry_run=True, out=tmp_path / "out")
    assert answer.record["files"] == SENT, "without raylm.json"
    made = (tmp_path / "out" / "README.md").read_text()
    assert re.findall(r'(?:from_pretrained\(|model=)"(.*?)"', made) == ["someone/tiny"] * 3
    assert made == (exported / "README.md").read_text().replace('("."', '("someone/tiny"').replace(
        '="."', '="someone/tiny"'
    )


# What cannot be sent -------------------------------------------------------------------------------------------------


def test_the_token_is_that_of_the_environment_or_of_the_login(hub, trained_directory, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="no token for the Hub; run hf auth login, or set HF_TOKEN"):
        push.push(str(trained_directory), "someone/tiny")
    assert hub.asked == []
    (tmp_path / "token").write_text(TOKEN)
    push.push(str(trained_directory), "someone/tiny")
    assert ("POST /api/repos/create", f"Bearer {TOKEN}") in hub.asked


@pytest.mark.parametrize(
    ("status", "why"), [(401, "hf auth login"), (403, "write access"), (404, "no such"), (500, "")]
)
@pytest.mark.parametrize("where", ["create|models", "commit"])
def test_a_refusal_names_the_repository_and_not_the_token(hub, trained_directory, where, status, why, caplog):
    hub.refusal = (where, status)
    with pytest.raises(StorageError, match=rf"someone/tiny: .*{why}.*\({status}: refused, \*\*\*\)") as raised:
        push.push(str(trained_directory), "someone/tiny")
    assert TOKEN not in str(raised.value)
    assert TOKEN not in caplog.text


def test_a_hub_that_is_away(hub, trained_directory, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"someone/tiny: .*offline mode is enabled"):
        push.push(str(trained_directory), "someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    gone = Hub()
    gone.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(StorageError, match=r"someone/tiny: cannot be sent: .*refused"):
        push.push(str(trained_directory), "someone/tiny")


def test_private_is_not_promised_of_what_is_public(hub, trained_directory):
    hub.repositories["someone/tiny"] = {"private": False, "files": {}}
    with pytest.raises(ConfigError, match="someone/tiny exists already and is public"):
        push.push(str(trained_directory), "someone/tiny", private=True)
    assert hub.repositories["someone/tiny"]["files"] == {}


def test_a_card_with_the_token_in_it_is_not_sent(hub, folder, tmp_path):
    directory = copied(folder, tmp_path / "edited")
    (directory / "README.md").write_text(f"# Mine\n\nlogin({TOKEN!r})\n")
    with pytest.raises(ConfigError, match=r"README.md has your Hub token in it") as raised:
        push.push(str(directory), "someone/tiny")
    assert TOKEN not in str(raised.value)
    assert hub.repositories["someone/tiny"]["files"] == {}


@pytest.mark.parametrize("repo_id", ["a/b/c", "two words", "-dash", "a--b", "x.git", ""])
def test_what_is_no_repo_id_is_named(trained_directory, repo_id):
    with pytest.raises(ConfigError, match=f"REPO_ID '{repo_id}'"):
        push.push(str(trained_directory), repo_id)


def test_what_is_no_whole_model_is_named(trained_directory, tmp_path):
    def refused(directory):
        with pytest.raises(StorageError) as raised:
            push.push(str(directory), "someone/tiny", dry_run=True)
        return str(raised.value)

    assert "missing is not a directory" in refused(tmp_path / "missing")
    assert "has no config.json; did you mean" in refused(trained_directory.parent)
    assert "holds no tokenizer" in refused(
        copied(trained_directory, tmp_path / "a", ("config.json", "model.safetensors"))
    )


def test_nothing_is_written_over(trained_directory, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(ConfigError, match="--out .* exists already"):
        push.push(str(trained_directory), "someone/tiny", dry_run=True, out=tmp_path)
