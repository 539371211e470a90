"""Documents -> token store: written once, memory-mapped ever after.

    <storage>/tokens/<fingerprint>/
        manifest.json                  written last: no manifest, no store
        tokenizer/                     save_pretrained
        train/shard-00000.arrow        Arrow IPC, uncompressed, one row a document:
        validation/shard-00000.arrow       tokens: list<uint16 or uint32>, num_bytes, doc_id, source
        progress/shard-00000.json      while it is written: the shards that are done; a killed run goes on after them

The store holds the tokens of the documents and nothing between them: end-of-text tokens are put in where blocks are
cut. The same files and settings give the same bytes, however many tasks write them: what a shard holds depends on the
files alone, and two writers of one store write the same files.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
import pickle
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raylm import tokenizer as tokenizers
from raylm.config import CorpusConfig, TokenizerConfig
from raylm.corpus import Document, Ledger, Shard, Source, check, documents, shards
from raylm.errors import DataError, RaylmError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1

# Text to train a tokenizer on, bytes an entry of the vocabulary. On the standard library with 4096 entries, 8 MB give
# 0.4 % more tokens than all 31 MB, in a quarter of the time.
SAMPLE_BYTES = 2000

SPLITS = ("train", "validation")

Progress = Callable[[float, float | None], None]


# Reading -----------------------------------------------------------------------------------------------------------


class Split:
    """The documents of a split: a sequence of 1-D arrays of token ids, views of the memory map."""

    def __init__(self, store: str, name: str, shards: list[dict[str, Any]]):
        self._key = (store, name)
        self._files = [os.path.join(store, shard["file"]) for shard in shards]
        self._first = [0, *accumulate(shard["documents"] for shard in shards)]
        self.shards = [(shard["documents"], shard["tokens"]) for shard in shards]
        """(documents, tokens) of each shard."""
        self.num_tokens: int = sum(shard["tokens"] for shard in shards)
        self.num_bytes: int = sum(shard["bytes"] for shard in shards)
        """UTF-8 bytes of the text."""

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = self._locate(index)
        values, offsets = self.arrays(shard)
        return values[offsets[row] : offsets[row + 1]]

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of the document's text."""
        shard, row = self._locate(index)
        return self._batch(shard)["num_bytes"][row].as_py()

    def document_id(self, index: int) -> int:
        """A hash of the document's text: the same in every store that has the document."""
        shard, row = self._locate(index)
        return self._batch(shard)["doc_id"][row].as_py()

    def arrays(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all documents of the shard one after the other, where each document begins and the last one ends)."""
        if shard not in self._arrays:
            tokens = self._batch(shard)["tokens"]
            self._arrays[shard] = tokens.values.to_numpy(), tokens.offsets.to_numpy()
        return self._arrays[shard]

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            self._batches[shard] = pa.ipc.open_file(pa.memory_map(self._files[shard])).get_batch(0)
        return self._batches[shard]

    @cached_property
    def _batches(self) -> dict[int, pa.RecordBatch]:
        return {}

    @cached_property
    def _arrays(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def __reduce__(self) -> tuple:
        return _split, self._key  # maps do not travel; the other process opens its own


class Store:
    """A written token store: `train` and `validation` documents, and the tokenizer they were made with."""

    def __init__(self, path: str, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.eos_id: int = manifest["tokenizer"]["eos_id"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.train = Split(path, "train", manifest["train"]["shards"])
        self.validation = Split(path, "validation", manifest["validation"]["shards"])

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizers.load(os.path.join(self.path, "tokenizer"))

    def __reduce__(self) -> tuple:
        return open_store, (self.path,)


def open_store(path: str | os.PathLike) -> Store:
    """The store of a directory. Reads the manifest alone; shards are mapped when they are first read."""
    try:
        manifest = json.loads((Path(path) / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path}: no token store there (it has no manifest.json); run raylm prepare", str(path)
        ) from None
    if manifest["format"] != FORMAT:
        raise DataError(f"{path}: a store of format {manifest['format']}, this raylm reads {FORMAT}", str(path))
    return Store(str(path), manifest)


@lru_cache(maxsize=8)
def _split(path: str, name: str) -> Split:
    return getattr(open_store(path), name)


# Where a store lies --------------------------------------------------------------------------------------------------


def fingerprint(corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: list[Source] | None = None) -> str:
    """Names what a store is made of: files with size and time, filters, split, tokenizer. Not blocks, not the model."""
    if sources is None:
        sources = check(corpus)
    made_of = {
        "format": FORMAT,
        "corpus": corpus.model_dump(mode="json"),
        "tokenizer": tokenizer.model_dump(mode="json"),
        "tokenizer_files": _tokenizer_files(tokenizer),
        "sources": [[(file.path, file.size, file.modified_ns) for file in source.files] for source in sources],
    }
    return _checksum(json.dumps(made_of, sort_keys=True).encode())[:16]


def store_path(
    storage: str, corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: list[Source] | None = None
) -> str:
    """Where the store of these settings lies, or will lie."""
    return os.path.join(storage, "tokens", fingerprint(corpus, tokenizer, sources))


def is_store(path: str) -> bool:
    """Whether a store is there, entirely: then `prepare` needs no Ray."""
    return os.path.exists(os.path.join(path, "manifest.json"))


def _tokenizer_files(tokenizer: TokenizerConfig) -> dict[str, str]:
    """Checksums of a local tokenizer's files, weights beside it left out."""
    if tokenizer.path is None or not os.path.isdir(tokenizer.path):
        return {}
    files = [file for file in Path(tokenizer.path).iterdir() if file.suffix in (".json", ".txt", ".model", ".jinja")]
    return {file.name: _checksum(file.read_bytes()) for file in sorted(files)}


def _checksum(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# Writing -------------------------------------------------------------------------------------------------------------


def prepare(
    corpus: CorpusConfig, tokenizer: TokenizerConfig, *, storage: str, progress: Progress = lambda done, total: None
) -> tuple[Store, bool]:
    """The store of these settings, and whether it was there already.

    Ray must be up. A run that was killed goes on at the shards it had not finished.
    """
    sources = check(corpus)
    path = store_path(storage, corpus, tokenizer, sources)
    if is_store(path):
        return open_store(path), True
    for directory in (*SPLITS, "progress"):
        os.makedirs(os.path.join(path, directory), exist_ok=True)
    plan = shards(sources)
    if corpus.max_documents is not None:
        plan = _first_documents(plan, corpus)
    _write_tokenizer(path, tokenizer, plan, corpus)
    manifest = {
        "format": FORMAT,
        "fingerprint": os.path.basename(path),
        "corpus": corpus.model_dump(mode="json"),
        "tokenizer": _tokenizer_facts(path),
        **_write_shards(path, plan, corpus, progress),
        "sources": [
            {"name": source.name, "files": [[file.path, file.size, file.modified_ns] for file in source.files]}
            for source in sources
        ],
    }
    if not manifest["train"]["documents"]:
        kept = ", ".join(f"{what} {count}" for what, count in manifest["ledger"].items())
        raise DataError(f"corpus: no document is left to train on; of what was read: {kept}", "corpus")
    _write(os.path.join(path, "manifest.json"), json.dumps(manifest, indent=1).encode())
    shutil.rmtree(os.path.join(path, "progress"), ignore_errors=True)
    return open_store(path), False


def _first_documents(plan: list[Shard], corpus: CorpusConfig) -> list[Shard]:
    """The shards that hold the first corpus.max_documents kept documents; the last of them is told where to stop."""
    left = corpus.max_documents or 0
    first = []

    def count(_: int, shard: Shard) -> dict[str, Any]:
        return {"kept": sum(1 for _ in documents(shard, corpus, Ledger()))}

    for shard, found in zip(plan, _each(count, enumerate(plan)), strict=False):
        first.append(shard._replace(most_documents=min(left, found["kept"])))
        left -= found["kept"]
        if left <= 0:
            break
    return first


def _write_tokenizer(path: str, section: TokenizerConfig, plan: list[Shard], corpus: CorpusConfig) -> None:
    """Load or train the tokenizer, into the store; one that is there stays."""
    target = os.path.join(path, "tokenizer")
    if os.path.exists(target):
        return
    if section.train is not None:
        most = SAMPLE_BYTES * section.train.vocab_size
        made = tokenizers.train(_sample(plan, corpus, most), section.train)
    else:
        made = tokenizers.load(section.path or "")
    partial = f"{target}.{uuid.uuid4().hex}"
    made.save_pretrained(partial)
    try:
        os.rename(partial, target)
    except OSError:  # another writer was faster, with the same files
        shutil.rmtree(partial)


def _sample(plan: list[Shard], corpus: CorpusConfig, most: int) -> Iterator[str]:
    """Training documents, about `most` bytes of them, evenly spread over the shards."""
    share = most / max(1, sum(shard.num_bytes for shard in plan))
    for shard in plan:
        left = share * shard.num_bytes
        for document in documents(shard, corpus, Ledger()):
            if left <= 0:
                break
            if not document.validation:
                yield document.text
                left -= document.num_bytes


def _tokenizer_facts(path: str) -> dict[str, Any]:
    made = tokenizers.load(os.path.join(path, "tokenizer"))
    return {"vocab_size": len(made), "eos_id": made.eos_token_id, "eos_token": made.eos_token}


def _write_shards(path: str, plan: list[Shard], corpus: CorpusConfig, progress: Progress) -> dict[str, Any]:
    """Write every shard that is not there yet. The manifest's ledger and splits."""
    total = sum(shard.num_bytes for shard in plan)
    found = {index: _finished(path, index) for index in range(len(plan))}
    done = sum(shard.num_bytes for index, shard in enumerate(plan) if found[index])
    progress(done, total)

    def tokenize(index: int, shard: Shard) -> dict[str, Any]:
        return _finished(path, index) or _write_shard(path, index, shard, corpus)

    missing = [index for index in found if not found[index]]
    tasks = _each(tokenize, ((index, plan[index]) for index in missing))
    for index, written in zip(missing, tasks, strict=True):
        found[index] = written
        done += plan[index].num_bytes
        progress(done, total)
    ledger: Ledger = Ledger()
    splits: dict[str, Any] = {name: {"documents": 0, "tokens": 0, "bytes": 0, "shards": []} for name in SPLITS}
    for index in range(len(plan)):
        written = found[index] or {}
        ledger.update(written["ledger"])
        for name in SPLITS:
            shard = written[name]
            if shard["documents"]:
                splits[name]["shards"].append(shard)
            for what in ("documents", "tokens", "bytes"):
                splits[name][what] += shard[what]
    return {"ledger": dict(ledger), **splits}


def _progress_file(path: str, index: int) -> str:
    return os.path.join(path, "progress", f"shard-{index:05}.json")


def _finished(path: str, index: int) -> dict[str, Any] | None:
    """What `_write_shard` returned when it wrote the shard, or None if it did not yet."""
    try:
        with open(_progress_file(path, index), "rb") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def _write_shard(path: str, index: int, shard: Shard, corpus: CorpusConfig) -> dict[str, Any]:
    """Tokenize and write one shard. Its ledger, and file, documents, tokens, bytes and checksum of each split."""
    encode = tokenizers.encoder(os.path.join(path, "tokenizer"))
    ledger: Ledger = Ledger()
    rows: dict[bool, list[tuple[np.ndarray, Document]]] = {False: [], True: []}
    for batch in _batches(documents(shard, corpus, ledger), tokenizers.BATCH):
        for ids, document in zip(encode([document.text for document in batch]), batch, strict=True):
            rows[document.validation].append((ids, document._replace(text="")))
    written: dict[str, Any] = {"ledger": dict(ledger)}
    for name, validation in zip(SPLITS, (False, True), strict=True):
        file = f"{name}/shard-{index:05}.arrow"
        split = rows[validation]
        written[name] = {
            "file": file,
            "documents": len(split),
            "tokens": sum(len(ids) for ids, _ in split),
            "bytes": sum(document.num_bytes for _, document in split),
        }
        if split:
            content = _arrow(split, encode.dtype)
            written[name]["checksum"] = _checksum(content)
            _write(os.path.join(path, file), content)
    _write(_progress_file(path, index), json.dumps(written).encode())
    return written


def _arrow(rows: list[tuple[np.ndarray, Document]], dtype: Any) -> pa.Buffer:
    """Documents as one Arrow IPC file of one record batch."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(ids) for ids, _ in rows], out=offsets[1:])
    batch = pa.record_batch(
        {
            "tokens": pa.ListArray.from_arrays(offsets, np.concatenate([ids for ids, _ in rows], dtype=dtype)),
            "num_bytes": np.array([document.num_bytes for _, document in rows], np.int64),
            "doc_id": np.array([document.hash for _, document in rows], np.uint64),
            "source": np.array([document.source for _, document in rows], np.uint16),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def _batches(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(path: str, content: Any) -> None:
    """A file that is there entirely or not at all."""
    partial = f"{path}.{uuid.uuid4().hex}"
    with open(partial, "wb") as file:
        file.write(content)
    os.replace(partial, path)


# Ray Data ------------------------------------------------------------------------------------------------------------


def _each(
    function: Callable[[int, Shard], dict[str, Any]], numbered: Iterable[tuple[int, Shard]]
) -> Iterator[dict[str, Any]]:
    """function(index, shard) for every shard, in tasks of one CPU, streamed in the order given.

    One row a task: Ray Data would merge small blocks into one task and use one core. Only counts come back.
    """
    import ray.data

    items = [{"shard": pickle.dumps(item)} for item in numbered]
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off

    def row(item: dict[str, Any]) -> dict[str, Any]:
        # A user's error comes back as a value: Ray would bury it in a traceback of its own.
        try:
            return {"found": json.dumps(function(*pickle.loads(item["shard"])))}
        except RaylmError as error:
            return {"found": json.dumps({"error": error.message, "where": error.where})}

    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(row, num_cpus=1)
    for answer in tasks.iter_rows():
        found = json.loads(answer["found"])
        if "error" in found:
            raise DataError(found["error"], found["where"])
        yield found
