"""A file, or a part of one -> texts, whatever its format.

Every reader yields the texts of its documents in order, and in the place of a bad one a Fault that says where it stands
and what is wrong. A file that cannot be read on at all is a DataError.
"""

from __future__ import annotations

import json
import lzma
import os
import zlib
from collections.abc import Callable

from raylm.config import CorpusConfig
from raylm.corpus import columns, text
from raylm.corpus.piece import BadDocument, FilePart, Texts, opened
from raylm.corpus.sources import File
from raylm.errors import DataError

MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "bz2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "parquet": b"PAR1",
}

READERS: dict[str, Callable[[FilePart, CorpusConfig], Texts]] = {
    "text": text.read_text,
    "python": text.read_python,
    "jsonl": columns.read_jsonl,
    "json": columns.read_json,
    "csv": columns.read_csv,
    "tsv": columns.read_csv,
    "parquet": columns.read_parquet,
    "arrow": columns.read_arrow,
    "saved": columns.read_data_set,
    "hub": columns.read_data_set,
}


def texts(piece: FilePart, corpus: CorpusConfig) -> Texts:
    """The documents of a piece as they stand there; nothing is filtered."""
    import pyarrow

    file = piece.file
    _check_unchanged(piece)
    if not file.size and piece.format not in ("text", "python", "hub"):
        yield BadDocument("", f"empty file (0 bytes), expected {piece.compression or piece.format}")
        return
    try:
        yield from READERS[piece.format](piece, corpus)
    except UnicodeDecodeError as error:
        encoding = corpus.encoding if error.encoding == "charmap" else error.encoding
        yield BadDocument("", f"not text in {encoding}: {error.reason}")
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException, json.JSONDecodeError) as error:
        kind = piece.compression or piece.format
        raise DataError(
            f"{file.path} ({file.size} bytes): torn, or not {kind}{_expected(kind, file)}: {error}", file.path
        ) from None


def _expected(kind: str, file: File) -> str:
    if kind not in MAGIC:
        return ""
    try:
        with opened(file) as stream:
            head = stream.read(len(MAGIC[kind]))
    except OSError:
        return ""
    return "" if head == MAGIC[kind] else f" (begins with {head!r}, expected {MAGIC[kind]!r})"


def _check_unchanged(piece: FilePart) -> None:
    file = piece.file
    if "://" in file.path or os.path.isdir(file.path):
        return
    try:
        status = os.stat(file.path)
    except FileNotFoundError:
        raise DataError(f"{file.path}: it was there when the corpus was listed, and is not now", file.path) from None
    # Every node has Python's own sources from an installation of its own, with times of its own.
    same_time = piece.format == "python" or str(status.st_mtime_ns) == file.version
    if status.st_size != file.size or not same_time:
        raise DataError(f"{file.path}: it has changed since the corpus was listed; run the command again", file.path)
