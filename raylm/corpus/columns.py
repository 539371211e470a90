"""Rows with columns -> texts: JSON, CSV, Parquet, Arrow, data sets."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import re
import string
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from raylm.config import CorpusConfig
from raylm.corpus.file_part import BadDocument, FilePart, Texts, as_utf8, decompressed, opened
from raylm.corpus.sources import File, load_data_set
from raylm.corpus.text import decoded, lines
from raylm.errors import DataError, did_you_mean, first_line, first_of
from raylm.storage import file_system

BATCH_BYTES = 8_000_000
"""Bytes of rows that are read or decoded at a time: one request to object storage, and little memory."""

HEAD_BYTES = 1 << 18
"""Bytes at the start of a .json file in which its first row is searched."""


class Columns:
    """corpus.text -> the text of a row: a column, a dotted path into one, or a template of them in braces."""

    key = "corpus.text"
    """The setting that names them."""

    def __init__(self, template: str, join: str):
        self.join = join
        if "{" in template:
            self.parts = [(before, name) for before, name, _, _ in string.Formatter().parse(template)]
        else:
            self.parts = [("", template)]
        self.names = list(dict.fromkeys(name for _, name in self.parts if name is not None))
        self.together = self._of_one_list()

    def text(self, row: dict[str, Any]) -> str:
        """The row's text; LookupError naming the column that has no text; KeyError, with the setting that names it as
        its second argument, if there is no such column."""
        values = {name: self._value(row, name) for name in self.names}
        lists = [name for name in self.together if not isinstance(values[name], str)]
        if not lists:
            return self._filled(values)
        if len({*self.names} - {*lists}) or len({len(values[name]) for name in lists}) > 1:
            raise LookupError(
                f"{self.key}: {' and '.join(f'{{{name}}}' for name in lists)} are lists, and go together only in a "
                "template of nothing else, with as many items in each; name one of them, or take the others out"
            )
        items = zip(*(values[name] for name in lists), strict=True)
        return self.join.join(self._filled(dict(zip(lists, item, strict=True))) for item in items)

    def _of_one_list(self) -> list[str]:
        """The columns that may be fields of one list of objects: {messages.role}: {messages.content}."""
        parents = [name.rpartition(".")[0] for name in self.names]
        return [name for name, parent in zip(self.names, parents, strict=True) if parent and parents.count(parent) > 1]

    def _filled(self, values: dict[str, Any]) -> str:
        return "".join(before + (self._joined(values[name]) if name is not None else "") for before, name in self.parts)

    def _joined(self, value: Any) -> str:
        return value if isinstance(value, str) else self.join.join(self._joined(item) for item in value)

    def _value(self, row: dict[str, Any], name: str) -> Any:
        """A text, or a list of texts or of such lists."""
        value: Any = row
        if name in row:
            value = row[name]
        else:
            for key in name.split("."):
                value = self._inside(value, key, name, row)
        return self._texts(value, name)

    def _texts(self, value: Any, name: str) -> Any:
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise LookupError(f"{self.key}: column {name!r} holds bytes that are not UTF-8") from None
        if isinstance(value, (list, tuple)):
            with contextlib.suppress(LookupError):
                return [self._texts(item, name) for item in value]
        raise LookupError(f"{self.key}: column {name!r} must hold text, got {_shown(value)}")

    def _inside(self, value: Any, key: str, name: str, row: dict[str, Any]) -> Any:
        if isinstance(value, list):
            return [self._inside(item, key, name, row) for item in value]
        if not isinstance(value, dict):
            raise LookupError(f"{self.key}: there is no {key} of {name} in {_shown(value)}")
        if key not in value:
            raise KeyError(missing(self.key, name if value is row else f"{key} in {name}", list(value)), self.key)
        return value[key]

    def top(self, names: list[str], where: str) -> list[str]:
        """The columns of a table that are needed; DataError if one is missing."""
        needed = [name if name in names else name.split(".")[0] for name in self.names]
        for name in needed:
            if name not in names:
                raise DataError(f"{where}: {missing(self.key, name, names)}", self.key)
        return list(dict.fromkeys(needed))


WHOLE_ROW = "{*}"
"""A corpus.text that takes the whole row as a line of JSON, to show what a table holds."""


class _WholeRow(Columns):
    def __init__(self) -> None:
        self.names = []

    def text(self, row: dict[str, Any]) -> str:
        return json.dumps(row, default=lambda value: None)

    def top(self, names: list[str], where: str) -> list[str]:
        return names


class _TokenIds(Columns):
    """corpus.tokens -> the token ids of a row, in decimal with spaces between."""

    key = "corpus.tokens"

    def __init__(self, corpus: CorpusConfig):
        assert corpus.tokens is not None
        self.names = [corpus.tokens]

    def text(self, row: dict[str, Any]) -> str:
        return self._value(row, self.names[0])

    def _texts(self, value: Any, name: str) -> Any:
        if isinstance(value, str) and re.fullmatch(r"[\d\s]*", value):  # as a .csv has them
            value = [int(id) for id in value.split()]
        if not isinstance(value, (list, tuple)) or not all(type(id) is int and 0 <= id < 2**32 for id in value):
            raise LookupError(f"corpus.tokens: column {name!r} must hold a list of token ids, got {_shown(value)}")
        return " ".join(map(str, value))


class Answered(str):
    """A prompt and its answer as one text, of which the answer alone is learned and scored."""

    answer_at: int
    """Characters of the prompt."""

    @classmethod
    def of(cls, prompt: str, answer: str) -> Answered:
        asked = prompt.rstrip(" ")  # tokens contain the space before a word
        text = cls(prompt + answer)
        text.answer_at = len(asked)
        return text

    @property
    def prompt(self) -> str:
        return self[: self.answer_at]

    @property
    def answer(self) -> str:
        return self[self.answer_at :]


class _Answers(Columns):
    """corpus.prompt and corpus.text -> prompt and answer."""

    def __init__(self, corpus: CorpusConfig):
        assert corpus.prompt is not None
        self._prompt, self._answer = Columns(corpus.prompt, corpus.join), Columns(corpus.text, corpus.join)
        self._prompt.key = "corpus.prompt"
        self.names = [*self._prompt.names, *self._answer.names]

    def text(self, row: dict[str, Any]) -> str:
        return Answered.of(self._prompt.text(row), self._answer.text(row))

    def top(self, names: list[str], where: str) -> list[str]:
        return list(dict.fromkeys([*self._prompt.top(names, where), *self._answer.top(names, where)]))


class _Messages(Columns):
    """corpus.messages -> the messages of a row, as JSON."""

    key = "corpus.messages"

    def __init__(self, corpus: CorpusConfig):
        assert corpus.messages is not None
        self.names = [corpus.messages]

    def text(self, row: dict[str, Any]) -> str:
        return self._value(row, self.names[0])

    def _texts(self, value: Any, name: str) -> Any:
        if isinstance(value, str):  # as a .csv has them
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        messages = [_message(each) for each in value] if isinstance(value, (list, tuple)) else []
        if not messages or None in messages:
            raise LookupError(
                f"{self.key}: column {name!r} must hold a list of messages {{role: user, content: text}}, got "
                f"{_shown(value)}"
            )
        return json.dumps(messages, ensure_ascii=False)


SHARE_GPT = {"human": "user", "gpt": "assistant"}
"""Names of roles in the data sets of ShareGPT, whose messages are {from: human, value: text}."""


def _message(value: Any) -> dict[str, Any] | None:
    """A message {role, content} without empty fields; None if it is none."""
    if not isinstance(value, dict):
        return None
    message = {key: part for key, part in value.items() if part is not None}
    if isinstance(role := message.get("from"), str) and "value" in message:
        del message["from"]
        message = {"role": SHARE_GPT.get(role, role), "content": message.pop("value"), **message}
    if isinstance(parts := message.get("content"), list) and all(_is_text(part) for part in parts):
        message["content"] = "".join(part["text"] for part in parts)
    return message if all(isinstance(message.get(key), str) for key in ("role", "content")) else None


def _is_text(part: Any) -> bool:
    """Whether a part of a message's content is {type: text, text: ...}."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def columns_of(corpus: CorpusConfig) -> Columns:
    if corpus.tokens is not None:
        return _TokenIds(corpus)
    if corpus.messages is not None:
        return _Messages(corpus)
    if corpus.prompt is not None:
        return _Answers(corpus)
    return _WholeRow() if corpus.text == WHOLE_ROW else Columns(corpus.text, corpus.join)


MOST_NAMED = 20
"""Columns that an error names: an object of records has one for each of them."""


def missing(key: str, name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names)
    shown = first_of([_short(each) for each in names], MOST_NAMED)
    return f"{key}: no column {name!r}; columns: {shown}" + (f"; {hint}" if hint else "")


def _shown(value: Any) -> str:
    return _short(json.dumps(value, default=str, ensure_ascii=False))


def _short(text: Any) -> str:
    return str(text) if len(str(text)) <= 60 else str(text)[:57] + "..."


def _row_text(columns: Columns, row: Any, place: str) -> str | BadDocument:
    if not isinstance(row, dict):
        return BadDocument(place, f"a row is an object {{...}}, got {_shown(row)}")
    try:
        return columns.text(row)
    except LookupError as error:
        return BadDocument(place, error.args[0], error.args[1] if isinstance(error, KeyError) else None)


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
                text = _row_text(columns, json.loads(line[start:].decode()), "")
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
            yield _row_text(columns, inner, f"row {number}")


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
    return not is_alone and isinstance(_row_text(columns_of(corpus), row, ""), str)


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
                text = _row_text(columns, row, place)
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
                yield _row_text(columns, row, f"row {number}")


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
            yield _row_text(columns, row, f"shard {part.start}, row {number}")
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
