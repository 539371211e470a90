"""Encoders: documents -> token ids, fast, and the ids of their text alone.

Text that spells a special token, as a page about GPT-2 spells <|endoftext|>, is encoded like any other text: special
tokens are only where raylm puts them. Text outside the vocabulary becomes the unknown token, which is counted, or is an
error: nothing is dropped from a document.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raylm.errors import DataError
from raylm.tokenizer.chat import Conversations
from raylm.tokenizer.loading import load, spelled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64  # documents: 1.5 times encode_batch with all of them, and memory stays flat

LONG = 1_000_000
"""Most characters encoded at once, of a document or a batch, because tokenizers needs 130 bytes for each."""

OVERLAP = 20_000
"""Characters that one part of a long document shares with the next."""

NOT_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that no UTF-8 text contains, so a vocabulary need not have them."""


class Encoder:
    """Documents -> token ids without special tokens, on one core."""

    def __init__(self, directory: str, name: str):
        kinds: dict[str, Callable[[str], _Slow | _Fast]] = {"fastokens": _Fast, "tokenizers": _Slow}
        self._ids = kinds[name](directory)
        self.unknown_id = self._ids.unknown_id
        """Id of the unknown token; None if the vocabulary has none."""
        self._special = _any_of(self._ids.special)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts, concatenated, in the smallest type that holds the vocabulary; number of ids of each text).

        DataError if the vocabulary cannot spell one of them.
        """
        return self.checked(self._ids, texts)

    def checked(self, encode: Callable[[list[str]], Any], texts: list[str]) -> Any:
        """encode(texts); DataError naming a text that the vocabulary cannot spell."""
        lacking = self._ids.lacking
        if lacking is not None:
            for text in texts:
                if (what := lacking(text)) is not None:
                    raise _cannot_spell(text, f"it has no {what}")
        try:
            return encode(texts)
        except Exception as error:
            if type(error) is not Exception:  # tokenizers raises this class itself
                raise
            for text in texts if len(texts) > 1 else ():
                self.checked(encode, [text])
            raise _cannot_spell(texts[0], str(error)) from None

    def special_tokens_in(self, text: str) -> int:
        """How often a text spells a special token."""
        return len(self._special.findall(text)) if self._special is not None else 0


class AnswerEncoder:
    """Documents -> token ids, and which of them are of an answer: those that have a character of it.

    `with_conversations`: the documents are conversations, in whose text the chat template has put special tokens.
    """

    def __init__(self, directory: str, with_conversations: bool):
        from tokenizers import Tokenizer

        tokenizer = load(directory)
        own = getattr(tokenizer, "backend_tokenizer", None)
        if own is None:
            raise DataError(
                "tokenizer.path: its tokenizer is written in Python and does not tell the characters of a token, which "
                "corpus.prompt and corpus.messages need; give one with a tokenizer.json",
                "tokenizer.path",
            )
        content = json.loads(own.to_str())
        content["post_processor"] = None  # GPT-2's leaves the space before a word out of the word's characters
        self._backend = Tokenizer.from_str(json.dumps(content))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._plain = Encoder(directory, "tokenizers")
        self._dtype = id_type(own.get_vocab())
        self.unknown_id = self._plain.unknown_id
        self.conversations = Conversations(tokenizer, directory) if with_conversations else None
        """Writes the documents of corpus.messages."""
        if not with_conversations:
            self._backend = _plain(self._backend)

    def __call__(
        self, texts: list[str], answers: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids of all texts, concatenated; number of ids of each text; uint8, whether each id is of an answer).

        DataError if the vocabulary cannot spell one of them.
        """
        # A conversation is encoded behind its begin-of-text token, on which the first word may depend.
        begin = self.conversations.begin if self.conversations else ""
        skip = 1 if begin else 0
        found = self._plain.checked(lambda some: self._encoded([begin + text for text in some]), texts)
        ids = [np.array(each.ids[skip:], self._dtype) for each in found]
        marks = [
            _inside(each.offsets[skip:], [(first + len(begin), last + len(begin)) for first, last in spans])
            for each, spans in zip(found, answers, strict=True)
        ]
        return np.concatenate(ids), np.array([len(part) for part in ids], np.int64), np.concatenate(marks)

    def _encoded(self, texts: list[str]) -> list[Any]:
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def special_tokens_in(self, text: str) -> int:
        """How often a text spells a special token without being one."""
        return 0 if self.conversations else self._plain.special_tokens_in(text)


def _inside(offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether each token, of these characters, has a character of one of the spans."""
    places = np.array(offsets, np.int64).reshape(-1, 2)
    marks = np.zeros(len(places), np.uint8)
    for first, last in spans:
        marks[(places[:, 0] < last) & (places[:, 1] > first)] = 1
    return marks


GIVEN = "corpus.tokens"
"""The name of the encoder of documents that are token ids already."""


class GivenDocument(NamedTuple):
    """A document of token ids without the special tokens around it."""

    ids: str
    """In decimal, with spaces between."""
    text: str
    """The text that the ids are of."""
    before: list[str]
    """The special tokens that were in front of it."""
    after: list[str]
    """Those that were at its end."""
    inside: int
    """Number of special tokens inside it."""


class GivenIds:
    """Documents of token ids, in decimal with spaces between -> these ids, with the interface of an Encoder."""

    def __init__(self, directory: str):
        self._tokenizer = load(directory)
        vocabulary = self._tokenizer.get_vocab()
        self._dtype = id_type(vocabulary)
        self._highest = max(vocabulary.values())
        self.unknown_id = unknown_id(self._tokenizer)
        names = ("bos", "cls", "eos", "sep", "pad")
        self._around = {id for name in names if (id := getattr(self._tokenizer, f"{name}_token_id")) is not None}

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [self._parsed(text) for text in texts]
        return np.concatenate(ids).astype(self._dtype), np.array([len(part) for part in ids], np.int64)

    def special_tokens_in(self, text: str) -> int:
        """0: ids are not searched for what they spell."""
        return 0

    def without_frame(self, text: str) -> GivenDocument:
        """A document without the special tokens around it; OverflowError of an id that the vocabulary does not have."""
        found = self._parsed(text)
        if len(wrong := found[found > self._highest]):
            raise OverflowError(f"token id {wrong[0]:,} is not in the vocabulary of the tokenizer that made the ids")
        ids = found.tolist()
        start, stop = 0, len(ids)
        while start < stop and ids[start] in self._around:
            start += 1
        while start < stop and ids[stop - 1] in self._around:
            stop -= 1
        names, kept = self._tokenizer.convert_ids_to_tokens, ids[start:stop]
        spelled = self._tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        inside = sum(id in self._around for id in kept)
        return GivenDocument(" ".join(map(str, kept)), spelled, names(ids[:start]), names(ids[stop:]), inside)

    def _parsed(self, text: str) -> np.ndarray:
        return np.array(text.split(), np.int64)


def _cannot_spell(text: str, why: str) -> DataError:
    return DataError(
        f"tokenizer: its vocabulary cannot spell the document that starts with {text[:60]!r}: {why}; give a tokenizer "
        "that has all bytes or an unknown token, or tokenizer.train for one of your own text",
        "tokenizer",
    )


def _special_tokens(added: dict[int, Any]) -> list[str]:
    return [token.content for token in added.values() if token.special]


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds special tokens in text, except those of one character: a line feed that ends documents also
    ends lines."""
    long = sorted({token for token in tokens if len(token) > 1}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, long))) if long else None


# What a vocabulary cannot spell --------------------------------------------------------------------------------------


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that a tokenizer gives to text outside its vocabulary; None if it has none.

    It need not be that of `unk_token`: GPT-2 has <|endoftext|> there, and its vocabulary covers all text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer.unk_token_id if backend is None else _unknown_id(backend)


def _unknown_id(backend: Any) -> int | None:
    model = backend.model
    if type(model).__name__ == "Unigram":  # the only model without an attribute for it
        return json.loads(model.__getstate__())["unk_id"]
    return None if model.unk_token is None else backend.token_to_id(model.unk_token)


def _finder_of_lacking(backend: Any) -> Callable[[str], str | None] | None:
    """A function that names the first character of a text that the vocabulary lacks, or returns None. No function, but
    None, if the vocabulary covers all text or has an unknown token.

    BPE without an unknown token silently drops what it lacks. A byte-level vocabulary must have all bytes, even if it
    has an unknown token.
    """
    from tokenizers import pre_tokenizers

    model = backend.model
    # GPT-2's notation for bytes: a printable byte is itself, the others are U+0100, ... in order
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    byte_of = {letter: ord(letter) if ord(letter) < 256 else next(others) for letter in alphabet}
    is_of_bytes = "Ā" in spelled(backend, "\0")
    if type(model).__name__ != "BPE" or (model.unk_token is not None and not is_of_bytes):
        return None
    entries = backend.get_vocab(with_added_tokens=False)
    prefix, suffix = model.continuing_subword_prefix or "", model.end_of_word_suffix or ""
    letters = {entry if len(entry) == 1 else entry.removeprefix(prefix).removesuffix(suffix) for entry in entries}
    if is_of_bytes:
        absent = {byte for letter, byte in byte_of.items() if letter not in letters} - NOT_IN_UTF8
    else:  # with byte_fallback a letter that is no piece is spelled by its bytes
        absent = {byte for byte in range(256) if f"<0x{byte:02X}>" not in entries} - NOT_IN_UTF8
    if not absent and (is_of_bytes or model.byte_fallback):
        return None
    added = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    known: set[str] = set()

    def lacking(text: str) -> str | None:
        for token in added:
            text = text.replace(token, "")
        for character in dict.fromkeys(text):
            if character in known:
                continue
            for letter in spelled(backend, character):
                if letter in letters:
                    continue
                if not is_of_bytes and not model.byte_fallback:
                    return repr(letter)
                needed = [byte_of[letter]] if is_of_bytes else letter.encode()
                for byte in needed:
                    if byte in absent:
                        return f"byte 0x{byte:02x} ({character!r})"
            known.add(character)
        return None

    return lacking


def _is_found(backend: Any, token: str, id: int) -> bool:
    try:
        return id in backend.encode(f"{token} {token}", add_special_tokens=False).ids
    except Exception:  # a model without an unknown token, to which the space is unknown
        return True


def _plain(backend: Any) -> Any:
    """The tokenizer, or a copy of it, set to encode whole texts and to treat special tokens in them as text.

    With encode_special_tokens tokenizers does not look for special tokens in a text, but some models find them among
    their own pieces: Unigram (T5, XLNet) takes </s> for the likeliest one. There they are renamed to what no text has.
    """
    from tokenizers import Tokenizer

    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    names = {
        token.content: f"\U0010fffe{id}\U0010ffff"
        for id, token in backend.get_added_tokens_decoder().items()
        if token.special and len(token.content) > 1 and _is_found(backend, token.content, id)
    }
    if not names:
        return backend
    content = json.loads(backend.to_str())
    model, vocabulary = content["model"], content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in names]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in content["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    renamed = Tokenizer.from_str(json.dumps(content))
    renamed.encode_special_tokens = True
    return renamed


# Ids -----------------------------------------------------------------------------------------------------------------


class _Slow:
    """The encoder of transformers, which uses tokenizers."""

    def __init__(self, directory: str):
        tokenizer = load(directory)
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._dtype = id_type(tokenizer.get_vocab())
        self.special = [*_special_tokens(tokenizer.added_tokens_decoder), *tokenizer.all_special_tokens]
        self.unknown_id = unknown_id(tokenizer)
        self.lacking = None
        if self._backend is None:
            self._spells_special = _any_of(self.special)
        else:
            self._backend = _plain(self._backend)
            self.lacking = _finder_of_lacking(self._backend)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        found: list[Any]
        if self._backend is None:  # a tokenizer written in Python
            found = [self._by_python(text) for text in texts]
        elif any(len(text) > LONG for text in texts):
            found = [self._long(text) for text in texts]
        else:
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            found = [encoding.ids for encoding in encoded]
        ids = [np.array(part, self._dtype) for part in found]
        return np.concatenate(ids), np.array([len(part) for part in ids], np.int64)

    def _by_python(self, text: str) -> list[int]:
        # Only if needed: with split_special_tokens these do not look for any added token.
        spells = self._spells_special is not None and self._spells_special.search(text) is not None
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=spells)["input_ids"]

    def _long(self, text: str) -> np.ndarray:
        """The ids of a text, encoded in parts that overlap and are joined where both see the same words.

        A tokenizer reads a text from left to right, word by word. Once two parts agree on some words, they agree on all
        that follow; so they are joined in the middle of the overlap, far from both ends. A text whose words are longer
        than the overlap is encoded as a whole.
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
    """Return free pages to the kernel. glibc keeps them: 60 million characters in parts took 2.2 GB instead of 0.7."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _joint(part: Any, head: Any, shift: int) -> tuple[int, int] | None:
    """The tokens at which one encoding can be joined to the next, which starts `shift` characters later.

    Both tokens start the same word at the same character, and the 50 tokens before and after are equal in both.
    """
    ends, begins = _word_starts(part), _word_starts(head)
    middle = [character for character in begins if OVERLAP // 4 < character < 3 * OVERLAP // 4]
    for character in middle:
        here, there = ends.get(character + shift), begins[character]
        if here is not None and there >= 50 and part.ids[here - 50 : here + 50] == head.ids[there - 50 : there + 50]:
            return here, there
    return None


def _word_starts(encoding: Any) -> dict[int, int]:
    """Character at which a word starts -> its first token."""
    words, offsets = encoding.word_ids, encoding.offsets
    return {
        offsets[token][0]: token
        for token in range(1, len(words))
        if words[token] is not None and words[token] != words[token - 1]
    }


class _Fast:
    """fastokens: the same ids, many times faster, in one buffer. Saves the seconds of importing transformers."""

    def __init__(self, directory: str):
        from tokenizers import Tokenizer

        fastokens = importlib.import_module("fastokens")
        backend = Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
        self.special = _special_tokens(backend.get_added_tokens_decoder())
        backend = _plain(backend)
        self._tokenizer = fastokens.Tokenizer.from_json_str(backend.to_str())
        self._dtype = id_type(backend.get_vocab())
        self.unknown_id = _unknown_id(backend)
        self.lacking = _finder_of_lacking(backend)

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, offsets = self._tokenizer.encode_batch_flat(texts, split_special_tokens=True)
        lengths = np.diff(np.frombuffer(offsets, np.uint64).astype(np.int64))
        return np.frombuffer(ids, np.uint32).astype(self._dtype, copy=False), lengths


@lru_cache(maxsize=2)
def answer_encoder(directory: str, with_conversations: bool) -> AnswerEncoder:
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # as for encoder
    return AnswerEncoder(directory, with_conversations)


@lru_cache(maxsize=2)  # a Ray worker process runs many tasks with one tokenizer
def encoder(directory: str, name: str) -> Encoder | GivenIds:
    """The encoder "fastokens" or "tokenizers" of the tokenizer in a directory, or that of GIVEN ids."""
    if name == GIVEN:
        return GivenIds(directory)
    # A task has one CPU. Both libraries read this when they encode their first batch in a process.
    os.environ.setdefault("RAYON_NUM_THREADS", "1")
    return Encoder(directory, name)


def the_only(name: str) -> dict[str, Any]:
    """What `choose_encoder` returns where there is no choice: "tokenizers", or GIVEN for documents of token ids."""
    checked = {"differs": None, "checked_documents": 0, "checked_bytes": 0}
    return {"name": name, "version": metadata.version("tokenizers"), **checked}


def choose_encoder(directory: str, texts: Iterable[str]) -> dict[str, Any]:
    """The fast encoder if it is installed, supports this tokenizer and gives the slow one's ids on all the texts.

    {name, version, checked_documents, checked_bytes, differs: None or how the fast one differs}
    """
    choice = the_only("tokenizers")
    if importlib.util.find_spec("fastokens") is None:
        return choice
    slow = Encoder(directory, "tokenizers")
    try:
        fast = Encoder(directory, "fastokens")
    except Exception:  # any error of its parser for an unsupported tokenizer
        return choice
    for text in texts:
        choice["checked_documents"] += 1
        choice["checked_bytes"] += len(text.encode())
        if not np.array_equal(fast([text])[0], slow([text])[0]):
            return choice | {"differs": f"fastokens gives other ids than the tokenizer for {text[:60]!r}"}
    return choice | {"name": "fastokens", "version": metadata.version("fastokens")}


def id_type(vocabulary: dict[str, int]) -> type[np.uint16] | type[np.uint32]:
    """The smallest type that holds every id. The size of a vocabulary with gaps is not its largest id."""
    return np.uint16 if max(vocabulary.values(), default=0) < 2**16 else np.uint32
