"""What of a row is its text: corpus.text, prompt, messages or tokens -> text."""

from __future__ import annotations

import contextlib
import json
import re
import string
from typing import Any

from raylm.config import CorpusConfig
from raylm.corpus.file_part import BadDocument
from raylm.errors import DataError, did_you_mean, first_of


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
        raise LookupError(f"{self.key}: column {name!r} must hold text, got {shown(value)}")

    def _inside(self, value: Any, key: str, name: str, row: dict[str, Any]) -> Any:
        if isinstance(value, list):
            return [self._inside(item, key, name, row) for item in value]
        if not isinstance(value, dict):
            raise LookupError(f"{self.key}: there is no {key} of {name} in {shown(value)}")
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


class _OneColumn(Columns):
    """A column that holds something else than text."""

    def __init__(self, name: str):
        self.names = [name]

    def text(self, row: dict[str, Any]) -> str:
        return self._value(row, self.names[0])


class _TokenIds(_OneColumn):
    """corpus.tokens -> the token ids of a row, in decimal with spaces between."""

    key = "corpus.tokens"

    def _texts(self, value: Any, name: str) -> Any:
        if isinstance(value, str) and re.fullmatch(r"[\d\s]*", value):  # as a .csv has them
            value = [int(id) for id in value.split()]
        if not isinstance(value, (list, tuple)) or not all(type(id) is int and 0 <= id < 2**32 for id in value):
            raise LookupError(f"corpus.tokens: column {name!r} must hold a list of token ids, got {shown(value)}")
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


class _Messages(_OneColumn):
    """corpus.messages -> the messages of a row, as JSON."""

    key = "corpus.messages"

    def _texts(self, value: Any, name: str) -> Any:
        if isinstance(value, str):  # as a .csv has them
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        messages = [_message(each) for each in value] if isinstance(value, (list, tuple)) else []
        if not messages or None in messages:
            raise LookupError(
                f"{self.key}: column {name!r} must hold a list of messages {{role: user, content: text}}, got "
                f"{shown(value)}"
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
        return _TokenIds(corpus.tokens)
    if corpus.messages is not None:
        return _Messages(corpus.messages)
    if corpus.prompt is not None:
        return _Answers(corpus)
    return _WholeRow() if corpus.text == WHOLE_ROW else Columns(corpus.text, corpus.join)


MOST_NAMED = 20
"""Columns that an error names: an object of records has one for each of them."""


def missing(key: str, name: str, names: list[str]) -> str:
    hint = did_you_mean(name, names)
    shown = first_of([_short(each) for each in names], MOST_NAMED)
    return f"{key}: no column {name!r}; columns: {shown}" + (f"; {hint}" if hint else "")


def shown(value: Any) -> str:
    return _short(json.dumps(value, default=str, ensure_ascii=False))


def _short(text: Any) -> str:
    return str(text) if len(str(text)) <= 60 else str(text)[:57] + "..."


def row_text(columns: Columns, row: Any, place: str) -> str | BadDocument:
    if not isinstance(row, dict):
        return BadDocument(place, f"a row is an object {{...}}, got {shown(row)}")
    try:
        return columns.text(row)
    except LookupError as error:
        return BadDocument(place, error.args[0], error.args[1] if isinstance(error, KeyError) else None)
