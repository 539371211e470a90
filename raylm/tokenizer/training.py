"""Train a tokenizer on texts."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from raylm.config import TrainedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

MOST_CHARS = 64
"""Of a pre-token, where they are limited: text without white space, such as DNA, may have one of megabytes. Each merge
reads all pre-tokens with its pair, so 0.3 MB of DNA took more than a minute without the limit."""

LONG_CHARS = 250_000
"""Characters in different words longer than MOST_CHARS from which on pre-tokens are limited. 31 MB of the standard
library have 15,000, and their tokenizer stays what it was."""

DIFFERENT_CHARS = {"byte_bpe": 20_000_000, "wordpiece": 20_000_000, "unigram": 1_000_000}
"""Characters in all different words, from which on a tokenizer is trained on less text, if they are more than
MOST_DIFFERENT of it. A byte-level BPE takes 2.8 us and 115 bytes for each of them, a unigram about 70 us and 200
bytes."""

MOST_DIFFERENT = 0.25
"""The part of a text's characters that are in different words: 0.05 of the standard library, 1 of DNA and base64."""

WORD = re.compile(r"\w+|[^\w\s]+|\s+")
"""About what tokenizers take for a word, fast: which pre-tokens there are differs from kind to kind."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pre-tokens of ByteLevel, to which the limit has to apply before it makes letters of bytes."""


def train(texts: Iterable[str], section: TrainedTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of at most section.vocab_size entries; fewer if the texts do not have that many.

    The same texts in the same order give the same tokenizer. Of text without white space it has a limit to the length
    of pre-tokens, which is part of it: it holds for all text that it ever encodes, wherever it is loaded.
    """
    from transformers import PreTrainedTokenizerFast

    unknown = _named("unk", section)
    special = list(dict.fromkeys([*section.special_tokens, *([unknown] if unknown else [])]))
    texts, is_limited = _bounded(list(texts), section)
    tokenizer = {"byte_bpe": _byte_bpe, "wordpiece": _wordpiece, "unigram": _unigram}[section.kind](
        texts, section, special, unknown, is_limited
    )
    end_of_text = section.special_tokens[0]
    named = {f"{name}_token": token for name in ("mask", "pad", "unk") if (token := _named(name, section)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end_of_text, eos_token=end_of_text, **named)


def _named(name: str, section: TrainedTokenizer) -> str | None:
    known = [token for token in section.special_tokens if token in (f"<{name}>", f"[{name.upper()}]")]
    if not known and name == "unk" and section.kind != "byte_bpe":  # these two need an unknown token
        return "[UNK]" if section.kind == "wordpiece" else "<unk>"
    return known[0] if known else None


def _bounded(texts: list[str], section: TrainedTokenizer) -> tuple[list[str], bool]:
    """As much of the texts as a tokenizer can be trained on in minutes, and whether its pre-tokens must be limited."""
    words: set[str] = set()
    for text in texts:
        words.update(WORD.findall(text))
    different = sum(map(len, words))
    long = sum(len(word) for word in words if len(word) > MOST_CHARS)
    most = DIFFERENT_CHARS[section.kind]
    if different > most and different > MOST_DIFFERENT * sum(map(len, texts)):
        share = most / different
        logger.info(
            f"tokenizer.train: the text has hardly any word twice, so the tokenizer is trained on {share:.0%} of the "
            "sample of each document"
        )
        texts = [text[: math.ceil(share * len(text))] for text in texts]
    if long > LONG_CHARS:
        logger.info(
            f"tokenizer.train: the text has words of up to {max(map(len, words)):,} characters; the tokenizer cuts "
            f"text without white space every {MOST_CHARS} characters"
        )
    return texts, long > LONG_CHARS


def _limit() -> Any:
    """A pre-tokenizer that cuts pre-tokens after every MOST_CHARS characters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MOST_CHARS}}}"), "isolated")


def _byte_bpe(
    texts: list[str], section: TrainedTokenizer, special: list[str], unknown: str | None, is_limited: bool
) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if is_limited:
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Split(Regex(GPT2), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, _limit(), bytes_alone])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _wordpiece(
    texts: list[str], section: TrainedTokenizer, special: list[str], unknown: str | None, is_limited: bool
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def untrained(vocabulary: dict[str, int]) -> Any:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        if is_limited:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, _limit()])
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    tokenizer = untrained({})
    letters = sorted({letter for text in texts for letter in tokenizer.normalizer.normalize_str(text)} - {" "})
    # The trainer numbers ##a, ##b, … in the random order of a hash table, and breaks ties by these numbers. It numbers
    # special tokens first, so these pieces are special, only during the training.
    trainer = trainers.WordPieceTrainer(
        vocab_size=section.vocab_size,
        min_frequency=section.min_frequency,
        special_tokens=[*special, *letters, *(f"##{letter}" for letter in letters)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    trained = untrained(tokenizer.get_vocab())
    trained.add_special_tokens(special)
    return trained


def _unigram(
    texts: list[str], section: TrainedTokenizer, special: list[str], unknown: str | None, is_limited: bool
) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def untrained(*model: Any) -> Any:
        tokenizer = Tokenizer(models.Unigram(*model))
        tokenizer.normalizer = normalizers.NFKC()
        # Pieces do not cross lines or punctuation, which makes training on source code 20 times faster.
        inside = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation("contiguous")]
        cut = [_limit()] if is_limited else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), *inside, *cut])
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer

    tokenizer = untrained()
    trainer = trainers.UnigramTrainer(
        vocab_size=section.vocab_size, special_tokens=special, unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer sums in the order of a hash table, so the last digits and the order of pieces vary. In that order it
    # also gives letters that are not pieces of their own scores, each 0.0001 below the one before.
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    pieces, found = pieces[: len(special)], pieces[len(special) :]
    letters = sorted((entry for entry in found if len(entry[0]) == 1), key=lambda entry: -entry[1])
    steps = [0, *accumulate(above[1] - below[1] > 0.00011 for above, below in pairwise(letters))]
    in_order = [entry for _, entry in sorted(zip(steps, letters, strict=False), key=lambda pair: (pair[0], pair[1][0]))]
    found = [entry for entry in found if len(entry[0]) > 1]
    found += [(piece, score) for (piece, _), (_, score) in zip(in_order, letters, strict=True)]
    pieces += sorted(found, key=lambda entry: (-entry[1], entry[0]))
    trained = untrained(pieces, special.index(unknown) if unknown else None)
    trained.add_special_tokens(special)
    return trained
