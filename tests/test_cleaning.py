import json

import pytest

from raylm import api, clean, cleaning, config, runs, scratch, storage
from raylm.errors import StorageError


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "abandoned", list)  # what other tests have left on this machine
    return config.load(None, [f"storage={tmp_path}/runs", "name=words"])


def sweep(experiment, store="abc"):
    """A sweep of three trials with checkpoints of 1,000 bytes each."""
    active = runs.start_or_resume(experiment, "tune", store, "never")
    storage.write(f"{active.directory}/events.jsonl", b"")
    for number in range(3):
        storage.write(f"{active.directory}/trial_{number:05}/checkpoints/step_00000001/model", bytes(1000))
        storage.write(f"{active.directory}/trial_{number:05}/metrics.jsonl", b"{}")
    return active


def checkpoints(active):
    return [name for name in storage.names(active.directory) if storage.names(f"{active.directory}/{name}/checkpoints")]


def finish(active):
    active.end({"best": {"trial_id": "trial_00001", "perplexity": 3.5}, "trials": []})
    active.lock.close()


def test_checkpoints_of_trials_that_lost_are_removed_once_the_sweep_has_finished(experiment):
    finished, stopped, running = sweep(experiment), sweep(experiment), sweep(experiment)
    stopped.lock.close()
    finish(finished)
    settings = [f"storage={experiment.storage}"]
    plan = clean.clean(settings, dry_run=True)
    assert len(plan.record["would_remove"]) == 2
    assert plan.record["bytes"] == 2000
    assert len(checkpoints(finished)) == 3, "nothing is removed yet"
    assert clean.clean(settings).record["bytes"] == 2000
    assert checkpoints(finished) == ["trial_00001"]
    assert storage.read(f"{finished.directory}/trial_00000/metrics.jsonl") == b"{}"
    assert len(checkpoints(stopped)) == len(checkpoints(running)) == 3
    assert clean.clean(settings).view == "there is nothing to remove"
    json.dumps(plan.record)


@pytest.mark.slow
def test_a_sweep_that_keeps_the_best_has_only_its_checkpoints_and_model(ray_cluster, tiny, tmp_path):
    grid = "tune.space={train.learning_rate: {grid: [2e-2, 1e-5]}}"
    settings = (f"storage={tmp_path}", grid, "tune.num_samples=1", "tune.scheduler=none", "tune.keep=best")
    result = api.tune(tiny(*settings))
    directory = f"{tmp_path}/tiny/{result.sweep}"
    trials = [name for name in storage.names(directory) if name.startswith("trial_")]
    kept = [name for name in trials if storage.names(f"{directory}/{name}/checkpoints")]
    assert len(trials) == 2
    assert kept == [result.best.trial_id]
    assert [row.checkpoint is None for row in result.trials] == [False, True]
    assert result.untrained["perplexity"] > result.best.perplexity
    assert "config.json" in storage.names(result.best.checkpoint)


def test_a_sweep_without_a_result_keeps_all(experiment):
    failed = sweep(experiment)
    failed.end({"error": "no trial of the sweep has a result"})
    assert cleaning.lost_checkpoints(failed.directory) == []


def test_stores_are_removed_when_asked_and_nothing_runs(experiment):
    used, unused = (f"{experiment.storage}/tokens/{name}" for name in ("abc", "def"))
    for store in (used, unused):
        storage.write(f"{store}/manifest.json", b"{}")
    active = sweep(experiment)
    with pytest.raises(StorageError, match="is running, and may need any token store"):
        cleaning.unused_stores(experiment.storage)
    finish(active)
    found = [leftover.path for leftover in cleaning.leftovers(experiment.storage, stores=True)]
    assert found[-1:] == [unused]
    assert used not in found
    assert unused not in [leftover.path for leftover in cleaning.leftovers(experiment.storage)]
