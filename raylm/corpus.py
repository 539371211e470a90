"""Sources -> documents.

    corpus.paths            files, directories, globs, python://stdlib
      -> sources            the files of each, sorted, with size and time           `check`, no Ray
      -> shards             files, or ranges of big ones, of about equal bytes      a function of the files alone
      -> documents          text, its hash, its source; filtered; train or validation

A document's split is decided by a hash of its content, so duplicates fall on one side, in whatever order or process
they are read. Nothing is dropped uncounted: what is left out goes to a ledger.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import io
import json
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylm.config import CorpusConfig
from raylm.errors import DataError

PYTHON = "python://"
TABLES = (".jsonl", ".ndjson", ".parquet")

Ledger = Counter  # what happened to documents -> how many; "bytes" are UTF-8 bytes of the documents that were read


@dataclass(frozen=True)
class File:
    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Source:
    """The files behind one entry of corpus.paths or corpus.validation_paths."""

    name: str
    files: tuple[File, ...]
    validation: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


class Piece(NamedTuple):
    """A file, or a part of one: a range of bytes of a .jsonl, of row groups of a .parquet."""

    file: File
    source: int
    """Index of its source."""
    validation: bool = False
    """Whether that source is one of corpus.validation_paths."""
    as_python: bool = False
    """Whether to decode it as Python does, by the encoding that its first lines declare."""
    start: int = 0
    stop: int | None = None


class Shard(NamedTuple):
    """What one task reads and writes."""

    pieces: tuple[Piece, ...]
    num_bytes: int
    most_documents: int | None = None


class Document(NamedTuple):
    text: str
    num_bytes: int
    """Of the text in UTF-8."""
    hash: int
    """64 bits of blake2b of the text; the same text has the same hash everywhere."""
    source: int
    validation: bool


# Sources -----------------------------------------------------------------------------------------------------------


def check(corpus: CorpusConfig) -> list[Source]:
    """The files of every source; DataError if one has none, or if its first file lacks the column of text.

    Lists directories and opens a file a source: well below a second for thousands of files, and no Ray.
    """
    if not corpus.paths and not corpus.validation_paths:
        raise DataError("corpus.paths is empty; give files, directories or globs of text", "corpus.paths")
    sources = [Source(path, _files("corpus.paths", path)) for path in corpus.paths]
    sources += [Source(path, _files("corpus.validation_paths", path), True) for path in corpus.validation_paths]
    for source in sources:
        if source.files[0].path.endswith(TABLES):
            next(_texts(Piece(source.files[0], 0), corpus, Ledger()), None)
    return sources


def _files(key: str, path: str) -> tuple[File, ...]:
    if path.startswith(PYTHON):
        found = _python_files(key, path)
    elif "://" in path:
        raise DataError(f"{key}: {path}: only local paths and {PYTHON}stdlib can be read", key)
    elif os.path.isdir(path):
        found = list(_walk(path))
    elif os.path.isfile(path):
        found = [path]
    else:
        found = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    if not found:
        what = "no files in it" if os.path.isdir(path) else "no such file, directory or glob"
        raise DataError(f"{key}: {path}: {what}", key)
    return tuple(_stat(name) for name in sorted(found))


def _python_files(key: str, path: str) -> list[str]:
    name = path.removeprefix(PYTHON)
    if name != "stdlib":
        raise DataError(f"{key}: {path}: known is {PYTHON}stdlib, the standard library's source", key)
    return [file for file in _walk(sysconfig.get_path("stdlib")) if file.endswith(".py")]


def _walk(directory: str) -> Iterator[str]:
    """Files below a directory; hidden ones, caches and installed packages are not the user's text."""
    for parent, directories, files in os.walk(directory):
        directories[:] = [
            name
            for name in directories
            if name not in ("__pycache__", "site-packages", "dist-packages") and not name.startswith(".")
        ]
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _stat(path: str) -> File:
    status = os.stat(path)
    return File(path, status.st_size, status.st_mtime_ns)


# Shards ------------------------------------------------------------------------------------------------------------


def shards(sources: list[Source]) -> list[Shard]:
    """The work of each task, in the order of the sources: a function of the files alone, not of the cluster."""
    total = sum(source.num_bytes for source in sources)
    # 8 MB keep a laptop's cores busy on 30 MB of text; at most some thousand shards, since each is a memory map.
    most = min(max(8_000_000, total // 2048), 256_000_000)
    made: list[Shard] = []
    pieces: list[Piece] = []
    size = 0
    for index, source in enumerate(sources):
        for file in source.files:
            whole = Piece(file, index, source.validation, source.name.startswith(PYTHON))
            for piece, num_bytes in _pieces(whole, most):
                if pieces and size + num_bytes > most:
                    made.append(Shard(tuple(pieces), size))
                    pieces, size = [], 0
                pieces.append(piece)
                size += num_bytes
    return [*made, Shard(tuple(pieces), size)]


def _pieces(whole: Piece, most: int) -> Iterator[tuple[Piece, int]]:
    """The piece, or parts of about `most` bytes of it where the format has places to cut; and the bytes of each."""
    file = whole.file
    if file.size <= most or not file.path.endswith(TABLES):
        yield whole, file.size
    elif file.path.endswith(".parquet"):
        import pyarrow.parquet

        groups = pyarrow.parquet.ParquetFile(file.path).num_row_groups
        for group in range(groups):
            yield whole._replace(start=group, stop=group + 1), file.size // groups
    else:
        for start in range(0, file.size, most):
            stop = min(start + most, file.size)
            yield whole._replace(start=start, stop=stop), stop - start


# Documents ---------------------------------------------------------------------------------------------------------


def documents(shard: Shard, corpus: CorpusConfig, ledger: Ledger) -> Iterator[Document]:
    """The kept documents of a shard, in the order of its files; the ledger counts every one that was read."""
    kept = 0
    for piece in shard.pieces:
        for text in _texts(piece, corpus, ledger):
            if kept == shard.most_documents:
                return
            encoded = text.encode("utf-8", "surrogatepass")
            ledger["documents"] += 1
            ledger["bytes"] += len(encoded)
            if not text or text.isspace():
                ledger["empty"] += 1
            elif corpus.keep_any and not any(keyword in text for keyword in corpus.keep_any):
                ledger["filtered: keep_any"] += 1
            else:
                kept += 1
                digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")
                held_out = piece.validation if corpus.validation_paths else digest < corpus.validation_fraction * 2**64
                yield Document(text, len(encoded), digest, piece.source, held_out)


def _texts(piece: Piece, corpus: CorpusConfig, ledger: Ledger) -> Iterator[str]:
    path = piece.file.path
    if path.endswith(".parquet"):
        yield from _parquet(piece, corpus.text)
    elif path.endswith(TABLES):
        yield from _jsonl(piece, corpus.text)
    elif piece.as_python:
        try:
            yield _python_text(path)
        except (SyntaxError, UnicodeDecodeError):  # the library's own test files of bad encodings
            ledger["undecodable"] += 1
    else:
        with open(path, "rb") as file:
            yield _decoded(path, file.read())


def _python_text(path: str) -> str:
    """A source file as Python itself reads it: with the encoding that its first lines declare."""
    with open(path, "rb") as file:
        content = file.read()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)


def _decoded(path: str, content: bytes) -> str:
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start}: invalid UTF-8", path) from None


def _jsonl(piece: Piece, column: str) -> Iterator[str]:
    """The texts of the rows that begin in the piece's range of bytes; a row ends with \\n and nothing else."""
    path = piece.file.path
    with open(path, "rb") as file:
        if piece.start:  # the row that the byte before lies in belongs to the piece before
            file.seek(piece.start - 1)
            file.readline()
        while piece.stop is None or file.tell() < piece.stop:
            begin = file.tell()
            line = file.readline()
            if not line:
                return
            if line.isspace():
                continue
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                at = error.start if isinstance(error, UnicodeDecodeError) else len(error.doc[: error.pos].encode())
                what = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else f"not JSON: {error.msg}"
                raise DataError(f"{path}: row {_row(path, begin)}, byte {begin + at}: {what}", path) from None
            text = row.get(column) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise DataError(f"{path}: row {_row(path, begin)}: {_missing(column, row)}", path)
            yield text


def _row(path: str, offset: int) -> int:
    """The number of the row that begins at an offset, from 1."""
    with open(path, "rb") as file:
        return file.read(offset).count(b"\n") + 1


def _missing(column: str, row: Any) -> str:
    if not isinstance(row, dict):
        return f"a row is an object {{...}}, got {json.dumps(row)[:60]}"
    if column in row:
        return f"corpus.text: column {column!r} must hold text, got {json.dumps(row[column])[:60]}"
    return f"corpus.text: no column {column!r}; columns: {', '.join(row)}"


def _parquet(piece: Piece, column: str) -> Iterator[str]:
    import pyarrow.parquet

    path = piece.file.path
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} ({piece.file.size} bytes): not a Parquet file: {error}", path) from None
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"corpus.text: no column {column!r} in {path}; columns: {', '.join(names)}", "corpus.text")
    groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
    row = 0
    for batch in file.iter_batches(batch_size=1024, row_groups=list(groups), columns=[column]):
        for text in batch.column(0).to_pylist():
            row += 1
            if not isinstance(text, str):
                group = f"row group {piece.start}, " if piece.stop is not None else ""
                raise DataError(f"{path}: {group}row {row}: column {column!r} must hold text, got {text!r:.60}", path)
            yield text
