"""Sweeps on real Tune: trials in their own processes, and one with a worker group in each."""

import gc
import hashlib
import itertools
import json
import math
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from raylm import budget, checkpoint, cluster, runs, summary, tracking
from raylm import plan as plans
from raylm import sweep as sweeps
from raylm.config import SchedulerConfig, TrainConfig, TuneConfig, corners, dump, load, override, save
from raylm.errors import ConfigError, Interrupted
from raylm.perplexity import Score
from raylm.pipeline import earlier, ranking, stores
from raylm.pipeline import sweep as sweeping
from raylm.results import choices, html, trial_table
from raylm.results.sweep import read, sources
from raylm.results.trial_table import TrialRow
from raylm.tracking import MEANING, journal
from raylm.training import launch

SPACE = {
    "train.learning_rate": {"choice": [2e-2, 1e-2]},
    "blocks.block_size": {"grid": [16, 32]},
    "train.warmup_steps": {"uniform": [0.0, 0.2]},
}


def run(experiment, resume="never"):
    """(rows, best row, parent run)"""
    import ray

    resources = cluster.resources(experiment.cluster, ray.cluster_resources())
    plan = plans.resolve(experiment)
    store, _ = stores.prepare(plan.tokens)
    begun = runs.start_or_resume(experiment, "tune", Path(store.path).name, resume)
    parent = summary.start(experiment, begun.directory, begun.name, "tune")
    prepared = plan.with_store(store)
    rows = sweeping.run_trials(prepared, {}, parent, begun, resources)
    best = ranking.export_best_trial(prepared, parent, resources, rows)
    parent.finish()
    assert parent.upload(60)
    return rows, best, parent


@pytest.fixture(scope="module")
def sweep(ray_cluster, tiny, tmp_path_factory):
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    experiment = override(
        tiny(f"tracking.uri={uri}"), {"tune.space": SPACE, "tune.num_samples": 2, "tune.scheduler": "none"}
    )
    return experiment, *run(experiment)


def test_every_point_of_the_grid_is_a_ranked_trial(sweep):
    _, rows, *_ = sweep
    assert sorted(row["settings"]["blocks.block_size"] for row in rows) == [16, 16, 32, 32]
    assert {row["status"] for row in rows} == {"completed"}
    assert {row["tokens"] for row in rows} == {2560}, "the same tokens whatever the block size"
    scores = [row["perplexity"] for row in rows]
    assert scores == sorted(scores)


EARLIER = {
    "train.learning_rate": {"loguniform": [1e-3, 1e-1]},
    "blocks.block_size": {"choice": [16, 32]},
    "train.warmup_steps": {"uniform": [0.0, 0.2]},
}


def observations(sweep, **settings):
    """(observations, the sentence about them) of the fixture's trials for another sweep."""
    experiment, _, _, parent = sweep
    given = {"tune.space": EARLIER, "tune.searcher": "optuna", "tune.prior_sweeps": [parent.directory], **settings}
    found, (note,) = earlier.observations(plans.resolve(override(experiment, given)).prepared)
    return found, note


def test_trials_of_an_earlier_sweep_are_observations(sweep):
    _, rows, _, parent = sweep
    found, note = observations(sweep)
    key = json.dumps
    assert {key(each.settings, sort_keys=True): each.score for each in found} == {
        key(row["settings"], sort_keys=True): row["perplexity"] for row in rows
    }
    assert note == f"tune.prior_sweeps: 4 of 4 trials of {Path(parent.directory).name} are taken as observations"


def test_scores_of_earlier_trials_are_taken_where_this_sweep_compares_trials(sweep):
    found, _ = observations(sweep, **{"tune.scheduler": {"kind": "asha", "grace_tokens": 512}})
    record = sweeps.SweepRecord(sweep[3].directory)
    assert [each.score for each in found] == [
        next(result["best_perplexity"] for result in trial.results if result["tokens"] >= 512)
        for trial in record.trials.values()
    ]


@pytest.mark.parametrize(
    ("settings", "taken", "why"),
    [
        ({"train.max_tokens": 1280}, 0, "not 4 of another budget than 1,280 tokens"),
        ({"train.weight_decay": 0.5, "train.seed": 7}, 0, "not 4 with another train.weight_decay"),
        (
            {"tune.space": {**EARLIER, "blocks.block_size": {"choice": [32, 64]}}},
            2,
            "not 2 outside of tune.space.blocks.block_size",
        ),
        (
            {"tune.space": {key: EARLIER[key] for key in ("train.learning_rate", "train.warmup_steps")}},
            2,
            "not 2 with another blocks.block_size",
        ),
        ({"train.seed": 7}, 4, "observations"),
    ],
)
def test_earlier_trials_that_do_not_compare_are_left_out_and_counted(sweep, settings, taken, why):
    found, note = observations(sweep, **settings)
    assert len(found) == taken
    assert note.endswith(why)


def test_a_sweep_over_other_tokens_is_no_prior(sweep):
    experiment, _, _, parent = sweep
    for directory, told in (
        (parent.directory, "do not compare with those of this sweep: token store"),
        ("x", "x is no"),
    ):
        given = override(experiment, {"tune.searcher": "optuna", "tune.space": {}, "tune.prior_sweeps": [directory]})
        with pytest.raises(ConfigError, match=told) as caught:
            earlier.check(given, "0123456789abcdef")
        assert caught.value.message.startswith("tune.prior_sweeps: ")
        assert directory in caught.value.message


def test_the_best_checkpoint_has_the_score_that_the_sweep_tells(sweep):
    experiment, rows, best, _ = sweep
    store, _ = stores.prepare(plans.resolve_tokens(experiment))
    assert best["perplexity"] == rows[0]["perplexity"]
    score = Score.of(launch.score(best["checkpoint"], store.validation, experiment, None))
    assert score.perplexity == pytest.approx(best["perplexity"], rel=1e-6)


def test_the_experiment_beside_the_best_checkpoint_repeats_the_trial(sweep, train_run):
    _, _, best, _ = sweep
    again, _ = train_run(checkpoint.read_experiment(best["checkpoint"]))
    assert again.best["perplexity"] == best["perplexity"], "to the last bit"


def test_mlflow_has_a_parent_and_a_closed_child_for_every_trial(sweep):
    experiment, rows, best, parent = sweep
    client = MlflowClient(parent.uri)
    children = children_of(parent)
    found = [client.get_run(parent.run_id), *children]
    assert len(found) == 5
    assert {run.data.tags["raylm.trial"] for run in children} == {row["trial_id"] for row in rows}
    assert {run.info.status for run in found} == {"FINISHED"}
    began, ended = ([getattr(run.info, what) for run in children] for what in ("start_time", "end_time"))
    assert min(ended) <= max(began), "a trial's run ends with it, and not with the sweep: two at a time make room"
    keys = {frozenset(run.data.params) for run in children}
    assert len(keys) == 1, "the same keys, or the runs cannot be compared"
    assert next(iter(keys)) - set(found[0].data.params) == set(experiment.tune.space), "which the sweep has no value of"
    for run in children:
        assert {"train/loss", "train/tokens", "eval/perplexity", "best/eval_perplexity"} <= set(run.data.metrics)
        assert all(math.isfinite(value) for value in run.data.metrics.values())
    by_trial = {run.data.tags["raylm.trial"]: run.data.metrics["best/eval_perplexity"] for run in children}
    assert by_trial == {row["trial_id"]: row["perplexity"] for row in rows}
    assert client.get_run(parent.run_id).data.metrics["best/eval_perplexity"] == best["perplexity"]


def test_the_trials_differ_in_mlflow_in_nothing_but_the_swept_settings(sweep):
    experiment, rows, best, parent = sweep
    client = MlflowClient(parent.uri)
    children = [client.get_run(run.info.run_id).data for run in children_of(parent)]
    differing = {key for run in children for key, value in run.params.items() if value != children[0].params[key]}
    # And in what they mean: a model has a position for each token of a block.
    assert differing == {*experiment.tune.space, *MEANING} - {"tokens_per_parameter_without_embeddings"}
    for run in children:
        sizes = {name: run.tags[f"raylm.{name}"] for name in ("model_parameters", "tokens", "steps")}
        assert all(int(size) > 0 for size in sizes.values())
        assert not sizes.keys() & run.params.keys()
        rate, meaning = float(run.params["train.learning_rate"]), {name: float(run.params[name]) for name in MEANING}
        assert meaning["weight_decay_timescale"] == pytest.approx(256 / (rate * 0.01 * 2560), rel=1e-3)
        assert meaning["tokens_per_parameter"] == pytest.approx(2560 / int(sizes["model_parameters"]), rel=1e-3)
        (row,) = [row for row in rows if row["trial_id"] == run.tags["raylm.trial"]]
        assert {name: row[name] for name in MEANING} == meaning
        assert row["evaluation_seconds"] == run.metrics["cost/evaluation_seconds"] > 0
        assert row["saving_seconds"] == run.metrics["cost/saving_seconds"] > 0
    found = client.get_run(parent.run_id).data
    assert found.tags["raylm.best.trial"] == best["trial_id"]
    assert float(found.tags["raylm.best.perplexity"]) == best["perplexity"]
    assert {key: found.tags[f"raylm.best.{key}"] for key in experiment.tune.space} == {
        key: str(value) for key, value in best["settings"].items()
    }
    description = found.tags["mlflow.note.content"]
    assert description.startswith(f"[Compare the trials]({parent.path})")
    assert f"**Best: {best['trial_id']}, perplexity {best['perplexity']:.2f}**" in description
    assert [line.split(" | ")[1] for line in description.splitlines() if line.startswith("| 1")] == [best["trial_id"]]


def test_the_best_trial_of_each_optimizer_is_on_the_page_of_the_sweep(ray_cluster, tiny, tmp_path):
    space = {"train.optimizer": {"grid": ["adamw", "muon"]}, "train.learning_rate": {"grid": [1e-2, 2e-2]}}
    experiment = override(
        tiny(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"), {"tune.space": space, "tune.scheduler": "none"}
    )
    rows, _, parent = run(experiment)
    (found,) = choices.of([TrialRow.from_record(row) for row in rows])
    assert [each.trials for each in found.values] == [2, 2]
    assert [each.best.perplexity for each in found.values] == sorted(each.best.perplexity for each in found.values)
    (sentence,) = found.sentences
    assert "muon" in sentence
    assert "adamw" in sentence
    description = MlflowClient(parent.uri).get_run(parent.run_id).data.tags["mlflow.note.content"]
    assert "**By optimizer**" in description
    assert sentence in description
    assert "By optimizer" in Path(html.build(parent.directory)).read_text()


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_resumes_from_its_checkpoint(ray_cluster, tiny, train_run, tmp_path):
    experiment = override(
        tiny(
            *(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", f"storage={tmp_path}"),
            *("train.max_tokens=102400", "train.eval_every_tokens=10240"),
        ),
        {"tune.space": {"train.learning_rate": {"grid": [1e-2]}}, "tune.num_samples": 1, "tune.scheduler": "none"},
    )
    killed = []

    def kill():
        deadline = time.monotonic() + 100
        while not killed and time.monotonic() < deadline:
            time.sleep(0.05)
            if list(tmp_path.glob("tiny/tune-*/trial_00000/checkpoints/*/manifest.json")):
                every = psutil.Process().children(recursive=True)
                killed.extend(one for one in every if one.name().startswith("ray::ImplicitFu"))
                for one in killed:
                    one.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    (row,), _, parent = run(experiment)
    killer.join()
    assert len(killed) == 1
    assert (row["status"], row["tokens"], row["failure"]) == ("completed", 102400, None)
    (child,) = children_of(parent)
    assert (child.info.status, child.data.tags["raylm.attempts"]) == ("FINISHED", "2")
    untouched, _ = train_run(override(experiment, {"train.learning_rate": 1e-2, "tracking.uri": None}))
    assert row["perplexity"] == untouched.best["perplexity"], "to the last bit"


def test_a_trial_that_diverges_or_cannot_be_built_is_a_row_and_the_others_continue(ray_cluster, tiny, tmp_path):
    experiment = override(
        tiny(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "train.arguments.max_grad_norm=1e30"),
        {
            "tune.space": {
                "train.learning_rate": {"grid": [1e-2, 1e30]},
                "model.config.n_head": {"grid": [2, 3]},  # 16 wide: three heads do not fit
            },
            "tune.num_samples": 1,
            "tune.scheduler": "none",
        },
    )
    rows, best, parent = run(experiment)
    failures = {(row["settings"]["train.learning_rate"], row["settings"]["model.config.n_head"]): row for row in rows}
    assert failures[1e-2, 2]["status"] == "completed"
    assert "diverged" in failures[1e30, 2]["failure"]
    assert failures[1e-2, 3]["status"] == "failed"
    assert [row["perplexity"] is None for row in rows] == [False, True, True, True], "failures rank last"
    assert best["settings"] == {"train.learning_rate": 1e-2, "model.config.n_head": 2}
    statuses = {run.data.tags["raylm.trial"]: run.info.status for run in children_of(parent)}
    assert statuses == {row["trial_id"]: "FAILED" if row["failure"] else "FINISHED" for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "error", "where", "exit_code"),
    [
        (
            ["blocks.isolate_documents=true", "model.config={model_type: opt, hidden_size: 16, num_hidden_layers: 1, "
             "ffn_dim: 16, num_attention_heads: 2, word_embed_proj_dim: 16}"],
            "blocks.isolate_documents=true: model.config.model_type=opt ", "blocks.isolate_documents", 2,
        ),
        (["tune.space={train.learning_rate: {choice: [1e30]}}", "train.arguments.max_grad_norm=1e30"],
         "diverged", None, 4),
    ],
)  # fmt: skip
def test_a_sweep_whose_trials_all_fail_says_if_a_setting_is_wrong(
    command, tiny, tmp_path, settings, error, where, exit_code
):
    save(tiny(f"storage={tmp_path}/runs"), tmp_path / "tiny.yaml")
    ended = command("tune", "--config", f"{tmp_path}/tiny.yaml", "tune.num_samples=2", *settings, "--json")
    answer = json.loads(ended.stdout)
    assert ended.returncode == answer["exit_code"] == exit_code, ended.stderr
    assert answer["error"].startswith("no trial of the sweep has a result: ")
    assert error in answer["error"]
    assert where is None or answer["where"] == where


def asha(experiment, rates, grace_tokens, eta, together=1, **settings):
    """The experiment with a sweep over these learning rates."""
    return override(
        experiment,
        {
            "tune.space": {"train.learning_rate": {"grid": rates}},
            "tune.num_samples": 1,
            "tune.max_concurrent_trials": together,
            "tune.scheduler": {"kind": "asha", "grace_tokens": grace_tokens, "reduction_factor": eta},
            **settings,
        },
    )


def test_asha_pauses_trials_at_rungs_of_tokens_and_promotes_the_best(ray_cluster, tiny, tmp_path):
    """The best ones come last: nobody gets further because it was there first."""
    experiment = asha(
        tiny("train.max_tokens=4096", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"),
        [3e-6, 2e-6, 1e-6, 1e-2, 2e-2],
        grace_tokens=1024,
        eta=4.0,
        together=2,
    )
    rows, best, parent = run(experiment)
    assert best["settings"]["train.learning_rate"] in (1e-2, 2e-2)
    whole = [row for row in rows if row["status"] == "completed"]
    assert {row["tokens"] for row in whole} == {4096}
    assert {(row["status"], row["tokens"]) for row in rows if row not in whole} == {("stopped early", 1024)}
    assert {row["settings"]["train.learning_rate"] for row in rows if row not in whole} >= {3e-6, 2e-6, 1e-6}
    for child in children_of(parent):
        trial_id = child.data.tags["raylm.trial"]
        ends = 1 + promoted(parent.directory).count(trial_id)
        told = statuses(parent, trial_id)
        assert [status for status, _ in told] == ["RUNNING", "FINISHED"] * ends, "while it waits it does not run"
        assert (child.info.status, child.info.end_time) == told[-1]


def test_a_trial_that_waited_ends_as_one_that_ran_through(ray_cluster, tiny, monkeypatch):
    """The best of three goes on twice in the end, each time in the process of the trial before: a new one takes 5 s."""
    processes, told = set(), sweeps.RecordedScheduler.on_trial_result

    def result(self, controller, trial, result):
        processes.add(result["pid"])
        return told(self, controller, trial, result)

    monkeypatch.setattr(sweeps.RecordedScheduler, "on_trial_result", result)
    experiment = asha(tiny("train.max_tokens=4608", "name=waits"), [2e-2, 1e-2, 1e-6], 512, 3.0)
    rows, best, parent = run(experiment)
    assert [(row["status"], row["tokens"]) for row in rows] == [
        ("completed", 4608), ("stopped early", 512), ("stopped early", 512)
    ]  # fmt: skip
    assert promoted(parent.directory) == [best["trial_id"]] * 2
    assert len(processes) == 1
    alone = {**best["settings"], "train.learning_rate": {"grid": [best["settings"]["train.learning_rate"]]}}
    through, _, untouched = run(
        override(experiment, {"tune.space": alone, "tune.scheduler": "none", "name": "through"})
    )
    kept = ("perplexity", "bits_per_byte", "best_step", "tokens")
    assert [through[0][key] for key in kept] == [rows[0][key] for key in kept]
    ours, theirs = (
        tracking.Run(f"{each.directory}/{trial_id}").metric_history()
        for each, trial_id in ((parent, best["trial_id"]), (untouched, "trial_00000"))
    )
    for name in ("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "eval/perplexity"):
        assert ours[name], name
        assert [point[:2] for point in ours[name]] == [point[:2] for point in theirs[name]], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asha", "hyperband"])
def test_a_sweep_of_which_trials_wait_stops_when_it_is_asked_to(ray_cluster, tiny, monkeypatch, kind):
    """Tune would wait for those that nobody lets go on any more."""
    experiment = asha(tiny("train.max_tokens=2560", f"name=stops-{kind}"), [1e-6, 2e-2, 2e-6, 1e-2], 512, 4.0)
    experiment = override(experiment, {"tune.scheduler.kind": kind})
    wrote, seen = sweeps.SweepRecord.result, itertools.count(1)

    def result(self, *arguments):
        wrote(self, *arguments)
        if next(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(sweeps.SweepRecord, "result", result)
        with pytest.raises(Interrupted, match="trials left"):
            run(experiment)
    gc.collect()  # the error's frames hold the sweep's lock
    rows, *_ = run(experiment, "must")
    assert [row["status"] for row in rows].count("completed") >= 1
    assert len(rows) == 4
    if kind == "asha":
        assert [row["tokens"] for row in rows] == [2560, 512, 512, 512]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_two_workers_pause_and_resume(ray_cluster, tiny):
    """What the workers of one that waits had reserved is free for the next: there is room for one group only."""
    import ray

    sizes = ("train.max_tokens=8192", "train.eval_every_tokens=4096", "cluster.num_workers=2")
    rows, _, parent = run(asha(tiny(*sizes, "name=groups"), [2e-2, 1e-6], 4096, 2.0))
    assert [(row["trial_id"], row["status"], row["tokens"]) for row in rows] == [
        ("trial_00000", "completed", 8192), ("trial_00001", "stopped early", 4096)
    ]  # fmt: skip
    assert promoted(parent.directory) == ["trial_00000"]
    assert [result["tokens"] for result in sweeps.read(parent.directory)["trial_00000"].results] == [4096, 8192]
    groups = ray.util.placement_group_table().values()
    assert [group for group in groups if group["state"] != "REMOVED"] == []


class Died(Exception):
    pass


def attempts(directory):
    """How often a process began to work on a trial."""
    return sum(trial.attempts for trial in sweeps.read(str(directory)).values())


def statuses(parent, trial_id):
    """(status, time) of a trial's run, as its journal has them."""
    records, _ = journal.json_lines(f"{parent.directory}/{trial_id}", journal.RUN_FILE).read()
    return [(record["status"], record["time"]) for record in records if "status" in record]


def promoted(directory):
    return [event["promoted"] for event in sweeps.SweepRecord(str(directory)).events if "promoted" in event]


def dies_after(monkeypatch, results):
    """Have the sweep's own process die when so many results were written down in it."""
    wrote = sweeps.SweepRecord.result
    seen = itertools.count(1)
    left = [results]

    def result(self, *arguments):
        wrote(self, *arguments)
        left[0] = results - next(seen)

    def stop_all(self):
        if left[0] <= 0:
            raise Died
        return False

    monkeypatch.setattr(sweeps.SweepRecord, "result", result)
    monkeypatch.setattr(sweeps.SweepStopper, "stop_all", stop_all)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "searcher"),
    [
        ("random", {}),
        ("optuna", {"tune.searcher": "optuna"}),
        ("prior", {"tune.points": "suggested", "tune.prior": {"train.learning_rate": 1e-3}}),
    ],
)
def test_a_sweep_that_died_twice_ends_as_if_it_had_not(ray_cluster, tiny, monkeypatch, name, searcher):
    experiment = override(
        tiny("train.max_tokens=2560", f"name={name}"),
        {
            "tune.space": {"train.learning_rate": {"loguniform": [1e-4, 1e-1]}},
            "tune.num_samples": 6,
            **searcher,
            "tune.max_concurrent_trials": 1,
            "tune.scheduler": {"kind": "asha", "grace_tokens": 512, "reduction_factor": 2.0},
        },
    )
    whole, _, untouched = run(experiment)
    for resume in ("never", "must"):
        with monkeypatch.context() as patch:
            dies_after(patch, 6)
            with pytest.raises(Died):
                run(experiment, resume)
    rows, _, parent = run(experiment, "must")
    assert {row["status"] for row in rows} == {"completed", "stopped early"}
    kept = ("trial_id", "status", "perplexity", "bits_per_byte", "tokens", "settings", "best_step")
    assert [{key: row[key] for key in kept} for row in rows] == [{key: row[key] for key in kept} for row in whole]
    assert attempts(parent.directory) <= attempts(untouched.directory) + 2, "what was over or waited was not run again"
    assert promoted(parent.directory) == promoted(untouched.directory) != []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_built_in_sweep_killed_three_times_ends_as_if_it_had_not(command, start_command, tmp_path):
    """By SIGKILL, in a trial, at the beginning of one and at the end of one, on the command line."""
    fewer = ["train.max_tokens=73728", "train.eval_every_tokens=8192", "tune.scheduler.grace_tokens=8192"]
    arguments = [*fewer, "tune.num_samples=6", "tune.max_concurrent_trials=1", "eval.max_tokens=20000"]

    def place(name):
        return [f"storage={tmp_path}/{name}", f"tracking.uri=sqlite:///{tmp_path}/{name}.db"]

    def happened(what):
        files = (tmp_path / "killed").glob("tiny/tune-*/events.jsonl")
        return sum(f'"{what}"' in line for file in files for line in file.read_text().splitlines())

    whole = command("tune", "--json", *arguments, *place("whole"))
    assert whole.returncode == 0, whole.stderr
    for what, number in (("result", 4), ("added", 5), ("finished", 1)):
        started = start_command("tune", *arguments, *place("killed"))
        while happened(what) < number:
            assert started.process.is_alive(), started.wait().stderr
            time.sleep(0.02)
        started.kill()
        started.wait()
    killed = command("tune", "--json", *arguments, *place("killed"))
    assert killed.returncode == 0, killed.stderr
    assert "resuming: 1 trial finished" in killed.stderr
    ours, theirs = json.loads(killed.stdout), json.loads(whole.stdout)
    kept = ("trial_id", "status", "perplexity", "bits_per_byte", "tokens", "settings", "best_step", "failure")
    assert [{key: row[key] for key in kept} for row in ours["trials"]] == [
        {key: row[key] for key in kept} for row in theirs["trials"]
    ]
    assert ours["best"]["perplexity"] == theirs["best"]["perplexity"]
    (untouched,), (directory,) = ((tmp_path / name).glob("tiny/tune-*") for name in ("whole", "killed"))
    assert attempts(directory) <= attempts(untouched) + 3, "nothing that was over, or waited, was run again"
    assert promoted(directory) == promoted(untouched)
    client = MlflowClient(f"sqlite:///{tmp_path}/killed.db")
    found = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(found) == 7, "one for each trial, and the sweep"
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in found:
        for key in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, key)]
            assert len(steps) == len(set(steps)), f"{key} has a point twice"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_trials_leave_nothing_behind(ray_cluster, tiny):
    """No actors, placement groups, open files, temporary directories, threads or memory; two of them cannot run."""
    import psutil
    import ray

    def left():
        gc.collect()
        me = psutil.Process()
        state = ray._private.state
        alive = [actor for actor in state.actors().values() if actor["State"] not in ("DEAD", 4)]
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
        scratch = [path for path in Path(tempfile.gettempdir()).glob("raylm-*") if path.is_dir()]
        return {
            "actors": len(alive),
            "groups": len(groups),
            "files": me.num_fds(),
            "temporary": len(scratch),
            "threads": me.num_threads(),
            "memory": me.memory_info().rss / 1e6,
        }

    def experiment(name, rates):
        return override(
            tiny(f"name={name}", "train.max_tokens=512", "train.arguments.max_grad_norm=1e30"),
            {
                "tune.space": {"train.learning_rate": {"grid": rates}, "train.batch_tokens": {"choice": [256]}},
                "tune.num_samples": 1,
            },
        )

    run(experiment("warm", [1e-2, 2e-2]))
    before = left()
    rates = [1e-3 * number for number in range(1, 49)]
    rows, *_ = run(experiment("fifty", [*rates, 1e30, 2e30]))
    after = left()
    print(before, after)
    assert [row["status"] for row in rows].count("failed") == 2
    assert len(rows) == 50
    for what in ("actors", "groups", "temporary"):
        assert after[what] <= before[what], (before, after)
    for what in ("files", "threads"):  # one a trial would be 50; pools grow a little
        assert after[what] <= before[what] + 10, (before, after)
    assert after["memory"] <= before["memory"] + 60, (before, after)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_of_many_trials_has_the_memory_of_few(ray_cluster, tiny, monkeypatch):
    """Of 7.5 million parameters, 120 MB with gradients and AdamW; the third had 1.4 GB once, and the twelfth 3.4 GB."""
    held, told = {}, sweeps.RecordedScheduler.on_trial_result

    def result(self, controller, trial, result):
        held[trial.trial_id] = (result["pid"], psutil.Process(result["pid"]).memory_info().rss)
        return told(self, controller, trial, result)

    monkeypatch.setattr(sweeps.RecordedScheduler, "on_trial_result", result)
    sizes = ("n_layer=6", "n_head=4", "n_embd=320")
    experiment = tiny(*(f"model.config.{size}" for size in sizes), "train.max_tokens=512", "eval.max_tokens=500")
    rates = [1e-3 * number for number in range(1, 13)]
    rows, *_ = run(
        override(
            experiment,
            {
                "tune.space": {"train.learning_rate": {"grid": rates}},
                "tune.max_concurrent_trials": 1,
                "tune.scheduler": "none",
            },
        )
    )
    assert {row["status"] for row in rows} == {"completed"}
    assert len({process for process, _ in held.values()}) == 1
    memory = [rss for _, rss in held.values()]
    assert len(memory) == 12
    assert max(memory) < 1.3 * memory[2], memory


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "trials", "unit"), [(1, 4, 512), (2, 2, 8192)])
def test_a_population_resumes_from_its_best_with_other_settings(ray_cluster, tiny, workers, trials, unit):
    sizes = (f"train.max_tokens={10 * unit}", f"train.eval_every_tokens={unit}")
    experiment = override(
        tiny(*sizes, f"name=population-{workers}"),
        {
            "tune.space": {"train.learning_rate": {"loguniform": [1e-5, 1e-1]}},
            "tune.num_samples": trials,
            "tune.scheduler": {"kind": "pbt", "every_tokens": 2 * unit},
            "cluster.num_workers": workers,
            "cluster.cpus_per_worker": 1 / workers,
        },
    )
    rows, best, parent = run(experiment)
    assert {row["status"] for row in rows} == {"completed"}
    events = sweeps.SweepRecord(parent.directory).events
    changes = [event for event in events if "changed" in event]
    assert changes, "somebody was far behind"
    begun = {event["added"]: event["settings"] for event in events if "added" in event}
    for change in changes:
        assert change["donor"] != change["changed"]
    found = sweeps.read(parent.directory)
    for trial_id, change in {event["changed"]: event for event in changes}.items():
        assert found[trial_id].settings == change["settings"] != begun[trial_id]
        adopted = json.loads(Path(parent.directory, trial_id, "adopted.json").read_text())
        assert adopted == change
        if change["tokens"] == 10 * unit:  # with other settings there was nothing left to train
            assert change["settings"] == found[change["donor"]].settings
            del found[trial_id]
    schedules = [
        (
            tracking.Run(f"{parent.directory}/{trial_id}").metric_history()["train/learning_rate"][-1][1]
            / trial.settings["train.learning_rate"]
        )
        for trial_id, trial in found.items()
    ]
    assert schedules == pytest.approx([schedules[0]] * len(found)), "the rates are those of each trial's last settings"
    assert best["perplexity"] == min(row["perplexity"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["median", "hyperband"])
def test_other_schedulers(ray_cluster, tiny, kind):
    experiment = override(
        tiny("train.max_tokens=2560", f"name={kind}"),
        {
            "tune.space": {"train.learning_rate": {"grid": [2e-2, 1e-2, 5e-2, 3e-2, 1e-6, 2e-6]}},
            "tune.num_samples": 1,
            "tune.scheduler": {"kind": kind, "grace_tokens": 512},
        },
    )
    rows, best, _ = run(experiment)
    assert [row["status"] for row in rows].count("stopped early") >= 1
    assert best["settings"]["train.learning_rate"] >= 1e-2
    assert len(rows) == 6


@pytest.mark.slow
def test_trials_of_two_workers_take_the_same_road(ray_cluster, tiny):
    experiment = override(
        tiny("cluster.num_workers=2"),
        {"tune.space": {"blocks.block_size": {"grid": [16, 32]}}, "tune.num_samples": 1, "tune.scheduler": "none"},
    )
    rows, best, _ = run(experiment)
    assert [row["status"] for row in rows] == ["completed", "completed"]
    store, _ = stores.prepare(plans.resolve_tokens(experiment))
    score = Score.of(launch.score(best["checkpoint"], store.validation, experiment, None))
    assert score.perplexity == pytest.approx(best["perplexity"], rel=1e-6)


def test_a_plan_counts_trials_and_writes_nothing(tiny, tmp_path):
    experiment = override(tiny(f"storage={tmp_path}"), {"tune.space": SPACE, "tune.num_samples": 3})
    record = sweeping.resolve(experiment).record()
    assert record["trials"] == 6, "three draws of each of two points of the grid"
    assert record["most_tokens"] == 6 * 2560
    assert list(Path(tmp_path).iterdir()) == []


def test_cpus_are_divided_by_the_trials_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr(cluster.capacity, "cpus_here", lambda: 12)
    experiment = override(tiny("cluster.cpus_per_worker=auto"), {"tune.space": SPACE, "tune.num_samples": 3})

    def cpus(plan, **settings):
        changed = override(experiment, {key.replace("__", "."): value for key, value in settings.items()})
        return plan(changed).record()["resources_per_worker"]["CPU"]

    assert cpus(sweeping.resolve) == 2, "of six trials"
    assert cpus(sweeping.resolve, tune__max_concurrent_trials=2) == 6
    assert cpus(sweeping.resolve, cluster__num_workers=2) == 1
    assert cpus(sweeping.resolve, tune__num_samples=100) == 1
    assert cpus(plans.resolve) == 12


def test_a_sweep_over_nothing_is_refused(tiny):
    with pytest.raises(ConfigError, match="tune.space is empty"):
        sweeping.resolve(override(tiny(), {"tune.space": {}}))


def test_a_value_that_only_the_model_can_refuse_is_refused_before_ray_starts(tiny):
    experiment = override(
        tiny("model.config.n_positions=32"), {"tune.space": {"blocks.block_size": {"choice": [32, 64]}}}
    )
    with pytest.raises(ConfigError, match=r"tune.space.blocks.block_size: value 64: .*at most 32"):
        sweeping.resolve(experiment)


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ({"eval.max_tokens": {"choice": [100, 200]}}, "eval is one for a whole sweep"),
        ({"train.arguments.max_steps": {"choice": [1, 2]}}, "is derived by raylm; set train.max_tokens instead"),
        ({"train.arguments.optimm": {"choice": ["sgd"]}}, "did you mean optim"),
    ],
)
def test_what_would_make_trials_incomparable_cannot_be_swept(tiny, setting, fault, tmp_path):
    file = tmp_path / "sweep.yaml"
    save(tiny(), file)
    key, sampler = next(iter(setting.items()))
    with pytest.raises(ConfigError, match=fault):
        sweeping.resolve(load(file, [f"tune.space={{{key}: {sampler}}}"]))


@pytest.mark.parametrize(
    ("eta", "save_every_tokens", "saves"),
    [
        (3.0, None, [1, 3]),  # and not 9, a step before the end
        (2.5, None, [1, 2, 5]),
        (1.1, None, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3.0, 120_000, [3]),
    ],
)
def test_rungs_lie_where_trials_are_saved(eta, save_every_tokens, saves):
    """Evaluated every 39,936 tokens, a rung at 40,000 would be seen at 79,872."""
    section = {"batch_tokens": 512, "max_tokens": 360_000, "eval_every_tokens": 40_000}
    found = budget.compute(
        TrainConfig(**section, save_every_tokens=save_every_tokens),
        block_size=64,
        num_workers=1,
        epoch_examples=9999,
    )
    section = TuneConfig(scheduler=SchedulerConfig(grace_tokens=40_000, reduction_factor=eta))
    assert sweeps.scheduler(section, found, "best_perplexity").rungs == [number * 39_936 for number in saves]


def test_the_ends_of_a_range_stand_for_it():
    space = {"a": {"randint": [1, 9]}, "b": {"quniform": [0, 1, 0.5]}, "c": {"grid": [3, 4]}}
    found = {key: [each[key] for each in corners(key, sampler)] for key, sampler in space.items()}
    assert found == {"a": [1, 8], "b": [0, 1], "c": [3, 4]}


def children_of(parent):
    client = MlflowClient(parent.uri)
    found = client.search_runs([client.get_run(parent.run_id).info.experiment_id])
    return [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.run_id]


def test_the_trials_that_none_beats_in_both_are_marked():
    rows = [
        {
            "trial_id": name,
            "perplexity": score,
            "bits_per_byte": score,
            "tokens": 8,
            "status": "completed",
            "settings": {},
        }
        for name, score in (("small", 9.0), ("better", 7.0), ("larger", 7.0), ("failed", None))
    ]
    ranking.mark_pareto(rows, "parameters", {"small": [9.0, 10], "better": [7.0, 20], "larger": [7.0, 30]})
    assert {row["trial_id"]: row["pareto"] for row in rows} == {
        "small": True, "better": True, "larger": False, "failed": False
    }  # fmt: skip
    assert [row["parameters"] for row in rows] == [10, 20, 30, None]
    table = trial_table.columns([TrialRow.from_record(row) for row in rows], "perplexity")
    assert table["parameters"].cells == ["10", "20", "30", "-"]
    assert table["pareto"].cells == ["✓", "✓", "", ""]


@pytest.mark.parametrize(
    ("limit", "what"), [("null", "the whole"), ("10000000", "the whole"), ("64", "the first 64 validation tokens")]
)
def test_a_limit_that_nothing_reaches_is_none(ray_cluster, tiny, limit, what):
    experiment = tiny(f"eval.max_tokens={limit}")
    store, _ = stores.prepare(plans.resolve_tokens(experiment))
    assert summary.scored(experiment, store)["scored_on"].startswith(what)


def test_a_sweep_over_a_mixture_of_sources_has_one_store_and_scores_each_source(ray_cluster, tiny, tmp_path):
    (tmp_path / "code.txt").write_text("\n\n".join(f"def f{n}(x): return x + {n * n}" for n in range(300)))
    words = tiny().corpus.paths[0]
    experiment = override(
        tiny(f"storage={tmp_path}", "corpus.separator=\\n\\n"),
        {
            "corpus.paths": {"words": [words], "code": [f"{tmp_path}/code.txt"]},
            "blocks.mixture": {"words": 1.0, "code": 1.0},
            "tune.space": {"blocks.mixture.words": {"grid": [0.25, 3]}},
            "tune.metric": {"words": 1.0, "code": 3.0},
            "tune.scheduler": "none",
        },
    )
    rows, best, parent = run(experiment)
    assert [row["status"] for row in rows] == ["completed", "completed"]
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    scores = {}
    for row in rows:
        history = parent.trial(row["trial_id"]).metric_history()
        last = {name: points[-1][1] for name, points in history.items() if name.startswith("validation/")}
        assert set(last) == {f"validation/{s}/{m}" for s in ("words", "code") for m in ("perplexity", "bits_per_byte")}
        assert min(last["validation/words/perplexity"], last["validation/code/perplexity"]) < row["perplexity"]
        weighted = [
            (math.log(words) + 3 * math.log(code)) / 4
            for (_, words), (_, code) in zip(
                *(history[f"validation/{source}/perplexity"] for source in ("words", "code")), strict=True
            )
        ]
        assert row["weighted_nll"] == pytest.approx(min(weighted)) == history["best/eval_weighted_nll"][-1][1]
        assert [value for _, value in history["eval/weighted_nll"]] == pytest.approx(weighted)
        scores[row["settings"]["blocks.mixture.words"]] = last
    few, many = scores[0.25], scores[3]
    assert few["validation/code/perplexity"] < many["validation/code/perplexity"]
    assert few["validation/words/perplexity"] > many["validation/words/perplexity"]
    assert best["weighted_nll"] == min(row["weighted_nll"] for row in rows)
    table = trial_table.columns([TrialRow.from_record(row) for row in rows], "perplexity")
    assert table["weighted_nll"].cells[0] == f"{best['weighted_nll']:.2f}"
    found = sources(read(parent.directory))
    passes = {row["settings"]["blocks.mixture.words"]: found[row["trial_id"]]["words"][1] for row in rows}
    assert float(passes[3]) / float(passes[0.25]) == pytest.approx((3 / 4) / (0.25 / 1.25), rel=0.01)
    page = Path(html.build(parent.directory)).read_text()
    for trial_id, parts in found.items():
        assert set(parts) == {"words", "code"}
        best_of = min(value for _, value in parent.trial(trial_id).metric_history()["validation/code/perplexity"])
        assert parts["code"][0] >= best_of
        assert f"<td class=number>{parts['code'][0]:.2f}</td>" in page
    assert "<th class=number>passes over words</th>" in page


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tune.metric": {"books": 1.0}}, "neither names any; got books"),
        ({"eval.paths": {"some": ["a"]}, "tune.metric": {"books": 1.0}}, "of sets of eval.paths: some; got books"),
        ({"eval.paths": {"some": ["a"]}, "tune.metric": {"some": 1.0}, "tune.repeats": 2}, "tune.repeats: must be 1"),
    ],
)
def test_weights_of_what_is_not_scored_are_refused(tiny, settings, told):
    with pytest.raises(ConfigError, match=told):
        override(tiny(), settings)


# More trials after the end -------------------------------------------------------------------------------------------

RATES = {"random": {"loguniform": [1e-3, 1e-1]}, "grid": {"grid": [1e-3, 3e-3, 1e-2, 3e-2]}}


def swept(experiment, name, **settings):
    """The experiment with a sweep over learning rates, without early stopping."""
    given = {"tune.scheduler": "none", "tune.space": {"train.learning_rate": RATES["random"]}}
    return override(experiment, {"name": name, **given, **{key.replace("__", "."): v for key, v in settings.items()}})


def sweep_again(experiment):
    return sweeping.run(sweeping.resolve(experiment))


def ranks(result):
    return [(row.trial_id, row.status, row.perplexity, row.settings) for row in result.trials]


def model_bytes(experiment, result):
    """Checkpoint -> SHA-256 of the model in it, of all trials."""
    directory = Path(runs.directory_of(experiment), result.sweep)
    files = [*directory.glob("trial_*/checkpoints/*/model.safetensors"), *directory.glob("model/model.safetensors")]
    assert files
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_an_extended_sweep_has_the_trials_bytes_and_ranks_of_one_of_as_many(ray_cluster, tiny, tmp_path, kind):
    few, many = {"random": (2, 4), "grid": (RATES["grid"]["grid"][:2], RATES["grid"]["grid"])}[kind]
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"

    def experiment(name, count):
        if kind == "random":
            return swept(tiny(uri), f"{name}-{kind}", tune__num_samples=count)
        return swept(tiny(uri), f"{name}-{kind}", tune__space={"train.learning_rate": {"grid": count}})

    first = sweep_again(experiment("extended", few))
    second = sweep_again(experiment("extended", many))
    at_once = sweep_again(experiment("whole", many))
    assert (second.sweep, second.mlflow_run_id) == (first.sweep, first.mlflow_run_id)
    assert len(first.trials) == 2
    assert len(ranks(second)) == 4
    assert ranks(second) == ranks(at_once)
    assert model_bytes(experiment("extended", many), second) == model_bytes(experiment("whole", many), at_once)
    again = sweep_again(experiment("extended", many))
    assert (again.best, again.record()) == (second.best, second.record())


def test_the_command_of_a_finished_sweep_says_so_and_starts_nothing(ray_cluster, tiny, tmp_path, capsys):
    experiment = swept(tiny(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"), "finished", tune__num_samples=2)
    first = sweep_again(experiment)
    (directory,) = Path(runs.directory_of(experiment)).iterdir()
    before = {file: file.stat().st_mtime_ns for file in directory.rglob("*") if file.name != "lock"}
    capsys.readouterr()
    second = sweep_again(experiment)
    assert second.record() == first.record()
    assert "the 2 trials of these settings have finished. To extend it, give more with" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in directory.rglob("*") if file.name != "lock"} == before
    assert list(Path(runs.directory_of(experiment)).iterdir()) == [directory]


@pytest.mark.parametrize("keep", ["all", "best"])
def test_a_trial_that_asha_stopped_is_promoted_when_the_sweep_is_extended(ray_cluster, tiny, tmp_path, capsys, keep):
    """Of 3 trials the best is promoted, of 6 the best two to the second rung, as in a sweep of 6."""

    def experiment_of(name, rates):
        found = asha(tiny("train.max_tokens=2560", f"name={name}-{keep}"), rates, 512, 3.0)
        return override(found, {"tune.keep": keep})

    experiment = experiment_of("promoted", [1e-2, 8e-3, 1e-6])
    first = sweep_again(experiment)
    assert sorted(row.tokens for row in first.trials) == [512, 512, 2560]
    second_best = first.trials[1].trial_id
    rates = [1e-2, 8e-3, 1e-6, 2e-6, 3e-6, 4e-6]
    capsys.readouterr()
    second = sweep_again(override(experiment, {"tune.space": {"train.learning_rate": {"grid": rates}}}))
    told = capsys.readouterr().err
    assert "extended by 3 trials: 3 trials finished, 0 in progress" in told
    assert ("one that is promoted trains from its start again" in told) is (keep == "best")
    rows = {row.trial_id: (row.status, row.tokens) for row in second.trials}
    assert rows[second_best] == ("stopped early", 1536)
    assert sorted(tokens for _, tokens in rows.values()) == [512] * 4 + [1536, 2560]
    assert ranks(second) == ranks(sweep_again(experiment_of("at-once", rates)))


@pytest.mark.slow
def test_a_key_that_is_added_to_the_space_is_one_of_the_trials_so_far(ray_cluster, tiny, tmp_path):
    uri = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    space = {"train.learning_rate": RATES["random"]}
    first = sweep_again(swept(tiny(uri), "key", tune__num_samples=2))
    wider = {**space, "train.warmup_steps": {"uniform": [0.0, 0.5]}}
    second = sweep_again(swept(tiny(uri), "key", tune__num_samples=3, tune__space=wider))
    assert second.sweep == first.sweep
    settings = {row.trial_id: row.settings for row in second.trials}
    assert [settings[f"trial_{n:05d}"]["train.warmup_steps"] for n in range(2)] == [tiny().train.warmup_steps] * 2
    assert 0 < settings["trial_00002"]["train.warmup_steps"] < 0.5
    assert {row.trial_id: row.perplexity for row in first.trials}.items() <= {
        row.trial_id: row.perplexity for row in second.trials
    }.items()


def test_a_choice_that_loses_an_entry_is_refused_where_the_searcher_needs_it(ray_cluster, tiny):
    first = {"train.learning_rate": {"choice": [1e-2, 2e-2]}}
    other = {"train.learning_rate": {"choice": [3e-2]}}
    settings = {"tune__searcher": "optuna", "tune__num_samples": 1}
    sweep_again(swept(tiny(), "entry", tune__space=first, **settings))
    with pytest.raises(ConfigError, match="tune.searcher=optuna cannot place trial_00000 in it"):
        sweep_again(swept(tiny(), "entry", tune__space=other, **settings | {"tune__num_samples": 2}))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["median", "hyperband", "pbt"])
def test_a_finished_sweep_is_extended_on_tune_with_the_other_schedulers(ray_cluster, tiny, kind, capsys):
    settings = {"tune__scheduler": kind, "tune__searcher": "optuna"} if kind == "median" else {"tune__scheduler": kind}
    first = sweep_again(swept(tiny(), f"extended-{kind}", tune__num_samples=3, **settings))
    second = sweep_again(swept(tiny(), f"extended-{kind}", tune__num_samples=6, **settings))
    assert second.sweep == first.sweep
    assert len(second.trials) == 6
    assert {row.trial_id: row.perplexity for row in first.trials}.items() <= {
        row.trial_id: row.perplexity for row in second.trials
    }.items()
    assert ("of their own" in capsys.readouterr().err) is (kind != "median")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_repeats_are_chosen_anew_when_a_sweep_is_extended(ray_cluster, tiny):
    """Repeats of settings that are still among the best are not trained again."""

    def experiment(rates):
        space = {"train.learning_rate": {"grid": rates}}
        return swept(tiny(), "repeats", tune__space=space, tune__repeats=2)

    first = sweep_again(experiment([1e-2, 1e-6]))
    assert [row.repeat_of for row in first.trials].count("trial_00000") == 2
    second = sweep_again(experiment([1e-2, 1e-6, 2e-2]))
    assert second.sweep == first.sweep
    repeated = {each.trial_id: each.runs for each in second.repeats.settings}
    newest = {row.settings["train.learning_rate"]: row.trial_id for row in second.trials if row.repeat_of is None}[2e-2]
    assert repeated == {"trial_00000": 2, "trial_00001": 2, newest: 2}
    record = sweeps.SweepRecord(f"{runs.directory_of(experiment([1e-2]))}/{second.sweep}")
    assert sorted(record.repeated) == sorted(["trial_00000", newest])
    assert len(second.trials) == 3 + 6


# Commands of another terminal ----------------------------------------------------------------------------------------


def wait_for(condition, started, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert started.process.is_alive(), started.wait().stderr
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_running_sweep_takes_commands_of_another_terminal(command, start_command, tiny, tmp_path):
    long = (f"storage={tmp_path}/runs", "train.max_tokens=409600", "train.eval_every_tokens=4096")
    save(swept(tiny(*long), "asked", tune__num_samples=2), tmp_path / "tiny.yaml")
    argv = ["--config", f"{tmp_path}/tiny.yaml", "tune.max_concurrent_trials=1"]
    started = start_command("tune", "--json", *argv)
    place = tmp_path / "runs" / "asked"

    def events(kind):
        lines = [line for file in place.glob("tune-*/events.jsonl") for line in file.read_text().splitlines()]
        return [event for event in map(json.loads, lines) if kind in event]

    wait_for(lambda: events("result"), started)
    told = command("tune", "--status", "--json", *argv)
    assert told.returncode == 0, told.stderr
    status = json.loads(told.stdout)
    assert (status["state"], [row["status"] for row in status["trials"]]) == ("running", ["running"])
    assert "1 running, 1 not started" in status["summary"]
    (directory,) = place.glob("tune-*")
    added = command("tune", "--add-trials", "1", "train.learning_rate=0.02", str(directory))
    assert (added.returncode, added.stdout) == (0, f"{directory}: 1 trial more\n"), added.stderr
    stopped = command("tune", "--stop-trial", "trial_00000", *argv)
    assert stopped.returncode == 0, stopped.stderr
    wait_for(lambda: events("finished"), started)
    assert [(event["finished"], event["status"]) for event in events("finished")] == [("trial_00000", "stopped early")]
    started.kill()
    started.wait()
    later = command("tune", "--add-trials", "1", *argv)
    assert "as soon as it resumes: none works on it now; " in later.stdout
    ended = command("tune", "--json", *argv)
    assert ended.returncode == 0, ended.stderr
    rows = {row["trial_id"]: row for row in json.loads(ended.stdout)["trials"]}
    assert sorted(rows) == [f"trial_{number:05d}" for number in range(4)]
    assert [row["settings"]["train.learning_rate"] for row in rows.values()].count(0.02) == 1
    assert {row["status"] for name, row in rows.items() if name != "trial_00000"} == {"completed"}
    assert rows["trial_00000"]["tokens"] < 409600
    over = command("tune", "--stop-trial", "trial_00001", str(directory))
    assert (over.returncode, over.stderr.count("\n")) == (2, 1)
    assert f"{directory}: trial_00001 is over: completed" in over.stderr


@pytest.mark.parametrize(
    ("argv", "told", "exit_code"),
    [
        (["--stop-trial", "trial_00009"], "has no such trial; did you mean trial_0000", 2),
        (["--stop-trial", "x"], "has no such trial; its trials are trial_00000, trial_00001", 2),
        (["--stop-trial", "00001"], "trial_00001 is over: completed", 2),
        (["--add-trials", "0"], "Invalid value for '--add-trials': ", 2),
        (["--add-trials", "1", "train.seed=3"], "must have keys of tune.space, got train.seed", 2),
        (["--add-trials", "1", "train.learning_rate=fast"], "train.learning_rate", 2),
        (["--status", "--add-trials", "1"], "give one of --status, --stop-trial and --add-trials", 2),
        (["--status", "nothing"], "nothing is no directory", 5),
        (["--status", "name=nothing"], "there is no sweep in", 5),
    ],
)
def test_what_cannot_be_asked_of_a_sweep_is_one_clear_line(recorded, command, argv, told, exit_code):
    _, directory = recorded
    ended = command("tune", "--config", f"{directory}/experiment.yaml", *argv)
    assert ended.returncode == exit_code, ended.stderr
    assert told in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not (directory / "requests").exists()


@pytest.fixture(scope="module")
def recorded(tiny, tmp_path_factory):
    """(experiment, directory) of a sweep of which two trials have ended; nothing was trained."""
    experiment = swept(tiny(f"storage={tmp_path_factory.mktemp('recorded')}"), "recorded", tune__num_samples=3)
    active = runs.start_or_resume(experiment, "tune", "abc", "never")
    summary.start(experiment, active.directory, active.name, "tune").log_text(dump(experiment), "experiment.yaml")
    record = sweeps.SweepRecord(active.directory)
    for number in range(2):
        record.add(f"trial_{number:05d}", {"train.learning_rate": 1e-3 * (number + 1)})
        record.start(f"trial_{number:05d}")
        scores = {"perplexity": 9.0 - number, "bits_per_byte": 1.0}
        best = {f"best_{name}": value for name, value in scores.items()}
        record.result(f"trial_{number:05d}", {"step": 5, "tokens": 2560, **scores, **best, "best_step": 5})
        record.finish(f"trial_{number:05d}", "completed")
    active.lock.close()
    return experiment, Path(active.directory)


def test_the_status_of_a_sweep_on_which_no_command_works(recorded, command):
    _, directory = recorded
    ended = command("tune", "--status", str(directory))
    assert ended.returncode == 0, ended.stderr
    first, *table = ended.stdout.splitlines()
    assert first.startswith(
        f"{directory}: interrupted; 2 completed, 1 not started; 5,120 of at most 7,680 tokens; best"
    )
    assert len([line for line in table if "completed" in line]) == 2
