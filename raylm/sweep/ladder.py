"""tune.ladder: a sweep over models of several sizes, each trained for several numbers of tokens.

    tune.ladder: {model.config.n_layer: [2, 4], tokens_per_parameter: [5, 20]}

    n_layer 2, n_embd 128, n_head 2       663,552 parameters     3,317,760 and 13,271,040 tokens
    n_layer 4, n_embd 256, n_head 4     3,699,712 parameters    18,498,560 and 73,994,240 tokens

Every draw of tune.space is trained at every size and length, so sizes are compared in pairs. The ladder becomes an
entry of the space, a grid of settings. What goes with a depth has the shape of GPT-2 (Radford et al. 2019): 64
dimensions and one head for each layer. The batch follows Step Law (Li et al. 2025, arXiv:2503.04715), 0.58 D^0.571 for
D tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raylm import model
from raylm.config import Experiment, override
from raylm.errors import ConfigError
from raylm.sweep.space import LADDER
from raylm.sweep.suggested import batch_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LENGTH = "tokens_per_parameter"

DEPTHS = ("model.config.n_layer", "model.config.num_hidden_layers")
WIDTHS = ("model.config.n_embd", "model.config.hidden_size")
HEADS = ("model.config.n_head", "model.config.num_attention_heads")

WIDTH = 64
"""Dimensions for each layer, and of each head, in GPT-2 of 124M parameters."""


def as_space(experiment: Experiment, vocab_size: int) -> Experiment:
    """The experiment with its ladder as an entry of tune.space; ConfigError naming what no model can have.

    Its model is the largest of the ladder, with the longest training: that is what a plan shows and measures, and what
    is scored before it is trained. The model that was given may have no size at all, and then has transformers' own: 7
    billion parameters, of a Llama.
    """
    section = experiment.tune
    lengths = section.ladder[LENGTH]
    keys = {key: values for key, values in section.ladder.items() if key != LENGTH}
    given = [dict(zip(keys, values, strict=True)) for values in zip(*keys.values(), strict=True)]
    sizes = [_shaped(experiment, each) for each in given]
    parameters = [_parameters(experiment, size, vocab_size) for size in sizes]
    steps = [
        {**size, **_budget(experiment, math.ceil(length * number))}
        for size, number in zip(sizes, parameters, strict=True)
        for length in lengths
    ]
    largest = sizes[parameters.index(max(parameters))]
    longest = max(steps, key=lambda step: step["train.max_tokens"])
    budget = {key: value for key, value in longest.items() if key.startswith("train.")}
    space = {**section.space, LADDER: {"grid": steps}}
    return override(experiment, {**largest, **budget, "tune.space": space, "tune.ladder": {}})


def lines(experiment: Experiment) -> dict[str, str]:
    """Size -> its training tokens and batches, for the plan; empty without a ladder in the space."""
    found: dict[str, str] = {}
    for step in experiment.tune.space.get(LADDER, {}).get("grid", ()):
        shape = [f"{key.rpartition('.')[2]} {value}" for key, value in step.items() if key.startswith("model.")]
        size = f"  {', '.join(shape)}"
        batch = step.get("train.batch_tokens")
        tokens = f"{step['train.max_tokens']:,} tokens{f' in steps of {batch:,}' if batch is not None else ''}"
        found[size] = f"{found[size]}; {tokens}" if size in found else tokens
    return found


def most_tokens(experiment: Experiment, trials: int) -> int | None:
    """The training tokens of so many trials, as many at each size and length; None without a ladder in the space."""
    steps = experiment.tune.space.get(LADDER, {}).get("grid", ())
    return trials * sum(step["train.max_tokens"] for step in steps) // len(steps) if steps else None


def settings(
    experiment: Experiment, largest: Mapping[str, Any], asked: Mapping[str, Any], tokens: int
) -> dict[str, Any]:
    """What the ladder would give a training that is asked for, over the settings of its largest trial: the batch for so
    many training tokens, unless the space has one, and what follows from its depth, width and heads.

    Width and heads are those of another depth, if the ladder's sizes have them so and no width is asked for; all else
    is in proportion to the largest. Empty if the experiment is of no ladder.
    """
    steps = experiment.tune.space.get(LADDER, {}).get("grid", ())
    if not steps:
        return {}
    batch = {}
    if "train.batch_tokens" in steps[0]:
        size = asked.get("blocks.block_size", experiment.blocks.block_size)
        a_block = override(
            experiment, {"blocks.block_size": size, "train.batch_tokens": size * experiment.cluster.most_workers}
        )
        batch = {"train.batch_tokens": batch_tokens(tokens, a_block)}
    if not _given(asked):
        return batch
    is_of_depth = all(map(_is_of_depth, steps)) and not {*asked} & {*WIDTHS}
    return {**_shaped(experiment, _given(asked if is_of_depth else {**largest, **asked})), **batch}


def _given(size: Mapping[str, Any]) -> dict[str, Any]:
    """The depth, width and heads of a size, from which the rest of its shape follows."""
    return {key: value for key, value in size.items() if key in (*DEPTHS, *WIDTHS, *HEADS)}


def _is_of_depth(size: Mapping[str, Any]) -> bool:
    depth, width, heads = (next((size[key] for key in keys if key in size), 0) for keys in (DEPTHS, WIDTHS, HEADS))
    return bool(depth) and (width, heads) == (WIDTH * depth, depth)


def _shaped(experiment: Experiment, size: dict[str, Any]) -> dict[str, Any]:
    """The settings of a size with the widths and heads that go with its depth, unless the ladder gives them."""
    found = model.config_of(override(experiment, {"tune.ladder": {}, "tune.space": {}}))
    # A width without an intermediate size says nothing of their proportion: the other is transformers' own.
    proportions = found if "intermediate_size" in (experiment.model.config or ()) else type(found)()
    shape = _shape(found, proportions, size)
    return {**{f"model.config.{name}": value for name, value in shape.items()}, **size}


def _shape(found: PreTrainedConfig, proportions: PreTrainedConfig, size: dict[str, Any]) -> dict[str, int]:
    """Names of transformers' configuration -> the width and heads for the depth in a size, and what else follows from
    these or from those that the size has itself; empty if it has no depth.

    Heads share keys and values as in `found`; the intermediate size is to the width as in `proportions`.
    """
    depth = next((size[key] for key in DEPTHS if key in size), None)
    if depth is None:
        return {}
    if "n_embd" in found.to_dict():
        return {"n_embd": WIDTH * depth, "n_head": depth}
    width = size.get("model.config.hidden_size", WIDTH * depth)
    heads = size.get("model.config.num_attention_heads", depth)
    if not all(isinstance(each, int) and each > 0 for each in (width, heads)):
        return {}  # no model has these, which is told where one is made
    shape = {"hidden_size": width, "num_attention_heads": heads}
    if getattr(found, "num_key_value_heads", None) is not None:
        groups = found.num_attention_heads // found.num_key_value_heads
        shape["num_key_value_heads"] = heads // groups if heads % groups == 0 else heads
    if getattr(found, "head_dim", None) is not None:
        shape["head_dim"] = width // heads
    if getattr(found, "intermediate_size", None) is not None:
        shape["intermediate_size"] = 8 * round(proportions.intermediate_size / proportions.hidden_size * width / 8)
    return shape


def _parameters(experiment: Experiment, size: Mapping[str, Any], vocab_size: int) -> int:
    """All parameters of a size of the ladder."""
    of_size = override(experiment, {**size, "tune.ladder": {}, "tune.space": {}})
    try:
        return model.num_parameters(model.config_of(of_size, vocab_size), masked=experiment.objective.is_masked)
    except ConfigError as error:
        raise ConfigError(f"tune.ladder: {size}: {error.message}", where="tune.ladder") from None


def _budget(experiment: Experiment, tokens: int) -> dict[str, int]:
    """The settings of a training of so many tokens, or of a few more in whole steps."""
    if "train.batch_tokens" in experiment.tune.space:
        batch = experiment.train.batch_tokens
        return {"train.max_tokens": math.ceil(tokens / batch) * batch}
    batch = batch_tokens(tokens, experiment)
    return {"train.max_tokens": math.ceil(tokens / batch) * batch, "train.batch_tokens": batch}
