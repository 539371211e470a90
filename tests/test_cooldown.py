"""Cooldowns in sweeps on real Tune: a trial is compared as if it ended at its rung, and goes on as if it had not."""

import json
from pathlib import Path

import pytest
from test_tune import promoted, run

from raylm import checkpoint, document_scores, tracking
from raylm import sweep as sweeps
from raylm.config import override

RATES = [2e-2, 1e-2, 1e-6]


def cooled(experiment, **settings):
    """The experiment with a sweep over RATES, and rungs at 4 and 8 of 16 steps with cooldowns of 2 and 4."""
    return override(
        experiment,
        {
            "train.lr_scheduler_type": "warmup_stable_decay",
            "tune.space": {"train.learning_rate": {"grid": RATES}},
            "tune.max_concurrent_trials": 1,
            "tune.scheduler": {"kind": "asha", "grace_tokens": 1024, "reduction_factor": 2.0, "cooldown": 0.5},
            **settings,
        },
    )


@pytest.fixture(scope="module")
def sweep(ray_cluster, tiny):
    experiment = cooled(tiny("train.max_tokens=4096", "name=cooled"))
    return experiment, *run(experiment)


def weights(path):
    return Path(path, "model.safetensors").read_bytes()


def test_trials_are_compared_by_their_cooldowns_and_the_best_goes_on(sweep):
    _, rows, best, parent = sweep
    assert [(row["status"], row["tokens"]) for row in rows] == [
        ("completed", 4096), ("stopped early", 1024), ("stopped early", 1024)
    ]  # fmt: skip
    assert promoted(parent.directory) == [best["trial_id"]] * 2
    trials = sweeps.read(parent.directory)
    for trial in trials.values():
        begin = [each["cooldown_step"] for each in trial.cooldowns]
        assert begin == ([4, 8] if trial.trial_id == best["trial_id"] else [4])
        assert [each["cooldown_tokens"] for each in trial.cooldowns] == [step // 2 * 256 for step in begin]
        scores = [result["perplexity"] for result in trial.results if result["tokens"] == 1024]
        assert trial.cooldowns[0]["perplexity"] != scores[0], "two steps more, of smaller updates"


def test_a_trial_has_the_same_bytes_without_its_cooldowns(sweep):
    experiment, _, best, parent = sweep
    alone = {"train.learning_rate": {"grid": [best["settings"]["train.learning_rate"]]}}
    _, _, untouched = run(override(experiment, {"tune.space": alone, "tune.scheduler": "none", "name": "uncooled"}))
    ours, theirs = (
        Path(f"{each.directory}/{trial_id}/checkpoints/step_00000016")
        for each, trial_id in ((parent, best["trial_id"]), (untouched, "trial_00000"))
    )
    for file in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    before, after = (tracking.Run(str(path.parents[1])).metric_history() for path in (theirs, ours))
    for name in ("train/loss", "train/learning_rate", "eval/perplexity"):
        assert before[name] == after[name], name


def test_a_cooldown_is_the_end_of_a_shorter_training(sweep, train_run):
    """Of the same settings; its experiment says which."""
    _, rows, _, parent = sweep
    stopped = rows[1]
    assert (
        stopped["checkpoint"]
        == f"{parent.directory}/{stopped['trial_id']}/cooldowns/step_00000004/checkpoints/step_00000006"
    )
    again, task = train_run(override(checkpoint.read_experiment(stopped["checkpoint"]), {"name": "shorter"}))
    assert again.step == 6
    assert weights(task.checkpoints.path(6)) == weights(stopped["checkpoint"])
    assert again.best["perplexity"] == stopped["perplexity"]


def test_the_best_of_a_stopped_trial_is_that_of_its_cooldown(sweep):
    _, rows, _, parent = sweep
    trials = sweeps.read(parent.directory)
    for row in rows[1:]:
        trial = trials[row["trial_id"]]
        best = min(trial.cooldowns[0]["perplexity"], *(result["perplexity"] for result in trial.results))
        assert row["perplexity"] == best == trial.cooldowns[0]["perplexity"]
        place, step = trial.best_place(trial.results[-1])
        scores = document_scores.read(f"{parent.directory}/{place}", step)
        assert (row["best_step"], step, row["best_tokens"]) == (6, 6, 1536)
        assert scores is not None


def test_only_the_best_cooldown_keeps_its_checkpoint(sweep):
    _, rows, best, parent = sweep
    kept = sorted(path.parts[-4] for path in Path(parent.directory).glob("trial_*/cooldowns/*/checkpoints"))
    assert kept == sorted(row["trial_id"] for row in rows if row["trial_id"] != best["trial_id"])
    results = Path(parent.directory).glob(f"{best['trial_id']}/cooldowns/*/result.json")
    assert len([json.loads(path.read_text()) for path in results]) == 2


def test_mlflow_has_the_score_of_a_cooldown(sweep):
    _, rows, _, parent = sweep
    history = tracking.Run(f"{parent.directory}/{rows[1]['trial_id']}").metric_history()
    assert history["cooldown/eval_perplexity"] == [(4, rows[1]["perplexity"])]
    assert history["best/eval_perplexity"][-1] == (6, rows[1]["perplexity"])
