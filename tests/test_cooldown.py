"""Cooldowns in sweeps on real Tune: a trial is compared as if it ended at its rung, and goes on as if it had not."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import pytest
from conftest import Here
from test_tune import promoted, run

from raylm import checkpoint, document_scores, storage, tracking, training
from raylm import sweep as sweeps
from raylm.budget import Budget
from raylm.checkpoint import CheckpointManager
from raylm.config import TuneConfig, override
from raylm.errors import ConfigError
from raylm.sweep.asha import rungs

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


class Killed(BaseException):
    """What a process does not survive."""


class Reporting(Here):
    """A session that keeps the score of each report."""

    reports: ClassVar[dict] = {}

    def report(self, metrics):
        scores = metrics["perplexity"], metrics["best_perplexity"]
        self.reports[metrics["tokens"], metrics.get("cooldown_step")] = scores


def trained(job, place):
    """The reports of a trial with cooldowns in this directory, which may have begun before."""
    Reporting.reports = reports = {}
    cooldowns = {4: 2, 8: 4}
    task = dataclasses.replace(
        job, directory=str(place), run=tracking.Run(), session=Reporting, cooldowns=cooldowns, name="trial"
    )
    training.train_loop_per_worker(task)
    return reports


def test_a_trial_killed_before_and_after_every_save_has_the_same_cooldowns(train_run, tiny, tmp_path, monkeypatch):
    settings = ("train.max_tokens=4096", "train.lr_scheduler_type=warmup_stable_decay", "train.save_every_tokens=1024")
    _, job = train_run(tiny(*settings, "name=killed"))
    untouched = trained(job, tmp_path / "untouched")
    assert [cooldown for _, cooldown in untouched if cooldown] == [4, 8]
    survived = {}
    for what in ((CheckpointManager, "commit"), (storage, "write")):
        whole = getattr(*what)

        def deadly(*arguments, whole=whole):
            told = str(arguments[:2])
            for when in ("before", "after"):
                if when == "after":
                    whole(*arguments)
                if (when, told) not in survived and ("result.json" in told or "CheckpointManager" in told):
                    survived[when, told] = True
                    raise Killed

        monkeypatch.setattr(*what, deadly)
    reports, deaths = {}, 0
    while True:
        try:
            reports |= trained(job, tmp_path / "killed")
            break
        except Killed:
            reports |= Reporting.reports
            deaths += 1
    assert deaths == len(survived) >= 2 * (8 + 2 + 2)
    assert reports == untouched
    kept = [path.relative_to(tmp_path / "untouched") for path in (tmp_path / "untouched").rglob("model.safetensors")]
    assert Path("checkpoints/step_00000016/model.safetensors") in kept
    for path in kept:
        assert (tmp_path / "killed" / path).read_bytes() == (tmp_path / "untouched" / path).read_bytes(), path


BUDGET = Budget(90, 64, 1, 1, 1, eval_every=10, save_every=10, decay_steps=9)


def test_no_cooldown_begins_in_the_decay_or_ends_after_it():
    assert rungs(BUDGET, 64 * 10, 2.0) == [640, 1280, 2560, 5120]
    assert rungs(BUDGET, 64 * 10, 2.0, 0.1) == [640, 1280, 2560, 5120], "80 of 90 steps, and 8 of a cooldown"
    assert rungs(BUDGET, 64 * 10, 2.0, 0.2) == [640, 1280, 2560]
    assert rungs(dataclasses.replace(BUDGET, decay_steps=20), 640, 2.0, 0.1) == [640, 1280, 2560]
    scheduler = sweeps.scheduler(
        TuneConfig(scheduler={"kind": "asha", "grace_tokens": 640, "cooldown": 0.1}), BUDGET, "best_perplexity"
    )
    assert scheduler.cooldowns(BUDGET) == {10: 1, 20: 2, 40: 4, 80: 8}
    smaller = dataclasses.replace(BUDGET, steps=180, batch_tokens=32)
    assert scheduler.cooldowns(smaller) == {20: 2, 40: 4, 80: 8, 160: 16}, "the same tokens in smaller steps"
    assert scheduler.expected_tokens(4, 90 * 64) == 4 * 640 + 2 * 640 + 1280 + 2560 + 640 + 4 * 64 + 2 * 128 + 256 + 512


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "train.lr_scheduler_type: must be warmup_stable_decay with tune.scheduler.cooldown, got linear: with"),
        ({"tune.scheduler.kind": "median"}, "tune.scheduler.cooldown: is for asha and cannot be given with median"),
        ({"tune.scheduler.cooldown": 0}, "tune.scheduler.cooldown: must be more than 0.0, got 0"),
        ({"tune.scheduler.cooldown": 1.5}, "tune.scheduler.cooldown: must be at most 1.0, got 1.5"),
        (
            {
                "train.lr_scheduler_type": "warmup_stable_decay",
                "tune.space": {"train.lr_scheduler_type": {"choice": ["linear", "warmup_stable_decay"]}},
            },
            "train.lr_scheduler_type: must be warmup_stable_decay with tune.scheduler.cooldown, got it in tune.space",
        ),
    ],
)
def test_what_a_cooldown_does_not_go_with_is_refused(tiny, settings, problem):
    experiment = tiny()
    with pytest.raises(ConfigError) as refused:
        override(experiment, {"tune.scheduler": {"kind": "asha", "cooldown": 0.1}, **settings})
    assert problem in refused.value.message


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_two_workers_cool_down(ray_cluster, tiny):
    sizes = ("train.max_tokens=8192", "train.eval_every_tokens=2048", "cluster.num_workers=2", "name=cooled-groups")
    scheduler = {"kind": "asha", "grace_tokens": 2048, "reduction_factor": 2.0, "cooldown": 0.5}
    rates = {"train.learning_rate": {"grid": [2e-2, 1e-6]}}
    rows, _, parent = run(cooled(tiny(*sizes), **{"tune.space": rates, "tune.scheduler": scheduler}))
    assert [(row["trial_id"], row["status"], row["tokens"]) for row in rows] == [
        ("trial_00000", "completed", 8192), ("trial_00001", "stopped early", 2048)
    ]  # fmt: skip
    trials = sweeps.read(parent.directory)
    assert [each["cooldown_step"] for each in trials["trial_00000"].cooldowns] == [8, 16]
    alone = {
        "tune.space": {"train.learning_rate": {"grid": [2e-2]}},
        "tune.scheduler": "none",
        "name": "uncooled-groups",
    }
    _, _, untouched = run(override(cooled(tiny(*sizes)), alone))
    ours, theirs = (f"{each.directory}/trial_00000/checkpoints/step_00000032" for each in (parent, untouched))
    assert weights(ours) == weights(theirs)
