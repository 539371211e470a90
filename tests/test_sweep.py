"""Where settings come from, who goes on; that both stand where they stood when a sweep was cut off. Without Ray."""

import itertools
import json
import math
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played import Played, ray_trial
from ray.tune.experiment import Trial as RayTrial

from raylm import budget, checkpoint, document_scores, storage, sweep
from raylm.config import StopConfig, TrainConfig, TuneConfig, load
from raylm.document_scores import DocumentScores
from raylm.errors import ConfigError
from raylm.sweep import requests
from raylm.sweep.asha import Asha
from raylm.sweep.record import EVENTS, by_rank
from raylm.sweep.trial import ADOPTED, _settle
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
    points = sweep.searcher(TuneConfig(**section), seed)
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


def test_every_point_of_grids_alone_once():
    space = {"train.seed": {"grid": [1, 2]}, "blocks.block_size": {"grid": [32, 64]}}
    first = {"blocks.block_size": 128}
    found = drawn(space=space, num_samples=3, points=(first,))
    pairs = [(point["train.seed"], point["blocks.block_size"]) for point in found]
    assert pairs[:2] == [(1, 128), (2, 128)]
    assert sorted(pairs[2:]) == list(itertools.product([1, 2], [32, 64]))


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 40), ("gp", 25)])
def test_optuna_looks_where_results_were_good(sampler, trials):
    space, searcher = {"train.weight_decay": {"uniform": [0, 1]}}, {"kind": "optuna", "sampler": sampler}
    points = sweep.searcher(TuneConfig(space=space, num_samples=trials, searcher=searcher), 0)
    found = []
    for number in range(points.total):
        value = points.draw(str(number))["train.weight_decay"]
        points.tell(str(number), [(value - 0.3) ** 2])
        found.append(value)
    assert sum(abs(value - 0.3) < 0.15 for value in found[trials // 2 :]) > trials // 4, "3 of 10 by chance"


def test_a_gaussian_process_draws_concurrent_trials_apart_and_takes_two_objectives():
    section = TuneConfig(space=SPACE, num_samples=12, searcher=GAUSSIAN_PROCESS, against="seconds")
    points = sweep.searcher(section, 0)
    for number in range(5):
        rate = points.draw(str(number))["train.learning_rate"]
        points.tell(str(number), [math.log(rate) ** 2, rate])
    together = [points.draw(str(number))["train.learning_rate"] for number in range(5, 8)]
    assert len(set(together)) == 3


@pytest.mark.parametrize("searcher", ["random", "optuna"])
@pytest.mark.parametrize("space", [SPACE, INNER])
def test_results_are_those_of_the_settings_that_were_trained(searcher, space):
    """Of a stopped sweep that goes on with more trials: drawn again, the first ones may have other settings."""
    before = sweep.searcher(TuneConfig(space=space, num_samples=16, searcher=searcher), 0)
    begun = {f"trial_{number:05d}": before.draw(f"trial_{number:05d}") for number in range(10)}
    for number, trial_id in enumerate(begun):
        before.tell(trial_id, [float(number)])
    again = sweep.searcher(TuneConfig(space=space, num_samples=40, searcher=searcher), 0)
    for number, (trial_id, point) in enumerate(begun.items()):
        again.add(trial_id, json.loads(json.dumps(point)))
        again.tell(trial_id, [float(number)])
    if searcher == "optuna":
        assert [trial.values for trial in again._study.trials] == [[float(number)] for number in range(10)]
        assert [again._suggested(optuna.trial.FixedTrial(trial.params)) for trial in again._study.trials] == [
            *begun.values()
        ]
    new = [again.draw(f"trial_{number:05d}") for number in range(10, 40)]
    assert not any(point in new for point in begun.values()), "the next ones are new"


PRIOR = {"train.learning_rate": 1e-3, "blocks.block_size": 128, "train.weight_decay": 0.1}


def test_draws_around_a_prior():
    section = {"space": SPACE, "num_samples": 400, "prior": PRIOR}
    found = drawn(**section)
    assert found == drawn(**section)
    assert found != drawn(1, **section)
    assert found[0].items() >= PRIOR.items(), "the prior itself"
    for point in found:
        assert list(point) == list(SPACE)
        assert 1e-4 <= point["train.learning_rate"] <= 1e-2
        assert point["train.seed"] in range(9)
        assert round(point["train.weight_decay"] * 10) in range(6)
    # Half are drawn anywhere: a third of these, and three quarters of the others, have the prior's choice.
    assert sum(point["blocks.block_size"] == 128 for point in found) == pytest.approx(400 * (1 / 6 + 3 / 8), abs=40)
    # Half of those anywhere are within a quarter of the range, and 0.68 / 0.95 of the others: a standard deviation.
    near = sum(abs(math.log10(point["train.learning_rate"] / 1e-3)) < 0.5 for point in found)
    assert near == pytest.approx(400 * (0.25 + 0.36), abs=40)


def test_draws_leave_a_wrong_prior_for_the_best_trial_so_far():
    section = TuneConfig(space=SPACE, num_samples=60, prior={"train.learning_rate": 1e-4})
    points, found = sweep.searcher(section, 0), []
    for number in range(points.total):
        found.append(points.draw(str(number)))
        score = abs(math.log(found[-1]["train.learning_rate"] / 5e-3))
        points.tell(str(number), [score] if number % 4 else None)
    assert all(point not in found[:number] for number, point in enumerate(found)), "none is another's training again"
    rates = [point["train.learning_rate"] for point in found]
    near = [abs(math.log(rate / 5e-3)) < math.log(2) for rate in rates]
    assert sum(near[-30:]) > 15, "9 by chance"
    assert sum(rate < 2e-4 for rate in rates[-30:]) < 5, "near the prior"


GAUSSIAN_PROCESS = {"kind": "optuna", "sampler": "gp"}


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ({"space": SPACE, "searcher": "optuna"}, 30),
        ({"space": INNER, "searcher": "optuna"}, 30),
        ({"space": SPACE, "searcher": GAUSSIAN_PROCESS}, 7),
        ({"space": SPACE, "prior": PRIOR, "points": ({"train.seed": 3},)}, 30),
        ({"space": {**INNER, "train.weight_decay": {"uniform": [0, 1]}}, "prior": {"train.weight_decay": 0.2}}, 30),
    ],
)
def test_a_searcher_resumes_as_if_the_sweep_had_never_stopped(settings, trials):
    section = TuneConfig(num_samples=trials, **settings)

    def told(points, number, point):
        points.tell(str(number), [point["train.learning_rate"]] if number % 5 else None)

    whole, found = sweep.searcher(section, 0), []
    for number in range(trials):
        again = sweep.searcher(section, 0)
        for earlier, point in enumerate(found):
            again.add(str(earlier), point)
            told(again, earlier, point)
        found.append(whole.draw(str(number)))
        assert again.draw(str(number)) == found[-1], f"stopped after {number} trials"
        told(whole, number, found[-1])


REFUSED = """
searcher: optuna, space: {train.seed: {grid: [1, 2]}}
    tune.searcher: must be random for a space with a grid
searcher: optuna, scheduler: pbt, space: {train.weight_decay: {uniform: [0, 1]}}
    tune.searcher: must be random with tune.scheduler=pbt
against: parameters, space: {train.seed: {choice: [1]}}
    tune.against: needs tune.searcher=optuna, got random
searcher: {sampler: gp}
    tune.searcher.sampler: must be tpe with tune.searcher=random, got gp
searcher: {kind: optuna, sampler: gp}, space: {size: {choice: [{train.seed: 1}, {train.seed: 2}]}}
    tune.searcher.sampler: must be tpe with inner spaces in tune.space (size), got gp
searcher: {kind: optuna, sampler: cma}
    tune.searcher.sampler: must be one of 'tpe' or 'gp', got 'cma'
searcher: bayes
    tune.searcher.kind: must be one of 'random' or 'optuna', got 'bayes'
against: seconds, searcher: optuna
    tune.against: must be parameters with tune.scheduler=asha, got seconds
scheduler: pbt, space: {blocks.block_size: {choice: [64]}}
    tune.space: must have one of train.learning_rate
scheduler: pbt, space: {train.optimizer: {choice: [sgd]}}
    tune.space: must have one of train.learning_rate
scheduler: pbt, space: {train.weight_decay: {uniform: [0, 1]}, train.learning_rate: {grid: [1e-4, 1e-3]}}
    tune.space.train.learning_rate: must be drawn with tune.scheduler=pbt
prior: {train.seed: 1}, space: {blocks.block_size: {choice: [64]}}
    tune.prior: must have keys of tune.space, got train.seed
prior: {train.seed: 1}
    tune.prior: must have keys of tune.space, got train.seed
prior: {train.learning_rate: 1e-1}, space: {train.learning_rate: {loguniform: [1e-4, 1e-2]}}
    tune.prior.train.learning_rate: must be from 0.0001 to 0.01, as in tune.space, got 0.1
prior: {train.learning_rate: high}, space: {train.learning_rate: {loguniform: [1e-4, 1e-2]}}
    tune.prior.train.learning_rate: must be from 0.0001 to 0.01, as in tune.space, got 'high'
prior: {train.seed: 9}, space: {train.seed: {randint: [0, 9]}}
    tune.prior.train.seed: must be from 0 to 8, as in tune.space, got 9
prior: {train.seed: 1.5}, space: {train.seed: {randint: [0, 9]}}
    tune.prior.train.seed: must be a whole number, got 1.5
prior: {blocks.block_size: 96}, space: {blocks.block_size: {choice: [64, 128]}}
    tune.prior.blocks.block_size: must be one of [64, 128], got 96
prior: {size: 1}, space: {size: {choice: [{train.seed: 1}, {train.seed: 2}]}}
    tune.prior.size: must be a setting, and size chooses between inner spaces
prior: {train.seed: 1}, space: {train.seed: {grid: [1, 2]}}
    tune.prior: must be left out with a grid in tune.space (train.seed); make it a choice
prior: {train.seed: 1}, space: {train.seed: {choice: [1, 2]}}, searcher: optuna
    tune.prior: must be left out with tune.searcher=optuna, which has no priors; to try its values first
prior: {train.learning_rate: 1e-3}, space: {train.learning_rate: {uniform: [0, 1]}}, scheduler: pbt
    tune.prior: must be left out with tune.scheduler=pbt
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
scheduler: {kind: median, ties: promote}
    tune.scheduler.ties: must be drop with tune.scheduler=median, got promote
scheduler: {ties: maybe}
    tune.scheduler.ties: must be one of 'drop' or 'promote', got 'maybe'
repeats: 0
    tune.repeats: must be at least 1, got 0
repeats: 1.5
    tune.repeats: must be a whole number, got 1.5
repeats: 2, space: {train.seed: {choice: [1, 2]}}
    tune.repeats: must be 1 with train.seed in tune.space, got 2: repeats have seeds of their own
repeats: 2, space: {size: {choice: [{train.data_seed: 1}, {train.data_seed: 2}]}}
    tune.repeats: must be 1 with train.data_seed in tune.space, got 2
repeats: 2, scheduler: pbt, space: {train.learning_rate: {choice: [1e-3, 1e-2]}}
    tune.repeats: must be 1 with tune.scheduler=pbt, got 2
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
    record = sweep.SweepRecord(str(tmp_path))
    record.add("trial_00000", {"train.learning_rate": 0.1 + 0.2})
    record.start("trial_00000")
    record.result("trial_00000", {"tokens": 10, "perplexity": 7.5})
    record.add("trial_00001", {"train.learning_rate": 1e-3})
    record.finish("trial_00000", "completed")
    record.start("trial_00001")
    record.start("trial_00001")
    record.finish("trial_00001", "failed", "model.path=a: it has no weights", "model.path")
    record.spend(2.5)
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"finished": "trial_0')  # killed while it wrote
    again = sweep.SweepRecord(str(tmp_path))
    assert again.trials == record.trials == sweep.read(str(tmp_path))
    assert list(again.trials) == ["trial_00000", "trial_00001"]
    assert again.trials["trial_00000"].settings == {"train.learning_rate": 0.1 + 0.2}
    assert again.trials["trial_00001"].attempts == 2
    assert again.trials["trial_00001"].wrong_setting == "model.path"
    assert again.seconds == 2.5
    journal.json_lines(str(tmp_path), EVENTS).close()  # as in a new process
    again.add("trial_00002", {})
    assert list(sweep.read(str(tmp_path))) == ["trial_00000", "trial_00001", "trial_00002"]


def test_trials_that_got_further_rank_above_those_that_were_stopped(tmp_path):
    record = sweep.SweepRecord(str(tmp_path))
    trials = [  # tokens, score, status, dropped by the scheduler
        (10, 40.0, "stopped early", True),  # better than a trial that was promoted
        (10, 60.0, "stopped early", True),
        (30, 50.0, "stopped early", True),
        (90, 45.0, "completed", False),
        (50, 30.0, "stopped early", False),  # by train.patience
        (60, 48.0, None, False),
        (90, 35.0, "completed", False),
        (90, 20.0, "failed", False),
    ]
    for number, (tokens, score, status, dropped) in enumerate(trials):
        record.add(name := f"trial_{number:05}", {})
        record.result(name, {"tokens": tokens, "step": tokens, "best_perplexity": score})
        if status is not None:
            record.finish(name, status, dropped=dropped)
    ranked = [int(trial.trial_id[-5:]) for trial in by_rank(record.trials.values(), "perplexity")]
    assert ranked == [4, 6, 3, 5, 2, 0, 1, 7]
    record.add("trial_00008", {})
    record.result("trial_00008", {"tokens": 10, "step": 10, "best_perplexity": 5.0})
    record.finish("trial_00008", "stopped early", dropped=True)
    assert by_rank(record.trials.values(), "perplexity")[0].trial_id == "trial_00008", "the best model stands first"


def test_a_trial_that_copied_a_donor_resumes_from_its_tokens(tmp_path):
    record = sweep.SweepRecord(str(tmp_path))
    record.add("trial_00000", {"train.learning_rate": 1e-3})
    for tokens in (10, 20, 30):
        record.result("trial_00000", {"tokens": tokens})
    record.change("trial_00000", {"train.learning_rate": 2e-3}, donor="trial_00001", tokens=20)
    (trial,) = sweep.read(str(tmp_path)).values()
    assert trial.tokens == 20
    assert trial.settings == {"train.learning_rate": 2e-3}


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_fewer_samples_than_started_trials_leave_the_trials(tmp_path, searcher):
    """tune.num_samples of 8, lowered to 4 when 6 had begun; and raised again."""
    section = TuneConfig(space=SPACE, num_samples=8, searcher=searcher, scheduler="none")
    first = Controller(tmp_path, section, together=1)
    begun = [first.search_alg.points.draw(f"trial_{number:05d}") for number in range(6)]
    for number, drawn_settings in enumerate(begun):
        first.record.add(f"trial_{number:05d}", drawn_settings)
    for asked, total in ((4, 6), (8, 8)):
        again = Controller(tmp_path, section.model_copy(update={"num_samples": asked}), together=1)
        assert [trial.settings for trial in again.record.trials.values()] == begun
        assert again.search_alg.total_samples == total
        assert len(again.search_alg.unfinished) == 6, "each of them is to end"


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
    record = sweep.SweepRecord(str(tmp_path))
    for number, tokens in enumerate((20, 30)):
        record.add(f"trial_{number}", {})
        record.result(f"trial_{number}", {"tokens": tokens, "best_perplexity": 7.0 + number})
    record.spend(200.0)
    limits = sweep.SweepStopper(StopConfig(**stop), record, "best_perplexity")
    assert limits.stop_all() is over


def test_the_seconds_of_a_killed_sweep_count(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    limits = sweep.SweepStopper(StopConfig(seconds=100), sweep.SweepRecord(str(tmp_path)), "best_perplexity")
    for _ in range(60):
        now[0] += 1
        assert not limits.stop_all()
    again = sweep.SweepStopper(StopConfig(seconds=100), sweep.SweepRecord(str(tmp_path)), "best_perplexity")
    now[0] += 39
    assert not again.stop_all()
    now[0] += 1
    assert again.stop_all()


# Schedulers ----------------------------------------------------------------------------------------------------------

BUDGET = budget.compute(
    TrainConfig(batch_tokens=64, max_tokens=64 * 16, eval_every_tokens=64),
    block_size=64,
    num_workers=1,
    epoch_examples=99,
)


class Controller(Played):
    """It runs what the queue and the scheduler let run, and hands on one result at a time."""

    def __init__(self, directory, section, together):
        self.record = sweep.SweepRecord(str(directory))
        inner = sweep.scheduler(section, BUDGET, "best_perplexity", str(directory))
        queue = Queue(
            sweep.searcher(section, 0),
            self.record,
            sweep.RecordedScheduler(inner, self.record, BUDGET, lambda: False),
            together=together,
            values=lambda trial: [trial.results[-1]["best_perplexity"]],
            stopping=lambda: False,
        )
        self.saving = []
        """Those that are told to wait, and do not yet."""
        super().__init__(queue)

    def running(self):
        """Those that run when every free place is taken, by name."""
        while True:
            self.take_new()
            chosen = self.scheduler.choose_trial_to_run(self)
            for trial in self.trials:
                if trial is chosen or trial.status == RayTrial.PENDING:
                    trial.set_status(RayTrial.RUNNING)
            if chosen is None:
                running = {trial.trial_id: trial for trial in self.trials if trial.status == RayTrial.RUNNING}
                return {trial_id: trial for trial_id, trial in running.items() if trial not in self.saving}

    def report(self, trial, result):
        if result is None:
            self.stop_trial(trial)
            return
        decision = self.scheduler.on_trial_result(self, trial, result)
        self.search_alg.on_trial_result(trial.trial_id, result)
        trial.update_last_result(result)
        if decision == self.scheduler.PAUSE:
            self.saving.append(trial)
        elif decision == self.scheduler.STOP or "failure" in result or result["tokens"] == BUDGET.tokens:
            self.stop_trial(trial)

    def pause(self):
        while self.saving:
            self.saving.pop().set_status(RayTrial.PAUSED)


class Queue(sweep.TrialQueue):
    def _made(self, trial_id, settings):
        return ray_trial(trial_id)


class Killed(Exception):
    pass


def play(directory, scheduler, scores, *, together=3, seed=0, cuts=(), searcher="random", slow=(), documents=None):
    """A sweep of trials of which each reports its row of scores, None for a failure; its events.

    It is cut off after so many lines of its record, `cuts`, and begun again. Who reports next is drawn by the number of
    results so far: the same one, cut off or not. After so many results, `slow`, who is to wait does so a result later.
    `documents`: (trial id, step) -> the document scores that a trial writes before it reports.
    """
    directory.mkdir(exist_ok=True)
    space = {"train.weight_decay": {"uniform": [0, 1]}}
    section = TuneConfig(scheduler=scheduler, num_samples=len(scores), space=space, searcher=searcher)
    wrote, written, cuts = sweep.SweepRecord._add, itertools.count(1), set(cuts)

    def add(record, event):
        wrote(record, event)
        if next(written) in cuts:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep.SweepRecord, "_add", add)
        while True:
            controller = Controller(directory, section, together)
            try:
                while (running := controller.running()) or controller.saving:
                    if running:
                        trial, result = _next_result(controller.record.trials, running, scores, seed)
                        if documents is not None and result is not None:
                            step = result["step"]
                            kept = documents(trial.trial_id, step)
                            document_scores.write(f"{directory}/{trial.trial_id}", step, kept)
                        controller.report(trial, result)
                    if (
                        not running
                        or sum(len(trial.results) for trial in controller.record.trials.values()) not in slow
                    ):
                        controller.pause()
            except Killed:
                continue
            assert controller.search_alg.is_finished(), "or Tune would wait for ever"
            return sweep.SweepRecord(str(directory)).events


def _next_result(trials, running, scores, seed):
    """(trial, result); None if it was killed between its last result and its end."""
    for trial_id, trial in running.items():
        if trials[trial_id].tokens == BUDGET.tokens:
            return trial, None
    number = sum(len(trial.results) for trial in trials.values())
    trial_id = random.Random(f"{seed} {number}").choice(sorted(running))
    tokens = trials[trial_id].tokens + 64
    score = scores[int(trial_id[-5:])][tokens // 64 - 1]
    if score is None:
        return running[trial_id], {"tokens": BUDGET.tokens, "best_perplexity": math.inf, "failure": "diverged"}
    step = tokens // 64
    return running[trial_id], {"step": step, "tokens": tokens, "best_perplexity": score, "budget_tokens": BUDGET.tokens}


def scores_of(seed, trials=9):
    source = random.Random(seed)
    quality = [source.uniform(10, 100) for _ in range(trials)]
    return [[each + 2000 / tokens + source.random() for tokens in range(64, 64 * 17, 64)] for each in quality]


def test_how_many_trials_are_expected_at_each_rung():
    assert Asha([100, 300], 3.0, "best_perplexity").stages(8, 900) == [(100, 8), (300, 2), (900, 1)]
    assert Asha([100, 300], 3.0, "best_perplexity").expected_tokens(8, 900) == 8 * 100 + 2 * 200 + 1 * 600
    assert Asha([], 2.0, "best_perplexity").stages(8, 900) == [(900, 8)], "nothing is compared on the way"


@pytest.mark.parametrize(("kind", "searcher"), [("asha", "random"), ("asha", "optuna"), ("median", "random")])
def test_a_sweep_resumes_as_if_it_had_never_been_interrupted(tmp_path, kind, searcher):
    scores = scores_of(3)
    whole = play(tmp_path / "whole", kind, scores, searcher=searcher)
    assert {event["status"] for event in whole if "finished" in event} == {"completed", "stopped early"}
    for cut in range(1, len(whole), 2 if searcher == "random" else 7):
        again = play(tmp_path / str(cut), kind, scores, searcher=searcher, cuts=[cut])
        assert again == whole, f"cut off after line {cut}: {whole[cut - 1]}"


def extended(directory, scheduler, scores, by, **options):
    """The events of a sweep that ends, and is then extended by the trials of the last so many rows of scores."""
    play(directory, scheduler, scores[:-by], **options)
    record = sweep.SweepRecord(str(directory))
    dropped = [trial.trial_id for trial in record.searched if trial.dropped and scheduler == "asha"]
    record.extend(len(scores), dropped, {})
    return play(directory, scheduler, scores, **options)


def of_kind(events, kind):
    return [event[kind] for event in events if kind in event]


@pytest.mark.parametrize("searcher", ["random", "optuna"])
@pytest.mark.parametrize("kind", ["none", "asha", "median", "hyperband"])
def test_a_finished_sweep_is_extended_with_every_scheduler(tmp_path, kind, searcher):
    """And if it is killed meanwhile, it ends as if it had not been."""
    scores = scores_of(3, 12)
    events = extended(tmp_path / "whole", kind, scores, 6, searcher=searcher)
    trials = sweep.read(str(tmp_path / "whole"))
    assert len(trials) == 12
    assert all(trial.is_over for trial in trials.values())
    assert "completed" in {trials[f"trial_{number:05d}"].status for number in range(6, 12)}
    first = next(number for number, event in enumerate(events) if "extended" in event)
    if kind == "hyperband":  # played here, its brackets choose trials that the queue has not handed out yet
        return
    for cut in range(first + 1, len(events), 5 if searcher == "random" else 19):
        again = tmp_path / f"{cut}"
        again.mkdir()
        (again / EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events[:cut]))
        assert play(again, kind, scores, searcher=searcher) == events, f"cut off after {events[cut - 1]}"


def test_of_an_extended_asha_sweep_as_many_are_promoted_as_of_one_of_all_trials(tmp_path):
    """Of 4 trials 1 is promoted by its rank, of 8 it is 2: the second best of the first 4, if those that follow are
    worse."""
    scores = [[float(quality)] * 16 for quality in (10, 11, 12, 13, 20, 21, 22, 23)]
    scheduler = {"kind": "asha", "grace_tokens": 64 * 4, "reduction_factor": 4.0}
    before = play(tmp_path / "four", scheduler, scores[:4])
    assert of_kind(before, "promoted") == ["trial_00000"]
    assert sweep.read(str(tmp_path / "four"))["trial_00001"].dropped
    record = sweep.SweepRecord(str(tmp_path / "four"))
    record.extend(8, ["trial_00001", "trial_00002", "trial_00003"], {})
    events = play(tmp_path / "four", scheduler, scores)
    assert of_kind(events, "promoted") == ["trial_00000", "trial_00001"]
    trials = sweep.read(str(tmp_path / "four"))
    assert [trial.status for trial in trials.values()] == ["completed"] * 2 + ["stopped early"] * 6
    assert all(trial.dropped for trial in list(trials.values())[2:])


def test_repeats_of_an_earlier_end_are_no_trials_of_the_search(tmp_path):
    scores = scores_of(3, 6)
    play(tmp_path / "s", "none", scores[:4])
    record = sweep.SweepRecord(str(tmp_path / "s"))
    record.repeat(["trial_00000", "trial_00001"])
    sweep.repeats.add(record, TrainConfig(), 1)
    record.extend(6, [], {})
    assert record.repeated is None
    section = TuneConfig(space={"train.weight_decay": {"uniform": [0, 1]}}, num_samples=6, scheduler="none")
    again = Controller(tmp_path / "s", section, together=9)
    assert again.search_alg.total_samples == 8
    assert list(again.running()) == ["trial_00006", "trial_00007"]
    fresh = drawn(space=section.space, num_samples=6)
    assert [trial.settings for trial in again.record.searched] == fresh


# Requests of other commands -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "asha", "median"])
def test_a_trial_stops_at_its_next_evaluation_when_another_command_asks_for_it(tmp_path, kind):
    """It counts as dropped by the scheduler, does not make others wait, and the record leads to the same end again."""
    section = TuneConfig(scheduler=kind, num_samples=3, space={"train.weight_decay": {"uniform": [0, 1]}})
    controller = Controller(tmp_path, section, together=3)
    running = controller.running()
    requests.stop_trial(str(tmp_path), "trial_00001")
    controller.search_alg.looked = -math.inf
    controller.search_alg.take_requests()
    assert storage.names(f"{tmp_path}/{requests.FOLDER}") == []
    result = {"step": 1, "tokens": 64, "best_perplexity": 5.0, "budget_tokens": BUDGET.tokens}
    for trial_id in ("trial_00001", "trial_00000"):
        controller.report(running[trial_id], result)
        controller.pause()
        controller.running()
    trials = sweep.read(str(tmp_path))
    assert (trials["trial_00001"].status, trials["trial_00001"].dropped) == ("stopped early", True)
    assert not trials["trial_00000"].is_over
    again = Controller(tmp_path, section, together=3)
    assert sorted(again.running()) == ["trial_00000", "trial_00002"]
    if kind == "asha":
        assert not again.scheduler.asha.has_one, "none has completed"


def test_a_trial_that_is_to_stop_does_not_resume(tmp_path):
    """If no command worked on the sweep when it was asked for."""
    section = TuneConfig(scheduler="none", num_samples=2, space={"train.weight_decay": {"uniform": [0, 1]}})
    controller = Controller(tmp_path, section, together=2)
    for trial in controller.running().values():
        controller.report(trial, {"step": 1, "tokens": 64, "best_perplexity": 5.0, "budget_tokens": BUDGET.tokens})
    requests.stop_trial(str(tmp_path), "trial_00001")
    requests.take(sweep.SweepRecord(str(tmp_path)))
    again = Controller(tmp_path, section, together=2)
    assert list(again.running()) == ["trial_00000"]
    assert sweep.read(str(tmp_path))["trial_00001"].status == "stopped early"


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_trials_that_another_command_adds_are_drawn_once(tmp_path, searcher, monkeypatch):
    """The next one has the settings that were given; a sweep that is killed while it takes a request takes it once."""
    section = TuneConfig(scheduler="none", num_samples=2, space=SPACE, searcher=searcher)

    def searched(record):
        return sweep.searcher(section.model_copy(update={"num_samples": 2 + record.requested}), 0)

    controller = Controller(tmp_path, section, together=5)
    assert len(controller.running()) == 2
    requests.add_trials(str(tmp_path), 2, {"train.learning_rate": 5e-3})
    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove_file", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            requests.take(controller.record)
    queue = controller.search_alg
    queue.again = lambda: searched(controller.record)
    queue._search_again()
    queue.looked = -math.inf
    assert not queue.take_requests(), "it was taken before"
    assert storage.names(f"{tmp_path}/{requests.FOLDER}") == []
    assert list(controller.running()) == [f"trial_{number:05d}" for number in range(4)]
    assert (queue.total_samples, queue.has_more) == (4, False)
    record = sweep.SweepRecord(str(tmp_path))
    settings = [trial.settings for trial in record.trials.values()]
    assert settings[2]["train.learning_rate"] == 5e-3
    assert all(each.keys() == SPACE.keys() for each in settings)
    assert (record.requested, record.requested_settings) == (2, [])
    if searcher == "random":
        points = drawn(space=SPACE, num_samples=4)
        assert settings[3] == points[3]
        assert settings[2] == {**points[2], "train.learning_rate": 5e-3}


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_key_that_is_added_to_the_space_has_its_value_in_earlier_trials(tmp_path, searcher):
    rates = {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}
    old = TuneConfig(space=rates, num_samples=3, searcher=searcher, scheduler="none")
    first = Controller(tmp_path, old, together=3)
    for trial in first.running().values():
        first.report(trial, {"step": 1, "tokens": BUDGET.tokens, "best_perplexity": 5.0})
    first.record.extend(5, [], {"train.seed": 0})
    new = old.model_copy(update={"space": {**rates, "train.seed": {"randint": [0, 9]}}, "num_samples": 5})
    again = Controller(tmp_path, new, together=5)
    assert list(again.running()) == ["trial_00003", "trial_00004"]
    settings = [trial.settings for trial in again.record.trials.values()]
    assert [each["train.seed"] for each in settings[:3]] == [0, 0, 0]
    assert all(each.keys() == new.space.keys() for each in settings)


def test_of_a_wider_grid_only_new_points_are_trained():
    """Whatever the order of its values, and each as often as tune.num_samples says."""

    def points(grid, **section):
        space = {"blocks.block_size": {"grid": grid}, **section.pop("others", {})}
        return sweep.searcher(TuneConfig(space=space, **section), 0)

    wider = points([32, 64, 128])
    for number, size in enumerate((64, 128)):
        wider.add(f"trial_{number}", {"blocks.block_size": size})
    assert (wider.total, wider.draw("trial_2")) == (3, {"blocks.block_size": 32})
    other = points([32, 64])
    other.add("trial_0", {"blocks.block_size": 128})
    assert other.total == 3
    rates = {"train.learning_rate": {"uniform": [0, 1]}}
    before, after = (points(grid, others=rates, num_samples=2) for grid in ([64, 128], [32, 64, 128]))
    for number in range(4):
        after.add(f"trial_{number}", before.draw(f"trial_{number}"))
    assert [after.draw(f"trial_{number}")["blocks.block_size"] for number in range(4, after.total)] == [32, 32]


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_with_fewer_samples_the_started_trials_resume_and_no_others_start(tmp_path, searcher):
    def section(num_samples):
        return TuneConfig(scheduler="none", num_samples=num_samples, space=SPACE, searcher=searcher)

    before = Controller(tmp_path, section(8), together=6)
    assert len(before.running()) == 6
    again = Controller(tmp_path, section(4), together=8)
    assert list(again.running()) == list(before.record.trials)
    assert again.search_alg.total_samples == 6
    assert not again.search_alg.has_more


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_new_trial_does_not_resume_from_the_checkpoints_of_one_that_the_record_has_lost(tmp_path, searcher):
    section = TuneConfig(scheduler="none", num_samples=5, space=SPACE, searcher=searcher)
    for number in range(3):
        (tmp_path / f"trial_{number:05d}").mkdir()
    record = sweep.SweepRecord(str(tmp_path))
    record.add("trial_00000", sweep.searcher(section, 0).draw("trial_00000"))
    again = Controller(tmp_path, section, together=5)
    assert again.search_alg.unknown == ["trial_00001", "trial_00002"]
    assert list(again.running()) == ["trial_00000", "trial_00003", "trial_00004", "trial_00005", "trial_00006"]
    assert not again.search_alg.has_more


def test_a_trial_of_a_population_has_no_checkpoints_of_a_change_that_is_lost(tmp_path):
    job = SimpleNamespace(directory=str(tmp_path), checkpoints=checkpoint.CheckpointManager(f"{tmp_path}/checkpoints"))
    for step in (10, 20):
        job.checkpoints.commit(step, {})
    (tmp_path / ADOPTED).write_text(json.dumps({"changed": "trial_00000", "donor": "trial_00001"}))
    _settle([], job, job)
    assert job.checkpoints.steps() == []
    job.checkpoints.commit(30, {})
    _settle([], job, job)
    assert job.checkpoints.steps() == [30], "they are its own"


def algorithm_2(scores, rungs, eta):
    """Li et al. 2020, to the letter, for one worker: (trial, tokens) of its jobs, until no trial is left."""
    results, promoted, jobs = [{} for _ in rungs], [set() for _ in rungs], []

    def get_job():
        for k in reversed(range(len(rungs) - 1)):
            candidates = sorted(results[k], key=results[k].get)[: len(results[k]) // eta]
            if promotable := [trial for trial in candidates if trial not in promoted[k]]:
                promoted[k].add(promotable[0])
                return promotable[0], k + 1
        return (len(results[0]), 0) if len(results[0]) < len(scores) else None

    while job := get_job():
        trial, k = job
        results[k][trial] = scores[trial][rungs[k] // 64 - 1]
        jobs.append((f"trial_{trial:05d}", rungs[k]))
    return jobs


@pytest.mark.parametrize(("eta", "rungs"), [(2, [64, 128, 256, 512, 1024]), (3, [64, 192, 576, 1024])])
def test_one_worker_follows_the_paper(tmp_path, eta, rungs):
    scores = scores_of(1, trials=30)
    section = {"kind": "asha", "grace_tokens": 64, "reduction_factor": eta}
    events = play(tmp_path / "sweep", section, scores, together=1)
    jobs = [(event["result"], event["tokens"]) for event in events if event.get("tokens") in rungs]
    assert jobs == algorithm_2(scores, rungs, eta)
    assert 1024 in dict(jobs).values()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_sweep_ends_and_promotes_nobody_that_is_not_among_the_best(data):
    """Whatever the order, the failures, the ties, and however often it is killed."""
    eta, together = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 4))
    score = st.sampled_from([None, *range(1, 9), *range(1, 9)])
    scores = data.draw(st.lists(st.lists(score, min_size=16, max_size=16), min_size=1, max_size=12))
    cuts = data.draw(st.lists(st.integers(1, 60), max_size=3))
    section = {"kind": "asha", "grace_tokens": 64, "reduction_factor": eta}
    order = {"seed": data.draw(st.integers(0, 9)), "slow": data.draw(st.sets(st.integers(1, 60)))}
    with tempfile.TemporaryDirectory() as directory:
        events = play(Path(directory), section, scores, together=together, cuts=cuts, **order)
    rungs = sweep.scheduler(TuneConfig(scheduler=section), BUDGET, "best_perplexity").rungs
    results, waiting, over = {rung: {} for rung in rungs}, {}, {}

    def may_go_on():
        """Those that wait among the best of their rungs, the highest rung first."""
        best = [(rung, sorted(found, key=found.get)[: len(found) // eta]) for rung, found in results.items()]
        return [trial for rung, trials in reversed(best) for trial in trials if waiting.get(trial) == rung]

    for event in events:
        match event:
            case {"added": trial}:
                assert may_go_on() == []
            case {"result": trial, "tokens": tokens, "best_perplexity": found}:
                assert trial not in waiting, "it goes no further than its rung"
                if tokens in rungs:
                    results[tokens][trial] = found
                    waiting[trial] = tokens
                    if may_go_on()[:1] == [trial]:
                        del waiting[trial]
            case {"promoted": trial}:
                if not may_go_on():  # in the end, for lack of one that has its whole budget
                    assert "completed" not in over.values()
                    assert len(waiting) + len(over) == len(scores)
                    highest = max(waiting.values())
                    assert trial == min((t for t in waiting if waiting[t] == highest), key=results[highest].get)
                else:
                    assert trial == may_go_on()[0]
                del waiting[trial]
            case {"finished": trial, "status": status}:
                assert (status == "stopped early") == (trial in waiting)
                assert waiting.pop(trial, None) is None or "completed" in over.values()
                over[trial] = status
    assert len(over) == len(scores)
    assert "completed" in over.values() or set(over.values()) == {"failed"}


def of_documents(*qualities, count=20):
    """(scores, document scores) of trials that are so many nats a token worse than the best."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(50, 200, count)
    nll = [tokens * (3 + worse + generator.normal(0, 0.01, count)) for worse in qualities]
    scores = [[math.exp(each.sum() / tokens.sum() + 1 / step) for step in range(1, 17)] for each in nll]
    return scores, lambda name, step: DocumentScores(nll[int(name[-5:])] + tokens / step, tokens, tokens, "a")


TIES = {"kind": "asha", "grace_tokens": 64 * 4, "reduction_factor": 4.0}
WORSE = (0.3, 0.001, 0.0, 0.2, 0.0005, 0.4)


@pytest.mark.parametrize(("ties", "completed"), [("drop", 1), ("promote", 3)])
def test_trials_that_are_not_worse_than_the_last_of_the_best_are_promoted_if_ties_are(tmp_path, ties, completed):
    """Of six trials three differ in noise alone. The same are promoted if the sweep is killed at every fifth line."""
    scores, documents = of_documents(*WORSE)
    events = play(tmp_path / "whole", {**TIES, "ties": ties}, scores, together=1, documents=documents)
    ends = {event["finished"]: event["status"] for event in events if "finished" in event}
    assert sum(status == "completed" for status in ends.values()) == completed
    stopped = {name for name, status in ends.items() if status == "stopped early"}
    assert stopped >= {f"trial_{number:05d}" for number in (0, 3, 5)}
    cuts = range(1, 200, 5)
    cut = play(tmp_path / "cut", {**TIES, "ties": ties}, scores, together=1, cuts=cuts, documents=documents)
    assert cut == events


@pytest.mark.parametrize("count", [5, 0], ids=["five documents", "no document scores"])
def test_where_documents_tell_nothing_ties_are_dropped(tmp_path, count):
    scores, documents = of_documents(*WORSE, count=count or 20)
    dropped, promoted = (
        play(tmp_path / ties, {**TIES, "ties": ties}, scores, together=1, documents=documents if count else None)
        for ties in ("drop", "promote")
    )
    assert promoted == dropped


def test_new_trials_start_before_ties_are_promoted(tmp_path):
    scores, documents = of_documents(0.0, 0.0005, 0.001, 0.3)
    section = {**TIES, "reduction_factor": 8.0, "ties": "promote"}
    events = play(tmp_path / "sweep", section, scores, together=1, documents=documents)
    kinds = [kind for event in events for kind in ("added", "promoted") if kind in event]
    assert kinds == ["added"] * 4 + ["promoted"] * kinds.count("promoted")
    assert kinds.count("promoted") >= 3


def test_a_trial_is_promoted_once_tune_has_paused_it(tmp_path):
    """Three have room beside each other; the best may go on when the last one reports, and is still being paused."""
    scores = [[10.0 + number] * 16 for number in range(3)]
    section = {"kind": "asha", "grace_tokens": 64, "reduction_factor": 3}
    events = play(tmp_path / "sweep", section, scores, together=4, slow={1, 2, 3})
    assert [event["finished"] for event in events if event.get("status") == "completed"] == ["trial_00000"]


@pytest.mark.parametrize(("trials", "evaluations"), [(1, 16), (2, 17), (3, 3 + 15), (9, 9 + 3 * 2 + 13)])
def test_what_a_sweep_costs(tmp_path, trials, evaluations):
    """The first of so many trials is the best, those after it are worse and worse: rungs are at 1, 3 and 9 of 16."""
    scores = [[10.0 + number] * 16 for number in range(trials)]
    events = play(tmp_path / "sweep", {"kind": "asha", "grace_tokens": 64, "reduction_factor": 3}, scores, together=1)
    assert sum("result" in event for event in events) == evaluations


def test_what_was_decided_and_nobody_heard_of_is_made_up_for(tmp_path):
    """Killed after a result was written down, and before the trial was told."""
    found = {}
    for kind in ("asha", "median"):
        (tmp_path / kind).mkdir()
        record = sweep.SweepRecord(str(tmp_path / kind))
        for number, score in enumerate((10.0, 20.0, 30.0, 90.0)):
            record.add(f"trial_{number}", {})
            for tokens in (64, 128):
                record.result(f"trial_{number}", {"tokens": tokens, "best_perplexity": score, "budget_tokens": 1024})
        record = sweep.SweepRecord(str(tmp_path / kind))
        section = TuneConfig(scheduler={"kind": kind, "grace_tokens": 128, "reduction_factor": 4.0})
        scheduler = sweep.RecordedScheduler(
            sweep.scheduler(section, BUDGET, "best_perplexity"), record, BUDGET, lambda: False
        )
        trials = {trial_id: ray_trial(trial_id) for trial_id in record.trials}
        scheduler.replay(trials)
        found[kind] = [record.trials[trial_id].status for trial_id in trials], [t.status for t in trials.values()]
    assert found["asha"] == (["running"] * 4, ["PAUSED"] * 4)
    assert found["median"][0] == ["running", "running", "running", "stopped early"]
    assert found["median"][1][:3] == ["PENDING"] * 3


def test_a_trial_whose_process_is_lost_while_it_pauses_stays_paused(tmp_path):
    record = sweep.SweepRecord(str(tmp_path))
    inner = sweep.scheduler(TuneConfig(scheduler="asha"), BUDGET, "best_perplexity")
    found, trial = sweep.RecordedScheduler(inner, record, BUDGET, lambda: False), ray_trial("trial_0")
    record.add("trial_0", {})
    result = {"tokens": 128, "best_perplexity": 9.0, "budget_tokens": 1024}
    assert found.on_trial_result(None, trial, result) == "PAUSE"
    assert found.on_trial_result(None, trial, result) == "PAUSE", "begun again, it tells its last result"
    room = SimpleNamespace(is_full=False, busy=0, has_more=False)
    controller = SimpleNamespace(search_alg=room, get_trials=lambda: [trial])
    assert found.choose_trial_to_run(controller) is None, "it is not paused yet"
    trial.set_status("PAUSED")
    assert found.choose_trial_to_run(controller) is trial
    assert found.on_trial_result(None, trial, result) == "CONTINUE", "it was promoted"


def test_a_failed_trial_does_not_decide_about_others(tmp_path):
    section = TuneConfig(scheduler={"kind": "asha", "grace_tokens": 64, "reduction_factor": 2.0})
    record = sweep.SweepRecord(str(tmp_path))
    found = sweep.RecordedScheduler(sweep.scheduler(section, BUDGET, "best_perplexity"), record, BUDGET, lambda: False)
    decisions = []
    for number, score in enumerate((50.0, float("inf"), float("inf"), 60.0, 40.0)):
        record.add(f"trial_{number}", {})
        trial = ray_trial(f"trial_{number}")
        found.on_trial_add(None, trial)
        failure = {"failure": "diverged"} if score == float("inf") else {}
        result = {"tokens": 64, "best_perplexity": score, "budget_tokens": 1024, **failure}
        decisions.append(found.on_trial_result(SimpleNamespace(), trial, result))
    assert decisions == ["PAUSE", "CONTINUE", "CONTINUE", "PAUSE", "CONTINUE"]
    assert not found.has_next, "one of three goes on; of five it were two"
    assert [trial.failure for trial in record.trials.values()] == [None, "diverged", "diverged", None, None]


def test_a_population_stays_inside_the_ranges_of_its_space():
    space = {
        "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "train.weight_decay": {"quniform": [0.0, 0.5, 0.1]},
        "train.warmup_steps": {"uniform": [0.0, 0.9]},
        "train.arguments.adam_beta2": {"uniform": [0.9, 0.999]},
        "train.arguments.max_grad_norm": {"randint": [1, 4]},
        "train.arguments.adam_beta1": {"choice": [0.8, 0.9, 0.95]},
        "train.optimizer": {"choice": ["adamw_torch", "sgd"]},
    }
    section = TuneConfig(scheduler="pbt", space=space)
    population = sweep.scheduler(section, BUDGET, "best_perplexity")
    trial = ray_trial("trial_0")
    random.seed(0)
    trial.config = dict(sweep.searcher(section, 0).draw("trial_0"))
    seen = []
    for _ in range(300):
        trial.config, _ = population._get_new_config(trial, trial)
        seen.append(trial.config)
    for key, values in {key: {found[key] for found in seen} for key in space}.items():
        ((kind, given),) = space[key].items()
        if kind == "choice":
            assert values <= {*given}
        else:
            assert given[0] <= min(values)
            assert max(values) <= given[1] - (kind == "randint")
            assert len(values) > 2, "and it moves"
    assert {round(found["train.weight_decay"] * 10, 9) for found in seen} <= {*range(6)}
    assert {found["train.arguments.max_grad_norm"] for found in seen} == {1, 2, 3}
    assert len({found["train.optimizer"] for found in seen}) == 1, "the optimizer's state would not fit"


def test_what_is_not_a_number_ranks_last():
    found = sweep.scheduler(TuneConfig(scheduler="asha"), BUDGET, "best_perplexity")
    for number, score in enumerate((8.0, math.nan, math.inf, 9.0)):
        result = {"tokens": 128, "best_perplexity": score, "budget_tokens": 1024}
        assert found.on_trial_result(None, ray_trial(f"trial_{number}"), result) == "PAUSE"
    for best in ("trial_0", "trial_3"):
        assert found.next_up() == best
        found.promote(best)
    assert found.next_up() is None
