"""How a model generates: the fields of transformers' GenerationConfig that decide a text, checked without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoTokenizer, GenerationConfig
from transformers.generation import logits_process

from raylm.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULTS = {"max_new_tokens": 100, "do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
"""The values where neither the user nor the model's generation_config.json gives one."""

WARPERS = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_h": logits_process.TopHLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
    "epsilon_cutoff": logits_process.EpsilonLogitsWarper,
    "eta_cutoff": logits_process.EtaLogitsWarper,
}
"""What a token is drawn from, by the field of GenerationConfig; in the order in which transformers applies them."""

PROCESSORS = {
    "repetition_penalty": logits_process.RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": logits_process.NoRepeatNGramLogitsProcessor,
    "sequence_bias": logits_process.SequenceBiasLogitsProcessor,
    "bad_words_ids": logits_process.NoBadWordsLogitsProcessor,
    "suppress_tokens": logits_process.SuppressTokensLogitsProcessor,
    **WARPERS,
}
"""The classes of transformers that check the values of fields."""

OFF = {"top_k": 0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
"""Values by which a field has no effect; its class refuses them."""

COUNTS = {"max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "top_k": 0, "no_repeat_ngram_size": 0}
"""Fields that take whole numbers, and the least that they take."""

SETTINGS = (*dict.fromkeys((*DEFAULTS, *COUNTS, "length_penalty", "early_stopping", "stop_strings", *PROCESSORS)),)
"""The fields that are settings. The other ones say the same as these, or belong to the tokenizer, or change what else
`generate` returns and how fast."""


def resolve_settings(directory: Path, given: Mapping[str, Any], *, trusted: bool = False) -> GenerationConfig:
    """The settings of a model: `given`, else its own generation_config.json, else DEFAULTS; ConfigError if one is
    wrong, before any weights are loaded."""
    transformers.logging.set_verbosity_error()
    typed = {name: _number(name, value) for name, value in given.items() if value is not None}
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
    if tokenizer.eos_token_id is None:
        raise DataError(f"{directory}: its tokenizer names no end-of-text token, so no text would end", str(directory))
    try:
        own = GenerationConfig.from_pretrained(directory)
    except OSError:  # it has none
        own = GenerationConfig()
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    values = {name: value for name in SETTINGS if (value := getattr(own, name)) is not None} | typed
    if typed.get("num_beams", 1) > 1:  # beam search looks for the likeliest text
        values["do_sample"] = typed.get("do_sample", False)
    if values.setdefault("do_sample", True):
        values = {**DEFAULTS, **values}
    else:  # what the model says of drawing has no effect then; what the user says is refused below
        values = {"max_new_tokens": DEFAULTS["max_new_tokens"], **values}
        values = {name: value for name, value in values.items() if name not in WARPERS or name in typed}
    values = {name: value for name, value in values.items() if value != OFF.get(name)}
    try:
        settings = GenerationConfig(**values, eos_token_id=sorted({tokenizer.eos_token_id, *ends} - {None}))
        settings.validate(strict=True, user_set_attributes=set(given))
    except (ValueError, TypeError) as error:
        raise _wrong(given, str(error)) from None
    _check_values(values, given, tokenizer)
    return settings


def _number(name: str, value: Any) -> Any:
    """A setting's value, its numbers whole or not as the field wants them; ConfigError if there is no such setting."""
    if name not in SETTINGS:
        alike = name.replace("_length", "_new_tokens")
        hint = did_you_mean(alike, SETTINGS) or f"these are taken: {', '.join(SETTINGS)}"
        if name == "num_return_sequences":
            hint = "each --seed gives another text of a prompt"
        is_field = hasattr(GenerationConfig(), name)
        problem = "is not taken" if is_field else "not a field of transformers.GenerationConfig"
        raise ConfigError(f"{name}: {problem}; {hint}", name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name not in COUNTS:
        return float(value) if is_number else value
    if not is_number or value != int(value) or value < COUNTS[name]:
        raise ConfigError(f"{name} must be a whole number of at least {COUNTS[name]}, got {value}", name)
    return int(value)


def _check_values(values: Mapping[str, Any], given: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Apply each setting once to the scores of one token."""
    if values["do_sample"] and values.get("num_beams", 1) > 1:
        raise ConfigError(
            "num_beams excludes do_sample=true, because beam search looks for the likeliest text; give one of them",
            "num_beams",
        )
    texts = values.get("stop_strings", ["."])
    if not all(isinstance(text, str) and text for text in (texts if isinstance(texts, list) else [texts])):
        raise ConfigError(
            f"stop_strings must be a text or a list of texts, got {texts}; put a number in quotes", "stop_strings"
        )
    ids, scores = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, max(tokenizer.get_vocab().values()) + 1)
    for name, processor in PROCESSORS.items():
        if name in values:
            try:
                processor(values[name])(ids, scores)
            except Exception as error:  # each class has errors of its own
                raise _wrong({name: given.get(name, values[name])}, str(error)) from None


def _wrong(given: Mapping[str, Any], problem: str) -> ConfigError:
    """What transformers says, at the setting that it names first, as it was typed."""
    lines = [line.strip("- ").replace("`", "") for line in problem.split("\n") if line.strip()]
    for line in lines:
        places = {name: match.start() for name in given if (match := re.search(rf"\b{name}\b", line))}
        if places:
            name = min(places, key=lambda name: places[name])
            return ConfigError(f"{name}={given[name]}: {line.removeprefix(f'{name}: ')}", name)
    typed = " ".join(f"{name}={value}" for name, value in given.items()) or "generation_config.json"
    return ConfigError(f"{typed}: {lines[-1] if lines else 'cannot be used'}", next(iter(given), None))
