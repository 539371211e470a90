"""A file, or a part of one, as bytes; and what stands in the place of a document of it that cannot be used."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from typing import Any, NamedTuple

from raylm.corpus.sources import File
from raylm.storage import file_system


class Piece(NamedTuple):
    """A file, or a part of one: a range of bytes, row groups or rows, whatever its format can be cut at."""

    file: File
    format: str
    compression: str | None
    source: int
    """Index of its source."""
    validation: bool = False
    """Whether that source is one of corpus.validation_paths."""
    start: int = 0
    stop: int | None = None


class Fault(NamedTuple):
    """A document that cannot be used."""

    place: str
    """In its file, like "row 2, byte 24"; empty for the file itself."""
    what: str

    def of(self, file: File) -> str:
        return ": ".join(part for part in (file.path, self.place, self.what) if part)


Texts = Iterator[str | Fault]


def opened(file: File) -> Any:
    """The file's bytes as a seekable binary stream."""
    if "://" not in file.path:
        return open(file.path, "rb")
    system, path = file_system(file.path)
    return io.BufferedReader(system.open_input_file(path), 1 << 20)


def decompressed(piece: Piece) -> Any:
    """The piece's file as a binary stream, decompressed."""
    raw = opened(piece.file)
    match piece.compression:
        case "gzip":
            return gzip.GzipFile(fileobj=raw)
        case "bz2":
            return bz2.BZ2File(raw)
        case "xz":
            return lzma.LZMAFile(raw)
        case "zstd":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw
