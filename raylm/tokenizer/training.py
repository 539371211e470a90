"""Train a tokenizer on texts."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from raylm.config import TrainedTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def train(texts: Iterable[str], section: TrainedTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of at most section.vocab_size entries; fewer if the texts do not have that many.

    The same texts in the same order give the same tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    unknown = _named("unk", section)
    special = list(dict.fromkeys([*section.special_tokens, *([unknown] if unknown else [])]))
    tokenizer = {"byte_bpe": _byte_bpe, "wordpiece": _wordpiece, "unigram": _unigram}[section.kind](
        texts, section, special, unknown
    )
    end_of_text = section.special_tokens[0]
    named = {f"{name}_token": token for name in ("mask", "pad", "unk") if (token := _named(name, section)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end_of_text, eos_token=end_of_text, **named)


def _named(name: str, section: TrainedTokenizer) -> str | None:
    known = [token for token in section.special_tokens if token in (f"<{name}>", f"[{name.upper()}]")]
    if not known and name == "unk" and section.kind != "byte_bpe":  # these two need an unknown token
        return "[UNK]" if section.kind == "wordpiece" else "<unk>"
    return known[0] if known else None


def _byte_bpe(texts: Iterable[str], section: TrainedTokenizer, special: list[str], unknown: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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


def _wordpiece(texts: Iterable[str], section: TrainedTokenizer, special: list[str], unknown: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def untrained(vocabulary: dict[str, int]) -> Any:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    tokenizer = untrained({})
    texts = list(texts)
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


def _unigram(texts: Iterable[str], section: TrainedTokenizer, special: list[str], unknown: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def untrained(*model: Any) -> Any:
        tokenizer = Tokenizer(models.Unigram(*model))
        tokenizer.normalizer = normalizers.NFKC()
        # Pieces do not cross lines or punctuation, which makes training on source code 20 times faster.
        inside = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation("contiguous")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), *inside])
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
