"""Where settings come from, who goes on; that both stand where they stood when a sweep was cut off. Without Ray."""

import itertools
import random
from types import SimpleNamespace

import pytest
from ray.tune.experiment import Trial as RayTrial

from raylm import budget, sweep
from raylm.config import StopConfig, TrainConfig, TuneConfig, load
from raylm.errors import ConfigError
from raylm.sweep.record import EVENTS
from raylm.tracking import journal

SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "blocks.block_size": {"choice": [64, 128, 256]},
    "train.seed": {"randint": [0, 9]},
    "train.weight_decay": {"quniform": [0.0, 0.5, 0.1]},
}
INNER = {
    "size": {
        "choice": [
            {"blocks.block_size": 64, "train.learning_rate": {"loguniform": [1e-3, 1e-2]}},
            {"blocks.block_size": 256, "train.learning_rate": {"loguniform": [1e-5, 1e-4]}},
        ]
    }
}


def drawn(seed=0, **section):
    points = sweep.points(TuneConfig(**section), seed)
    return [points.draw(f"trial_{number:05d}") for number in range(points.total)]


# Space ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_points_lie_in_the_space_and_depend_on_the_seed_alone(searcher):
    found = drawn(space=SPACE, num_samples=20, searcher=searcher)
    assert found == drawn(space=SPACE, num_samples=20, searcher=searcher)
    assert found != drawn(1, space=SPACE, num_samples=20, searcher=searcher)
    for point in found:
        assert list(point) == list(SPACE)
        assert 1e-4 <= point["train.learning_rate"] <= 1e-2
        assert point["train.seed"] in range(9)
        assert round(point["train.weight_decay"] * 10) in range(6)
    assert {point["blocks.block_size"] for point in found} == {64, 128, 256}


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_range_may_depend_on_another_setting(searcher):
    found = drawn(space=INNER, num_samples=20, searcher=searcher)
    assert {point["blocks.block_size"] for point in found} == {64, 256}
    for point in found:
        assert (point["train.learning_rate"] >= 1e-3) == (point["blocks.block_size"] == 64)
    assert sweep.keys(INNER) == list(found[0])


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_points_to_try_first(searcher):
    first = {"train.learning_rate": 5e-3, "blocks.block_size": 128}
    found = drawn(space=SPACE, num_samples=3, points=(first,), searcher=searcher)
    assert len(found) == 3
    assert found[0].items() >= first.items()
    assert not found[1].items() >= first.items()


def test_every_point_of_a_grid_with_each_draw():
    space = {**SPACE, "train.seed": {"grid": [1, 2]}, "blocks.block_size": {"grid": [32, 64]}}
    found = drawn(space=space, num_samples=3)
    assert len(found) == 12
    assert len({point["train.learning_rate"] for point in found}) == 12
    pairs = [(point["train.seed"], point["blocks.block_size"]) for point in found]
    assert sorted(pairs) == sorted(3 * list(itertools.product([1, 2], [32, 64])))


def test_optuna_looks_where_results_were_good():
    points = sweep.points(
        TuneConfig(space={"train.weight_decay": {"uniform": [0, 1]}}, num_samples=40, searcher="optuna"), 0
    )
    found = []
    for number in range(points.total):
        value = points.draw(str(number))["train.weight_decay"]
        points.tell(str(number), [(value - 0.3) ** 2])
        found.append(value)
    assert sum(abs(value - 0.3) < 0.15 for value in found[-20:]) > 10, "6 of 20 by chance"


REFUSED = """
searcher: optuna, space: {train.seed: {grid: [1, 2]}}
    tune.searcher: must be random for a space with a grid
searcher: optuna, scheduler: pbt, space: {train.weight_decay: {uniform: [0, 1]}}
    tune.searcher: must be random with tune.scheduler=pbt
against: parameters, space: {train.seed: {choice: [1]}}
    tune.against: needs tune.searcher=optuna, got random
against: seconds, searcher: optuna
    tune.against: must be parameters with tune.scheduler=asha, got seconds
scheduler: pbt, space: {blocks.block_size: {choice: [64]}}
    tune.space: must have one of train.learning_rate
points: [{train.seed: 1}], space: {blocks.block_size: {choice: [64]}}
    keys of tune.space, got train.seed
points: [{train.seed: x}], space: {train.seed: {choice: [1]}}
    train.seed: must be a whole number, got 'x'
space: {size: {choice: [{seed: 1}]}}
    size: space 1: seed must be a dotted key
space: {size: {choice: [{train.seed: {grid: [1]}}]}}
    size: space 1: train.seed must be drawn, got a grid
space: {size: {choice: [{train.seed: 1}, {train.sed: 1}]}}
    did you mean seed
space: {size: {choice: [{train.learning_rate: {uniform: [-1, 1]}}]}}
    train.learning_rate: must be more than 0.0, got -1
space: {size: {choice: [{corpus.text: a}]}}
    corpus is one for a whole sweep
""".strip().split("\n")


@pytest.mark.parametrize(("settings", "told"), zip(REFUSED[::2], map(str.strip, REFUSED[1::2]), strict=True))
def test_what_does_not_go_together_is_refused(settings, told, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(f"tune: {{{settings}}}")
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert told in caught.value.message


# Record --------------------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = sweep.Record(str(tmp_path))
    record.begin("trial_00000", {"train.learning_rate": 0.1 + 0.2})
    record.start("trial_00000")
    record.result("trial_00000", {"tokens": 10, "perplexity": 7.5})
    record.begin("trial_00001", {"train.learning_rate": 1e-3})
    record.end("trial_00000", "completed")
    record.start("trial_00001")
    record.start("trial_00001")
    record.end("trial_00001", "failed", "out of memory")
    record.pause(2.5)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"over": "trial_0')  # killed while it wrote
    again = sweep.Record(str(tmp_path))
    assert again.trials == record.trials == sweep.read(str(tmp_path))
    assert list(again.trials) == ["trial_00000", "trial_00001"]
    assert again.trials["trial_00000"].settings == {"train.learning_rate": 0.1 + 0.2}
    assert again.trials["trial_00001"].attempts == 2
    assert again.seconds == 2.5
    journal.log(str(tmp_path), EVENTS).close()  # as in a new process
    again.begin("trial_00002", {})
    assert list(sweep.read(str(tmp_path))) == ["trial_00000", "trial_00001", "trial_00002"]


def test_a_trial_that_became_like_another_goes_on_from_its_tokens(tmp_path):
    record = sweep.Record(str(tmp_path))
    record.begin("trial_00000", {"train.learning_rate": 1e-3})
    for tokens in (10, 20, 30):
        record.result("trial_00000", {"tokens": tokens})
    record.change("trial_00000", {"train.learning_rate": 2e-3}, like="trial_00001", tokens=20)
    (trial,) = sweep.read(str(tmp_path)).values()
    assert trial.tokens == 20
    assert trial.settings == {"train.learning_rate": 2e-3}


@pytest.mark.parametrize(
    ("stop", "over"),
    [
        ({}, False),
        ({"tokens": 50}, True),
        ({"tokens": 51}, False),
        ({"perplexity": 7.0}, True),
        ({"perplexity": 6.9}, False),
        ({"seconds": 100}, True),
        ({"seconds": 10_000}, False),
    ],
)
def test_limits_of_a_sweep(tmp_path, stop, over):
    record = sweep.Record(str(tmp_path))
    for number, tokens in enumerate((20, 30)):
        record.begin(f"trial_{number}", {})
        record.result(f"trial_{number}", {"tokens": tokens, "best_perplexity": 7.0 + number})
    record.pause(200.0)
    limits = sweep.Limits(StopConfig(**stop), record, "best_perplexity")
    assert limits.stop_all() is over


# Schedulers ----------------------------------------------------------------------------------------------------------

BUDGET = budget.plan(
    TrainConfig(batch_tokens=64, max_tokens=64 * 16, eval_every_tokens=64),
    block_size=64,
    num_workers=1,
    epoch_examples=99,
)


class Controller:
    """What a scheduler asks of Tune."""

    def __init__(self, scheduler, trials):
        self.scheduler, self.trials = scheduler, trials
        self.search_alg = None

    def get_live_trials(self):
        return [trial for trial in self.trials.values() if trial.status != RayTrial.TERMINATED]

    def stop_trial(self, trial):
        if trial.status == RayTrial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
        else:
            self.scheduler.on_trial_remove(self, trial)
        trial.set_status(RayTrial.TERMINATED)


def ray_trial(trial_id):
    return RayTrial("t", stub=True, trial_id=trial_id)


def play(directory, kind, table, cut):
    """Show a scheduler a table of scores, as Tune would, begin again from the record before step `cut`; the record."""
    section = TuneConfig(scheduler=kind)
    directory.mkdir()

    def begun():
        record = sweep.Record(str(directory))
        found = sweep.Recorded(sweep.scheduler(section, BUDGET, "best_perplexity"), record, BUDGET, lambda: False)
        trials = {trial_id: ray_trial(trial_id) for trial_id in record.trials}
        found.replay(trials)
        return found, record, Controller(found, trials)

    scheduler, record, controller = begun()
    for step, (trial_id, tokens, score) in enumerate(table):
        if step == cut:
            scheduler, record, controller = begun()
        if trial_id not in record.trials:
            record.begin(trial_id, {"train.seed": 1})
            controller.trials[trial_id] = ray_trial(trial_id)
        if record.trials[trial_id].is_over:
            continue
        trial = controller.trials[trial_id]
        scheduler.on_trial_add(controller, trial)
        if trial.status == RayTrial.PAUSED and scheduler.choose_trial_to_run(controller) is not trial:
            continue
        trial.set_status(RayTrial.RUNNING)
        result = {"tokens": tokens, "best_perplexity": score, "perplexity": score, "budget_tokens": BUDGET.tokens}
        decision = scheduler.on_trial_result(controller, trial, result)
        trial.update_last_result(result)
        if decision == scheduler.PAUSE:
            trial.set_status(RayTrial.PAUSED)
        if decision == scheduler.STOP or tokens == BUDGET.tokens:
            controller.stop_trial(trial)
    return sweep.read(str(directory))


def table_of(seed, trials=9):
    """(trial, tokens, score) in the order in which three trials at a time would report."""
    source = random.Random(seed)
    quality = {f"trial_{number:05d}": source.uniform(10, 100) for number in range(trials)}
    left = {trial_id: list(range(64, 64 * 17, 64)) for trial_id in quality}
    while any(left.values()):
        trial_id = source.choice([name for name, steps in left.items() if steps][:3])
        tokens = left[trial_id].pop(0)
        yield trial_id, tokens, quality[trial_id] + 2000 / tokens + source.random()


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_scheduler_decides_as_if_the_sweep_had_never_been_cut_off(tmp_path, kind):
    table = list(table_of(3))
    whole = play(tmp_path / "whole", kind, table, cut=None)
    assert {trial.status for trial in whole.values()} == {"completed", "stopped early"}
    for cut in range(1, len(table), 7):
        assert play(tmp_path / str(cut), kind, table, cut) == whole, f"cut before step {cut}"


def test_a_stop_that_nobody_heard_of_is_made_up_for(tmp_path):
    """Killed after the result was written down, and before the trial was told."""
    section = TuneConfig(scheduler={"kind": "asha", "grace_tokens": 64, "reduction_factor": 4.0})
    record = sweep.Record(str(tmp_path))
    for number, score in enumerate((10.0, 20.0, 90.0)):
        record.begin(f"trial_{number}", {})
        record.result(f"trial_{number}", {"tokens": 64, "best_perplexity": score, "budget_tokens": 1024})
    record = sweep.Record(str(tmp_path))
    found = sweep.Recorded(sweep.scheduler(section, BUDGET, "best_perplexity"), record, BUDGET, lambda: False)
    found.replay({trial_id: ray_trial(trial_id) for trial_id in record.trials})
    assert [trial.status for trial in record.trials.values()] == ["running", "stopped early", "stopped early"]


def test_a_failed_trial_does_not_decide_about_others(tmp_path):
    section = TuneConfig(scheduler={"kind": "asha", "grace_tokens": 64, "reduction_factor": 2.0})
    record = sweep.Record(str(tmp_path))
    found = sweep.Recorded(sweep.scheduler(section, BUDGET, "best_perplexity"), record, BUDGET, lambda: False)
    decisions = []
    for number, score in enumerate((50.0, float("inf"), float("inf"), 60.0, 40.0)):
        record.begin(f"trial_{number}", {})
        trial = ray_trial(f"trial_{number}")
        found.on_trial_add(None, trial)
        failure = {"failure": "diverged"} if score == float("inf") else {}
        result = {"tokens": 64, "best_perplexity": score, "budget_tokens": 1024, **failure}
        decisions.append(found.on_trial_result(SimpleNamespace(), trial, result))
    assert decisions == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP", "CONTINUE"]
    assert [trial.failure for trial in record.trials.values()] == [None, "diverged", "diverged", None, None]
