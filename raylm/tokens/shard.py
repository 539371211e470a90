"""One shard of a token store, tokenized and written by one task."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from raylm import tokenizer as tokenizers
from raylm.config import CorpusConfig
from raylm.corpus import BadDocument, Document, File, Ledger, Shard, content_hash, documents
from raylm.storage import read
from raylm.tokens.store import ANSWERS, as_numpy, checksum, local_tokenizer, write

AnyEncoder = tokenizers.Encoder | tokenizers.GivenIds | tokenizers.AnswerEncoder

MOST_TOKENS = 1 << 28
"""Of a file. A larger shard, such as a file of 100 GB that cannot be cut, has several files: the offsets of an Arrow
list have 32 bits, and the tokens of a file are in memory until it is written."""

MOST_REJECTED = 100
"""Documents of a shard that rejected.jsonl names; all are counted."""


def write_shard(path: str, index: int, shard: Shard, key: str, corpus: CorpusConfig, encoder: str) -> dict[str, Any]:
    """Tokenize and write one shard. Returns its key, ledger, rejected documents, and the files of each split.

    Sources are numbered in the order of the shard's own, `shard.sources`, so that stores of other sources can share it.
    """
    number = {source: at for at, source in enumerate(shard.sources)}
    encode = encoder_of(corpus, local_tokenizer(path), encoder)
    files = {name: _Files(path, f"{name}/shard-{index:05}", encode) for name in corpus.splits}
    ledger: Ledger = Ledger()
    rejected: list[dict[str, str]] = []

    def reject(file: File, fault: BadDocument) -> None:
        if len(rejected) < MOST_REJECTED:
            rejected.append({"file": file.path, "place": fault.place, "fault": fault.what})

    for document in ready(shard, corpus, encode, ledger, reject):
        if spelled := encode.special_tokens_in(document.text):
            ledger["spell a special token"] += 1
            ledger["special tokens as text"] += spelled
        files[document.split].append(document._replace(source=number[document.source]))
    written: dict[str, Any] = {"key": key, "ledger": dict(ledger), "rejected": rejected}
    written |= {name: each.finish() for name, each in files.items()}
    write(path, f"progress/{facts_name(index)}", json.dumps(written).encode())
    return written


def encoder_of(corpus: CorpusConfig, directory: str, name: str) -> AnyEncoder:
    """The encoder of this name for the documents of a corpus, with the tokenizer of a directory."""
    if not corpus.has_prompts:
        return tokenizers.encoder(directory, name)
    return tokenizers.answer_encoder(directory, with_conversations=corpus.messages is not None)


def ready(
    shard: Shard,
    corpus: CorpusConfig,
    encode: AnyEncoder,
    ledger: Ledger,
    reject: Callable[[File, BadDocument], None] = lambda file, fault: None,
) -> Iterator[Document]:
    """The documents of a shard as they are encoded: token ids checked, conversations written by the chat template."""
    said = isinstance(encode, tokenizers.AnswerEncoder) and encode.conversations
    for document in documents(shard, corpus, ledger, reject):
        found: Document | BadDocument | None = document
        if isinstance(encode, tokenizers.GivenIds):
            found = _checked(document, encode, ledger)
        elif said:
            found = _written(document, said, ledger)
        if isinstance(found, BadDocument):
            if corpus.on_bad_row == "error":
                raise found.error(document.file)
            reject(document.file, found)
            ledger.subtract(["kept"])
            ledger["bad rows"] += 1
        elif found is not None:
            yield found


def _written(
    document: Document, conversations: tokenizers.Conversations, ledger: Ledger
) -> Document | BadDocument | None:
    """A conversation as text; None if nothing can be learned from it."""
    ledger.subtract({"bytes": document.num_bytes, "kept bytes": document.num_bytes})  # of JSON
    try:
        chat = conversations.text(document.text)
    except tokenizers.Unanswered as why:
        ledger.subtract(["kept"])
        ledger[str(why)] += 1
        return None
    except tokenizers.Refused as why:
        return BadDocument("", str(why))
    size = len(chat.text.encode())
    ledger.update({"bytes": size, "kept bytes": size})
    return document._replace(text=chat.text, num_bytes=chat.num_bytes, answers=tuple(chat.answers))


FRAMES = "removed: "
"""How the counts of special tokens around documents of ids start in the ledger."""


def _checked(document: Document, given: tokenizers.GivenIds, ledger: Ledger) -> Document | BadDocument | None:
    """A document of token ids without special tokens around it, with the bytes and hash of its text.

    None if it has no others; BadDocument if an id is not in the vocabulary.
    """
    ledger.subtract({"bytes": document.num_bytes, "kept bytes": document.num_bytes})  # of decimal numbers
    try:
        found = given.without_frame(document.text)
    except OverflowError as error:
        return BadDocument("", str(error))
    ledger.update({f"{FRAMES}{token} in front": 1 for token in set(found.before)})
    ledger.update({f"{FRAMES}{token} at the end": 1 for token in set(found.after)})
    if not found.ids:
        ledger.subtract(["kept"])
        ledger["empty"] += 1
        return None
    if found.inside:
        ledger["special tokens inside"] += found.inside
    encoded = found.text.encode(errors="replace")
    ledger.update({"bytes": len(encoded), "kept bytes": len(encoded)})
    return document._replace(text=found.ids, num_bytes=len(encoded), hash=content_hash(encoded))


def finished(path: str, index: int, key: str) -> dict[str, Any] | None:
    """The result of `write_shard`; None if the shard is not written yet."""
    content = read(f"{path}/progress/{facts_name(index)}")
    written = json.loads(content) if content else {}
    return written if written.get("key") == key else None


def facts_name(index: int) -> str:
    return f"shard-{index:05}.json"


def encoded(encode: AnyEncoder, some: list[Document]) -> tuple[np.ndarray, ...]:
    """(ids of all documents, concatenated; number of ids of each); with prompts also whether each id is of an answer,
    uint8."""
    texts = [document.text for document in some]
    if isinstance(encode, tokenizers.AnswerEncoder):
        return encode(texts, [document.answers or () for document in some])
    return encode(texts)


class _Files:
    """The documents of one split in one shard, written to files of about MOST_TOKENS."""

    def __init__(self, path: str, stem: str, encode: AnyEncoder):
        self._path, self._stem, self._encode = path, stem, encode
        self._rows = _Rows(encode)
        self._written: list[dict[str, Any]] = []

    def append(self, document: Document) -> None:
        self._rows.append(document)
        if self._rows.num_tokens >= MOST_TOKENS:
            self._write()

    def finish(self) -> list[dict[str, Any]]:
        """The manifest's entry of each file."""
        if self._rows.facts:
            self._write()
        return self._written

    def _write(self) -> None:
        suffix = f"-{len(self._written):03}" if self._written else ""
        entry = _write_rows(self._path, f"{self._stem}{suffix}.arrow", self._rows.table())
        self._written.append({**entry, "unknown_tokens": self._rows.unknown_tokens})
        self._rows = _Rows(self._encode)


class _Rows:
    """The documents of one file: token ids in one buffer, and a row of facts for each."""

    def __init__(self, encode: AnyEncoder):
        self._encode = encode
        self._waiting: list[Document] = []
        self._characters = 0
        self._ids: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._answers: list[np.ndarray] = []
        self.facts: list[tuple[int, int, int]] = []
        """(bytes, hash, source) of each document."""
        self.num_tokens = 0
        """Of the documents encoded so far."""
        self.unknown_tokens = 0

    def append(self, document: Document) -> None:
        self.facts.append((document.num_bytes, document.hash, document.source))
        self._waiting.append(document)
        self._characters += len(document.text)
        if len(self._waiting) == tokenizers.BATCH or self._characters > tokenizers.LONG:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            ids, lengths, *answers = encoded(self._encode, self._waiting)
            self._answers += answers
            self._ids.append(ids)
            self._lengths.append(lengths)
            self.num_tokens += len(ids)
            if self._encode.unknown_id is not None:
                self.unknown_tokens += int(np.count_nonzero(ids == self._encode.unknown_id))
            self._waiting, self._characters = [], 0

    def table(self) -> pa.RecordBatch:
        self._flush()
        lengths = np.concatenate(self._lengths)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])).cast(pa.int32())
        num_bytes, hashed, source = zip(*self.facts, strict=True)
        answers = {"answers": pa.ListArray.from_arrays(offsets, np.concatenate(self._answers))} if self._answers else {}
        return pa.record_batch(
            {
                "tokens": pa.ListArray.from_arrays(offsets, np.concatenate(self._ids)),
                **answers,
                "num_bytes": np.array(num_bytes, np.int64),
                "doc_id": np.array(hashed, np.uint64),
                "source": np.array(source, np.uint16),
            }
        )


def _write_rows(path: str, file: str, batch: pa.RecordBatch) -> dict[str, Any]:
    """Write an Arrow IPC file of one record batch. Returns its entry in the manifest."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    write(path, file, content)
    source, lengths = as_numpy(batch["source"]), np.diff(as_numpy(batch["tokens"].offsets))
    num_bytes = as_numpy(batch["num_bytes"])
    sources = {
        str(index): {
            "documents": int((source == index).sum()),
            "tokens": int(lengths[source == index].sum()),
            "bytes": int(num_bytes[source == index].sum()),
        }
        for index in np.unique(source)
    }
    entry = {
        "file": file,
        "size": content.size,
        "checksum": checksum(content),
        "documents": batch.num_rows,
        "tokens": int(lengths.sum()),
        "bytes": int(num_bytes.sum()),
        "sources": sources,
    }
    if "answers" in batch.schema.names:
        entry[ANSWERS] = int(as_numpy(batch["answers"].values).sum())
    return entry
