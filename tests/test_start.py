"""What a sweep starts from: values of published formulas, and the trials of earlier sweeps."""

import logging
import math
import types

import pytest

from raylm import model, sweep
from raylm.config import load
from raylm.errors import ConfigError
from raylm.pipeline import extension
from raylm.pipeline import sweep as sweeping
from raylm.sweep.start import Observation, Start

SPACE = {
    "train.learning_rate": {"loguniform": [1e-5, 1e-1]},
    "train.weight_decay": {"loguniform": [1e-3, 1.0]},
    "train.batch_tokens": {"choice": [2**power for power in range(11, 21)]},
}


def experiment(space, **settings):
    return load(None, {"tune.space": space, "tune.points": "suggested", "train.max_tokens": 10**10, **settings})


def suggestions(found, tokens):
    model_config = model.config_of(found, vocab_size=50_000)
    return {each.key: each for each in sweep.suggested.suggestions(found, model_config, tokens)}, model_config


@pytest.mark.parametrize("searcher", [{"tune.searcher": "optuna"}, {"tune.prior": {"train.learning_rate": 1e-4}}])
def test_a_searcher_learns_from_earlier_trials(searcher):
    """They are no trials of the sweep: these are numbered, and drawn first, as without them."""
    space = {"train.learning_rate": SPACE["train.learning_rate"]}
    section = experiment(space, **{"tune.num_samples": 16, **searcher}).tune
    rates = [10 ** (-5 + number / 5) for number in range(20)]
    observed = [Observation({"train.learning_rate": rate}, abs(math.log(rate / 2e-2))) for rate in rates]
    drawn = {}
    for observations in ((), tuple(observed)):
        points = sweep.searcher(section, 0, Start(({"train.learning_rate": 5e-4},), observations))
        drawn[bool(observations)] = [points.draw(str(number))["train.learning_rate"] for number in range(16)]
    assert drawn[True][0] == drawn[False][0] == 5e-4
    near = {known: sum(5e-3 < rate < 8e-2 for rate in found) for known, found in drawn.items()}
    assert near[True] >= near[False] + 3


# Published formulas --------------------------------------------------------------------------------------------------


def test_the_suggested_values_are_those_of_the_formulas():
    """Of a model of 472M without embeddings on 10B tokens. People who trained one of 440M quote a rate of 1.4e-3."""
    config = {"model_type": "gpt2", "n_layer": 24, "n_head": 20, "n_embd": 1280}
    found, model_config = suggestions(experiment(SPACE, **{"model.config": config}), 10**10)
    assert list(found) == ["train.batch_tokens", "train.learning_rate", "train.weight_decay"]
    batch, rate, decay = (each.value for each in found.values())
    assert batch == 2**18, "the nearest to 0.58 x (10^10)^0.571 = 297,000"
    assert rate == pytest.approx(1.4e-3, rel=0.1)
    timescale = batch / (rate * decay * 10**10)
    assert timescale == pytest.approx(1.084 * (10**10 / model.num_parameters(model_config)) ** -0.527, rel=0.01)
    holds = ["is inside of that range" in each.sentence for each in found.values()]
    assert holds == [True, True, False], "Power Lines wants 20 tokens for each of 537M parameters"


def test_a_suggested_value_says_where_its_formula_holds_and_that_it_was_clipped():
    space = {"train.learning_rate": {"loguniform": [1e-4, 1e-3]}, "model.config.n_layer": {"choice": [2, 4]}}
    found, _ = suggestions(experiment(space, **{"train.optimizer": "muon"}), 737_280)
    (suggestion,) = found.values()
    assert suggestion.value == 1e-3
    for told in (
        "train.learning_rate=0.001, the nearest in tune.space to 0.0",
        "(Step Law, Li et al. 2025, arXiv:2503.04715, for N of 60M to 1B and D of 2B to 100B: this run, with ",
        "parameters without embeddings and 737k tokens, is outside of that range",
        "train.optimizer=muon; trials draw model.config.n_layer, and the value is for the experiment's own model",
    ):
        assert told in suggestion.sentence


@pytest.mark.parametrize(
    ("sampler", "value", "nearest"),
    [
        ({"choice": [0.0, 0.01, 0.1]}, 0.04, 0.1),  # by the ratio
        ({"grid": [1e-3, 1e-2]}, 5e-4, 1e-3),
        ({"uniform": [0.0, 0.5]}, 0.7, 0.5),
        ({"quniform": [0.0, 0.5, 0.1]}, 0.26, 0.3),
        ({"randint": [0, 10]}, 10.2, 9),
    ],
)
def test_a_suggested_value_is_one_that_the_space_can_give(sampler, value, nearest):
    assert sweep.suggested.inside(sampler, value) == pytest.approx(nearest)


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_the_first_trial_has_the_suggested_values(searcher):
    found = experiment(SPACE, **{"tune.searcher": searcher})
    start = sweep.suggested.start(found, model.config_of(found, vocab_size=2048), 737_280)
    first = sweep.searcher(found.tune, 0, start).draw("trial_00000")
    assert first == start.points[0]
    assert sweep.searcher(found.tune, 0, sweep.suggested.placeholder(found.tune.space)).total == found.tune.num_samples


def test_a_sweep_says_what_is_suggested_once_and_keeps_it(tmp_path, caplog):
    """Another raylm, or another library, may compute other values when the sweep resumes."""
    found = experiment(SPACE)
    prepared = types.SimpleNamespace(
        experiment=found,
        budget=types.SimpleNamespace(tokens=737_280),
        store=types.SimpleNamespace(tokenizer=range(2048)),
    )
    active = types.SimpleNamespace(directory=str(tmp_path))
    with caplog.at_level(logging.INFO):
        sweeping._decide_start(prepared, active)
    start = sweep.start.read(str(tmp_path))
    assert [record.message for record in caplog.records] == list(start.notes)
    caplog.clear()
    prepared.budget = types.SimpleNamespace(tokens=1_000_000_000)
    sweeping._decide_start(prepared, active)
    assert sweep.start.read(str(tmp_path)) == start
    assert not caplog.records


def test_points_of_the_user_are_what_a_sweep_starts_from(tmp_path):
    points = [{"train.learning_rate": 1e-3}]
    found = load(None, {"tune.space": {"train.learning_rate": SPACE["train.learning_rate"]}, "tune.points": points})
    prepared, active = types.SimpleNamespace(experiment=found), types.SimpleNamespace(directory=str(tmp_path))
    sweeping._decide_start(prepared, active)
    assert not list(tmp_path.iterdir())
    assert extension.searcher(found, sweep.SweepRecord(str(tmp_path))).draw("trial_00000") == points[0]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"tune.points": "suggested", "tune.space": {"train.seed": {"choice": [1, 2]}}},
            "tune.points: must be a list unless tune.space has one of train.batch_tokens, train.learning_rate, ",
        ),
        (
            {"tune.prior_sweeps": "tune-a", "tune.space": {"train.seed": {"choice": [1, 2]}}},
            "tune.prior_sweeps: must come with tune.searcher=optuna or with a tune.prior: a random search",
        ),
        (
            {"tune.prior_sweeps": "tune-a", "tune.searcher": "optuna", "tune.against": "parameters"},
            "tune.prior_sweeps: must be left out with tune.against, got tune-a",
        ),
        ({"tune.points": "suggest"}, "tune.points: must be suggested or a list of settings to try"),
        ({"tune.points": {"train.seed": 1}}, "tune.points: must be suggested or a list of settings to try"),
        ({"tune.points": [1]}, "tune.points: must be suggested or a list of settings to try"),
    ],
)
def test_points_that_are_refused(settings, told):
    with pytest.raises(ConfigError) as caught:
        load(None, settings)
    assert told in caught.value.message
