"""The frame of a document: the tokens around it whenever a model sees it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from raylm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Frame(NamedTuple):
    """The tokens around every document, in training, in scoring and before a prompt.

    tokenizer.prefix=auto takes the model's own: Gemma 3 270M has perplexity 13.1 on plain English after its
    begin-of-text token, and 129.6 after its end-of-text token.
    """

    prefix: int | None
    """Token in front of a document; None for none: then a document's first token is not predicted."""
    end: int
    """Token after a document. If it is also the prefix, one token between two documents serves as both."""

    @property
    def in_stream(self) -> int:
        """Number of tokens around each document of a stream."""
        return 1 if self.prefix in (None, self.end) else 2

    def around(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """A single document in its frame, int64."""
        before = [] if self.prefix is None else [self.prefix]
        return np.concatenate([before, ids, [self.end]]).astype(np.int64)


def frame(tokenizer: PreTrainedTokenizerBase, prefix: str = "auto") -> Frame:
    """The frame of a tokenizer's documents, by tokenizer.prefix; ConfigError if it has no token of that name.

    If the tokenizer itself adds tokens on both sides, [CLS] and [SEP], they are the frame.
    """
    end = tokenizer.eos_token_id
    before, behind = _template(tokenizer)
    if prefix == "none":
        return Frame(None, end)
    if prefix == "eos":
        return Frame(end, end)
    if prefix == "bos" and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"tokenizer.prefix=bos: the tokenizer has no begin-of-text token; its special ones: "
            f"{', '.join(tokenizer.all_special_tokens) or 'none'}",
            "tokenizer.prefix",
        )
    if prefix == "bos":
        return Frame(tokenizer.bos_token_id, end)
    return Frame(before[-1] if before else end, behind[0] if before and behind else end)


def for_export(tokenizer: PreTrainedTokenizerBase, prefix: str, context: int | None) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer to save with a model: it puts the model's prefix in front of a text, as Llama's does with
    its BOS, and has the model's context as its length limit (no limit if `context` is None).
    """
    made = copy.deepcopy(tokenizer)
    for key in ("is_local", "local_files_only"):  # local loading details that transformers would save
        made.init_kwargs.pop(key, None)
    if context is not None:
        made.model_max_length = context
    backend = getattr(made, "backend_tokenizer", None)
    before, behind = _template(made)
    token = frame(made, prefix).prefix
    wanted = [] if token is None else [token]
    if before != wanted and backend is not None:
        from tokenizers import processors

        def around(text: str) -> list[str]:
            return [*made.convert_ids_to_tokens(wanted), text, *made.convert_ids_to_tokens(behind)]

        special = [(made.convert_ids_to_tokens(id), id) for id in {*wanted, *behind}]
        template = processors.TemplateProcessing(
            single=around("$A"), pair=[*around("$A"), *around("$B")], special_tokens=special
        )
        own = backend.post_processor
        trims = isinstance(own, processors.ByteLevel)  # the offsets of tokens, by the space in front of a word
        backend.post_processor = processors.Sequence([own, template]) if trims else template
    return made


def adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer itself puts its begin-of-text token in front of a text, as Llama's does. That of SmolLM2 is
    the beginning of a turn, which its chat template writes."""
    return tokenizer.bos_token_id is not None and _template(tokenizer)[0][-1:] == [tokenizer.bos_token_id]


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
