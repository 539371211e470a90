import json
import re

import pytest

from raylm import budget, estimate, runs, storage
from raylm.pipeline import sweep
from raylm.plan import resolve
from raylm.sweep.record import SweepRecord


@pytest.fixture
def own(tiny, tmp_path):
    """settings -> an experiment whose storage is empty at first."""
    return lambda *settings: tiny(f"storage={tmp_path}", *settings)


ONE_WORKER = {"block_size": 32, "num_workers": 1, "epoch_examples": 1000}


def finished(experiment, kind, result):
    active = runs.start_or_resume(experiment, kind, "abc", "never")
    active.end(result)
    active.lock.close()
    return active


def test_the_disk_by_hand(own):
    """Two checkpoints and the best one, of three sizes of the model each; and the model that is exported."""
    experiment = own("train.eval_every_tokens=256", "train.save_every_tokens=256")
    plan = resolve(experiment)
    found = estimate.training(plan, plan.budget)
    model = 4 * plan.num_parameters
    assert (found.model_bytes, found.checkpoint_bytes) == (model, 3 * 3 * model)
    assert found.store_bytes == round(plan.tokens.num_bytes / 3 * 2), "two bytes a token, three bytes of text"
    assert found.record() == {"disk_bytes": found.store_bytes + 10 * model, "seconds": None}
    assert found.facts()["time"].startswith("unknown until it has run a few steps")
    measured = estimate.training(plan, plan.budget, measures=True)
    assert measured.seconds > 0
    assert re.search(r"of training at [\d,]+ tokens/s, measured here for a second$", measured.facts()["time"])
    assert estimate.sweep(plan, 8, None).checkpoint_bytes == 8 * 3 * 3 * model


def test_the_time_of_a_training_is_told_by_a_finished_one_of_the_same_model(own):
    experiment = own()
    plan = resolve(experiment)
    planned = plan.budget or budget.compute(experiment.train, **ONE_WORKER)
    finished(experiment, "train", {"tokens_per_second": 512})
    finished(own("model.config.n_layer=2"), "train", {"tokens_per_second": 7})
    finished(experiment, "train", {"error": "no memory"})
    found = estimate.training(plan, planned)
    assert found.seconds == planned.tokens / 512
    assert found.facts()["time"].startswith(
        f"about {planned.tokens // 512} s of training at 512 tokens/s, the speed of train-"
    )


def test_the_time_of_a_sweep_is_told_by_a_finished_one(own):
    experiment = own("tune.space={train.learning_rate: {grid: [1e-3, 1e-2]}}")
    active = finished(experiment, "tune", {"best": {}})
    record = SweepRecord(active.directory)
    record.add("trial_00000", {})
    record.result("trial_00000", {"step": 1, "tokens": 1000, "perplexity": 30.0, "best_perplexity": 29.0, "seconds": 5})
    record.spend(10.0)
    storage.write(f"{active.directory}/result.json", json.dumps({"best": {"trial_id": "trial_00000"}}).encode())
    found = estimate.sweep(resolve(experiment), 2, 4000)
    assert found.seconds == pytest.approx(40)
    other = estimate.sweep(resolve(own("model.config.n_layer=2", "tune.max_concurrent_trials=1")), 2, 4000)
    assert other.seconds > 0
    assert "tokens/s, measured here for a second" in other.facts()["time"]
    assert "at the 100 tokens/s of all trials of tune-" in found.facts()["time"]
    alone = estimate.training(resolve(experiment), budget.compute(experiment.train, **ONE_WORKER))
    assert "of training at 200 tokens/s, the speed of trial_00000 of tune-" in alone.facts()["time"]
    record = sweep.resolve(experiment).record()
    assert {"disk_bytes", "seconds"} <= record.keys()
