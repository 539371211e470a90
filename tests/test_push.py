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
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from raylm import checkpoint, config, push, tokenizer
from raylm.config import TrainedTokenizer
from raylm.errors import ConfigError, StorageError

TOKEN = "hf_canaryCanaryCanaryCanaryCanaryCana"

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


# A model -------------------------------------------------------------------------------------------------------------

MANIFEST = {
    "format": 1,
    "fingerprint": "f",
    "tokenizer": {"eos_id": 0, "vocab_size": 260},
    "ledger": {"documents": 4, "bytes": 1234, "filtered: min_chars": 1, "kept": 3, "kept bytes": 1200},
    "train": {"documents": 2, "tokens": 500, "bytes": 1000, "shards": []},
    "validation": {"documents": 1, "tokens": 100, "bytes": 200, "shards": []},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a tiny GPT-2 in it as the Trainer and raylm leave it, beside its token store; never changed."""
    home = tmp_path_factory.mktemp("home")
    directory, store = home / "checkpoint", home / "tokens" / "f"
    sizes = {"vocab_size": 260, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(directory)
    tokenizer.train(["a b c"], TrainedTokenizer(vocab_size=260)).save_pretrained(directory)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"):
        (directory / name).write_text("of the training")
    sources = [
        {"name": f"{home}/notes/**/*.md", "documents": 2, "tokens": 400, "bytes": 800},
        {"name": "hub://stories?split=train", "documents": 1, "tokens": 200, "bytes": 400},
    ]
    store.mkdir(parents=True)
    (store / "manifest.json").write_text(json.dumps({**MANIFEST, "sources": sources}))
    experiment = config.load(
        None,
        [
            f"storage={home}/runs",
            f"corpus.paths=['{home}/notes/**/*.md', 'hub://stories?split=train']",
            f"eval.paths=['s3://key:{TOKEN}@bucket/held/out.txt']",
            f"tracking.uri=https://user:{TOKEN}@mlflow.example",
            "tracking.experiment=/Users/me@example/words",
            "cluster.address=ray://10.0.0.7:10001",
            f"train.arguments={{hub_token: {TOKEN}, logging_first_step: true, deepspeed: {home}/zero.json}}",
            "model.config={model_type: gpt2, n_layer: 1, n_head: 1, n_embd: 8}",
        ],
    )
    record = {"step": 7, "tokens": 3584, "perplexity": 12.25, "bits_per_byte": 1.5, "store": str(store)}
    checkpoint.describe(directory, experiment, record)
    return directory


def copied(directory, to, names=None):
    to.mkdir()
    for file in directory.iterdir():
        if names is None or file.name in names:
            (to / file.name).write_bytes(file.read_bytes())
    return to


PLAIN = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


# The whole way, as a command -----------------------------------------------------------------------------------------


def command(*arguments, cwd, **environment):
    """(exit code, the JSON object on stdout, everything that was printed)"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = {**inherited, "HF_HOME": str(cwd), "HF_HUB_DISABLE_XET": "1", **environment}
    line = [sys.executable, "-m", "raylm.push", *map(str, arguments), "--json"]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, json.loads(done.stdout), done.stdout + done.stderr


def test_a_pushed_model_loads_as_any_other(hub, saved, tmp_path):
    code, answer, printed = command(
        saved, "someone/tiny", "--private", cwd=tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN, HF_DEBUG="1"
    )
    assert code == 0, printed
    assert answer == {"repo": "someone/tiny", "url": f"{hub.url}/someone/tiny", "files": SENT, "dry_run": False}
    received = hub.repositories["someone/tiny"]
    assert received["private"]
    assert sorted(received["files"]) == SENT
    for name in PLAIN:
        assert received["files"][name] == (saved / name).read_bytes()

    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in received["files"].items():
        (folder / name).write_bytes(content)
    network, found = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(network.transformer.wte.weight, checkpoint.load(saved).model.transformer.wte.weight)
    generate = pipeline("text-generation", model=str(folder))
    assert generate("a b", max_new_tokens=3)[0]["generated_text"].startswith("a b")
    assert found("a b c")["input_ids"] == checkpoint.load(saved).tokenizer("a b c")["input_ids"]

    assert TOKEN not in printed
    assert not any(TOKEN.encode() in content for content in received["files"].values())
    assert {seen for request, seen in hub.asked if request.startswith("PUT")} == {None}  # storage is another company's
    assert {seen for request, seen in hub.asked if "/tiny" in request} == {f"Bearer {TOKEN}"}


# What is sent --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """What --dry-run writes."""
    out = tmp_path_factory.mktemp("dry") / "folder"
    answer = push.push(str(saved), "someone/tiny", dry_run=True, out=out)
    assert answer.record["folder"] == str(out)
    return out


def test_a_dry_run_asks_the_hub_for_nothing(hub, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = push.push(str(saved), "someone/tiny", dry_run=True)
    record = {"repo": "someone/tiny", "url": f"{hub.url}/someone/tiny", "files": SENT, "dry_run": True}
    assert answer.record == {**record, "folder": answer.record["folder"]}
    assert sorted(os.listdir(answer.record["folder"])) == SENT
    assert hub.asked == []


def test_places_and_secrets_stay_at_home(saved, folder):
    for file in set(folder.iterdir()) - {folder / "model.safetensors"}:
        content = file.read_text(encoding="utf-8")
        for private in (TOKEN, str(saved.parent), "mlflow.example", "me@example", "10.0.0.7", "bucket"):
            assert private not in content, file.name


def test_the_experiment_that_is_sent_can_be_run(saved, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given, found = checkpoint.read_experiment(saved), checkpoint.read_experiment(folder)
    assert found.corpus.paths == (f"{tmp_path}/notes/**/*.md", "hub://stories?split=train")
    assert found.eval.paths == (f"{tmp_path}/out.txt",)
    assert found.storage == f"{tmp_path}/runs"
    assert found.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert found.train.arguments == {"logging_first_step": True, "deepspeed": "./zero.json"}
    assert (found.model, found.blocks, found.tune) == (given.model, given.blocks, given.tune)
    assert push.published(found) == push.published(given)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/me/notes/**/*.md", "notes/**/*.md"),
        ("/home/me/books", "books"),
        ("~/books/a.txt.gz", "a.txt.gz"),
        ("/books", "books"),
        ("s3://key:secret@bucket/dir/*.jsonl", "dir/*.jsonl"),
        ("s3://key:sec/ret@bucket/*.jsonl", "bucket/*.jsonl"),
        ("gs://bucket", "bucket"),
        ("/home/me@work/a@b.txt", "a@b.txt"),
        ("./books", "books"),
        ("/", "/"),
        ("s3://key:secret@bucket", "bucket"),
        ("https://host/a.parquet?signature=secret", "a.parquet"),
        ("hub://org/stories?split=train[:5000]", "hub://org/stories?split=train[:5000]"),
        ("hub:///home/me/stories?split=train", "stories"),
        ("python://stdlib", "python://stdlib"),
        ("distilbert/distilgpt2", "distilbert/distilgpt2"),
    ],
)
def test_a_place_is_told_by_its_name(place, name):
    assert push.name_of(place) == name


def test_settings_that_are_no_places_stay_as_they_are():
    kept = {
        "corpus": {"keep_matching": "/usr/.*", "text": "{a}/{b}"},
        "keywords": ("/usr/bin", "~", "://"),
        "rate": 0.5,
    }
    assert push.named(kept) == kept
    assert push.named({"space": {"model.path": {"choice": ["/home/me/base", "gpt2"]}}}) == {
        "space": {"model.path": {"choice": ["./base", "gpt2"]}}
    }
    assert push.named({"config": {"any": "/home/me/x"}}) == {"config": {"any": "./x"}}
    assert push.named({"text": "http://me:secret@host/x"}) == {"text": "http://host/x"}


def test_a_configuration_that_tells_where_it_was_loaded_from(saved, tmp_path):
    directory = copied(saved, tmp_path / "model", PLAIN)
    told = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**told, "_name_or_path": "/home/me/base"}))
    push.push(str(directory), "someone/tiny", dry_run=True, out=tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**told, "_name_or_path": "./base"}


def test_weights_in_several_files_are_sent_with_their_index(saved, tmp_path):
    directory = copied(saved, tmp_path / "model", PLAIN)
    checkpoint.load(saved).model.save_pretrained(directory, max_shard_size="5KB")
    (directory / "model.safetensors").unlink()
    files = push.model_files(directory)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1
    assert "model.safetensors.index.json" in files
    assert push.parameters(directory, files) == push.parameters(saved, push.model_files(saved))
    (directory / shards[0]).unlink()
    with pytest.raises(StorageError, match=shards[0]):
        push.model_files(directory)


# The card ------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_model_is(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["raylm", "gpt2"],
        "datasets": ["stories"],
        "metrics": ["perplexity"],
    }
    for line in (
        "A gpt2 model of 3,096 parameters, trained from scratch on 3,584 tokens with raylm.",
        'pipeline("text-generation", model="someone/tiny")',
        "| perplexity | 12.2500 |",
        "| bits per byte | 1.5000 |",
        "On the validation split (1 documents, 100 tokens, 200 bytes)",
        "| `notes/**/*.md` | 2 | 400 | 800 |",
        "| `hub://stories?split=train` | 1 | 200 | 400 |",
        "| train | 2 | 500 | 1,000 |",
        "**75.00% of data after filtering**: 3 of 4 documents",
        "| filtered: min_chars | 1 |",
        "| `train.learning_rate` |",
        "| `model.config.n_embd` | `8` |",
    ):
        assert line in card.text


def test_the_card_says_when_the_score_is_of_a_part(saved, tmp_path):
    directory = copied(saved, tmp_path / "model")
    experiment = config.override(checkpoint.read_experiment(saved), {"eval.max_tokens": 64, "eval.stride": 8})
    checkpoint.describe(directory, experiment, {**checkpoint.read_record(saved), "store": str(tmp_path / "gone")})
    push.push(str(directory), "someone/tiny", dry_run=True, out=tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "On the first documents of the validation split, up to 64 tokens" in card
    assert "with 8 new tokens in each" in card
    assert "## Data" not in card


def test_a_model_that_raylm_did_not_train(saved, tmp_path):
    directory = copied(saved, tmp_path / "model", PLAIN)
    answer = push.push(str(directory), "tiny", dry_run=True, out=tmp_path / "out")
    assert answer.record["files"] == sorted([*PLAIN, "README.md"])
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "A gpt2 model of 3,096 parameters." in card.text
    assert re.findall("## (.*)", card.text) == ["How to load it"]


def test_a_masked_model_is_told_to_be_one(saved, tmp_path):
    directory = copied(saved, tmp_path / "model")
    told = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**told, "architectures": ["BertForMaskedLM"]}))
    push.push(str(directory), "someone/tiny", dry_run=True, out=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert "AutoModelForMaskedLM.from_pretrained" in card.text
    assert "| pseudo-perplexity | 12.2500 |" in card.text


def test_an_edited_folder_is_pushed_as_it_is(hub, folder, tmp_path):
    directory = copied(folder, tmp_path / "edited")
    card = (directory / "README.md").read_text().replace("library_name", "license: mit\nlibrary_name")
    (directory / "README.md").write_text(card)
    answer = push.push(str(directory), "tiny", out=tmp_path / "out")
    assert answer.record["repo"] == "someone/tiny"
    received = hub.repositories["someone/tiny"]
    assert not received["private"]
    assert received["files"] == {file.name: file.read_bytes() for file in directory.iterdir()}
    assert received["files"] == {file.name: file.read_bytes() for file in Path(answer.record["folder"]).iterdir()}


# What cannot be sent -------------------------------------------------------------------------------------------------


def test_the_token_is_that_of_the_environment_or_of_the_login(hub, saved, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="no token for the Hub; run hf auth login, or set HF_TOKEN"):
        push.push(str(saved), "someone/tiny")
    assert hub.asked == []
    (tmp_path / "token").write_text(TOKEN)
    push.push(str(saved), "someone/tiny")
    assert ("POST /api/repos/create", f"Bearer {TOKEN}") in hub.asked


@pytest.mark.parametrize(
    ("status", "why"), [(401, "hf auth login"), (403, "write access"), (404, "no such"), (500, "")]
)
@pytest.mark.parametrize("where", ["create|models", "commit"])
def test_a_refusal_names_the_repository_and_not_the_token(hub, saved, where, status, why, caplog):
    hub.refusal = (where, status)
    with pytest.raises(StorageError, match=rf"someone/tiny: .*{why}.*\({status}: refused, \*\*\*\)") as raised:
        push.push(str(saved), "someone/tiny")
    assert TOKEN not in str(raised.value)
    assert TOKEN not in caplog.text


def test_a_hub_that_is_away(hub, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(StorageError, match=r"someone/tiny: .*offline mode is enabled"):
        push.push(str(saved), "someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    gone = Hub()
    gone.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone.url)
    with pytest.raises(StorageError, match=r"someone/tiny: cannot be sent: .*refused"):
        push.push(str(saved), "someone/tiny")


def test_private_is_not_promised_of_what_is_public(hub, saved):
    hub.repositories["someone/tiny"] = {"private": False, "files": {}}
    with pytest.raises(ConfigError, match="someone/tiny is there already and is public"):
        push.push(str(saved), "someone/tiny", private=True)
    assert hub.repositories["someone/tiny"]["files"] == {}


def test_a_card_with_the_token_in_it_is_not_sent(hub, folder, tmp_path):
    directory = copied(folder, tmp_path / "edited")
    (directory / "README.md").write_text(f"# Mine\n\nlogin({TOKEN!r})\n")
    with pytest.raises(ConfigError, match=r"README.md has your Hub token in it") as raised:
        push.push(str(directory), "someone/tiny")
    assert TOKEN not in str(raised.value)
    assert hub.repositories["someone/tiny"]["files"] == {}


@pytest.mark.parametrize("repo_id", ["a/b/c", "two words", "-dash", "a--b", "x.git", ""])
def test_what_is_no_repo_id_is_named(saved, repo_id):
    with pytest.raises(ConfigError, match=f"REPO_ID '{repo_id}'"):
        push.push(str(saved), repo_id)


def test_what_is_no_whole_model_is_named(saved, tmp_path):
    def refused(directory):
        with pytest.raises(StorageError) as raised:
            push.push(str(directory), "someone/tiny", dry_run=True)
        return str(raised.value)

    assert "missing is not a directory" in refused(tmp_path / "missing")
    assert "has no config.json; did you mean" in refused(saved.parent)
    assert "holds no tokenizer" in refused(copied(saved, tmp_path / "a", ("config.json", "model.safetensors")))
    pickled = copied(saved, tmp_path / "b", ("config.json", "tokenizer.json"))
    (pickled / "pytorch_model.bin").write_text("a pickle")
    assert "holds no model.safetensors (pytorch_model.bin is pickled" in refused(pickled)
    torn = copied(saved, tmp_path / "c", PLAIN)
    (torn / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors cannot be loaded" in refused(torn)
    damaged = copied(saved, tmp_path / "d", PLAIN)
    (damaged / "config.json").write_text("[1]")
    assert "has a configuration that is damaged" in refused(damaged)


def test_nothing_is_written_over(saved, tmp_path):
    (tmp_path / "kept").write_text("")
    with pytest.raises(ConfigError, match="--out .* is there already"):
        push.push(str(saved), "someone/tiny", dry_run=True, out=tmp_path)
