"""train.precision and eval.precision: auto is decided once, when a run or sweep starts."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_by_one

from raylm import api, checkpoint, cluster, config, runs
from raylm import plan as plans
from raylm.checkpoint import CheckpointManager
from raylm.pipeline import arithmetic, stores
from raylm.plan import Prepared
from raylm.tokens import write
from raylm.tracking import journal
from raylm.training import arguments

AUTO = ("train.precision=auto", "eval.precision=auto")


@pytest.fixture
def fastest(monkeypatch):
    """(kind) makes it the precision that this machine computes fastest in."""

    def become(kind):
        monkeypatch.setattr(arguments, "fastest", lambda on_gpu: kind)

    return become


def settled(experiment, active):
    resources = cluster.resources(experiment.cluster, cluster.this_machine())
    found = arithmetic.settled(Prepared(None, experiment, None, {}, 0.0, ()), active, resources).experiment
    return found.train.precision, found.eval.precision


def start(experiment):
    return runs.start_or_resume(experiment, "train", "f00d", "auto")


def stop(active):
    CheckpointManager(f"{active.directory}/checkpoints").commit(40, {})
    active.lock.close()


@pytest.mark.parametrize(
    ("has", "kind"),
    [
        ({"amx_bf16"}, "bfloat16"),
        ({"avx512_bf16"}, "float32"),
        ({"amx_bf16", "avx512_bf16"}, "bfloat16"),
        ((), "float32"),
    ],
)
def test_on_a_cpu_bfloat16_takes_amx(has, kind, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    assert arguments.fastest(on_gpu=False) == kind


@pytest.mark.parametrize(("is_native", "kind"), [(True, "bfloat16"), (False, "float32")])
def test_on_a_gpu_bfloat16_takes_one_that_does_not_emulate_it(is_native, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_native)
    assert arguments.fastest(on_gpu=True) == kind


def test_a_worker_is_asked_of_a_cluster(ray_cluster):
    """Its devices need not be those of the command's machine."""
    assert cluster.on_a_worker(ray_cluster, arguments.fastest, False) == arguments.fastest(on_gpu=False)


def test_a_resumed_run_keeps_its_precision_on_another_machine(tiny, tmp_path, fastest):
    experiment = tiny("train.precision=auto", f"storage={tmp_path}")
    fastest("bfloat16")
    first = start(experiment)
    assert settled(experiment, first) == ("bfloat16", "float32")
    stop(first)
    fastest("float32")
    again = start(experiment)
    assert again.directory == first.directory
    assert settled(experiment, again) == ("bfloat16", "float32")
    stop(again)
    assert settled(experiment, runs.start_or_resume(experiment, "train", "f00d", "never")) == ("float32", "float32")


@pytest.mark.parametrize("then", ["float32", None])
def test_a_run_of_an_older_raylm_keeps_float32(then, tiny, tmp_path, fastest):
    """Its settings say float32, the default of then, or nothing of a precision."""
    experiment = tiny("train.precision=auto", f"storage={tmp_path}")
    first = start(experiment)
    file = Path(first.directory, "run.json")
    terms = {**json.loads(file.read_text()), "train.precision": then}
    file.write_text(json.dumps({key: value for key, value in terms.items() if key != "train.precision" or then}))
    stop(first)
    fastest("bfloat16")
    again = start(experiment)
    assert again.directory == first.directory
    assert settled(experiment, again) == ("float32", "float32")


def test_scores_are_in_the_arithmetic_of_the_training_if_that_changes_them_little(tiny, tmp_path, monkeypatch, caplog):
    perplexities = {"float32": 50.0}

    def scored(_, experiment, __):
        asked.append(experiment.eval.precision)
        return np.array([[100 * np.log(perplexities[experiment.eval.precision]), 100, 400, 0, 0]])

    monkeypatch.setattr(arithmetic.launch, "score_untrained", scored)
    for other, kind in ((50.04, "bfloat16"), (50.06, "float32")):
        asked = []
        perplexities["bfloat16"] = other
        experiment = tiny("train.precision=bfloat16", "eval.precision=auto", f"storage={tmp_path / str(other)}")
        first = start(experiment)
        assert settled(experiment, first) == ("bfloat16", kind)
        assert settled(experiment, first) == ("bfloat16", kind)
        assert asked == ["float32", "bfloat16"], "once a run"
    experiment = tiny("eval.precision=auto", f"storage={tmp_path / 'float32'}")
    assert settled(experiment, start(experiment)) == ("float32", "float32")
    assert len(asked) == 2, "nothing to compare"


def test_a_training_says_its_arithmetic_everywhere(tiny, tmp_path, fastest, monkeypatch):
    fastest("bfloat16")
    experiment = tiny(*AUTO, f"storage={tmp_path}", "train.max_tokens=512", "tracking.uri=null")
    monkeypatch.setattr(write, "_each", one_by_one)
    stores.prepare(plans.resolve_tokens(experiment))
    assert plans.resolve(experiment).record()["precision"] == "bfloat16"
    result = api.train(experiment)
    decided = json.loads((Path(result.checkpoint).parent / "decided.json").read_text())
    assert decided["train.precision"] == "bfloat16"
    assert decided["eval.precision"] == result.scored_in == "bfloat16", "of random weights all scores are alike"
    own = checkpoint.read_experiment(result.checkpoint)
    assert (own.train.precision, own.eval.precision) == ("bfloat16", "bfloat16")
    logged = journal.run_state(str(Path(result.checkpoint).parent)).parameters
    assert (logged["train.precision"], logged["scored_in"]) == ("bfloat16", "bfloat16")
    evaluation = api.evaluate(result.checkpoint)
    assert evaluation.plan.experiment.eval.precision == "bfloat16"


@pytest.mark.slow
def test_all_trials_have_the_arithmetic_of_their_sweep(tiny, tmp_path, fastest):
    fastest("bfloat16")
    experiment = config.override(
        tiny(*AUTO, f"storage={tmp_path}", "train.max_tokens=512"),
        {"tune.space": {"train.learning_rate": {"grid": [1e-2, 2e-2]}}, "tune.scheduler": "none"},
    )
    result = api.tune(experiment)
    assert result.scored_in == "bfloat16"
    for row in result.trials:
        own = checkpoint.read_experiment(row.checkpoint)
        assert (own.train.precision, own.eval.precision) == ("bfloat16", "bfloat16")
        assert journal.run_state(f"{tmp_path}/tiny/{result.sweep}/{row.trial_id}").parameters["scored_in"] == "bfloat16"
