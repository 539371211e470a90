"""Files of rows with columns -> texts: JSON, CSV, Parquet, Arrow, data sets."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from raylm.config import CorpusConfig
from raylm.corpus.columns import Columns, columns_of, row_text
from raylm.corpus.file_part import BadDocument, FilePart, Texts, as_utf8, decompressed, opened
from raylm.corpus.sources import File, load_data_set
from raylm.corpus.text import decoded, lines
from raylm.errors import DataError, first_line
from raylm.storage import file_system

BATCH_BYTES = 8_000_000
"""Bytes of rows that are read or decoded at a time: one request to object storage, and little memory."""

HEAD_BYTES = 1 << 18
"""Bytes at the start of a .json file in which its first row is searched."""


def read_jsonl(part: FilePart, corpus: CorpusConfig) -> Texts:
    columns = columns_of(corpus)
    with decompressed(part) as stream:
        for number, (offset, line) in enumerate(lines(part, stream)):
            if line.isspace():
                continue

            start = len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
            fault: tuple[int | None, str]
            setting: str | None = None
            try:
                text = row_text(columns, json.loads(line[start:].decode()), "")
                if isinstance(text, str):
                    yield text
                    continue
                fault, setting = (None, text.what), text.setting
            except UnicodeDecodeError as error:
                fault = error.start, "invalid UTF-8"
            except json.JSONDecodeError as error:
                fault = len(error.doc[: error.pos].encode()), f"not JSON: {error.msg}"
            except RecursionError:
                fault = None, "not JSON: nested too deep"
            at, what = fault
            place = f"row {number + 1 + _lines_before(part)}"
            yield BadDocument(place if at is None else f"{place}, byte {offset + start + at}", what, setting)


def _lines_before(part: FilePart) -> int:
    """Number of lines that start before the part, so that an error can name the line."""
    if not part.start:
        return 0
    with opened(part.file) as stream:
        count, left = 0, part.start - 1
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count + 1


def read_json(part: FilePart, corpus: CorpusConfig) -> Texts:
    """The objects of a .json file: the items of its list, or those inside its one object."""
    columns = columns_of(corpus)
    with as_utf8(part, "utf-8") as stream:
        content = decoded(stream.read(), 0)
    if isinstance(content, BadDocument):
        yield content
        return
    decoder = json.JSONDecoder()
    position, number = _skip(content, 0, " \t\r\n["), 0
    while position < len(content):
        if content[position] == "]" and not content[position + 1 :].strip():
            return
        try:
            row, position = decoder.raw_decode(content, position)
        except RecursionError:
            yield BadDocument(f"row {number + 1}", "not JSON: nested too deep")
            return
        position = _skip(content, position, " \t\r\n,")
        is_alone = not number and position == len(content)
        for inner in _records(row, columns) if is_alone else [row]:
            number += 1
            yield row_text(columns, inner, f"row {number}")


def begins_with_text(part: FilePart, corpus: CorpusConfig) -> bool:
    """Whether the first bytes of a .json file hold its first row, with a text; if not, the whole file must be read.

    A single object may hold the rows.
    """
    with as_utf8(part, "utf-8") as stream:
        head = codecs.getincrementaldecoder("utf-8")().decode(stream.read(HEAD_BYTES)).removeprefix("\ufeff")
    try:
        row, position = json.JSONDecoder().raw_decode(head, _skip(head, 0, " \t\r\n["))
    except (json.JSONDecodeError, RecursionError):
        return False
    is_alone = _skip(head, position, " \t\r\n,") == len(head)
    return not is_alone and isinstance(row_text(columns_of(corpus), row, ""), str)


def _records(row: Any, columns: Columns) -> list[Any]:
    """The rows in the one object of a file: {"data": [{...}, ...]} or {"id1": {...}, ...}; else the object."""
    if not isinstance(row, dict) or any(name in row or name.split(".")[0] in row for name in columns.names):
        return [row]
    lists = [value for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if len(lists) == 1:
        return lists[0]
    return list(row.values()) if row and all(isinstance(value, dict) for value in row.values()) else [row]


def _skip(content: str, position: int, characters: str) -> int:
    while position < len(content) and content[position] in characters:
        position += 1
    return position


def read_csv(part: FilePart, corpus: CorpusConfig) -> Texts:
    columns = columns_of(corpus)
    csv.field_size_limit(sys.maxsize)
    with as_utf8(part, corpus.encoding) as stream:
        # A byte that is not UTF-8 becomes a lone surrogate, so that the row it is in can be named.
        characters = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        header = characters.readline()
        delimiter = "\t" if part.format == "tsv" else _delimiter(header, columns)
        rows = csv.DictReader(itertools.chain([header], characters), delimiter=delimiter)
        names = list(rows.fieldnames or ())
        columns.top(names, part.file.path)
        try:
            for number, row in enumerate(rows, 1):
                place = f"row {number}, line {rows.line_num}"
                text = row_text(columns, row, place)
                if any(row.pop(None, ())):
                    text = BadDocument(
                        place, f"has more fields than the header, {len(names)}; is a {delimiter!r} unquoted?"
                    )
                if isinstance(text, str) and not text.isascii() and any("\udc80" <= char <= "\udcff" for char in text):
                    text = BadDocument(place, "invalid UTF-8")
                yield text
        except csv.Error as error:
            raise DataError(f"{part.file.path}: line {rows.line_num}: {error}", part.file.path) from None


def _delimiter(header: str, columns: Columns) -> str:
    """The delimiter that gives the header the needed columns, else the one that gives it the most columns."""

    def fitness(delimiter: str) -> tuple[bool, int]:
        names = next(csv.reader([header], delimiter=delimiter), [])
        return all(name in names or name.split(".")[0] in names for name in columns.names), len(names)

    return max(",;\t|", key=fitness)


def read_parquet(part: FilePart, corpus: CorpusConfig) -> Texts:
    """Rows of row groups, about BATCH_BYTES at a time.

    A page must be in memory whole, as it is stored and decompressed. Pages are of about 1 MB, but pyarrow looks at
    their size after every 1024 rows only when it writes them: with long rows one page is the whole text.
    """
    import pyarrow.parquet

    with opened(part.file) as stream:
        # The defaults of pyarrow read a whole column of a row group, and copy it while its rows are decoded.
        file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BATCH_BYTES)
        columns = columns_of(corpus)
        names = columns.top(file.schema_arrow.names, part.file.path)
        groups = range(part.start, file.num_row_groups if part.stop is None else part.stop)
        before = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
        try:
            for group in groups:
                known = file.metadata.row_group(group)
                rows = _rows_at_a_time(known.num_rows, known.total_byte_size)
                yield from _batches(file.iter_batches(rows, row_groups=[group], columns=names), columns, before)
                before += known.num_rows
        finally:
            pyarrow.default_memory_pool().release_unused()  # of pages, which it would keep for the next file


def _batches(batches: Any, columns: Columns, number: int = 0) -> Texts:
    """Rows of record batches, with the needed columns only; `number` is the number of the previous row."""
    for batch in batches:
        rows = _rows_at_a_time(batch.num_rows, batch.nbytes)
        for first in range(0, batch.num_rows, rows):
            for row in batch.slice(first, rows).to_pylist():
                number += 1
                yield row_text(columns, row, f"row {number}")


def _rows_at_a_time(num_rows: int, num_bytes: int) -> int:
    """The number of rows that have about BATCH_BYTES: at least 1, at most 1024."""
    return min(1024, max(1, BATCH_BYTES * num_rows // max(1, num_bytes)))


def read_arrow(part: FilePart, corpus: CorpusConfig) -> Texts:
    columns = columns_of(corpus)
    with _arrow_source(part.file) as source:
        reader = ArrowBatches(source)
        names = columns.top(reader.schema.names, part.file.path)
        yield from _batches(_rows_of(reader, part, names), columns, part.start)


def _rows_of(batches: Any, part: FilePart, names: list[str]) -> Iterator[Any]:
    """Batches cut to the part's range of rows and the columns of these names."""
    first = 0
    for batch in batches:
        start = max(part.start - first, 0)
        stop = batch.num_rows if part.stop is None else min(part.stop - first, batch.num_rows)
        first += batch.num_rows
        for offset in range(start, stop, 1024):
            yield batch.select(names).slice(offset, min(1024, stop - offset))
        if part.stop is not None and first >= part.stop:
            return


def _arrow_source(file: File) -> Any:
    import pyarrow

    return (
        pyarrow.memory_map(file.path)
        if "://" not in file.path
        else file_system(file.path)[0].open_input_file(file_system(file.path)[1])
    )


class ArrowBatches:
    """The record batches of an Arrow file or an Arrow stream."""

    def __init__(self, source: Any):
        import pyarrow

        try:
            self.file = pyarrow.ipc.open_file(source)
        except pyarrow.ArrowInvalid:
            self.file = None
            source.seek(0)
            self.stream = pyarrow.ipc.open_stream(source)
        self.schema = self.file.schema if self.file else self.stream.schema

    def __iter__(self) -> Iterator[Any]:
        if self.file is None:
            yield from self.stream
        else:
            for number in range(self.file.num_record_batches):
                yield self.file.get_batch(number)


def read_data_set(part: FilePart, corpus: CorpusConfig) -> Texts:
    """Rows of a memory-mapped datasets.Dataset, or of one shard of a stream."""
    columns = columns_of(corpus)
    rows = data_set_rows(part.file)
    names = columns.top(rows.column_names, part.file.path) if rows.column_names else []
    if hasattr(rows, "num_shards") and not hasattr(rows, "select"):
        if rows.num_shards > 1:
            rows = rows.shard(num_shards=rows.num_shards, index=part.start)
        for number, row in enumerate(rows.select_columns(names) if names else rows, 1):
            yield row_text(columns, row, f"shard {part.start}, row {number}")
        return
    stop = len(rows) if part.stop is None else min(part.stop, len(rows))
    selected = rows.select_columns(names).select(range(part.start, stop)).with_format("arrow")
    for first in range(0, len(selected), 1024):
        table = selected[first : first + 1024]
        yield from _batches(table.to_batches(), columns, part.start + first)


@lru_cache(maxsize=4)  # a process of Ray reads many parts of one data set
def data_set_rows(file: File) -> Any:
    """The data set behind a hub:// path or a saved directory."""
    import datasets

    try:
        return load_data_set(file) if "://" in file.path else datasets.load_from_disk(file.path)
    except Exception as error:  # of the network, the Hub, the data files, the libraries that read them
        raise DataError(f"{file.path}: {first_line(error.__cause__ or error)}", file.path) from None
