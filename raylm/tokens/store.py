"""Read a token store: documents as views of the memory map; verify it."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raylm import console, storage
from raylm import tokenizer as tokenizers
from raylm.config import TokenizerConfig
from raylm.corpus import File, Source
from raylm.errors import DataError, StorageError, StorageUnavailable, first_line, first_of
from raylm.storage import is_remote, read, sizes
from raylm.tokenizer import Frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3

SPLITS = ("train", "validation", "test")
"""Of a corpus without a test split the manifest has no entry `test`."""

COUNTED = ("documents", "tokens", "bytes", "unknown_tokens")
"""The counts in the manifest, of each split and each of its shards."""

ANSWERS = "answer_tokens"
"""The count of a corpus with prompts besides."""

MOST_UNKNOWN = 0.01
"""The part of a split's tokens that may be unknown without a warning."""


SEEN_IN_TRAINING = "duplicates: trained on and in "
"""The ledger's count of documents of the training split that are in another split, too: this, and its name."""

UNANSWERED = ("empty completion", "without an assistant turn", "a message spells a special token")
"""The ledger's reasons to leave out a row of which nothing can be learned."""

LARGE_VOCABULARY = 8_000
FEWEST_BYTES_PER_TOKEN = 1.5
"""Below it a large vocabulary was not made for the text. English has 4 to 5 bytes a token, source code 3."""


class Split:
    """The documents of a split: a sequence of 1-D arrays of token ids, views of the memory map."""

    def __init__(self, store: str, name: str, shards: list[dict[str, Any]], sources: list[str]):
        self._key = (store, name)
        self.sources = sources
        """For each path of corpus.paths, corpus.validation_paths and corpus.test_paths its name, or itself."""
        self._files = [shard["file"] for shard in shards]
        self._numbers = [shard.get("source_numbers") for shard in shards]
        """Of each shard the index in `sources` of its own sources; None if that is their number in the shard."""
        self._first = [0, *accumulate(shard["documents"] for shard in shards)]
        self.shards = [(shard["documents"], shard["tokens"]) for shard in shards]
        """(documents, tokens) of each shard."""
        self.num_tokens: int = sum(shard["tokens"] for shard in shards)
        self.num_bytes: int = sum(shard["bytes"] for shard in shards)
        """UTF-8 bytes of the text, or of its answers."""
        self.has_prompts = any(ANSWERS in shard for shard in shards)
        """Whether only the answers of documents are learned and scored."""
        self.answer_tokens: int = sum(shard.get(ANSWERS, shard["tokens"]) for shard in shards)
        """Tokens that are learned and scored: those of answers in a store with prompts, else all."""
        self.unknown_tokens: int = sum(shard["unknown_tokens"] for shard in shards)
        """Tokens in place of text that the vocabulary cannot spell; that text is lost."""
        self._batches: dict[int, pa.RecordBatch] = {}
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = self._locate(index)
        values, offsets = self.arrays(shard)
        return values[offsets[row] : offsets[row + 1]]

    def answers(self, index: int) -> np.ndarray | None:
        """Whether each token of a document is of an answer, bool; None without prompts."""
        if not self.has_prompts:
            return None
        shard, row = self._locate(index)
        values, offsets = self.answer_arrays(shard)
        return values[offsets[row] : offsets[row + 1]].astype(bool)

    def scored_tokens(self, documents: int) -> int:
        """Tokens of the first documents that are scored: those of answers with prompts, else all."""
        marks = [self.answers(index) for index in range(documents)]
        return sum(len(self[index]) if each is None else int(each.sum()) for index, each in enumerate(marks))

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of the document's text, or of its answers."""
        shard, row = self._locate(index)
        return self._batch(shard)["num_bytes"][row].as_py()

    def document_id(self, index: int) -> int:
        """A hash of the document's text: the same in every store that has the document."""
        shard, row = self._locate(index)
        return self._batch(shard)["doc_id"][row].as_py()

    def document_source(self, index: int) -> str:
        """The name of the source that the document is from, or its path without one."""
        shard, row = self._locate(index)
        number, numbers = self._batch(shard)["source"][row].as_py(), self._numbers[shard]
        return self.sources[number if numbers is None else numbers[number]]

    def is_of(self, source: str, shard: int | None = None) -> np.ndarray:
        """For each document of the split, or of one shard, whether it is from the source of this name."""
        if shard is None:
            every = [self.is_of(source, each) for each in range(len(self.shards))]
            return np.concatenate([np.zeros(0, bool), *every])
        numbers = self._numbers[shard] or range(len(self.sources))
        own = [at for at, number in enumerate(numbers) if self.sources[number] == source]
        return np.isin(as_numpy(self._batch(shard)["source"]), own)

    def arrays(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all documents of the shard, offset of each document and of the end)."""
        if shard not in self._arrays:
            tokens = self._batch(shard)["tokens"]
            self._arrays[shard] = as_numpy(tokens.values), as_numpy(tokens.offsets)
        return self._arrays[shard]

    def answer_arrays(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """As `arrays`, with uint8 in the place of each id: whether it is of an answer. Only with prompts."""
        return as_numpy(self._batch(shard)["answers"].values), self.arrays(shard)[1]

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, shard by shard."""
        for shard in range(len(self.shards)):
            yield np.diff(self.arrays(shard)[1])

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect.bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    def _batch(self, shard: int) -> pa.RecordBatch:
        if shard not in self._batches:
            path = os.path.join(local_copy(self._key[0]), self._files[shard])
            try:
                self._batches[shard] = storage.retried(path, lambda: pa.ipc.open_file(pa.memory_map(path)).get_batch(0))
            except (FileNotFoundError, NotADirectoryError, pa.ArrowInvalid) as error:
                raise DataError(
                    f"{path} cannot be read: {first_line(error)}; remove {self._key[0]} and run raylm prepare "
                    "with the same settings",
                    self._key[0],
                ) from None
        return self._batches[shard]

    def __reduce__(self) -> tuple:
        return _split, self._key  # another process opens its own memory maps


class Store:
    """A written token store: the documents of each split, and the tokenizer they were made with."""

    def __init__(self, path: str, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        sources = [source["name"] for source in manifest["sources"]]
        self.splits: dict[str, Split] = {
            name: Split(path, name, manifest[name]["shards"], sources) for name in splits(manifest)
        }
        self.train, self.validation = self.splits["train"], self.splits["validation"]
        self.test = self.splits.get("test")
        """None of a corpus without a test split."""

    def __repr__(self) -> str:
        counts = [
            f"{name} {split.num_tokens:,} tokens of {len(split):,} documents" for name, split in self.splits.items()
        ]
        return f"Store({self.path}: {', '.join(counts)})"

    def counts(self, split: str) -> dict[str, int]:
        """documents, tokens, bytes and unknown_tokens of a split; with prompts also answer_tokens, and the bytes of
        answers alone."""
        return {what: self.manifest[split][what] for what in (*COUNTED, ANSWERS) if what in self.manifest[split]}

    @property
    def sources(self) -> list[dict[str, Any]]:
        """name, documents, tokens and bytes of each source in all splits; paths of one name are one source."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.manifest["sources"]:
            source = found.setdefault(row["name"], {"name": row["name"], **dict.fromkeys(COUNTED[:3], 0)})
            source |= {what: source[what] + row[what] for what in COUNTED[:3]}
        return list(found.values())

    @property
    def unknown_token(self) -> str | None:
        """The token in place of text that the vocabulary cannot spell."""
        id = tokenizers.unknown_id(self.tokenizer)
        return None if id is None else self.tokenizer.convert_ids_to_tokens(id)

    def frame(self, prefix: str) -> Frame:
        """The prefix and end of each document, by tokenizer.prefix."""
        known = self.manifest["tokenizer"]["frames"]
        return Frame(*known[prefix]) if prefix in known else tokenizers.frame(self.tokenizer, prefix)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tokenizers.load(os.path.join(local_copy(self.path), "tokenizer"))

    def __reduce__(self) -> tuple:
        return open_store, (self.path,)


class Encoded:
    """Documents in memory with the interface of a split, for text that is scored once."""

    def __init__(self) -> None:
        self._rows: list[tuple[np.ndarray, int, int, str, np.ndarray | None]] = []

    def append(
        self, ids: np.ndarray, num_bytes: int, document_id: int, source: str, answers: np.ndarray | None = None
    ) -> None:
        self._rows.append((ids, num_bytes, document_id, source, answers))

    def extend(self, other: Encoded) -> None:
        self._rows += other._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._rows[index][0]

    def document_bytes(self, index: int) -> int:
        return self._rows[index][1]

    def document_id(self, index: int) -> int:
        return self._rows[index][2]

    def document_source(self, index: int) -> str:
        return self._rows[index][3]

    def answers(self, index: int) -> np.ndarray | None:
        return self._rows[index][4]


def open_store(path: str | os.PathLike) -> Store:
    """The store of a directory or URI. Reads only the manifest; shards are mapped at their first use."""
    path = os.fspath(path)
    manifest = _manifest(path)
    if manifest is None:
        raise DataError(f"{path}: no token store there (it has no manifest.json); run raylm prepare", path)
    if faults := _damage(path, manifest):
        raise DataError(
            f"{path} is damaged: {shown(faults)}; run raylm prepare with the same settings, which writes it again", path
        )
    return Store(path, manifest)


def damage(path: str) -> list[str] | None:
    """Missing files of a store and files of another size, without reading them; None if there is no store."""
    try:
        manifest = _manifest(path)
        return None if manifest is None else _damage(path, manifest)
    except DataError:
        return ["manifest.json: damaged"]


def incomparable(unknown_tokens: int, tokens: int) -> str | None:
    """Why a score is not comparable with that of another tokenizer; None if it is.

    An unknown token is easy to predict and replaces text of any length: a vocabulary without Japanese has 0.97 bits per
    byte on Japanese text, and one of bytes 11.75.
    """
    if not unknown_tokens:
        return None
    return (
        f"{unknown_tokens:,} of {tokens:,} tokens are unknown to the tokenizer, so neither perplexity nor bits per "
        "byte compares with a model that has another tokenizer"
    )


def warnings(store: Store) -> list[str]:
    """A warning for each split with too many unknown tokens, and for text that the tokenizer cuts too small."""
    found = []
    for name, split in store.splits.items():
        if split.unknown_tokens > MOST_UNKNOWN * split.num_tokens:
            share = 100 * split.unknown_tokens / split.num_tokens
            found.append(
                f"tokenizer: {split.unknown_tokens:,} of the {split.num_tokens:,} tokens of the {name} split "
                f"({share:.2g} %) are its unknown token {store.unknown_token!r}. Their text is lost to the model, and "
                "scores over them look better than they are; give a tokenizer that can spell the text, such as "
                "tokenizer.train={kind: byte_bpe}"
            )
    for name, split in store.splits.items():
        if seen := store.manifest["ledger"].get(f"{SEEN_IN_TRAINING}{name}"):
            found.append(
                f"corpus: {seen:,} of the {len(split):,} documents of the {name} split are documents of the training "
                "split, too, so scores look better than they are; corpus.deduplicate=exact keeps them out of training"
            )
    for reason in UNANSWERED:
        if count := store.manifest["ledger"].get(reason):
            found.append(f"corpus: {console.counted(count, 'document')} left out: {reason}")
    num_tokens = sum(split.answer_tokens for split in store.splits.values())
    num_bytes = sum(split.num_bytes for split in store.splits.values())
    if store.vocab_size >= LARGE_VOCABULARY and 0 < num_bytes < FEWEST_BYTES_PER_TOKEN * num_tokens:
        found.append(
            f"tokenizer: a token is {num_bytes / num_tokens:.2f} bytes of text on average, which is little for a "
            f"vocabulary of {store.vocab_size:,}: it does not know this kind of text; give a tokenizer that does, or "
            "tokenizer.train for one of the text itself"
        )
    return found


def is_store(path: str) -> bool:
    """Whether a complete store exists, so that `prepare` needs no Ray."""
    return damage(path) == []


def shown(faults: list[str]) -> str:
    """The first few of them."""
    return first_of(faults, 3, "; ")


def _manifest(path: str) -> dict[str, Any] | None:
    """The manifest of a store; None if there is none."""
    content = read(f"{path}/manifest.json")
    if content is None:
        return None
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise DataError(f"{path}: a store of format {manifest['format']}, this raylm reads {FORMAT}", path)
        for key in ("fingerprint", "tokenizer", "sources", "train", "validation"):
            manifest[key]
        return manifest
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}/manifest.json is damaged; remove {path} and run raylm prepare", path) from None


def splits(manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The splits of a store."""
    return tuple(name for name in SPLITS if name in manifest)


def _damage(path: str, manifest: dict[str, Any]) -> list[str]:
    """Missing files and files of another size than in the manifest, if a second listing has them too.

    A listing of object storage may lack what was written a moment ago, and another command may be writing.
    """
    return _differing(path, manifest) and _differing(path, manifest)


def _differing(path: str, manifest: dict[str, Any]) -> list[str]:
    own = splits(manifest)
    expected = {shard["file"]: shard["size"] for name in own for shard in manifest[name]["shards"]}
    expected |= {f"tokenizer/{name}": None for name in manifest["tokenizer"].get("files", ())}
    found = {f"{part}/{name}": size for part in (*own, "tokenizer") for name, size in sizes(f"{path}/{part}").items()}
    faults = []
    for file, size in expected.items():
        if file not in found:
            faults.append(f"{file}: missing")
        elif size is not None and found[file] != size:
            faults.append(f"{file}: {found[file]} of {size} bytes")
    return faults


@lru_cache(maxsize=8)
def _split(path: str, name: str) -> Split:
    return open_store(path).splits[name]


def verify(store: Store) -> list[str]:
    """Files of a store that differ from the sizes and checksums of its manifest."""
    faults = []
    for name in store.splits:
        for shard in store.manifest[name]["shards"]:
            content = read(f"{store.path}/{shard['file']}")
            if content is None:
                faults.append(f"{shard['file']}: missing")
            elif len(content) != shard["size"]:
                faults.append(f"{shard['file']}: {len(content)} of {shard['size']} bytes")
            elif checksum(content) != shard["checksum"]:
                faults.append(f"{shard['file']}: its checksum differs")
    for file, expected in store.manifest["tokenizer"]["files"].items():
        content = read(f"{store.path}/tokenizer/{file}")
        if content is None or checksum(content) != expected:
            faults.append(f"tokenizer/{file}: {'missing' if content is None else 'its checksum differs'}")
    return faults


def changed_inputs(store: Store, sources: list[Source]) -> list[str]:
    """How the corpus differs from the files of the store: "a.txt: changed", "b.txt: added", "c.txt: removed"."""
    now = {file.path: file for source in sources for file in source.files}
    then = {file[0]: File(*file) for source in store.manifest["sources"] for file in source["files"]}
    faults = []
    for path in sorted(now.keys() | then.keys()):
        if path not in then:
            faults.append(f"{path}: added")
        elif path not in now:
            faults.append(f"{path}: removed")
        elif now[path] != then[path]:
            sizes = f" ({then[path].size:,} -> {now[path].size:,} bytes)" if now[path].size != then[path].size else ""
            faults.append(f"{path}: changed{sizes}")
    return faults


@lru_cache(maxsize=8)
def local_copy(path: str) -> str:
    """The store itself, or this node's copy of a remote one, made once by the first process."""
    if not is_remote(path):
        return path
    parts = ["", *(f"{part}/" for part in (*SPLITS, "tokenizer"))]
    files = lambda: [part + name for part in parts for name in sizes(f"{path}/{part}".rstrip("/"))]  # noqa: E731
    return _copied(path, files, is_whole=is_store)


def tokenizer_section(path: str) -> TokenizerConfig:
    """The tokenizer of a token store, as a section of settings."""
    return TokenizerConfig(path=os.path.join(local_copy(path), "tokenizer"))


@lru_cache(maxsize=8)
def local_tokenizer(path: str) -> str:
    """The local directory of the tokenizer of a store, which may not be complete yet."""
    if not is_remote(path):
        return os.path.join(path, "tokenizer")
    there = sizes(f"{path}/tokenizer")
    return _copied(f"{path}/tokenizer", lambda: list(there), is_whole=lambda copy: sizes(copy) == there != {})


def copy_of(path: str) -> str:
    """The path of this node's copy of a remote directory."""
    home = os.path.join(tempfile.gettempdir(), f"raylm-{os.getuid()}", "tokens")
    return os.path.join(home, checksum(path.encode()), path.rstrip("/").rpartition("/")[2])


def _copied(path: str, files: Callable[[], list[str]], is_whole: Callable[[str], bool]) -> str:
    """This node's copy of these files of a remote directory, made again if a cleanup of /tmp has removed some."""
    copy = copy_of(path)
    if is_whole(copy):
        return copy
    shutil.rmtree(copy, ignore_errors=True)
    for directory in reversed(Path(copy).parents[:3]):
        _make_private(directory)
    partial = Path(f"{copy}.{uuid.uuid4().hex}")

    def download(file: str) -> None:
        (partial / file).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        storage.download(f"{path}/{file}", partial / file)

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(download, files()))
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(partial, copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if not is_whole(copy):
        raise StorageUnavailable(f"{path} could not be copied whole to {copy}; run the same command again", path)
    return copy


def _make_private(directory: Path) -> None:
    """Create a directory that only this user can read and write, inside the shared temporary one."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StorageError(
            f"{directory} is not a directory of this user, and remote token stores are copied there; remove it, or set "
            "TMPDIR to another directory",
            str(directory),
        )
    directory.chmod(0o700)


def write(store: str, name: str, content: Any) -> None:
    """Write a file of a store atomically, with its partial file in progress/, which is removed at the end."""
    path = f"{store}/{name}"
    try:
        storage.write(path, content, scratch=f"{store}/progress")
    except FileNotFoundError:
        if not os.path.exists(path):  # else another writer has finished the store, with the same file
            raise


def document_ids(path: str) -> np.ndarray:
    """The hash of each document of a shard's file, which was just written, without reading its tokens."""

    def act() -> np.ndarray:
        with storage.reading(path) if is_remote(path) else pa.memory_map(path) as stream:
            schema = pa.ipc.open_file(stream).schema
            options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index("doc_id")])
            return as_numpy(pa.ipc.open_file(stream, options=options).get_batch(0)["doc_id"]).copy()

    try:
        return storage.retried(path, act)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise StorageUnavailable(
            f"{path} was written and cannot be read: {first_line(error)}; run the same command again", path
        ) from None


def as_numpy(array: pa.Array) -> np.ndarray:
    """A view of an array of numbers. Its own `to_numpy` imports pandas, which takes 0.4 s."""
    kind = np.dtype(str(array.type))
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def checksum(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
