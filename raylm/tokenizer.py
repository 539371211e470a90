"""Tokenizers: load one, or train one on the corpus.

Both ways give a transformers tokenizer with an end-of-text token, the one that follows every document. A padding token
is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm.config import TokenizerConfig, TrainedTokenizer
from raylm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH = 64  # documents: 1.5 times encode_batch with all of them, and memory stays flat


def chosen(section: TokenizerConfig, model_path: str | None) -> TokenizerConfig:
    """The section with its default filled in: the tokenizer of the pretrained model."""
    if section.path is not None or section.train is not None:
        return section
    if model_path is None:
        raise ConfigError(
            "tokenizer: a model from a config has no tokenizer of its own; give tokenizer.path or tokenizer.train",
            "tokenizer",
        )
    return section.model_copy(update={"path": model_path})


def load(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or Hub id. Without an end-of-text token: DataError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise DataError(f"tokenizer.path: {path}: no tokenizer found there: {first}", "tokenizer.path") from None
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer.path: {path}: it has no end-of-text token, and documents need one between them; name one as "
            f"eos_token in its tokenizer_config.json",
            "tokenizer.path",
        )
    return tokenizer


def train(texts: Iterable[str], section: TrainedTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of at most section.vocab_size entries; fewer if the texts do not have that many pairs.

    The same texts in the same order give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end_of_text = section.special_tokens[0]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        special_tokens=list(section.special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end_of_text, eos_token=end_of_text)


class Encoder:
    """Documents -> token ids, for one core; what the tokenizer of a directory gives, without special tokens around."""

    def __init__(self, directory: str):
        # Each task is one CPU of the cluster; read when the first batch is encoded.
        os.environ.setdefault("RAYON_NUM_THREADS", "1")
        tokenizer = load(directory)
        self._backend: Any = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.dtype = id_type(len(tokenizer))

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text: 1-D, of the smallest type that holds the vocabulary."""
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encoded]


@lru_cache(maxsize=2)  # a process of Ray runs many tasks with one tokenizer
def encoder(directory: str) -> Encoder:
    return Encoder(directory)


def id_type(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32
