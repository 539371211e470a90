"""Texts of eval.prompts: what the model of an evaluation writes, with no effect on the training."""

import json
import shutil
from pathlib import Path

import pytest

from raylm import samples
from raylm.errors import ConfigError
from raylm.generate import generate
from raylm.tracking import journal
from raylm.training import sampling

PROMPTS = ("the cat", "one dog ")
SETTINGS = [f"eval.prompts={json.dumps(PROMPTS)}", "eval.sample_tokens=5"]


def weights(job, step):
    return Path(job.checkpoints.path(step), "model.safetensors").read_bytes()


def test_each_evaluation_writes_what_its_model_writes_and_the_training_stays_the_same(train_run, tiny):
    """Bit-identical, though the model has dropout, whose random numbers come between the evaluations."""
    _, job = train_run(tiny(*SETTINGS, "train.keep_checkpoints=9"))
    _, plain = train_run(tiny("train.keep_checkpoints=9"))
    rows = samples.read(job.directory)
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, each) for step in (2, 4, 6, 8, 10) for each in PROMPTS
    ]
    assert [row["tokens"] for row in rows[::2]] == [512, 1024, 1536, 2048, 2560]
    for step in (4, 10):
        assert weights(job, step) == weights(plain, step)
        found = generate(job.checkpoints.path(step), ["do_sample=false", "max_new_tokens=5"], prompt=list(PROMPTS))
        assert [row["text"] for row in rows if row["step"] == step] == found.record["texts"]
    assert len({row["text"] for row in rows}) > 2
    assert job.run.metric_history() == plain.run.metric_history()
    own, other = (Path(each.checkpoints.path(10)) for each in (job, plain))
    assert (own / "generation_config.json").read_bytes() == (other / "generation_config.json").read_bytes()
    assert (own / "tokenizer_config.json").read_bytes() == (other / "tokenizer_config.json").read_bytes()
    assert journal.run_state(job.directory).artifacts[samples.FILE]["file"]
    assert samples.read(plain.directory) == []


def test_a_resumed_run_has_no_evaluation_twice(train_run, tiny):
    experiment = tiny(*SETTINGS)
    _, whole = train_run(experiment)
    _, job = train_run(experiment)
    shutil.rmtree(job.checkpoints.path(10))
    assert samples.read(job.directory)[-1]["step"] == 10
    train_run.go_on(job, experiment)
    files = [Path(each.directory, samples.FILE).read_bytes() for each in (job, whole)]
    assert files[0] == files[1]


def test_what_a_run_repeats_is_replaced(tmp_path):
    for step in (2, 4, 6, 4):
        samples.write(str(tmp_path), step, [{"prompt": "ä", "text": f"ä {step}"}])
    assert [row["step"] for row in samples.read(str(tmp_path))] == [2, 4]


class Telling:
    """A channel that keeps messages."""

    def __init__(self):
        self.told = []

    def say(self, message):
        self.told.append(message)

    def is_stopping(self):
        return False

    def advance(self, *_):
        pass

    report = advance


def test_a_model_that_cannot_generate_trains_all_the_same(train_run, tiny, monkeypatch):
    def fails(*_):
        raise RuntimeError("no cache")

    monkeypatch.setattr(sampling, "texts", fails)
    channel = Telling()
    outcome, job = train_run(tiny(*SETTINGS), channel=channel)
    assert outcome.step == 10
    assert samples.read(job.directory) == []
    assert "the texts of eval.prompts at step 2 are not kept: no cache" in channel.told


def test_a_masked_model_fills_its_prompts(train_run, tiny):
    masked = ["objective.kind=masked", "tokenizer.train={vocab_size: 300, special_tokens: ['<|endoftext|>', '<mask>']}"]
    masked += ["model.config={model_type: bert, num_hidden_layers: 1, hidden_size: 16, num_attention_heads: 2}"]
    masked += ["blocks.packing=chunked"]
    _, job = train_run(tiny(*masked, "eval.prompts=['the <mask> sat']"))
    rows = samples.read(job.directory)
    assert len(rows) == 5
    assert all("<mask>" not in row["text"] and row["text"].startswith("the") for row in rows)
    with pytest.raises(ConfigError, match=r"^eval.prompts: 'the cat': a masked model fills <mask>; put one in"):
        train_run(tiny(*masked, "eval.prompts=[the cat]"))


@pytest.mark.slow
def test_of_two_workers_one_writes(train_run, tiny):
    _, one = train_run(tiny(*SETTINGS))
    _, two = train_run(tiny(*SETTINGS, "cluster.num_workers=2"))
    found = [[(row["step"], row["prompt"]) for row in samples.read(job.directory)] for job in (one, two)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_sharded_weights_write_nothing(train_run, tiny):
    outcome, job = train_run(tiny(*SETTINGS, "cluster.num_workers=2", "train.arguments={fsdp: true}"))
    assert outcome.step == 10
    assert samples.read(job.directory) == []
