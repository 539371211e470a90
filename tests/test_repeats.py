"""The best settings are trained again with other seeds, and these runs say which settings are better."""

import itertools
import json
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from raylm import api, config, runs, sweep
from raylm.console import format_p
from raylm.errors import ConfigError
from raylm.pipeline import sweep as sweeping
from raylm.results import repeats
from raylm.results import sweep as reading
from raylm.results.trial_table import RankedTable, TrialRow
from raylm.sweep import Trial

# Which trials are repeated, and how --------------------------------------------------------------------------------


def trials(**settings):
    return [Trial(name, {"train.learning_rate": value}) for name, value in settings.items()]


@pytest.mark.parametrize(
    ("ranked", "as_good", "chosen"),
    [
        (trials(a=1, b=2, c=3, d=4), "", "ab"),
        (trials(a=1, b=2, c=3, d=4), "c", "ac"),
        (trials(a=1, b=2, c=3, d=4), "bcd", "abc"),
        (trials(a=1, b=1, c=3), "bc", "ac"),
        (trials(a=1, b=1, c=3), "b", "ac"),
        (trials(a=1, b=1), "b", ""),
        ([], "", ""),
    ],
    ids=["the second best", "a tie", "three at most", "settings once", "a tie with itself", "one settings", "nothing"],
)
def test_the_best_settings_and_those_as_good_are_repeated(ranked, as_good, chosen):
    assert sweep.repeats.choose(ranked, {*as_good}) == [*chosen]


def test_seeds_depend_on_the_seed_of_the_sweep_and_the_number_alone():
    section = config.TrainConfig(seed=3)
    first, second = (sweep.repeats.seeds(section, number) for number in (1, 2))
    assert first == sweep.repeats.seeds(config.TrainConfig(seed=3, learning_rate=1.0), 1)
    assert [*first] == ["train.seed"]
    assert len({3, *first.values(), *second.values()}) == 3
    assert sweep.repeats.seeds(config.TrainConfig(seed=4), 1) != first
    both = sweep.repeats.seeds(config.TrainConfig(seed=3, data_seed=5), 1)
    assert both.items() > first.items()
    assert both["train.data_seed"] not in (5, first["train.seed"])


def test_repeats_are_added_once_with_the_settings_of_their_trial(tmp_path, monkeypatch):
    """Also if the sweep is killed while it adds them; and a name with a directory is not used again."""
    section = config.TrainConfig()
    record = sweep.SweepRecord(str(tmp_path))
    record.add("trial_00000", {"train.learning_rate": 0.1})
    record.add("trial_00001", {"train.learning_rate": 0.2})
    record.repeat(["trial_00001", "trial_00000"])
    (tmp_path / "trial_00003").mkdir()
    sweep.repeats.add(record, section, 1)
    again = sweep.SweepRecord(str(tmp_path))
    assert again.repeated == ["trial_00001", "trial_00000"]
    lines = (tmp_path / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text("".join(lines[:-1]))
    for _ in range(2):
        sweep.repeats.add(sweep.SweepRecord(str(tmp_path)), section, 2)
    found = sweep.read(str(tmp_path))
    repeated = {name: (trial.repeat_of, trial.settings, trial.seeds) for name, trial in found.items()}
    seeds = [sweep.repeats.seeds(section, number) for number in (1, 2)]
    assert [*repeated] == [f"trial_{number:05d}" for number in (0, 1, 2, 4, 5, 6)]
    assert [*repeated.values()][2:] == [
        ("trial_00001", {"train.learning_rate": 0.2}, seeds[0]),
        ("trial_00000", {"train.learning_rate": 0.1}, seeds[0]),
        ("trial_00001", {"train.learning_rate": 0.2}, seeds[1]),
        ("trial_00000", {"train.learning_rate": 0.1}, seeds[1]),
    ]


def test_a_plan_says_how_many_repeats_there_will_be(tiny):
    space = {"train.learning_rate": {"grid": [1e-2, 1e-3, 1e-4, 1e-5]}}
    changed = {"tune.space": space, "tune.scheduler": "none", "tune.repeats": 3}
    plan = sweeping.resolve(config.override(tiny(), changed))
    assert plan.trials == 4
    assert plan.record()["repeats"] == {"fewest_trials": 6, "most_trials": 9}
    assert plan.most_tokens == (4 + 9) * 2560
    alone = sweeping.resolve(config.override(tiny(), {**changed, "tune.repeats": 1}))
    assert "repeats" not in alone.record()
    assert alone.most_tokens == 4 * 2560
    assert plan.estimate.checkpoint_bytes == alone.estimate.checkpoint_bytes * 13 / 4
    with pytest.raises(ConfigError, match="tune.repeats=3: the sweep has 1 trial"):
        sweeping.resolve(config.override(tiny(), {**changed, "tune.space": {"train.learning_rate": {"grid": [1e-2]}}}))


# What they say -----------------------------------------------------------------------------------------------------


def row(name, perplexity, *, of=None, seed=None, status="completed", **settings):
    seeds = {} if seed is None else {"train.seed": seed}
    return TrialRow(name, status, perplexity, None, 2560, settings, repeat_of=of, seeds=seeds)


def repeated(scores, **options):
    """trial -> its repeats' scores; the trials themselves have scores that say the opposite."""
    rows = [row(name, 100.0 - values[0], learning_rate=name) for name, values in scores.items()]
    for name, values in scores.items():
        rows += [row(f"{name}{seed}", value, of=name, seed=seed) for seed, value in enumerate(values)]
    return repeats.compare(rows, has_patience=False, **options)


def test_the_repeats_decide_and_not_the_trials_by_which_settings_were_chosen():
    found = repeated({"a": [30.0, 31.0, 32.0], "b": [20.0, 21.0, 22.0], "c": [20.2, 20.8, 22.1]})
    assert [each.trial_id for each in found.settings] == ["b", "c", "a"]
    best, tie, worse = found.settings
    assert best.perplexity == pytest.approx((20 * 21 * 22) ** (1 / 3))
    assert best.low < best.perplexity < best.high
    assert (best.as_good_as_best, tie.as_good_as_best, worse.as_good_as_best) == (True, True, False)
    assert worse.nats_low < worse.nats_per_token < worse.nats_high
    assert worse.nats_per_token == pytest.approx(math.log(worse.perplexity / best.perplexity))
    assert found.sentence.startswith("settings, over 3 other seeds: those of b are better than those of a (p = 0.0")
    assert "and as good as those of c, as far as these runs tell: only " in found.sentence
    assert format_p(0.01234, "p") == "p = 0.012"
    assert [format_p(p) for p in (0.01234, 1e-9, None)] == ["0.012", "< 0.0001", "-"]
    json.dumps(found.record("perplexity"), allow_nan=False)


def test_a_repeat_without_a_score_is_left_out_and_counted():
    rows = [row("a", 30.0), row("b", 20.0)]
    rows += [row(f"a{seed}", 30.0 + seed, of="a", seed=seed) for seed in range(3)]
    rows += [row("b0", 20.0, of="b", seed=0), row("b1", 21.0, of="b", seed=1)]
    failed = row("b2", None, of="b", seed=2, status="failed")
    half = row("b2", 90.0, of="b", seed=2, status="stopped early")
    for last in (failed, half):
        found = repeats.compare([*rows, last], has_patience=False)
        assert [(each.runs, each.failed) for each in found.settings] == [(2, 1), (3, 0)]
        assert found.sentence.endswith("; 1 repeat has no score")
    by_patience = repeats.compare([*rows, half], has_patience=True)
    assert [each.runs for each in by_patience.settings] == [3, 3]


def test_one_repeat_is_too_few_to_tell():
    found = repeated({"a": [30.0], "b": [20.0]})
    assert [each.as_good_as_best for each in found.settings] == [True, None]
    assert "too few to tell" in found.sentence
    json.dumps(found.record("perplexity"), allow_nan=False)
    none = repeats.compare([row("a", 3.0), row("b", 2.0)], has_patience=False)
    assert none is None


def test_the_table_names_what_is_repeated(capsys):
    rows = [row("trial_00002", 20.0, of="trial_00000", seed=1), row("trial_00000", 21.0)]
    (table,) = RankedTable(rows, "perplexity").tables(100)
    assert [column.header for column in table.columns][:3] == ["", "trial", "repeats"]
    assert [str(cell) for cell in table.columns[2].cells] == ["00000", ""]
    assert rows[0].record("perplexity")["repeat_of"] == "trial_00000"
    assert "repeat_of" not in rows[1].record("perplexity")


# Sweeps ------------------------------------------------------------------------------------------------------------


def tuned(tiny, tmp_path, **settings):
    """The result of a sweep of tiny models, and its directory."""
    changed = {"tune.max_concurrent_trials": 2, "storage": str(tmp_path), **settings}
    experiment = config.override(tiny(f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"), changed)
    result = api.tune(experiment)
    return result, f"{runs.directory_of(experiment)}/{result.sweep}"


@pytest.mark.slow
def test_settings_that_differ_in_randomness_alone_are_as_good_as_each_other(ray_cluster, tiny, tmp_path):
    """Micro-batches change nothing but what dropout draws."""
    space = {"train.micro_batch_tokens": {"grid": [128, 256]}}
    result, _ = tuned(tiny, tmp_path, **{"tune.space": space, "tune.scheduler": "none", "tune.repeats": 4})
    assert [each.as_good_as_best for each in result.repeats.settings] == [True, True]
    assert all(each.nats_per_token for each in result.repeats.settings[1:]), "the runs are not the same"
    assert "as good as" in result.repeats.sentence


@pytest.mark.slow
def test_learning_rates_far_apart_are_not_as_good_as_each_other(ray_cluster, tiny, tmp_path):
    space = {"train.learning_rate": {"grid": [1e-3, 1e-5]}}
    result, directory = tuned(tiny, tmp_path, **{"tune.space": space, "tune.repeats": 3})
    best, other = result.repeats.settings
    assert (best.settings, other.settings) == ({"train.learning_rate": 1e-3}, {"train.learning_rate": 1e-5})
    assert (best.runs, other.runs, other.as_good_as_best) == (3, 3, False)
    assert "are better than those of" in result.repeats.sentence
    found = {row.trial_id: row for row in result.trials}
    again = [row for row in found.values() if row.repeat_of is not None]
    assert {row.status for row in again} == {"completed"}
    assert len({row.perplexity for row in again}) == 6
    assert sorted(row.seeds["train.seed"] for row in again[:3]) == sorted(row.seeds["train.seed"] for row in again[3:])
    # The same in the record of the command, on the report's page, in MLflow and when it is read back.
    stored = json.loads(Path(directory, "result.json").read_text())
    assert stored["repeats"]["sentence"] == result.repeats.sentence
    assert result.record()["repeats"] == stored["repeats"]
    assert result.repeats.sentence in Path(result.report).read_text()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    parent = client.get_run(result.mlflow_run_id)
    assert result.repeats.sentence in parent.data.tags["mlflow.note.content"]
    one = client.get_run(again[0].mlflow_run_id).data
    assert one.tags["raylm.repeat_of"] == again[0].repeat_of
    assert int(one.params["train.seed"]) == again[0].seeds["train.seed"]
    chosen = client.get_run(found[best.trial_id].mlflow_run_id).data
    assert float(chosen.tags["raylm.settings.perplexity"]) == best.perplexity
    read = {row.trial_id: row for row in reading.read(directory).trials}
    assert {name: row.repeat_of for name, row in read.items()} == {name: row.repeat_of for name, row in found.items()}
    command = next(row.repeat for row in again)
    assert f"train.seed={again[0].seeds['train.seed']}" in command


class Died(Exception):
    pass


@pytest.mark.slow
def test_a_sweep_that_died_in_its_repeats_ends_as_if_it_had_not(ray_cluster, tiny, tmp_path, monkeypatch):
    settings = {
        "tune.space": {"train.learning_rate": {"loguniform": [1e-4, 1e-1]}},
        "tune.num_samples": 3,
        "tune.searcher": "optuna",
        "tune.max_concurrent_trials": 1,
        "tune.scheduler": {"kind": "asha", "grace_tokens": 512, "reduction_factor": 2.0},
        "tune.repeats": 2,
        "tracking.uri": None,
    }
    whole, _ = tuned(tiny, tmp_path / "whole", **settings)
    wrote, deaths, results = sweep.SweepRecord._add, 0, itertools.count(1)
    seen = 0

    def add(record, event):
        nonlocal seen
        wrote(record, event)
        if "repeat_of" in event and deaths == 0:
            raise Died
        if "result" in event and record.repeated:
            seen = next(results)

    def stop_all(self):
        if deaths < 2 and seen >= 4 * deaths > 0:
            raise Died
        return False

    with monkeypatch.context() as patch:
        patch.setattr(sweep.SweepRecord, "_add", add)
        patch.setattr(sweep.SweepStopper, "stop_all", stop_all)
        while True:
            try:
                result, directory = tuned(tiny, tmp_path / "cut", **settings)
                break
            except Died:
                deaths += 1
    assert deaths == 2
    kept = ("trial_id", "status", "perplexity", "tokens", "settings", "repeat_of", "seeds")
    rows, expected = ([{name: getattr(row, name) for name in kept} for row in each.trials] for each in (result, whole))
    assert rows == expected
    assert result.repeats == whole.repeats
    assert {row["status"] for row in rows if row["repeat_of"]} == {"completed"}
    assert sum("repeated" in event for event in sweep.SweepRecord(directory).events) == 1
