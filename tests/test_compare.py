"""Runs side by side; their directories are written by hand: nothing is trained."""

import io
import json
import re
from pathlib import Path

import pytest
from conftest import TOKEN
from rich.console import Console
from test_report import BUDGET, TRIALS, keep, write_sweep

from raylm import config, export, tracking
from raylm.compare import compare
from raylm.errors import ConfigError, StorageError
from raylm.results.compared_run import pace, summarize

STORES = {  # fingerprint -> (documents, bytes, unknown tokens) of its validation split, its tokenizer, and its tokens
    "f00d": ((5, 900, 0), "one", "tokens"),
    "beef": ((5, 900, 0), "two", "others"),
    "dead": ((5, 900, 3), "two", "others"),
    "cafe": ((6, 1000, 0), "one", "of other text"),
    "babe": ((5, 900, 0), "one", "tokens"),
    "face": ((5, 900, 0), "one, exported", "tokens"),
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Sweeps aaaa, which goes on, and bbbb, which is over and was scored on the whole split; four token stores."""
    storage = tmp_path_factory.mktemp("compare") / "runs"
    for fingerprint, (counts, tokenizer, checksum) in STORES.items():
        split = dict(zip(("documents", "bytes", "unknown_tokens"), counts, strict=True))
        split["shards"] = [{"checksum": checksum}]
        manifest = {"validation": split, "tokenizer": {"files": {"t": tokenizer}}}
        (storage / "tokens" / fingerprint).mkdir(parents=True)
        (storage / "tokens" / fingerprint / "manifest.json").write_text(json.dumps(manifest))
    write_sweep(storage, "tune-20260101-000000-aaaa", "eval.max_tokens=64", trials=TRIALS)
    best = {"trial_id": "trial_00000", "perplexity": 31.5, "bits_per_byte": 1.97, "checkpoint": "/there/model"}
    write_sweep(storage, "tune-20260102-000000-bbbb", "eval.max_tokens=64", trials=TRIALS, result_json={"best": best})
    return storage


@pytest.fixture
def trained(storage):
    """(name, settings, store, result) -> the directory of a training run that was evaluated twice."""

    def make(name, *settings, store="f00d", result=None):
        directory = f"{storage}/words/{name}"
        where = [f"storage={storage}", "name=words", "tracking.uri=null", f"train.max_tokens={BUDGET}"]
        experiment = config.load(None, [*where, "train.batch_tokens=256", "blocks.block_size=64", *settings])
        run = tracking.start(experiment.tracking, experiment="words", name=name, tags={}, directory=directory)
        run.log_parameters({"store": store} if store else {})
        run.log_text(config.dump(experiment), "experiment.yaml")
        for step, score in ((1, 40.0), (2, 44.0)):
            scores = {f"eval/{experiment.measure}": score, "eval/bits_per_byte": score / 20}
            run.log_metrics({**scores, "train/tokens": 256 * step}, step)
        if result:
            (Path(directory) / "result.json").write_text(json.dumps(result))
        return directory

    return make


DONE = {"perplexity": 38.0, "bits_per_byte": 1.9, "tokens": 1024}


def test_runs_side_by_side(storage, trained):
    trained("train-1", "train.learning_rate=0.5", result=DONE)
    answer = compare([f"{storage}/words/tune-20260101-000000-aaaa/trial_00001", f"{storage}/words/train-1"])
    trial, run = answer.record["runs"]
    assert trial.pop("difference")["not_compared"].startswith("no scores of single documents are kept of it")
    assert trial == {
        "run": "tune-20260101-000000-aaaa/trial_00001",
        "perplexity": 80.0,
        "bits_per_byte": 5.0,
        "perplexity_low": None,
        "perplexity_high": None,
        "bits_per_byte_low": None,
        "bits_per_byte_high": None,
        "scored_on": "the first 64 validation tokens",
        "scored_in": "float32",
        "tokens": 256,
        "seconds": None,
        "tokens_per_second": None,
        "mfu": None,
        "data": "f00d",
    }
    assert (run["run"], run["perplexity"], run["tokens"]) == ("train-1", 38.0, 1024)
    assert answer.record["settings"] == {
        "blocks.block_size": [128, 64],
        "train.learning_rate": [0.01, 0.5],
        "eval.max_tokens": [64, None],
    }
    json.dumps(answer.record, allow_nan=False)


def test_a_sweep_is_its_best_trial(storage):
    going, over = (
        summarize(f"{storage}/words/{name}") for name in ("tune-20260101-000000-aaaa", "tune-20260102-000000-bbbb")
    )
    part, whole = "the first 64 validation tokens", "the whole validation split"
    assert (going.name, going.perplexity, going.scored_on) == ("tune-20260101-000000-aaaa/trial_00000", 32.0, part)
    assert (over.perplexity, over.scored_on) == (31.5, whole)
    trial = summarize(f"{storage}/words/tune-20260102-000000-bbbb/trial_00000")
    assert (trial.perplexity, trial.scored_on) == (32.0, part), "comparable with the other trials"
    model = Path(f"{storage}/words/tune-20260102-000000-bbbb/model")
    model.mkdir()
    assert summarize(str(model)) == over


def test_a_run_that_is_not_over_has_its_best_evaluation(trained):
    found = summarize(trained("train-2"))
    assert (found.perplexity, found.bits_per_byte, found.tokens, found.scored_on) == (
        40.0,
        2.0,
        512,
        "the whole validation split",
    )


def test_speed_is_that_of_the_steps_without_stops(tmp_path):
    times = {1: 10, 2: 12, 3: 14, 4: 100, 5: 102}  # stopped after step 3
    lines = [{"step": n, "time": 1000 * time, "metrics": {"train/tokens": 256 * n}} for n, time in times.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert pace(str(tmp_path)) == {"seconds": 92, "tokens_per_second": 128}


def test_a_model_that_was_exported(trained_directory):
    found = summarize(str(trained_directory))
    assert (found.perplexity, found.bits_per_byte, found.tokens, found.store) == (12.25, 1.5, 3584, "f")
    assert found.experiment.model.config["n_embd"] == 8


def test_an_adapter_that_was_exported(lora_directory, tmp_path, monkeypatch):
    """It has no config.json; its name alone finds it, though an experiment with runs has the same one."""
    monkeypatch.chdir(tmp_path)
    export.export(lora_directory, tmp_path / "words")
    assert "config.json" not in {file.name for file in (tmp_path / "words").iterdir()}
    (tmp_path / "runs" / "words" / "train-20260101-000000-aaaa").mkdir(parents=True)
    found = summarize("words")
    assert (found.model, found.perplexity, found.store) == (str(tmp_path / "words"), 12.25, "f")
    answer = compare(["words", str(lora_directory)])
    assert [run["perplexity"] for run in answer.record["runs"]] == [12.25, 12.25]


def test_no_secret_is_shown(trained_directory, storage):
    answer = compare([str(trained_directory), f"{storage}/words/tune-20260101-000000-aaaa"])
    assert "train.arguments.logging_first_step" in answer.record["settings"]
    assert "s3://key@bucket/held/out.txt" in answer.record["settings"]["eval.paths"][0]
    assert TOKEN not in json.dumps(answer.record)


TEXTS = "the validation texts differ"
TOKENIZERS = "the tokenizers differ"
PARTS = "the scores are of other parts"


@pytest.mark.parametrize(
    ("settings", "store", "warnings"),
    [
        ([], "f00d", []),
        (["train.learning_rate=0.5", "blocks.block_size=128"], "f00d", []),
        ([], "babe", []),  # other training text alone
        ([], "face", []),  # the tokenizer of an exported model has other files, and the same tokens
        ([], "beef", [f"{TOKENIZERS}, so that perplexities are of other tokens: compare bits per byte"]),
        ([], "dead", [f"{TOKENIZERS}, and of the validation text some tokens are unknown"]),
        ([], "cafe", [TEXTS]),
        (["eval.max_tokens=64"], "f00d", [PARTS]),
        (["eval.precision=bfloat16"], "f00d", ["the scores are of different arithmetic"]),
        (["objective.kind=masked"], "f00d", ["the scores are of different kinds"]),
        ([], None, ["nothing says on what text b was scored"]),
        ([], "gone", [TEXTS]),  # the same settings, so the files have changed
        (["tokenizer.train={vocab_size: 999}"], "gone", [TOKENIZERS]),
        (["corpus.paths=/other/*.txt", "tokenizer.train={vocab_size: 999}"], "gone", [TEXTS]),
    ],
)
def test_what_cannot_be_compared_is_told(trained, tmp_path, settings, store, warnings):
    a = trained(f"{tmp_path.name}/a")
    b = trained(f"{tmp_path.name}/b", *settings, store=store)
    told = compare([a, b]).record["warnings"]
    assert [warning[: len(start)] for warning, start in zip(told, warnings, strict=True)] == warnings


def test_what_is_no_run_is_refused(storage, monkeypatch):
    monkeypatch.chdir(storage.parent)
    with pytest.raises(ConfigError, match="nothing to compare runs/words with; give two runs or more"):
        compare(["runs/words"])
    with pytest.raises(ConfigError, match="^give two runs or more, of those that raylm ls lists"):
        compare([])
    with pytest.raises(
        StorageError, match=r"runs/words is no run, trial, sweep or model .*; in .* there are .*tune-20260101"
    ):
        compare(["runs/words", "tune-20260101-000000-aaaa"])
    empty = write_sweep(storage, "tune-20260103-000000-cccc", trials=[])
    with pytest.raises(StorageError, match="the sweep has no score yet"):
        summarize(empty)


# Document by document -------------------------------------------------------------------------------------------------


def shown(answer):
    screen = Console(file=io.StringIO(), width=200)
    for part in answer.view:
        screen.print(part)
    return screen.file.getvalue()


def test_runs_are_compared_by_the_documents_of_their_best_evaluations(trained, tmp_path):
    a, b = (trained(f"{tmp_path.name}/{name}", result={**DONE, "best_step": 1}) for name in "ab")
    keep(a, 1, 0.0)
    keep(b, 1, 0.1)
    keep(b, 2, -9)
    answer = compare([a, b])
    one, other = (run["difference"] for run in answer.record["runs"])
    assert (one["to"], one["as_good_as_best"], other["to"], other["as_good_as_best"]) == (None, True, "a", False)
    assert other["nats_per_token_low"] < 0.11
    assert answer.record["runs"][0]["perplexity_low"] < answer.record["runs"][0]["perplexity_high"]
    text = shown(answer)
    assert "\na is better than b: " in text
    assert re.search(r"^as good as best +best +no$", text, re.MULTILINE)
    keep(b, 1, 0.0, documents=range(1, 21))
    answer = compare([a, b])
    assert answer.record["runs"][1]["difference"]["not_compared"] == "scored on other documents"
    assert answer.record["runs"][1]["difference"]["nats_per_token"] is None
    assert "is better than" not in shown(answer)


def test_a_run_whose_best_model_was_scored_on_the_whole_split_is_compared_by_that(trained, tmp_path):
    result = {**DONE, "best_step": 1, "scored_on": "the whole validation split"}
    a, b = (trained(f"{tmp_path.name}/{name}", "eval.max_tokens=64", result=result) for name in "ab")
    for directory, worse in ((a, 0.0), (b, 0.1)):
        keep(directory, 1, -worse, documents=range(3))
        keep(directory, "whole", worse)
    other = compare([a, b]).record["runs"][1]["difference"]
    assert (other["to"], other["documents"], other["as_good_as_best"]) == ("a", 20, False)


def test_trials_of_a_sweep_are_compared_by_their_documents(storage, tmp_path):
    directory = write_sweep(tmp_path, "tune-20260101-000000-dddd", trials=TRIALS)
    keep(f"{directory}/trial_00000", 1, 0.0)
    keep(f"{directory}/trial_00001", 1, 0.1)
    runs = compare([directory, f"{directory}/trial_00001"]).record["runs"]
    assert runs[1]["difference"]["to"] == "tune-20260101-000000-dddd/trial_00000"
    assert runs[1]["difference"]["as_good_as_best"] is False


def lines(worse, count=8, documents=range(8), **others):
    """What raylm evaluate --documents writes."""
    made = []
    for number in list(documents)[:count]:
        nll = 50 * (3 + number % 5 / 3 + worse + 0.01 * (number * 7 % 3))
        counts = {"perplexity": 1.0, "bits_per_byte": 1.0, "nll": nll, "tokens": 50, "bytes": 200, "unknown_tokens": 0}
        said = {"model": "m", "scored_in": "float32", "set": "text", "source": "a.txt", "document": f"{number:016x}"}
        made.append(json.dumps({**said, **counts, **others}) + "\n")
    return "".join(made)


def test_evaluations_are_compared_by_their_files(tmp_path, trained):
    for name, text in {
        "a": lines(0),
        "b": lines(0.5),
        "others": lines(0, documents=range(9, 17)),
        "bytes": lines(0.5, tokens=99),
        "unknown": lines(0.5, tokens=99, unknown_tokens=1),
        "few": lines(0, count=5),
    }.items():
        (tmp_path / name).write_text(text)

    def compared(*names):
        answer = compare([str(tmp_path / name) for name in names])
        return answer.record["runs"][-1]["difference"], answer.record["warnings"]

    difference, warnings = compared("a", "b")
    assert (difference["to"], difference["documents"], difference["as_good_as_best"]) == (f"{tmp_path}/a", 8, False)
    assert difference["nats_per_token"] == pytest.approx(0.5)
    assert warnings == []
    difference, warnings = compared("a", "others")
    assert difference["not_compared"] == "scored on other documents"
    assert [warning[:37] for warning in warnings] == ["the scores are of other documents, so"]
    difference, warnings = compared("a", "bytes")
    assert (difference["nats_per_token"], difference["as_good_as_best"]) == (None, False)
    assert warnings == ["the tokenizers differ, so that perplexities are of other tokens: compare bits per byte"]
    assert "unknown to one of them" in compared("a", "unknown")[0]["not_compared"]
    assert compared("few", "few")[0]["not_compared"].startswith("too few documents to tell: 5")
    run = trained(f"{tmp_path.name}/run", result=DONE)
    assert compare([str(tmp_path / "a"), run]).record["settings"] == {}, "an evaluation has none"


@pytest.mark.parametrize("text", ["", "{}\n", "hello\n", '{"perplexity": 1.0, "nll": 3}\n', "[1]\n", "LINE\n"])
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text):
    (tmp_path / "file").write_text(text.replace("LINE", lines(0, count=1).replace('"set": "text", ', "").strip()))
    with pytest.raises(StorageError, match=r"file is no file that raylm evaluate MODEL --documents FILE writes"):
        compare([str(tmp_path / "file"), str(tmp_path / "file")])
