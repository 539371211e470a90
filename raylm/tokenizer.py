"""Tokenizers: load one, or train one on the corpus; and encoders, that make ids of many documents fast.

Either way it is a tokenizer of transformers with an end-of-text token, the one that follows every document. A padding
token is not needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from raylm import cli, hub
from raylm.config import ModelConfig, TokenizerConfig, TrainedTokenizer
from raylm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILES = ("tokenizer", "vocab", "merges", "special", "added", "spiece", "sentencepiece")
"""How the names of a tokenizer's files begin."""

BATCH = 64  # documents: 1.5 times encode_batch with all of them, and memory stays flat

LONG = 1_000_000
"""Characters of a document, or of a batch, beyond which it is encoded in parts: tokenizers needs 130 bytes for each."""

PROBES = ("A word", "naïve", "ﬁ", "two  spaces ", " x", "don't", "1234", "東京", "a\n\n\tb")
"""What tokenizers differ in, beside the words that they know: case, accents, spaces, quotes, digits, Chinese, lines."""

OVERLAP = 20_000
"""Characters that one part of a long document shares with the next."""


def chosen(section: TokenizerConfig, model: ModelConfig) -> TokenizerConfig:
    """The section with its default filled in: the pretrained model's own tokenizer, of its revision or GGUF file."""
    if section.train is not None:
        return section
    if section.path is not None:
        _check_files(section.path, "tokenizer.path", section.gguf_file)
        return section
    if model.path is None:
        if (path := (model.config or {}).get("path")) and (why := hub.fault(path, or_file=True)):
            raise ConfigError(f"model.config.path={path}: {why}", "model.config.path")
        raise ConfigError(
            "tokenizer: a model from a config has no tokenizer of its own; give tokenizer.path or tokenizer.train",
            "tokenizer",
        )
    _check_files(model.path, "model.path", section.gguf_file or model.gguf_file)
    own = {name: getattr(section, name) or getattr(model, name) for name in ("revision", "gguf_file")}
    return section.model_copy(update={"path": model.path, **own})


def _check_files(path: str, key: str, gguf_file: str | None) -> None:
    """ConfigError if there is no tokenizer at a path that the setting `key` gave, by the names of its files."""
    why = hub.fault(path, gguf_file=gguf_file)
    if why is None and gguf_file is None and os.path.isdir(path):
        names = sorted(os.listdir(path))
        ours = [name for name in names if name.startswith(FILES)]
        packed = [name for name in names if name.endswith(".gguf")]
        if not ours and packed:
            why = f"there is no tokenizer in it but in a GGUF file; give {key.split('.')[0]}.gguf_file={packed[0]}"
        elif not ours:
            why = (
                "there is no tokenizer in it, no tokenizer.json nor anything like it; give tokenizer.path, or "
                "tokenizer.train for one of your own text"
            )
        elif not {"tokenizer.json", "tokenizer_config.json", "config.json"} & {*names}:
            why = (
                f"{', '.join(ours)} alone do not say how text is split, and GPT-2, RoBERTa and Qwen do it differently; "
                'put a tokenizer_config.json beside them, {"tokenizer_class": "GPT2Tokenizer"} if it is GPT-2\'s'
            )
    if why is not None:
        raise ConfigError(f"{key}={path}: {why}", key)


def load_section(section: TokenizerConfig, key: str = "tokenizer.path") -> PreTrainedTokenizerFast:
    """The tokenizer that a section of settings names by its path, which the setting `key` gave."""
    assert section.path is not None
    tokenizer = load(
        section.path, revision=section.revision, gguf_file=section.gguf_file, eos_token=section.eos_token, key=key
    )
    if section.gguf_file is None and (how := _other_rules(tokenizer, section.path, section.revision)):
        _say_once(f"{key}={section.path}: {how}")
    return tokenizer


_say_once = lru_cache(cli.say)


def _other_rules(tokenizer: PreTrainedTokenizerFast, path: str, revision: str | None) -> str | None:
    """How a tokenizer, as transformers has loaded it, reads text otherwise than its tokenizer.json does; else None.

    transformers gives some classes rules of their own: BertTokenizer makes everything lower case unless
    tokenizer_config.json says do_lower_case=false, whatever tokenizer.json has.
    """
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = cached_file(path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if backend is None or file is None:
        return None
    in_file = Tokenizer.from_file(file)
    in_file.no_truncation()
    in_file.no_padding()
    entries = in_file.get_vocab_size()
    own = (in_file.decode([entry]) for entry in range(0, entries, max(1, entries // 1000)))
    for text in (*PROBES, *own):
        by_file, loaded = (each.encode(text, add_special_tokens=False).tokens for each in (in_file, backend))
        if by_file != loaded:
            return (
                f"transformers reads {text!r} as {' '.join(loaded)}, its tokenizer.json as {' '.join(by_file)}: "
                f"{type(tokenizer).__name__} has rules of its own, for which tokenizer_config.json has settings such "
                "as do_lower_case; going on with those of transformers"
            )
    return None


def load(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    eos_token: str | None = None,
    key: str | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or Hub id. Without an end-of-text token: DataError."""
    from transformers import AutoTokenizer

    options = {"revision": revision, "gguf_file": gguf_file}
    with hub.loading(DataError, key, os.fspath(path), gguf_file=gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(path, **{name: value for name, value in options.items() if value})
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise DataError(
                f"tokenizer.eos_token: {eos_token!r} is not among the {len(tokenizer)} tokens of {path}; "
                f"its special ones: {', '.join(tokenizer.all_special_tokens) or 'none'}",
                "tokenizer.eos_token",
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer.path: {path}: it names no end-of-text token, and documents need one between them; "
            f"name one with tokenizer.eos_token, of: {', '.join(tokenizer.all_special_tokens) or 'its vocabulary'}",
            "tokenizer.eos_token",
        )
    return tokenizer


class Frame(NamedTuple):
    """The tokens around every document, wherever a model sees one: in training, when it is scored, before a prompt.

    auto is what the model was made with: Gemma 3 270M has perplexity 13.1 on plain English behind its begin-of-text
    token, and 129.6 behind its end-of-text token.
    """

    prefix: int | None
    """In front; None for nothing, so that a document's first token is not predicted."""
    end: int
    """Behind. Where it is the prefix, too, one token between two documents of a stream is both."""

    @property
    def in_stream(self) -> int:
        """Tokens around each document of a stream."""
        return 1 if self.prefix in (None, self.end) else 2

    def around(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """A document by itself in its frame, int64."""
        before = [] if self.prefix is None else [self.prefix]
        return np.concatenate([before, ids, [self.end]]).astype(np.int64)


def frame(tokenizer: PreTrainedTokenizerBase, prefix: str = "auto") -> Frame:
    """The frame of a tokenizer's documents, by tokenizer.prefix; ConfigError if it has no token of that name.

    A tokenizer that puts tokens on both sides itself, [CLS] and [SEP], has them as its frame.
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


def _template(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and behind a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def version(section: TokenizerConfig) -> dict[str, str]:
    """What changes when the tokenizer behind a path does: checksums of a directory's files, or a Hub commit."""
    if section.path is None:
        return {}
    directory = Path(section.path)
    if directory.is_dir():
        import hashlib

        if section.gguf_file is not None:
            status = (directory / section.gguf_file).stat() if (directory / section.gguf_file).exists() else None
            return {section.gguf_file: f"{status.st_size} {status.st_mtime_ns}" if status else ""}
        files = [file for file in directory.iterdir() if file.suffix in (".json", ".txt", ".model", ".jinja")]
        return {
            file.name: hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()
            for file in sorted(files)
            if file.name.startswith(FILES)
        }
    return {"commit": _commit(section.path, section.revision)}


@lru_cache(maxsize=8)
def _commit(path: str, revision: str | None) -> str:
    """The commit that a Hub id stands for now; of the local cache if the Hub cannot be reached."""
    import huggingface_hub

    if hub.out_of_reach() is None:
        with contextlib.suppress(Exception):  # any of a dozen, such as a private repository
            return huggingface_hub.model_info(path, revision=revision, timeout=10).sha or ""
    cached = huggingface_hub.try_to_load_from_cache(path, "tokenizer_config.json", revision=revision)
    return os.path.basename(os.path.dirname(cached)) if isinstance(cached, str) else ""


# Training ------------------------------------------------------------------------------------------------------------


def same(path: str, other: str) -> bool:
    """Whether two tokenizers give the same ids."""
    return load(path).backend_tokenizer.to_str() == load(other).backend_tokenizer.to_str()


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
    if not known and name == "unk" and section.kind != "byte_bpe":  # these two have texts that they cannot spell
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
    # The trainer numbers ##a, ##b, … as it meets them in a hash table, in another order each time, and breaks ties by
    # these numbers. What is special is numbered first: so they are, for the training alone.
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
        # Pieces stay inside lines and between punctuation: 20 times quicker to train on source code.
        inside = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation("contiguous")]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), *inside])
        tokenizer.decoder = decoders.Metaspace()
        return tokenizer

    tokenizer = untrained()
    trainer = trainers.UnigramTrainer(
        vocab_size=section.vocab_size, special_tokens=special, unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer sums in the order of a hash table: what it finds is the same but for the last digits and the order. In
    # that order it also gives letters that are no pieces of their own scores one step of 0.0001 below the other.
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


# Encoders ------------------------------------------------------------------------------------------------------------


class Encoder(Protocol):
    """Documents -> token ids, without special tokens around them, on one core."""

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts one after the other, of the smallest type that holds the vocabulary; ids of each text)."""
        ...


class _Slow:
    """What transformers itself does, by way of tokenizers."""

    def __init__(self, directory: str):
        tokenizer = load(directory)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self._dtype = id_type(tokenizer.get_vocab())

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._backend is None:  # a tokenizer written in Python
            found = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        elif any(len(text) > LONG for text in texts):
            found = [self._long(text) for text in texts]
        else:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            found = [encoding.ids for encoding in encoded]
        ids = [np.array(part, self._dtype) for part in found]
        return np.concatenate(ids), np.array([len(part) for part in ids], np.int64)

    def _long(self, text: str) -> np.ndarray:
        """The ids of a text, encoded in parts that overlap and are joined where both see the same words.

        A tokenizer goes through a text from left to right word by word. Where a word of the one part is a word of the
        next and so are those that follow it, both go on alike; so they are joined in the middle of the overlap, far
        from both ends. A text of words longer than that is encoded as a whole.
        """
        assert self._backend is not None
        parts = []
        start, skip = 0, 0
        while True:
            part = self._backend.encode(text[start : start + LONG], add_special_tokens=False)
            if start + LONG >= len(text):
                parts.append(np.array(part.ids[skip:], self._dtype))
                return np.concatenate(parts)
            following = start + LONG - OVERLAP
            head = self._backend.encode(text[following : start + LONG], add_special_tokens=False)
            joint = _joint(part, head, LONG - OVERLAP)
            if joint is None:
                return np.array(self._backend.encode(text, add_special_tokens=False).ids, self._dtype)
            parts.append(np.array(part.ids[skip : joint[0]], self._dtype))
            start, skip = following, joint[1]
            del part, head
            _give_back_memory()


def _give_back_memory() -> None:
    """Free pages to the kernel: glibc keeps them, and 60 million characters in parts took 2.2 GB instead of 0.7."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _joint(part: Any, head: Any, shift: int) -> tuple[int, int] | None:
    """Where to go over from one encoding to the next, which begins `shift` characters later: the token of each.

    A token that begins a word in both, at the same character, with 50 tokens before and after it alike in both.
    """
    ends, begins = _word_starts(part), _word_starts(head)
    middle = [character for character in begins if OVERLAP // 4 < character < 3 * OVERLAP // 4]
    for character in middle:
        here, there = ends.get(character + shift), begins[character]
        if here is not None and there >= 50 and part.ids[here - 50 : here + 50] == head.ids[there - 50 : there + 50]:
            return here, there
    return None


def _word_starts(encoding: Any) -> dict[int, int]:
    """Character at which a word begins -> its first token."""
    words, offsets = encoding.word_ids, encoding.offsets
    return {
        offsets[token][0]: token
        for token in range(1, len(words))
        if words[token] is not None and words[token] != words[token - 1]
    }


class _Fast:
    """fastokens: the same ids, many times faster, handed over as one buffer. Does not import transformers: seconds."""

    def __init__(self, directory: str):
        from tokenizers import Tokenizer

        fastokens = importlib.import_module("fastokens")
        backend = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        self._tokenizer = fastokens.Tokenizer.from_json_str(backend.to_str())
        self._dtype = id_type(backend.get_vocab())

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(texts)
        lengths = np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))
        return np.frombuffer(ids, np.uint32).astype(self._dtype, copy=False), lengths


@lru_cache(maxsize=2)  # a process of Ray runs many tasks with one tokenizer
def encoder(directory: str, name: str) -> Encoder:
    """The encoder "fastokens" or "tokenizers" of the tokenizer in a directory."""
    # A task is one CPU of the cluster. Read by both when they encode their first batch in a process.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    kinds: dict[str, Callable[[str], Encoder]] = {"fastokens": _Fast, "tokenizers": _Slow}
    return kinds[name](directory)


def choose_encoder(directory: str, texts: Iterable[str]) -> dict[str, Any]:
    """The fast encoder where it is installed, reads this tokenizer and gives the slow one's ids on all the texts.

    {name, version, checked_documents, checked_bytes, differs: None or how the fast one differs}
    """
    choice: dict[str, Any] = {"name": "tokenizers", "version": metadata.version("tokenizers"), "differs": None}
    choice |= {"checked_documents": 0, "checked_bytes": 0}
    if importlib.util.find_spec("fastokens") is None:
        return choice
    slow = _Slow(directory)
    try:
        fast = _Fast(directory)
    except Exception:  # whatever its parser says to a tokenizer that it does not know
        return choice
    for text in texts:
        choice["checked_documents"] += 1
        choice["checked_bytes"] += len(text.encode())
        if not np.array_equal(fast([text])[0], slow([text])[0]):
            return choice | {"differs": f"fastokens gives other ids than the tokenizer for {text[:60]!r}"}
    return choice | {"name": "fastokens", "version": metadata.version("fastokens")}


def id_type(vocabulary: dict[str, int]) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id: some vocabularies have gaps, so their size does not tell."""
    return np.uint16 if max(vocabulary.values(), default=0) < 2**16 else np.uint32
