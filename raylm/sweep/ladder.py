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
    """The experiment with its ladder as an entry of tune.space; ConfigError naming what no model can have."""
    section = experiment.tune
    lengths = section.ladder[LENGTH]
    sizes = {key: values for key, values in section.ladder.items() if key != LENGTH}
    given = [dict(zip(sizes, values, strict=True)) for values in zip(*sizes.values(), strict=True)]
    steps = [
        {**size, **_budget(experiment, size, length, vocab_size)}
        for size in (_shaped(experiment, each) for each in given)
        for length in lengths
    ]
    most = max(step["train.max_tokens"] for step in steps)
    space = {**section.space, LADDER: {"grid": steps}}
    return override(experiment, {"tune.space": space, "tune.ladder": {}, "train.max_tokens": most})


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

    Width and heads are those of another depth, if the ladder's sizes have them so and no width is asked for. Empty if
    the experiment is of no ladder.
    """
    steps = experiment.tune.space.get(LADDER, {}).get("grid", ())
    if not steps:
        return {}
    batch = {"train.batch_tokens": batch_tokens(tokens, experiment)} if "train.batch_tokens" in steps[0] else {}
    sizes = [{key: value for key, value in step.items() if key.startswith("model.")} for step in steps]
    is_of_depth = all(_of_depth(experiment, each) == each for each in sizes) and not {*asked} & {*WIDTHS}
    if not is_of_depth and any(_shaped(experiment, _given(each)) != each for each in sizes):
        return batch
    base = _of_depth(experiment, asked) if is_of_depth else largest
    return {**_shaped(experiment, _given({**base, **asked})), **batch}


def _given(size: Mapping[str, Any]) -> dict[str, Any]:
    """The depth, width and heads of a size, from which the rest of its shape follows."""
    return {key: value for key, value in size.items() if key in (*DEPTHS, *WIDTHS, *HEADS)}


def _of_depth(experiment: Experiment, size: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a size by its depth alone; empty without one."""
    depth = {key: value for key, value in size.items() if key in DEPTHS}
    return _shaped(experiment, depth) if depth else {}


def _shaped(experiment: Experiment, size: dict[str, Any]) -> dict[str, Any]:
    """The settings of a size with the widths and heads that go with its depth, unless the ladder gives them."""
    found = model.config_of(override(experiment, {"tune.ladder": {}, "tune.space": {}}))
    shape = _shape(found, size)
    return {**{f"model.config.{name}": value for name, value in shape.items()}, **size}


def _shape(found: PreTrainedConfig, size: dict[str, Any]) -> dict[str, int]:
    """Names of transformers' configuration -> the width and heads for the depth in a size, and what else follows from
    these or from those that the size has itself; empty if it has no depth."""
    depth = next((size[key] for key in DEPTHS if key in size), None)
    if depth is None:
        return {}
    if "n_embd" in found.to_dict():
        return {"n_embd": WIDTH * depth, "n_head": depth}
    width = size.get("model.config.hidden_size", WIDTH * depth)
    heads = size.get("model.config.num_attention_heads", depth)
    shape = {"hidden_size": width, "num_attention_heads": heads}
    if getattr(found, "num_key_value_heads", None) is not None:
        groups = found.num_attention_heads // found.num_key_value_heads
        shape["num_key_value_heads"] = heads // groups if heads % groups == 0 else heads
    if getattr(found, "head_dim", None) is not None:
        shape["head_dim"] = width // heads
    if getattr(found, "intermediate_size", None) is not None:
        shape["intermediate_size"] = 8 * round(found.intermediate_size / found.hidden_size * width / 8)
    return shape


def _budget(experiment: Experiment, size: dict[str, Any], length: float, vocab_size: int) -> dict[str, int]:
    """The settings of a training of so many tokens for each parameter of a model."""
    of_size = override(experiment, {**size, "tune.ladder": {}, "tune.space": {}})
    try:
        parameters = model.num_parameters(model.config_of(of_size, vocab_size), masked=experiment.objective.is_masked)
    except ConfigError as error:
        raise ConfigError(f"tune.ladder: {size}: {error.message}", where="tune.ladder") from None
    tokens = math.ceil(length * parameters)
    batch = experiment.train.batch_tokens
    if "train.batch_tokens" not in experiment.tune.space:
        batch = batch_tokens(tokens, experiment)
    budget = {"train.max_tokens": math.ceil(tokens / batch) * batch}
    return budget if "train.batch_tokens" in experiment.tune.space else {**budget, "train.batch_tokens": batch}
