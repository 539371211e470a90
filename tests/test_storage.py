"""Object storage: all that a command keeps, on a real S3 server on loopback; and what becomes of it when that fails."""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from urllib.parse import parse_qs, unquote

import mlflow.transformers
import pyarrow.fs
import pytest
from conftest import S3, S3_KEY, answers, mlflow_server, one_by_one
from mlflow import MlflowClient
from werkzeug.serving import make_server

from raylm import checkpoint, cluster, config, export, runs, storage, tokens, tracking, train
from raylm import plan as plans
from raylm.corpus import sources
from raylm.errors import ConfigError, DataError, StorageError
from raylm.evaluate import evaluate
from raylm.generate import generate
from raylm.pipeline import stores
from raylm.results.compare import differing
from raylm.sweep import SweepRecord
from raylm.tokens import store as token_store
from raylm.tokens import write

DENIED = b"<Error><Code>%s</Code><Message>%s</Message></Error>"


def never(method, path):
    return False


class Server:
    """moto's S3 behind a door: `requests` are noted; those that `refused` or `broken` are true of are not let in."""

    def __init__(self):
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.inner = DomainDispatcherApplication(create_backend_app)
        self.requests: list[tuple[str, str]] = []
        self.listings: list[dict[str, list[str]]] = []
        """The query of each listing that was asked for."""
        self.refused = self.broken = never
        self.waits_seconds = 0.0
        self.server = make_server(
            "127.0.0.1", 0, self, threaded=True, request_handler=MotoRequestHandler, fd=S3.fileno()
        )
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ, start_response):
        request = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append(request)
        if "list-type" in environ["QUERY_STRING"]:
            self.listings.append(parse_qs(environ["QUERY_STRING"]))
        time.sleep(self.waits_seconds)
        signed = unquote(environ["QUERY_STRING"]) + environ.get("HTTP_AUTHORIZATION", "")  # an address may be, too
        if f"Credential={S3_KEY}/" not in signed:
            return self.deny(start_response, b"InvalidAccessKeyId", b"The access key does not exist")
        if self.refused(*request):
            return self.deny(start_response, b"ExpiredToken", b"The provided token has expired")
        if self.broken(*request):
            return self.deny(start_response, b"InternalError", b"Please try again", "500 Internal Server Error")
        return self.inner(environ, start_response)

    def deny(self, start_response, code, message, status="403 Forbidden"):
        start_response(status, [("Content-Type", "application/xml")])
        return [DENIED % (code, message)]

    def read(self, part):
        """How often a file with this in its path was read."""
        return sum(method == "GET" and part in path for method, path in self.requests)


@pytest.fixture(scope="module")
def server():
    return Server()  # until the process ends: what waits to be written is written then


@pytest.fixture
def place(server, tmp_path, monkeypatch):
    """A URI in a new bucket. What this process copies from there lies in tmp_path/tmp."""
    server.refused, server.broken, server.waits_seconds = never, never, 0.0
    monkeypatch.setattr(storage.retries, "RETRIES_SECONDS", (0.1, 0.1))
    monkeypatch.setattr(storage.retries, "_last_failure", -storage.retries.PAUSE_SECONDS)
    bucket = f"bucket-{uuid.uuid4().hex}"
    pyarrow.fs.FileSystem.from_uri(f"s3://{bucket}/?allow_bucket_creation=true")[0].create_dir(bucket)
    server.requests.clear()
    copies = Path(token_store.copy_of("s3://a/b")).parents[1]
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    yield f"s3://{bucket}/runs"
    server.refused = server.broken = never
    for name in storage.names(f"s3://{bucket}/runs/tokens"):
        for path in (f"s3://{bucket}/runs/tokens/{name}", f"s3://{bucket}/runs/tokens/{name}/tokenizer"):
            shutil.rmtree(copies / token_store.checksum(path.encode()), ignore_errors=True)  # those of Ray's workers


@pytest.fixture
def many_objects(place):
    """(number) -> s3://BUCKET/texts, with so many objects of a few words: put there without requests."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    bucket = place.split("/")[2]

    def put(number):
        for index in range(number):
            words = f"the cat sat on mat {index} and saw a dog"
            s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket, f"texts/{index:05}.txt", words.encode())
        return f"s3://{bucket}/texts"

    return put


def pages(server):
    """Of a corpus: the pages of listings that were asked for, each by where it begins."""
    of_corpus = [query for query in server.listings if query.get("prefix") == ["texts/"]]
    listed = [query.get("continuation-token", [""])[0] for query in of_corpus if query.get("max-keys") != ["1"]]
    server.listings.clear()
    return listed


@pytest.mark.slow
def test_a_corpus_of_20_000_objects_is_listed_once_for_a_plan(place, server, many_objects, tiny, command, tmp_path):
    text = many_objects(20_000)
    experiment = tiny(f"storage={tmp_path}/runs", f"corpus.paths={text}")
    config.save(experiment, tmp_path / "words.yaml")
    plan = plans.resolve(experiment)
    assert plan.tokens.num_files == 20_000
    of_plan = pages(server)
    assert (len(of_plan), len(set(of_plan))) == (20, 20)
    ended = command("train", "--config", tmp_path / "words.yaml", "--dry-run", "--json")
    assert json.loads(ended.stdout)["corpus"]["files"] == 20_000
    assert len(pages(server)) == 20


@pytest.mark.slow
def test_a_corpus_of_objects_is_listed_once_for_a_run(place, server, many_objects, tiny, command, tmp_path):
    """From its plan to its end; again where the tokens are there already."""
    text = many_objects(1_001)
    config.save(tiny(f"storage={tmp_path}/runs", f"corpus.paths={text}"), tmp_path / "words.yaml")
    for _ in range(2):
        ended = command("train", "--config", tmp_path / "words.yaml", "--json")
        assert ended.returncode == 0, ended.stderr
        assert len(pages(server)) == 2


# Before a command begins ---------------------------------------------------------------------------------------------


def test_a_storage_that_can_be_used_is_left_as_it_was(place):
    storage.look(place)
    storage.check(place)
    assert storage.names(place) == []


def test_a_storage_that_can_only_be_read_is_refused(place, server):
    server.refused = lambda method, path: method in ("PUT", "POST")
    storage.look(place)
    with pytest.raises(StorageError, match=rf"^storage={place} cannot be written: .*expired.*in the environment$"):
        storage.check(place)


def test_wrong_credentials_are_refused_before_anything_is_read(place, monkeypatch, tiny):
    storage.file_systems._file_system.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "another")
        with pytest.raises(StorageError, match=rf"^storage={place} cannot be read: .*INVALID_ACCESS_KEY_ID"):
            plans.resolve(tiny(f"storage={place}"))
    storage.file_systems._file_system.cache_clear()


def test_a_bucket_that_is_not_there_is_refused(server):
    with pytest.raises(StorageError, match="^storage=s3://nowhere/runs cannot be written: .*NO_SUCH_BUCKET"):
        storage.check("s3://nowhere/runs")


def test_a_storage_that_does_not_answer_is_refused_in_time(place, server, monkeypatch):
    server.waits_seconds = 0.5
    monkeypatch.setattr(storage.checks, "ANSWER_SECONDS", 0.1)
    with pytest.raises(StorageError, match=rf"^storage={place} cannot be read: no answer in 0.1 seconds"):
        storage.look(place)


@pytest.fixture
def silent(monkeypatch):
    """A server that takes connections and says nothing, in the place of S3; those that it has taken."""
    taken = []

    def take():
        with contextlib.suppress(OSError):  # it was closed
            while True:
                taken.append(listener.accept())

    with socket.create_server(("127.0.0.1", 0)) as listener, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        threading.Thread(target=take, daemon=True).start()
        storage.file_systems._file_system.cache_clear()
        yield taken
        listener.shutdown(socket.SHUT_RDWR)
    storage.file_systems._file_system.cache_clear()


LOOK = """
import atexit
from raylm import cli, storage

storage.checks.ANSWER_SECONDS, storage.file_systems.S3_ATTEMPTS = 1, 1000  # of 3 s each
atexit.register(print, "closed")

def look() -> None:
    storage.look("s3://bucket/runs")

cli.run(look)
"""


def test_a_command_ends_without_the_answer_of_a_storage_that_says_nothing(silent):
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (5, "closed\n")
    assert done.stderr.startswith("error: storage=s3://bucket/runs cannot be read: no answer in 1 seconds")
    assert done.stderr.count("\n") == 1


def test_a_corpus_on_a_server_that_says_nothing_is_asked_for_a_few_times(silent):
    with pytest.raises(DataError, match=r"^corpus.paths: s3://bucket/notes/\*.md: .*Timeout was reached"):
        sources.find("corpus.paths", "s3://bucket/notes/*.md")
    assert len(silent) == storage.file_systems.S3_ATTEMPTS


def test_a_place_that_goes_with_the_job_is_refused():
    place = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs"
    with pytest.raises(ConfigError, match=f"^storage={place}: the directory in which Ray runs this job, and removes"):
        storage.check(place)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for directory, problem in ((f"{tmp_path}/file/runs", "Not a directory"), ("/proc/runs", "/proc/runs")):
        with pytest.raises(StorageError, match=rf"^storage={directory} cannot be written: .*{problem}"):
            storage.check(directory)


@pytest.mark.parametrize("uri", ["s3://key:sec/ret@bucket/runs", "s3://bucket/runs?secret_key=sec/ret"])
def test_credentials_do_not_belong_in_a_setting(uri):
    with pytest.raises(ConfigError, match="storage must come without credentials.*AWS_SECRET_ACCESS_KEY") as told:
        storage.look(uri)
    assert "sec" not in told.value.message.replace("AWS_SECRET", "")


# What is kept --------------------------------------------------------------------------------------------------------


def test_the_checkpoints_of_a_run(place, tmp_path):
    series = checkpoint.CheckpointManager(f"{place}/checkpoints")
    assert series.newest() == (None, [])
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 10)
    for step in (20, 40, 60):
        series.commit(step, series.upload(step, tmp_path))
    series.discard(80)  # which is not there
    storage.write(f"{series.path(60)}/model.safetensors", b"half")
    assert series.newest() == (40, [f"{series.path(60)}: model.safetensors: 4 of 70 bytes"])
    assert (series.fetch(40, tmp_path) / "model.safetensors").read_bytes() == b"weights" * 10
    series.prune(1, [20])
    assert series.steps() == [20, 60], "nothing is left of the other"
    series.commit(80, {})
    series.discard(80)
    assert series.steps() == [20, 60], "nor of one whose last file went"


def test_a_stopped_run_is_resumed(place):
    experiment = config.load(None, [f"storage={place}/", "name=words"])
    first = runs.start_or_resume(experiment, "train", "abc", "auto")
    assert first.directory.startswith(f"{place}/words/train-")
    checkpoint.CheckpointManager(f"{first.directory}/checkpoints").commit(40, {})
    assert runs.start_or_resume(experiment, "train", "abc", "auto").step == 40
    first.end({"perplexity": 3.5})
    assert runs.start_or_resume(experiment, "train", "abc", "auto").directory != first.directory


def test_a_model_is_exported_to_object_storage_and_found_there(place, server, trained_directory, tmp_path):
    target = f"{place}/model"
    assert export.export(trained_directory, target) == target
    there = storage.names(target)
    assert {"config.json", "model.safetensors", "README.md", "experiment.yaml", "raylm.json"} <= set(there)
    assert "optimizer.pt" not in there
    local = Path(export.export(trained_directory, tmp_path / "model"))
    assert sorted(file.name for file in local.iterdir()) == there
    texts = [generate(str(model), prompt=["a"], json=True).record["texts"] for model in (target, local)]
    assert texts[0] == texts[1]
    assert checkpoint.load(target).record == checkpoint.read_record(local)
    assert server.read("model.safetensors") == 1, "it is copied once"
    with pytest.raises(StorageError, match=f"{place} holds no model.*did you mean {target}"):
        checkpoint.locate(place)
    with pytest.raises(StorageError, match=f"{place}/none is not a directory; give one"):
        checkpoint.locate(f"{place}/none")

    storage.write(f"{target}/model-00002-of-00002.safetensors", b"of a larger model")
    export.export(trained_directory, target)
    assert storage.names(target) == there, "the older one is replaced whole"
    storage.write(f"{place}/other/of_mine.txt", b"")
    with pytest.raises(StorageError, match="other exists already and holds no exported model"):
        export.export(trained_directory, f"{place}/other")


def test_a_file_of_a_run_is_kept_there_and_reaches_mlflow(place, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    section = config.load(None, [f"tracking.uri={uri}"]).tracking
    run = tracking.start(section, experiment="words", name="tune-1", tags={}, directory=f"{place}/words/tune-1")
    storage.write(f"{run.directory}/report/report.html", b"a page")
    run.log_file(f"{run.directory}/report/report.html", "report/report.html")
    (tmp_path / "here.txt").write_text("from here")
    run.log_file(tmp_path / "here.txt", "there.txt")
    run.finish()
    assert run.upload(60)
    assert storage.read(f"{run.directory}/there.txt") == b"from here"
    client = MlflowClient(uri)
    found = client.download_artifacts(run.run_id, "", str(tmp_path))
    assert (Path(found) / "report" / "report.html").read_text() == "a page"
    assert (Path(found) / "there.txt").read_text() == "from here"


def test_a_sweep_ends_where_its_record_cannot_be_written_twice(place, server):
    record = SweepRecord(f"{place}/words/tune-1")
    record.add("trial_00000", {})
    server.refused = lambda method, path: True
    record.finish("trial_00000", "completed")
    with pytest.raises(
        StorageError, match=r"tune-1/events.jsonl cannot be written: .*ACCESS_DENIED.*; once it can, the same"
    ):
        record.spend(1.0)
    server.refused = never
    record.spend(2.0)
    kinds = [next(iter(event)) for event in SweepRecord(record.directory).events]
    assert kinds == ["added", "finished", "spent", "spent"], "nothing is lost meanwhile"


def test_an_export_that_is_cut_off_leaves_no_model(place, server, trained_directory):
    target = f"{place}/model"
    export.export(trained_directory, target)
    server.refused = lambda method, path: method == "PUT" and path.endswith("tokenizer.json")
    with pytest.raises(StorageError, match=f"{target}/tokenizer.json cannot be reached: .*expired"):
        export.export(trained_directory, target)
    with pytest.raises(StorageError, match="holds no model: it has no config.json"):
        checkpoint.locate(target)
    with pytest.raises(StorageError, match="expired"):
        export.export(trained_directory, f"{place}/first")
    server.refused = never
    for again in (target, f"{place}/first"):
        export.export(trained_directory, again)
        checkpoint.locate(again)


def test_a_file_is_shared_by_the_server_alone(place, server):
    storage.write(f"{place}/a/one", b"content")
    server.requests.clear()
    storage.share(f"{place}/a/one", f"{place}/b/two", scratch=f"{place}/progress")
    assert server.read("one") == 0
    assert storage.read(f"{place}/b/two") == b"content"
    assert storage.names(place) == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        storage.share(f"{place}/a/none", f"{place}/b/three", scratch=f"{place}/progress")


@pytest.mark.parametrize("links", [True, False])
def test_a_local_file_is_shared_by_a_link_or_copied_where_there_are_none(tmp_path, monkeypatch, links):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    place = str(tmp_path)
    storage.write(f"{place}/a/one", b"content")
    for _ in range(2):  # also in the place of itself
        storage.share(f"{place}/a/one", f"{place}/b/two", scratch=f"{place}/progress")
        assert storage.read(f"{place}/b/two") == b"content"
        assert os.path.samefile(f"{place}/a/one", f"{place}/b/two") == links
    assert storage.names(f"{place}/progress") == []
    with pytest.raises(FileNotFoundError):
        storage.share(f"{place}/a/none", f"{place}/b/three", scratch=f"{place}/progress")


def test_a_token_store_is_copied_once_a_node(place, server, tiny, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    made, reused = stores.prepare(plans.resolve_tokens(tiny(f"storage={place}")))
    assert not reused
    assert tokens.verify(made) == []
    server.requests.clear()
    for _ in range(2):
        token_store.local_copy.cache_clear()  # as in a second process of the node
        opened = tokens.open_store(made.path)
        assert sum(len(ids) for ids in opened.train) == opened.train.num_tokens
    assert server.read("train/shard-00000.arrow") == 1
    assert stores.prepare(plans.resolve_tokens(tiny(f"storage={place}")))[1]


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_run_continues_to_the_next_save_if_storage_fails_and_ends_if_it_fails_again(
    place, server, tiny, train_run, tmp_path, monkeypatch
):
    """Credentials that expire, for step 4 and again from step 8 on; then the same run is gone on with to its end."""
    failing = ("step_00000004", "step_00000008", "step_00000010")
    server.refused = lambda method, path: method == "PUT" and any(step in path for step in failing)
    said = []
    experiment = tiny(f"storage={place}", "train.save_every_tokens=512", "train.keep_checkpoints=9")
    with cluster.progress_channel(lambda value: None, said.append) as channel, pytest.raises(StorageError) as ended:
        train_run(experiment, channel=channel)
    assert ended.value.message.startswith(f"{place}/tiny/train-")
    assert re.search(r"step_00000010/\S+ cannot be reached: When uploading", ended.value.message)
    assert ended.value.message.endswith("; once it can, the same command resumes")
    assert [message.split(" could not be written")[0] for message in said if "training until the next" in message] == [
        "the checkpoint of step 4", "the checkpoint of step 8"
    ]  # fmt: skip
    directory = ended.value.where.rpartition("/checkpoints/")[0]
    series = checkpoint.CheckpointManager(f"{directory}/checkpoints")
    assert series.complete() == [2, 6]

    server.refused = never
    config.save(experiment, tmp_path / "tiny.yaml")
    result = train.train(config=tmp_path / "tiny.yaml", resume="must").record
    assert (result["resumed_from"], result["steps"]) == (6, 10)
    assert result["checkpoint"] == f"{directory}/model"
    assert series.complete() == [2, 6, 8, 10]
    assert {"run.json", "result.json", "metrics.jsonl", "model"} <= set(storage.names(directory))
    assert tracking.Run(directory).metric_history()["eval/perplexity"][-1][0] == 10
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tiny.yaml", "tmp"], "nothing of it is here"
    assert evaluate(result["checkpoint"]).record["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    with pytest.raises(StorageError, match="--resume must: no run"):
        train.train(config=tmp_path / "tiny.yaml", resume="must")


def test_a_storage_that_answers_500_for_a_while_costs_no_save(place, server, tiny, train_run, monkeypatch):
    """Each file of one checkpoint is taken at the third time."""
    seen: list[str] = []

    def broken(method, path):
        if method == "PUT" and "step_00000004" in path:
            seen.append(path)
            return seen.count(path) <= 2
        return False

    server.broken = broken
    outcome, job = train_run(tiny(f"storage={place}", "train.save_every_tokens=512", "train.keep_checkpoints=9"))
    assert outcome.step == 10
    assert {seen.count(path) for path in seen} == {3}
    assert job.checkpoints.complete() == [2, 4, 6, 8, 10]
    assert job.checkpoints.damage(4) is None


@pytest.mark.slow
def test_a_command_keeps_all_it_has_in_object_storage(place, tiny, command, tmp_path):
    file = tmp_path / "words.yaml"
    config.save(tiny(f"storage={place}", "name=words", "eval.max_tokens=500"), file)
    ended = command("train", "--config", file, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["checkpoint"] == f"{place}/words/{result['run']}/model"
    found = command("evaluate", result["checkpoint"], "--json", "cluster.num_workers=2")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["perplexity"] == pytest.approx(result["perplexity"], rel=1e-6)
    listed = command("ls", place, "--json")
    assert listed.returncode == 0, listed.stderr
    (run,) = json.loads(listed.stdout)["runs"]
    assert (run["name"], run["state"], run["score"]) == (result["run"], "finished", result["perplexity"])
    assert run["num_bytes"] > 10_000
    left = command("clean", place, "--dry-run", "--json")
    assert left.returncode == 0, left.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_in_object_storage_resumes_where_it_was_killed(place, tiny, command, start_command, tmp_path):
    file = tmp_path / "words.yaml"
    sizes = ("train.max_tokens=25600", "train.eval_every_tokens=2560", "cluster.cpus_per_worker=2")
    space = "tune.space={train.learning_rate: {grid: [1e-3, 1e-2, 3e-2]}}"
    config.save(
        tiny(f"storage={place}", "name=words", "tune.num_samples=1", "tune.scheduler=none", space, *sizes), file
    )
    started = start_command("tune", "--config", file, "--json", cwd=tmp_path)

    def begun():
        names = storage.names(f"{place}/words")
        return [name for name in names if storage.names(f"{place}/words/{name}/trial_00001/checkpoints")]

    deadline = time.monotonic() + 280
    while not begun():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started.kill()
    started.wait()
    ended = command("tune", "--config", file, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "resuming: 1 trial finished" in ended.stderr
    found = json.loads(ended.stdout)
    assert [(trial["status"], trial["tokens"]) for trial in found["trials"]] == [("completed", 25600)] * 3
    assert found["best"]["checkpoint"].startswith(f"{place}/words/tune-")
    scored = command("evaluate", found["best"]["checkpoint"], "--json")
    assert json.loads(scored.stdout)["perplexity"] == pytest.approx(found["best"]["perplexity"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["trial_00001/checkpoints", "trial_00001/"])
def test_a_sweep_whose_storage_fails_ends_and_its_trials_are_to_resume(place, server, tiny, command, tmp_path, part):
    """For the second of three trials: when it saves, or already when its journal is opened."""
    file = tmp_path / "words.yaml"
    space = "tune.space={train.learning_rate: {grid: [1e-3, 1e-2, 3e-2]}}"
    sizes = ("train.max_tokens=2560", "cluster.cpus_per_worker=2")
    config.save(
        tiny(f"storage={place}", "name=words", "tune.num_samples=1", "tune.scheduler=none", space, *sizes), file
    )
    server.refused = lambda method, path: part in path
    ended = command("tune", "--config", file, "--json", cwd=tmp_path)
    assert ended.returncode == 5, ended.stderr
    told = json.loads(ended.stdout)["error"]
    assert part in told
    assert told.endswith("once it can, the same command resumes")
    assert "Traceback" not in ended.stderr
    server.refused = never
    (sweep,) = [name for name in storage.names(f"{place}/words") if name.startswith("tune-")]
    before = SweepRecord(f"{place}/words/{sweep}").trials
    assert [trial.status for trial in before.values()] == ["completed", "running"]

    ended = command("tune", "--config", file, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["sweep"] == sweep
    assert [(trial["status"], trial["tokens"]) for trial in found["trials"]] == [("completed", 2560)] * 3


# MLflow's artifacts ---------------------------------------------------------------------------------------------------


def artifacts(place, tmp_path):
    """A run in an MLflow that keeps its artifacts in object storage, where raylm writes them; it has one."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri).create_experiment("words", f"{place}/artifacts")
    section = config.load(None, [f"tracking.uri={uri}"]).tracking
    run = tracking.start(section, experiment="words", name="one", tags={}, directory=tmp_path / "run")
    run.log_metrics({"train/loss": 2.0}, 1)
    run.log_text("a: 1\n", "experiment.yaml")
    run.finish()
    return run


def stored_later(place, tmp_path, capsys, when_well, why):
    """What MLflow is given while there is a problem, and once all is well."""
    run = artifacts(place, tmp_path)
    assert not run.upload(2)
    told = capsys.readouterr().err
    assert re.search(f"warning: MLflow at .* does not store artifacts: experiment.yaml: .*{why}", told)
    assert told.count("warning") == 1
    client = MlflowClient(run.uri)
    found = client.get_run(run.run_id)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"train/loss": 2.0}), "all else is there"
    when_well()
    assert run.upload(20)
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["experiment.yaml"]


def test_artifacts_that_object_storage_refuses_are_uploaded_later(place, server, tmp_path, capsys):
    server.refused = lambda method, path: method == "PUT"
    why = "An error .*ExpiredToken.*; check AWS_ACCESS_KEY_ID, .* in the environment; training continues"
    stored_later(place, tmp_path, capsys, lambda: setattr(server, "refused", never), why)


def test_artifacts_that_need_a_package_are_uploaded_once_it_is_installed(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "path")  # MLflow keeps no client of boto3's for it
    monkeypatch.setitem(sys.modules, "boto3", None)
    stored_later(place, tmp_path, capsys, lambda: monkeypatch.delitem(sys.modules, "boto3"), ": pip install boto3")


@pytest.mark.slow
@pytest.mark.parametrize("by", ["server", "client"])
def test_what_mlflow_is_given_lies_in_object_storage(
    by, place, server, tiny, command, tmp_path, free_port, monkeypatch
):
    """A sweep whose MLflow keeps artifacts in S3: its server writes them there, or raylm does."""
    secret, there = f"canary{uuid.uuid4().hex}", f"{place}/artifacts"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    option = {"server": "--artifacts-destination", "client": "--default-artifact-root"}[by]
    with mlflow_server(tmp_path, free_port(), option, there) as address, monkeypatch.context() as patch:
        if by == "server":  # it alone needs to know how to get there
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
                patch.delenv(name)
        answers(f"{address}/health")
        file = tmp_path / "words.yaml"
        settings = (f"tracking.uri={address}", "tracking.register_as=words")
        config.save(tiny(f"storage={tmp_path}/runs", "name=words", *settings), file)
        ended = command("tune", "--config", file, "--json", cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert "warning" not in ended.stderr
        result = json.loads(ended.stdout)

        client = MlflowClient(address)
        run = client.get_run(result["mlflow_run_id"])
        assert run.info.artifact_uri.startswith(there if by == "client" else "mlflow-artifacts:/")
        assert any(method == "PUT" and path.endswith("/report.html") for method, path in server.requests)
        assert {each.dataset.name for each in run.inputs.dataset_inputs} == {"words train", "words validation"}
        found = Path(client.download_artifacts(run.info.run_id, "", str(tmp_path / "tmp")))
        kept, given = config.load(found / "experiment.yaml"), config.load(file)
        assert differing([kept, given]).keys() <= {"corpus.split_by", "cluster.cpus_per_worker"}, "what was decided"
        assert (found / "report" / "report.html").read_bytes() == Path(result["report"]).read_bytes()
        champion = client.get_model_version_by_alias("words", "champion")
        assert champion.run_id == run.info.run_id
        patch.setenv("MLFLOW_TRACKING_URI", address)
        pipeline = mlflow.transformers.load_model("models:/words@champion")
        assert pipeline("the cat", max_new_tokens=1)[0]["generated_text"].startswith("the cat")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"mlflow.db", "tracking.jsonl", "experiment.yaml", "report.html"} <= {path.name for path in files}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    assert secret not in ended.stdout + ended.stderr


# Several nodes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def another_node(ray_cluster, monkeypatch):
    """This node again, as if it were another."""
    import ray

    nodes = {ray.get_runtime_context().get_node_id(): "10.0.0.7"}
    monkeypatch.setattr(cluster, "other_nodes", lambda: nodes)


def test_a_directory_that_other_nodes_do_not_see_is_refused(another_node, tiny, tmp_path, monkeypatch):
    """/proc/self/cwd is another directory in each process, as a local one is on each node."""
    stores.check_nodes(tiny())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        StorageError, match=r"^storage=/proc/self/cwd/runs cannot.*\n  10.0.0.7: not the same.*\n.*s3://"
    ):
        stores.check_nodes(tiny("storage=/proc/self/cwd/runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_database_that_other_nodes_do_not_see_is_refused(another_node, tiny):
    stores.check_nodes(tiny("tracking.uri=http://10.0.0.1:5000"))
    with pytest.raises(
        ConfigError, match=r"^tracking.uri=sqlite:\S+ is a file of this machine.*10.0.0.7; start a server"
    ):
        stores.check_nodes(tiny("tracking.uri=sqlite:///mlflow.db"))


def test_a_single_node_needs_no_asking(ray_cluster):
    assert cluster.other_nodes() == {}


def test_a_name_without_a_directory_is_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    storage.write("scores.jsonl", b"{}")
    assert (tmp_path / "scores.jsonl").read_bytes() == b"{}"
