"""Transfer from small to large: how a larger model starts and learns, so that settings that are best for a base model
of the same kind (learning rate, weight decay, ...) stay best for it.

By width it is muP (Yang et al. 2022, arXiv:2203.03466, table 8), by depth CompleteP (Dey et al. 2025, arXiv:2505.01618,
alpha = 1). With m the width and l the number of layers, both relative to the base's:

                                multiplier  initial values  AdamW: rate  epsilon    Muon: rate
    token, position embedding       1             1              1       1 / m      (AdamW)
    matrix of a layer               1         1 / sqrt(m)      1 / m     1 / (m l)  1 / sqrt(m)
    bias, norm of a layer           1             1              1       1 / (m l)  (AdamW)
    end of a residual branch      1 / l       as above                              as above
    final norm, before the head   1 / m           1              1       1 / m      (AdamW)

The m of a matrix is that of its inputs, for example of the MLP's width. Weight decay is divided by the rate's factor,
so a step takes the same share of each matrix at every size. A query has the multiplier sqrt(head size of the base /
head size), so that attention is scaled by 1 / head size; usually the number of heads grows instead.

Muon's steps have a spectral norm that does not depend on the gradient. It has to be proportional to
sqrt(outputs / inputs) (Yang et al. 2023, arXiv:2310.17813; Qiu et al. 2025, arXiv:2512.05620), and match_rms_adamw
makes it proportional to sqrt(max(outputs, inputs)): the rate's factor is the quotient. By depth it is AdamW's rule,
because the steps of neither depend on the size of the gradient.

Multipliers are no part of the model: c times a weight w is the weight c w, with initial values and rate times c,
epsilon and weight decay divided by c (lemma J.1 of Yang et al. 2022). So the model is transformers' own, and its
checkpoints and exports load anywhere. Its gradients are 1 / c times those of w, by which they are clipped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from raylm.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

KEY = "model.transfer.base"


@dataclass(frozen=True)
class Shape:
    """How an architecture names its sizes and its weights."""

    width: str
    depth: str
    heads: str
    follow: tuple[str, ...]
    """Sizes that are proportional to the width unless the base names them, besides the number of heads."""
    layers: str
    """The list of layers; each has its MLP as `mlp`."""
    attention: str
    """The module of a layer."""
    ends: tuple[str, ...]
    """The modules at the ends of residual branches."""
    norm: str
    """The final norm."""
    query: str | None
    """The module of a layer whose weights scale the queries alone."""


GPT2 = Shape(
    "n_embd", "n_layer", "n_head", ("n_inner",), "transformer.h", "attn", ("c_proj",), "transformer.ln_f", None
)
LLAMA = Shape(
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    ("num_key_value_heads", "intermediate_size"),
    "model.layers",
    "self_attn",
    ("o_proj", "down_proj"),
    "model.norm",
    "q_proj",
)
SHAPES = {"gpt2": GPT2, "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": replace(LLAMA, query="q_norm")}


@dataclass(frozen=True)
class Factors:
    """What of a weight is how many times that of the base's weight."""

    start: float
    """The initial values, relative to those that transformers draws for this model."""
    rate: float
    """The learning rate with AdamW."""
    muon_rate: float
    epsilon: float
    multiplier: float = 1.0
    """What is a part of the weight and not of the model."""


def base_configuration(found: PreTrainedConfig, base: Mapping[str, int]) -> PreTrainedConfig:
    """The base's configuration: that of the model but for its sizes. ConfigError if there is none.

    Sizes that `base` does not name: heads and the MLP's width follow the width, the number of layers is the model's.
    """
    shape, fields = shape_of(found), found.to_dict()
    has_head_size = fields.get("head_dim") is not None
    known = [shape.width, shape.depth, shape.heads, *shape.follow, *(["head_dim"] if has_head_size else [])]
    for name in base:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(
                f"{KEY}.{name}: not a size of {found.model_type}{f', {hint}' if hint else ''}; it takes: "
                f"{', '.join(known)}",
                where=f"{KEY}.{name}",
            )
    sizes = dict(base)
    width = sizes.setdefault(shape.width, fields[shape.width])
    for name in (shape.heads, *shape.follow):
        if name not in sizes and fields[name] is not None:
            sizes[name] = _whole(name, fields[name] * width, fields[shape.width])
    if has_head_size and "head_dim" not in sizes and fields["head_dim"] * fields[shape.heads] == fields[shape.width]:
        sizes["head_dim"] = _whole("head_dim", width, sizes[shape.heads])
    if not has_head_size:
        _whole(shape.heads, width, sizes[shape.heads])
    made = resized(found, sizes)
    if shape.query is None and _head_size(made, shape) != _head_size(found, shape):
        raise ConfigError(
            f"{KEY}.{shape.heads} must make heads of {_head_size(found, shape)}, the model's, got "
            f"{sizes[shape.heads]}, and heads of {_head_size(made, shape)}: in {found.model_type} queries, keys and "
            "values are one matrix, which has one learning rate; leave it out, and the number of heads follows the "
            "width",
            where=f"{KEY}.{shape.heads}",
        )
    return made


def resized(found: PreTrainedConfig, sizes: Mapping[str, int]) -> PreTrainedConfig:
    """A copy of a configuration with other sizes, by their own names."""
    made: PreTrainedConfig = type(found).from_dict({**found.to_dict(), **sizes, "layer_types": None})
    return made


def sizes_of_width(found: PreTrainedConfig, width: int, *, layers: int, head_size: int) -> dict[str, int]:
    """The sizes of a model like `found` with this width and heads of this size, by their own names.

    The share of key-value heads and the ratio of the MLP's width stay as they are, up to rounding.
    """
    shape, fields = shape_of(found), found.to_dict()
    heads = width // head_size
    sizes = {shape.width: width, shape.depth: layers, shape.heads: heads}
    for name in shape.follow:
        of, ours = (shape.heads, heads) if name == "num_key_value_heads" else (shape.width, width)
        if fields[name] is not None:
            sizes[name] = max(1, round(fields[name] * ours / fields[of]))
    return sizes | ({"head_dim": head_size} if fields.get("head_dim") is not None else {})


def shape_of(found: PreTrainedConfig) -> Shape:
    """The names of a model's sizes and weights; ConfigError if its architecture is not known."""
    if found.model_type not in SHAPES:
        raise ConfigError(
            f"model.transfer and its coordinate check are for {', '.join(SHAPES)}, got "
            f"model.config.model_type={found.model_type}",
            where="model.transfer",
        )
    return SHAPES[found.model_type]


def _whole(name: str, dividend: int, divisor: int) -> int:
    if dividend % divisor:
        raise ConfigError(
            f"{KEY} must name {name}, or a width that divides: in proportion it is {dividend / divisor:g}", where=KEY
        )
    return dividend // divisor


def _head_size(found: PreTrainedConfig, shape: Shape) -> int:
    return getattr(found, "head_dim", None) or getattr(found, shape.width) // getattr(found, shape.heads)


def factors(found: PreTrainedConfig, base: Mapping[str, int]) -> dict[str, Factors]:
    """The factors of each weight of a model by its name; all are 1 if it has the base's sizes."""
    like, shape = base_configuration(found, base), shape_of(found)
    depth = getattr(found, shape.depth) / getattr(like, shape.depth)
    width = getattr(found, shape.width) / getattr(like, shape.width)
    head_size = _head_size(found, shape) / _head_size(like, shape)
    as_deep = resized(like, {shape.depth: getattr(found, shape.depth)})  # so that both have the same names
    ours, bases = _without_weights(found), _without_weights(as_deep)
    transposed = {f"{name}.weight" for name, module in ours.named_modules() if isinstance(module, Conv1D)}
    shapes = {name: weight.shape for name, weight in bases.named_parameters()}
    result = {}
    for name, weight in ours.named_parameters():
        is_of_layer, module = name.startswith(f"{shape.layers}."), name.split(".")[-2]
        multiplier = inputs = outputs = longer = 1.0
        if is_of_layer and weight.ndim == 2:
            ratios = [mine / of_base for mine, of_base in zip(weight.shape, shapes[name], strict=True)]
            inputs, outputs = ratios if name in transposed else reversed(ratios)
            longer = max(weight.shape) / max(shapes[name])
        if is_of_layer and module in shape.ends:
            multiplier = 1 / depth
        elif is_of_layer and module == shape.query:
            multiplier = 1 / math.sqrt(head_size)
        elif name.startswith(f"{shape.norm}."):
            multiplier = 1 / width
        start = multiplier / math.sqrt(inputs)
        if shape is GPT2 and module in shape.ends and weight.ndim == 2:
            start *= math.sqrt(depth)  # transformers draws them smaller by the square root of the layers
        result[name] = Factors(
            start=start,
            rate=multiplier / inputs,
            muon_rate=multiplier * math.sqrt(outputs / inputs / longer),
            epsilon=1 / (width * (depth if is_of_layer else 1.0)) / multiplier,
            multiplier=multiplier,
        )
    return result


def _without_weights(found: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found)


def scale_weights(network: torch.nn.Module, by_name: Mapping[str, Factors]) -> None:
    """Scale the initial values of a model's weights in place."""
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.mul_(by_name[name].start)


def scale_groups(optimizer: torch.optim.Optimizer, network: torch.nn.Module, by_name: Mapping[str, Factors]) -> None:
    """Split the groups of a new optimizer in place, AdamW or MuonWithAdamW, so that each weight has its own rate.

    The first group has the rate of the base, because the Trainer logs that of the first group.
    """
    names = {id(weight): name for name, weight in network.named_parameters()}
    groups: list[tuple[float, dict[str, Any]]] = []
    for group in optimizer.param_groups:
        is_of_muon = "ns_steps" in group
        alike: dict[tuple[float, float], list[torch.Tensor]] = {}
        for weight in group["params"]:
            own = by_name[names[id(weight)]]
            key = (own.muon_rate, 1.0) if is_of_muon else (own.rate, own.epsilon)
            alike.setdefault(key, []).append(weight)
        for (rate, epsilon), weights in alike.items():
            scaled = {
                "params": weights,
                "lr": group["lr"] * rate,
                "weight_decay": group["weight_decay"] / rate,
                "eps": group["eps"] * epsilon,
            }
            groups.append((rate, {**group, **scaled}))
    optimizer.param_groups = [group for _, group in sorted(groups, key=lambda pair: pair[0] != 1.0)]


@contextlib.contextmanager
def gradients_without_multipliers(network: torch.nn.Module, by_name: Mapping[str, Factors]) -> Iterator[None]:
    """Inside, gradients are those of weights whose multipliers are a part of the model; so is their norm."""
    multipliers = {name: own.multiplier for name, own in by_name.items() if own.multiplier != 1.0}
    scaled = [
        (weight.grad, multipliers[name])
        for name, weight in network.named_parameters()
        if name in multipliers and weight.grad is not None
    ]
    for gradient, multiplier in scaled:
        gradient.mul_(multiplier)
    yield
    for gradient, multiplier in scaled:
        gradient.div_(multiplier)
