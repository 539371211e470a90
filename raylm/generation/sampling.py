"""Fields of transformers' GenerationConfig -> how a model writes, checked before its weights are loaded."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from raylm.checkpoint import TrainedModel
from raylm.errors import ConfigError, DataError
from raylm.generation.writer import TextGenerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OURS = {"max_new_tokens": 100, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
"""Where neither the user nor the model's generation_config.json says it. What is not here is transformers' default."""

NOT_TAKEN = {
    "set max_new_tokens": "max_length max_time",
    "set min_new_tokens": "min_length",
    "a prompt has one text; another --seed gives another": "num_return_sequences",
    "prompts are always healed": "token_healing",
    "the tokenizer says it": "bos_token_id eos_token_id pad_token_id decoder_start_token_id",
    "it is for models of two parts, as in translation": (
        "encoder_no_repeat_ngram_size encoder_repetition_penalty forced_bos_token_id forced_eos_token_id "
        "begin_suppress_tokens"
    ),
    "the answer is text alone": (
        "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate"
    ),
    "it changes how fast texts are made, not which": (
        "use_cache cache_implementation cache_config max_cache_len prefill_chunk_size compile_config disable_compile "
        "continuous_batching_config use_mtp is_assistant num_assistant_tokens num_assistant_tokens_schedule "
        "assistant_confidence_threshold assistant_early_exit assistant_lookbehind target_lookbehind "
        "assistant_ensemble_weight prompt_lookup_num_tokens max_matching_ngram_size speculation_type"
    ),
    "transformers has given it up": (
        "low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups constraints force_words_ids"
    ),
}
"""Fields of GenerationConfig that are no settings of a text: why, or what to set instead."""

WHOLE = ("max_new_tokens", "min_new_tokens", "top_k", "num_beams", "no_repeat_ngram_size")
"""The fields that take whole numbers: transformers refuses 50.0 for one of these, and 2 for another."""


def settings(directory: Path, given: Mapping[str, Any], *, trusted: bool = False) -> GenerationConfig:
    """How a model writes: `given` over its own generation_config.json over OURS, checked; ConfigError if it cannot."""
    transformers.logging.set_verbosity_error()
    for name, value in given.items():
        _check_name(name)
        _check_stops(name, value)
    numbered = {name: _number(name, value) for name, value in given.items()}
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
    own = _of_model(directory)
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    stops = sorted({tokenizer.eos_token_id, *stops} - {None})
    if tokenizer.eos_token_id is None:
        raise DataError(f"{directory}: its tokenizer names no end-of-text token, so no text would end", str(directory))
    said = {name: value for name in taken() if (value := getattr(own, name)) is not None}
    said |= {name: value for name, value in numbered.items() if value is not None}
    try:
        # Beams look for the likeliest text; whoever wants them drawn says so.
        said.setdefault("do_sample", OURS["do_sample"] and said.get("num_beams", 1) == 1)
        ours = OURS if said["do_sample"] else {"max_new_tokens": OURS["max_new_tokens"]}
        how = GenerationConfig(**{**ours, **said}, eos_token_id=stops)
        how.validate(strict=True, user_set_attributes=set(given))
        _rehearse(how, tokenizer)
    except Exception as error:  # each of transformers' processors has errors of its own
        raise _wrong(given, str(error)) from None
    return how


def taken() -> list[str]:
    """The fields of GenerationConfig that are settings of a text."""
    left_out = {"transformers_version", *" ".join(NOT_TAKEN.values()).split()}
    return [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in left_out]


def _check_name(name: str) -> None:
    for why, names in NOT_TAKEN.items():
        if name in names.split():
            raise ConfigError(f"{name} is not taken: {why}", name)
    known = taken()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(known)}"
        raise ConfigError(f"{name}: not a field of transformers.GenerationConfig; {hint}", name)


def _of_model(directory: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(directory)
    except OSError:  # it has none
        return GenerationConfig()


def _check_stops(name: str, value: Any) -> None:
    texts = value if isinstance(value, list) else [value]
    if name == "stop_strings" and value is not None and not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop_strings must be a text or a list of texts, got {value}; put a number in quotes", name)


def _number(name: str, value: Any) -> Any:
    """A number as the field wants it, whole or not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if name not in WHOLE:
        return float(value)
    if value != int(value):
        raise ConfigError(f"{name} must be a whole number, got {value}", name)
    return int(value)


def _rehearse(how: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write two tokens with a model of no size: values that transformers refuses are found before a model is loaded."""
    rows = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=8, n_layer=1, n_head=1, n_embd=2))
    short = copy.deepcopy(how)
    short.max_new_tokens = min(2, how.max_new_tokens)
    if how.min_new_tokens is not None:
        short.min_new_tokens = min(2, how.min_new_tokens)
    TextGenerator(TrainedModel(network.eval(), tokenizer, None, {}), short, seed=0).texts(["a"])


def _wrong(given: Mapping[str, Any], problem: str) -> ConfigError:
    """What transformers says, at the setting that it names first, as it was typed."""
    lines = [line.strip("- ").replace("`", "") for line in problem.split("\n") if line.strip()]
    for line in lines:
        places = {name: found.start() for name in given if (found := re.search(rf"\b{name}\b", line))}
        if places:
            name = min(places, key=lambda name: places[name])
            return ConfigError(f"{name}={given[name]}: {line.removeprefix(f'{name}: ')}", name)
    typed = " ".join(f"{name}={value}" for name, value in given.items()) or "generation_config.json"
    return ConfigError(f"{typed}: {lines[-1] if lines else 'cannot be used'}", next(iter(given), None))
