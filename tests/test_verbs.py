"""The verbs as their users run them: as commands, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from raylm import cluster

BAD = [
    ("train.learning_rte=1", 2, "train.learning_rte"),
    ("train.batch_tokens=many", 2, "train.batch_tokens"),
    ("corpus.paths=/nowhere/*.txt", 3, "corpus.paths"),
    ("model.config.n_positions=16", 2, "blocks.block_size"),
    ("cluster.num_workers=1024", 2, "cluster.num_workers"),
]


def raylm(*arguments, cwd):
    """(exit code, the JSON object on stdout, stderr)"""
    command = [sys.executable, "-m", f"raylm.{arguments[0]}", *map(str, arguments[1:]), "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=280)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def swept(text_directory, tmp_path_factory):
    """A directory in which a small sweep was run by command, its config, and the command's answer."""
    directory = tmp_path_factory.mktemp("project")
    config = directory / "words.yaml"
    config.write_text(
        f"""
name: words
corpus: {{paths: {text_directory}, validation_fraction: 0.2}}
tokenizer: {{train: {{vocab_size: 300}}}}
blocks: {{block_size: 32}}
model: {{config: {{model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16}}}}
train: {{batch_tokens: 256, max_tokens: 2560, eval_every_tokens: 512}}
tune:
  num_samples: 1
  space:
    train.learning_rate: {{grid: [2e-2, 1e-5]}}
"""
    )
    code, answer, stderr = raylm("tune", "--config", config, cwd=directory)
    assert code == 0, stderr
    return directory, config, answer


def test_the_answer_of_a_sweep(swept):
    directory, _, answer = swept
    assert [trial["settings"] for trial in answer["trials"]] == [
        {"train.learning_rate": 2e-2},
        {"train.learning_rate": 1e-5},
    ]
    assert answer["best"]["perplexity"] < answer["trials"][1]["perplexity"]
    assert answer["tokens_reused"] is False
    run = MlflowClient(f"sqlite:///{directory}/mlflow.db").get_run(answer["mlflow_run_id"])
    assert run.info.status == "FINISHED"


def test_tokens_are_prepared_once(swept):
    directory, config, _ = swept
    code, answer, _ = raylm(
        "prepare", "--config", config, "blocks.block_size=64", "train.batch_tokens=512", cwd=directory
    )
    assert (code, answer["reused"]) == (0, True)
    assert answer["train"]["tokens"] > 0


def test_one_worker_with_prepared_tokens_needs_no_ray(swept, monkeypatch, tmp_path):
    directory, config, sweep = swept
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/nowhere")  # where none can start
    if cluster.this_machine()["GPU"] == 0:  # else Ray is asked for them
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['ray'] = None  # import ray fails\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    code, answer, stderr = raylm("train", "--config", config, cwd=directory)
    assert (code, answer and answer["steps"]) == (0, 10), stderr
    untrained = sweep["untrained"]["perplexity"]
    assert answer["untrained_perplexity"] == pytest.approx(untrained, rel=1e-6), "as a sweep scores the same model"
    assert 200 < untrained < 400, "it knows nothing of 300 tokens"
    lines = [line for line in stderr.splitlines() if "perplexity" in line]
    assert lines[0].startswith("before training: perplexity ")
    assert [line.partition(" tokens: ")[0] for line in lines[1:]] == ["512", "1,024", "1,536", "2,048", "2,560"]
    shown = [float(line.rpartition(" ")[2]) for line in lines[1:]]
    assert answer["best_perplexity"] == pytest.approx(min(shown), rel=1e-3), "on the documents of the last one"
    assert answer["last_perplexity"] == pytest.approx(shown[-1], rel=1e-3)


@pytest.mark.slow
def test_evaluate_tells_the_number_of_the_sweep_whatever_batch_and_workers(swept):
    directory, _, answer = swept
    best = answer["best"]
    code, found, _ = raylm("evaluate", best["checkpoint"], cwd=directory)
    assert code == 0
    assert found["perplexity"] == pytest.approx(best["perplexity"], rel=1e-6)
    _, other, _ = raylm("evaluate", best["checkpoint"], "eval.batch_tokens=64", "cluster.num_workers=2", cwd=directory)
    assert other["nll"] == pytest.approx(found["nll"], rel=1e-6)
    assert (other["tokens"], other["bytes"]) == (found["tokens"], found["bytes"])


def test_evaluate_scores_any_text(swept, tmp_path):
    directory, _, answer = swept
    (tmp_path / "text.txt").write_text("the cat sat on a mat")
    code, found, _ = raylm("evaluate", answer["best"]["checkpoint"], "--text", tmp_path / "text.txt", cwd=directory)
    assert (code, found["bytes"]) == (0, 20)


@pytest.mark.parametrize(("setting", "exit_code", "where"), BAD, ids=[setting for setting, *_ in BAD])
@pytest.mark.parametrize("verb", ["train", "tune"])
def test_bad_input_is_named_and_leaves_nothing_behind(verb, setting, exit_code, where, tmp_path):
    code, answer, stderr = raylm(verb, setting, cwd=tmp_path)
    assert (code, answer["exit_code"]) == (exit_code, exit_code)
    assert where in answer["error"]
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_a_model_is_refused(tmp_path):
    for verb in ("evaluate", "generate"):
        code, answer, _ = raylm(verb, tmp_path, *(["--prompt", "x"] if verb == "generate" else []), cwd=tmp_path)
        assert (code, answer["exit_code"]) == (5, 5)
        assert str(tmp_path) in answer["error"]
