"""A file, or a part of one, as bytes; and the record of a bad document in it."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
from collections.abc import Iterator
from typing import Any, NamedTuple

from raylm.config import SplitName
from raylm.corpus.sources import File
from raylm.errors import DataError
from raylm.storage import file_system


class FilePart(NamedTuple):
    """A file, or a part of one: a range of bytes, row groups or rows, depending on its format."""

    file: File
    format: str
    compression: str | None
    source: int
    """Index of its source."""
    split: SplitName = "train"
    """The split of that source."""
    is_found: bool = False
    """Whether a directory or glob gave the file, rather than its own name."""
    start: int = 0
    stop: int | None = None


class BadDocument(NamedTuple):
    """A document that cannot be used."""

    place: str
    """Its place in the file, such as "row 2, byte 24"; empty for the file itself."""
    what: str
    setting: str | None = None
    """The setting that names a column which the file lacks, so that no other document of it is good."""

    def of(self, file: File) -> str:
        return ": ".join(part for part in (file.path, self.place, self.what) if part)

    def error(self, file: File) -> DataError:
        way_out = "" if self.setting else "; corpus.on_bad_row=skip leaves such documents out and counts them"
        if "UTF-8" in self.what:
            way_out = f"; corpus.encoding=cp1252, for example, reads text of another encoding{way_out}"
        return DataError(f"{self.of(file)}{way_out}", self.setting or file.path)


Texts = Iterator[str | BadDocument]

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a file that git-lfs puts in place of a large one, which it has not downloaded."""

MOST_POINTER_BYTES = 1024
"""Of such a file, by its specification."""


def opened(file: File) -> Any:
    """The file's bytes as a seekable binary stream."""
    if "://" not in file.path:
        return open(file.path, "rb")
    system, path = file_system(file.path)
    return io.BufferedReader(system.open_input_file(path), 1 << 20)


def lfs_pointer(file: File) -> BadDocument | None:
    """The fault of a file that git-lfs has not downloaded; None of any other file."""
    if not len(LFS_POINTER) < file.size < MOST_POINTER_BYTES:
        return None
    with opened(file) as stream:
        if stream.read(len(LFS_POINTER)) != LFS_POINTER:
            return None
    return BadDocument("", "a git-lfs pointer, not the file that it stands for; run git lfs pull where it is")


def decompressed(part: FilePart) -> Any:
    """The part's file as a binary stream, decompressed."""
    raw = opened(part.file)
    match part.compression:
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


BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark is a prefix of this one
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def as_utf8(part: FilePart, encoding: str) -> Any:
    """The part's file as a binary stream of UTF-8, decompressed, decoded by its byte order mark, else by `encoding`.
    A UnicodeDecodeError names the encoding that failed."""
    stream = decompressed(part)
    head = stream.peek(4)
    marked = next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
    if not marked and (codecs.lookup(encoding).name == "utf-8" or head.startswith(codecs.BOM_UTF8)):
        return stream
    return io.BufferedReader(_Recoded(stream, marked or encoding), 1 << 20)


class _Recoded(io.RawIOBase):
    def __init__(self, stream: Any, encoding: str):
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        recoded = b""
        block = b" "
        while block and not recoded:
            block = self._stream.read(max(1, len(buffer) // 4))  # one byte may become four
            recoded = self._decoder.decode(block, final=not block).encode("utf-8", "surrogatepass")
        buffer[: len(recoded)] = recoded
        return len(recoded)
