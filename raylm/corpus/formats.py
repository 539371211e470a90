"""The formats of files: a file, or a part of one -> texts.

Every reader yields the texts of its documents in order, and for each bad document a BadDocument with its place and
fault. A file whose rest cannot be read is a DataError.
"""

from __future__ import annotations

import itertools
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raylm.config import CorpusConfig
from raylm.corpus import rows, text
from raylm.corpus.file_part import BadDocument, FilePart, Texts, lfs_pointer, opened
from raylm.corpus.sources import COMPRESSIONS, HUB, PYTHON, File, Source
from raylm.errors import DataError


@dataclass(frozen=True)
class Format:
    """A file format: its reader, how files of it are recognized, and where they can be cut."""

    read: Callable[[FilePart, CorpusConfig], Texts]
    suffixes: tuple[str, ...] = ()
    """Suffixes of its file names, without that of a compression."""
    magic: bytes = b""
    """The first bytes of each of its files, if they are always the same."""
    split: Callable[[FilePart, int], Iterator[tuple[FilePart, int]]] | None = None
    """(whole file, most bytes) -> its parts with the bytes of each; None if a file cannot be cut."""

    @property
    def has_columns(self) -> bool:
        """Whether a file is rows with columns: its reader is one of rows.py."""
        return self.read.__module__ == rows.__name__


def _ranges(whole: FilePart, length: int, num_bytes: int, most: int) -> Iterator[tuple[FilePart, int]]:
    """Cut 0:length, which has num_bytes in total, into ranges of about `most` bytes."""
    count = max(1, min(length, -(-num_bytes // most)))
    edges = [length * number // count for number in range(count + 1)]
    for start, stop in itertools.pairwise(edges):
        yield whole._replace(start=start, stop=stop), num_bytes // count


def _bytes(whole: FilePart, most: int) -> Iterator[tuple[FilePart, int]]:
    return _ranges(whole, whole.file.size, whole.file.size, most)


def _row_groups(whole: FilePart, most: int) -> Iterator[tuple[FilePart, int]]:
    import pyarrow.parquet

    with opened(whole.file) as stream:
        groups = pyarrow.parquet.ParquetFile(stream).num_row_groups
    return _ranges(whole, groups, whole.file.size, most)


def _arrow_rows(whole: FilePart, most: int) -> Iterator[tuple[FilePart, int]]:
    import pyarrow

    if "://" in whole.file.path:
        return iter([(whole, whole.file.size)])
    with pyarrow.memory_map(whole.file.path) as source:
        num_rows = sum(batch.num_rows for batch in rows.ArrowBatches(source))
    return _ranges(whole, num_rows, whole.file.size, most)


def _data_set_rows(whole: FilePart, most: int) -> Iterator[tuple[FilePart, int]]:
    found = rows.data_set_rows(whole.file)
    if hasattr(found, "select"):
        size = sum(os.path.getsize(part["filename"]) for part in found.cache_files)
        yield from _ranges(whole, len(found), size, most)
    else:
        for shard in range(found.num_shards):
            yield whole._replace(start=shard, stop=shard + 1), whole.file.size // found.num_shards


FORMATS = {
    "text": Format(text.read_text),  # any other suffix
    "python": Format(text.read_python),
    "jsonl": Format(rows.read_jsonl, (".jsonl", ".ndjson"), split=_bytes),
    "json": Format(rows.read_json, (".json",)),
    "csv": Format(rows.read_csv, (".csv",)),
    "tsv": Format(rows.read_csv, (".tsv",)),
    "parquet": Format(rows.read_parquet, (".parquet",), magic=b"PAR1", split=_row_groups),
    "arrow": Format(rows.read_arrow, (".arrow", ".feather", ".ipc"), split=_arrow_rows),
    "saved": Format(rows.read_data_set, split=_data_set_rows),
    "hub": Format(rows.read_data_set, split=_data_set_rows),
}
"""A new format needs a line here and a reader."""

DATA_SETS = ("saved", "hub")
"""Formats whose path is not that of a file."""

COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bz2": b"BZh", "xz": b"\xfd7zXZ\x00"}
"""The first bytes of compressed files."""


def format_of(path: str, source: str) -> tuple[str, str | None]:
    """(format, compression) of a file, by its name."""
    if path.startswith(HUB):
        return "hub", None
    if source.startswith(PYTHON):
        return "python", None
    stem, suffix = os.path.splitext(path)
    compression = COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = os.path.splitext(stem)[1]
    elif "://" not in path and os.path.isdir(path):
        return "saved", None
    known = (name for name, each in FORMATS.items() if suffix.lower() in each.suffixes)
    return next(known, "text"), compression


def whole_file(file: File, index: int, source: Source) -> FilePart:
    """A whole file of the source with this index."""
    return FilePart(file, *format_of(file.path, source.path), index, source.split, source.is_found)


def split(whole: FilePart, most: int) -> Iterator[tuple[FilePart, int]]:
    """A whole file, or parts of about `most` bytes where its format can be cut, with the bytes of each."""
    cut = FORMATS[whole.format].split
    is_large = whole.file.size > most or whole.format == "hub"  # the Hub does not always say how large a data set is
    if cut is not None and is_large and not whole.compression:
        yield from cut(whole, most)
    else:
        yield whole, whole.file.size


def texts(part: FilePart, corpus: CorpusConfig) -> Texts:
    """The documents of a part, unfiltered."""
    import pyarrow

    file = part.file
    _check_unchanged(part)
    if not file.size and part.format not in ("text", "python", "hub"):
        yield BadDocument("", f"empty file (0 bytes), expected {part.compression or part.format}")
        return
    try:
        if part.format not in DATA_SETS and (pointer := lfs_pointer(file)):
            yield pointer
            return
        for name in ("tokens", "messages", "prompt"):
            if getattr(corpus, name) is not None and not FORMATS[part.format].has_columns:
                yield BadDocument("", f"plain text, but corpus.{name} needs columns, as .jsonl and .parquet have")
                return
        yield from FORMATS[part.format].read(part, corpus)
    except UnicodeDecodeError as error:
        encoding = corpus.encoding if error.encoding == "charmap" else error.encoding
        yield BadDocument("", f"not text in {encoding}: {error.reason}")
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException, json.JSONDecodeError) as error:
        kind = part.compression or part.format
        raise DataError(
            f"{file.path} ({file.size} bytes): torn, or not {kind}{_expected(kind, file)}: {error}", file.path
        ) from None


def _expected(kind: str, file: File) -> str:
    magic = COMPRESSED.get(kind) or FORMATS[kind].magic
    if not magic:
        return ""
    try:
        with opened(file) as stream:
            head = stream.read(len(magic))
    except OSError:
        return ""
    return "" if head == magic else f" (starts with {head!r}, expected {magic!r})"


def _check_unchanged(part: FilePart) -> None:
    file = part.file
    if "://" in file.path or os.path.isdir(file.path):
        return
    try:
        status = os.stat(file.path)
    except FileNotFoundError:
        raise DataError(f"{file.path}: it existed when the corpus was listed and is gone now", file.path) from None
    # Each node has its own installation of Python, whose sources have other modification times.
    same_time = part.format == "python" or str(status.st_mtime_ns) == file.version
    if status.st_size != file.size or not same_time:
        raise DataError(f"{file.path}: it has changed after the corpus was listed; run the command again", file.path)
