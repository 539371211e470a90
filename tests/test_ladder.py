"""tune.ladder: every draw of a sweep at several sizes of models, each trained for several numbers of tokens."""

import pytest
from test_tune import run

from raylm import model, sweep
from raylm.config import load, override
from raylm.errors import ConfigError
from raylm.pipeline import sweep as sweeping
from raylm.sweep import ladder

RATES = {"train.learning_rate": {"loguniform": [1e-3, 1e-2]}}
LADDER = {"model.config.n_layer": [1, 2], "tokens_per_parameter": [2, 5.5]}


def swept(experiment, **settings):
    common = {"tune.space": RATES, "tune.scheduler": "none", "tune.num_samples": 2, "tune.ladder": LADDER}
    return override(experiment, {**common, **settings})


def steps_of(experiment, vocab_size=300):
    return ladder.as_space(experiment, vocab_size).tune.space["ladder"]["grid"]


def test_each_size_has_the_shape_of_gpt2_and_budgets_by_its_parameters(tiny):
    steps = steps_of(swept(tiny()))
    shapes = [(step["model.config.n_embd"], step["model.config.n_head"]) for step in steps]
    assert shapes == [(64, 1), (64, 1), (128, 2), (128, 2)]
    for step, length in zip(steps, [2, 5.5, 2, 5.5], strict=True):
        of_size = override(tiny(), step)
        parameters = model.num_parameters(model.config_of(of_size, 300))
        batch = step["train.batch_tokens"]
        assert batch % 32 == step["train.max_tokens"] % batch == 0
        assert 0 <= step["train.max_tokens"] - length * parameters < batch
        assert batch == pytest.approx(0.58 * (length * parameters) ** 0.571, abs=16), "Step Law, in whole blocks"


def test_what_is_given_is_not_derived(tiny):
    given = {**LADDER, "model.config.n_embd": [16, 48], "model.config.n_head": [2, 3]}
    assert [step["model.config.n_embd"] for step in steps_of(swept(tiny(), **{"tune.ladder": given}))] == [
        16,
        16,
        48,
        48,
    ]
    batches = {**RATES, "train.batch_tokens": {"choice": [256, 512]}}
    assert all("train.batch_tokens" not in step for step in steps_of(swept(tiny(), **{"tune.space": batches})))
    blocks = {**RATES, "blocks.block_size": {"choice": [32, 48]}}
    assert all(step["train.batch_tokens"] % 96 == 0 for step in steps_of(swept(tiny(), **{"tune.space": blocks})))


def test_another_depth_has_the_shape_of_the_ladder_only_if_its_sizes_do(tiny):
    depth, batch = {"model.config.n_layer": 5}, {"train.batch_tokens": 1536}
    width, heads = "model.config.n_embd", "model.config.n_head"

    def found(asked, **settings):
        made = ladder.as_space(swept(tiny(), **settings), 300)
        return ladder.settings(made, made.tune.space["ladder"]["grid"][-1], asked, 10**6)

    assert ladder.settings(tiny(), {}, depth, 10**6) == {}, "no ladder"
    assert found(depth) == {**depth, width: 320, heads: 5, **batch}
    assert found({**depth, heads: 10}) == {**depth, width: 320, heads: 10, **batch}
    assert found({**depth, width: 64}) == {**depth, width: 64, heads: 2, **batch}, "heads as the largest has"
    assert found({"train.seed": 1}) == batch
    assert found({"blocks.block_size": 1000}) == {"train.batch_tokens": 2000}, "whole blocks of the size asked for"
    batches = {**RATES, "train.batch_tokens": {"choice": [256, 512]}}
    assert found(depth, **{"tune.space": batches}) == {**depth, width: 320, heads: 5}
    own = {**LADDER, width: [16, 48], heads: [2, 3]}
    assert found(depth, **{"tune.ladder": own}) == {**depth, width: 48, heads: 3, **batch}


def test_what_follows_from_a_width_that_is_asked_for_follows(tiny):
    name = "model.config."
    base = {
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96,
    }  # fmt: skip
    sizes = {f"{name}num_hidden_layers": [1, 2], f"{name}hidden_size": [32, 64], f"{name}num_attention_heads": [4, 4]}
    lengths = {"model.config": base, "tune.ladder": {**sizes, "tokens_per_parameter": [1]}}
    made = ladder.as_space(swept(tiny(), **lengths), 300)
    largest = made.tune.space["ladder"]["grid"][-1]
    asked = {f"{name}hidden_size": 128, f"{name}num_attention_heads": 8}
    found = ladder.settings(made, largest, asked, 10**6)
    assert [found[f"{name}{each}"] for each in ("num_hidden_layers", "intermediate_size", "head_dim")] == [2, 384, 16]
    assert found[f"{name}num_key_value_heads"] == 4


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_models_with_other_names_have_the_same_shape(tiny, kind):
    base = {
        "model_type": kind, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 80, "head_dim": 8,
    }  # fmt: skip
    sizes = {"model.config.num_hidden_layers": [2, 3], "tokens_per_parameter": [1]}
    two, three = steps_of(swept(tiny(), **{"model.config": base, "tune.ladder": sizes}))
    name = "model.config."
    assert (two[f"{name}hidden_size"], two[f"{name}num_attention_heads"], two[f"{name}head_dim"]) == (128, 2, 64)
    assert (two[f"{name}num_key_value_heads"], two[f"{name}intermediate_size"]) == (1, 320)
    assert three[f"{name}num_key_value_heads"] == 3, "three heads cannot share two by two"
    own = {**sizes, f"{name}hidden_size": [64, 96], f"{name}num_attention_heads": [4, 6]}
    _, three = steps_of(swept(tiny(), **{"model.config": base, "tune.ladder": own}))
    assert (three[f"{name}head_dim"], three[f"{name}num_key_value_heads"]) == (16, 3), "they follow the widths given"
    assert three[f"{name}intermediate_size"] == 240


def test_the_model_of_the_sweep_is_the_largest_of_the_ladder(tiny):
    """It is scored before it is trained, and its speed is measured: transformers' own Llama takes 27 GB."""
    name = "model.config."
    sizes = {f"{name}num_hidden_layers": [2, 1], f"{name}hidden_size": [48, 32], f"{name}num_attention_heads": [4, 4]}
    given = {"model.config": {"model_type": "llama"}, "tune.ladder": {**sizes, "tokens_per_parameter": [1]}}
    planned = sweeping.resolve(swept(tiny(), **given)).plan
    config = planned.model_config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (48, 2, 128), "as of Llama"
    assert planned.num_parameters == model.num_parameters(model.config_of(planned.experiment, 300)) < 100_000
    longest = planned.experiment.tune.space["ladder"]["grid"][0]
    assert planned.experiment.train.batch_tokens == longest["train.batch_tokens"]
    assert planned.budget.tokens == longest["train.max_tokens"]


def test_the_intermediate_size_follows_from_one_that_is_given_with_the_width(tiny):
    name = "model.config."
    sizes = {f"{name}num_hidden_layers": [1], f"{name}hidden_size": [64], f"{name}num_attention_heads": [4]}
    base = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
    for given, intermediate in (({}, 176), ({"intermediate_size": 48}, 192)):
        settings = {"model.config": {**base, **given}, "tune.ladder": {**sizes, "tokens_per_parameter": [1]}}
        (step,) = steps_of(swept(tiny(), **settings))
        assert step[f"{name}intermediate_size"] == intermediate


def test_each_draw_is_trained_at_every_size(tiny):
    experiment = ladder.as_space(swept(tiny()), 300)
    searcher = sweep.searcher(experiment.tune, 0)
    drawn = [searcher.draw("") for _ in range(searcher.total)]
    assert len(drawn) == 8
    rates = [each["train.learning_rate"] for each in drawn]
    assert len({*rates[:4]}) == len({*rates[4:]}) == 1
    assert rates[0] != rates[4]
    assert [each["train.max_tokens"] for each in drawn[:4]] == [each["train.max_tokens"] for each in drawn[4:]]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tune.ladder": {"tokens_per_parameter": [1]}}, "must have sizes of models and tokens_per_parameter, such as"),
        ({"tune.ladder": {**LADDER, "train.seed": [1, 2]}}, "must have keys of model.config and tokens_per_parameter"),
        (
            {"tune.ladder": {**LADDER, "model.config.n_embd": [64]}},
            "2 of model.config.n_layer, 1 of model.config.n_embd",
        ),
        ({"tune.ladder": {**LADDER, "model.config.n_layer": [1, 1.5]}}, "must be whole numbers above 0, got 1.5"),
        ({"tune.scheduler": "asha"}, "tune.scheduler: must be none with tune.ladder, got asha"),
        ({"tune.space": {"train.max_tokens": {"choice": [512]}}}, "tune.space: must not have train.max_tokens"),
    ],
)
def test_what_is_no_ladder_is_refused(tiny, settings, problem):
    with pytest.raises(ConfigError) as refused:
        swept(tiny(), **settings)
    assert problem in refused.value.message


def test_a_size_that_no_model_can_have_is_refused_before_anything_runs(tiny):
    heads = {**LADDER, "model.config.n_embd": [16, 16], "model.config.n_head": [3, 3]}
    with pytest.raises(ConfigError, match=r"^tune.ladder: .*n_head"):
        sweeping.resolve(swept(tiny(), **{"tune.ladder": heads}))


def test_the_plan_of_a_ladder_has_the_tokens_of_all_sizes(tiny):
    planned = sweeping.resolve(load(None, {"tune.ladder": LADDER, "tune.scheduler": "none", "tracking.uri": None}))
    steps = planned.experiment.tune.space["ladder"]["grid"]
    assert planned.most_tokens == 8 * sum(step["train.max_tokens"] for step in steps)
    assert planned.trials == 8 * 4
    alone = sweeping.resolve(override(planned.experiment, {"tune.space": {"ladder": {"grid": steps}}}))
    assert (alone.trials, alone.most_tokens) == (4, planned.most_tokens // 8), "settings that nothing draws, once"
    assert planned.plan.budget.tokens == pytest.approx(max(step["train.max_tokens"] for step in steps), rel=0.01)
    assert [*ladder.lines(planned.experiment)] == [
        "  n_embd 64, n_head 1, n_layer 1",
        "  n_embd 128, n_head 2, n_layer 2",
    ]


def test_each_trial_of_a_ladder_is_trained_to_the_end_of_its_own_budget(ray_cluster, tiny):
    sizes = {"model.config.n_layer": [1, 2], "model.config.n_embd": [8, 16], "model.config.n_head": [2, 2]}
    lengths = {"tokens_per_parameter": [0.25, 0.5]}
    given = swept(tiny("name=ladder"), **{"tune.ladder": {**sizes, **lengths}, "tune.num_samples": 1})
    experiment = sweeping.resolve(given).experiment
    rows, _, _ = run(experiment)
    assert {row["status"] for row in rows} == {"completed"}
    assert sorted(row["tokens"] for row in rows) == sorted(row["settings"]["train.max_tokens"] for row in rows)
    assert len({row["parameters"] for row in rows}) == 2
