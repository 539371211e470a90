"""The language model: pretrained, or new from a configuration."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from raylm.config import ModelConfig
from raylm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def configuration(
    section: ModelConfig, *, vocab_size: int, block_size: int, eos_id: int | None = None
) -> PreTrainedConfig:
    """The model's transformers configuration, checked against vocabulary and block size; no weights are made.

    A new model gets the tokenizer's vocabulary, and block_size positions unless model.config says how many.
    """
    if section.path is not None:
        found = _pretrained_configuration(section.path)
    elif section.config is not None:
        found = _new_configuration(section.config, vocab_size=vocab_size, block_size=block_size, eos_id=eos_id)
    else:
        raise ConfigError("model.path or model.config must be given", where="model")
    positions = context(found)
    if positions is not None and block_size > positions:
        raise ConfigError(
            f"blocks.block_size must be at most {positions}, the positions of the model "
            f"({section.path or section.config}), got {block_size}",
            where="blocks.block_size",
        )
    if vocab_size > found.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, the model's embedding {found.vocab_size} rows "
            f"({section.path or section.config}); use the model's own tokenizer or a larger model.config.vocab_size",
            where="model",
        )
    return found


def build(
    section: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, block_size: int, seed: int = 0
) -> PreTrainedModel:
    """The model in float32 on the CPU. New weights depend on `seed` alone."""
    found = configuration(section, vocab_size=len(tokenizer), block_size=block_size, eos_id=tokenizer.eos_token_id)
    if section.path is not None:
        return AutoModelForCausalLM.from_pretrained(section.path, config=found, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(found, dtype=torch.float32)


def num_parameters(found: PreTrainedConfig) -> int:
    """Parameters of a model of this configuration, tied ones once; counted without allocating them."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found).num_parameters()
    except Exception as error:  # sizes that do not fit each other, kinds that are no language model
        raise ConfigError(f"model.config: {_first_line(error)}", where="model.config") from None


def context(found: PreTrainedConfig) -> int | None:
    """The most tokens the model has positions for; None if it has no such limit (recurrent models, ALiBi)."""
    return getattr(found, "max_position_embeddings", None)


def _pretrained_configuration(path: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={path} is neither a model directory nor a model the Hub gave us: {_first_line(error)}",
            where="model.path",
        ) from None


def _new_configuration(fields: dict, *, vocab_size: int, block_size: int, eos_id: int | None) -> PreTrainedConfig:
    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "for example gpt2 or llama"
        raise ConfigError(f"model.config.model_type={kind} is not a model of transformers; {hint}", "model.config")
    kind_class = CONFIG_MAPPING[kind]
    defaults = kind_class()
    unknown = [field for field in fields if not hasattr(defaults, field)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(defaults.to_dict()), n=1)
        hint = f"did you mean {near[0]}?" if near else f"{kind} takes: {', '.join(sorted(defaults.to_dict()))}"
        raise ConfigError(f"model.config.{unknown[0]}: unknown field of {kind}; {hint}", f"model.config.{unknown[0]}")
    positions = kind_class.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if context(defaults) is not None:
        fields.setdefault(positions, block_size)
    fields.setdefault("vocab_size", vocab_size)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(token, eos_id)
    try:
        return kind_class(**fields)
    except Exception as error:  # each configuration checks its fields in a way of its own
        raise ConfigError(f"model.config: {_first_line(error)}", where="model.config") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
