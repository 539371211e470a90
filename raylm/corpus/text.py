"""Plain text, lines or parts between separators, and source code -> texts."""

from __future__ import annotations

import codecs
import io
import re
import tokenize
from collections.abc import Iterator
from typing import Any

from raylm.config import CorpusConfig
from raylm.corpus.file_part import BadDocument, FilePart, Texts, as_utf8, opened


def read_text(part: FilePart, corpus: CorpusConfig) -> Texts:
    with as_utf8(part, corpus.encoding) as stream:
        if corpus.separator is None:
            yield decoded(stream.read(), 0)
        elif corpus.separator == "\n":
            for offset, line in lines(part, stream):
                yield decoded(line.removesuffix(b"\n").removesuffix(b"\r"), offset)
        else:
            for offset, content in _separated(stream, corpus.separator.encode()):
                yield decoded(content, offset)


def decoded(content: bytes, offset: int) -> str | BadDocument:
    """The text of bytes at an offset of the file, without a byte order mark at the start of the file."""
    try:
        return (content.removeprefix(codecs.BOM_UTF8) if not offset else content).decode()
    except UnicodeDecodeError as error:
        return BadDocument(f"byte {offset + error.start}", "invalid UTF-8")


def lines(part: FilePart, stream: Any) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that start in the part's range of bytes. Only \\n ends a line."""
    offset = 0
    if part.start:  # the line of the previous byte belongs to the previous part
        offset = part.start - 1
        stream.seek(offset)
        while content := stream.readline(1 << 20):
            offset += len(content)
            if content.endswith(b"\n"):
                break
            if part.stop is not None and offset >= part.stop:  # a range inside a huge line has no line of its own
                return
    for line in stream:
        if part.stop is not None and offset >= part.stop:
            return
        yield offset, line
        offset += len(line)


def _separated(stream: Any, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, part) between separators, which may have Windows line ends; an empty part at the end is left out."""
    find = re.compile(re.escape(separator).replace(b"\\\n", rb"\r?\n")).search
    longest = len(separator) + separator.count(b"\n")
    offset, rest, searched = 0, bytearray(), 0
    while more := stream.read(1 << 20):
        rest += more
        while match := find(rest, searched):
            yield offset, bytes(rest[: match.start()])
            offset += match.end()
            del rest[: match.end()]
            searched = 0
        searched = max(0, len(rest) - longest + 1)
    if rest.strip():
        yield offset, bytes(rest)


def read_python(part: FilePart, corpus: CorpusConfig) -> Texts:
    """A source file as Python itself reads it: with the encoding that its first lines declare."""
    with opened(part.file) as stream:
        content = stream.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        yield content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        yield BadDocument("", "not in the encoding that it declares")
