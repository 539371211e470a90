"""Conversations -> text, by the tokenizer's chat template, and the parts of it that the assistant says.

    messages   user: Hi                          assistant: Hello
    text       <|im_start|>user\\nHi<|im_end|>\\n  <|im_start|>assistant\\nHello<|im_end|>
    answers                                                               ^^^^^^^^^^^^^^^

An answer has the token that ends its turn. A template that marks its answers, {% generation %}, says itself where they
are. Of any other they are found by writing a placeholder into the place of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from raylm.errors import ConfigError, first_line
from raylm.tokenizer.frame import adds_begin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "corpus.messages"

DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""The day that a template is told, Llama 3.1's own default: by the calendar's, tokens would depend on when they were
made."""

Spans = list[tuple[int, int]]
"""(first character, one after the last)"""


class Unanswered(Exception):
    """Why nothing can be learned from a conversation, in the words of the ledger."""


class Refused(Exception):
    """Why the template cannot write a conversation."""


class Chat(NamedTuple):
    """A conversation as text, without the begin-of-text token in front and the end-of-text token behind, which raylm
    puts there itself."""

    text: str
    answers: Spans
    num_bytes: int
    """UTF-8 bytes of the answers, without special tokens."""


def template_of(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    """The chat template of the tokenizer from `path`; ConfigError if it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        why = f"that of {path} has no chat template" if not tokenizer.chat_template else first_line(error)
        raise ConfigError(
            f"{KEY} needs a tokenizer with a chat template, but {why}; give one that has as tokenizer.path, or write "
            "the messages as text with corpus.text, such as '{messages.role}: {messages.content}'",
            KEY,
        ) from None


class Conversations:
    """Conversations of a tokenizer with a chat template -> text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str):
        self._tokenizer = tokenizer
        self._template = template_of(tokenizer, path)
        self.begin = tokenizer.bos_token if adds_begin(tokenizer) else ""
        """What the template writes in front of a conversation and raylm puts there itself."""
        self._is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))
        self._end = re.compile(rf"\s*(?:{self._special.pattern})")

    def text(self, content: str) -> Chat:
        """The text of messages as JSON.

        Unanswered if the assistant says nothing, or if a message spells a special token, which would become one;
        Refused if the template cannot write them.
        """
        messages: list[dict[str, Any]] = json.loads(content)
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        if not said:
            raise Unanswered("without an assistant turn")
        if not any(map(str.strip, said)):
            raise Unanswered("empty completion")
        if any(self._special.search(message["content"]) for message in messages):
            raise Unanswered("a message spells a special token")
        if self._is_marked:
            text, marked = self._rendered(messages, marks=True)
            answers = [(int(first), int(last)) for first, last in marked]
        else:
            text, _ = self._rendered(messages)
            answers = list(self._found(text, messages))
        text, answers = self._without_frame(text, answers)
        num_bytes = sum(len(self._special.sub("", text[first:last]).encode()) for first, last in answers)
        return Chat(text, answers, num_bytes)

    def _rendered(self, messages: list[dict[str, Any]], marks: bool = False) -> tuple[str, list[Any]]:
        """(text, what the template marks as generated)"""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marked = render_jinja_template(
                [messages],
                chat_template=DATE + self._template,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # any, of the template's own code
            raise _refused(messages, str(error)) from None
        return texts[0], marked[0] if marks else []

    def _found(self, text: str, messages: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """The answers in the text of a template that does not mark them."""
        shown = [dict(message) for message in messages]
        places = [message for message in shown if message["role"] == "assistant"]
        for number, message in enumerate(places):
            if more := [key for key in message if key not in ("role", "content") and key in self._template]:
                raise _refused(messages, f"it writes {', '.join(more)} of an answer, too, and does not mark answers")
            message["content"] = f"\ue000{number}\ue001"
        around = re.split("\ue000\\d+\ue001", self._rendered(shown)[0])
        if len(around) != len(places) + 1 or not text.startswith(around[0]) or not text.endswith(around[-1]):
            raise _unmarked()
        first = len(around[0])
        for number, after in enumerate(around[1:], 1):
            last = len(text) - len(after) if number == len(places) else text.find(after, first)
            if last < first:
                raise _unmarked()
            end = self._end.match(text, last)
            yield first, end.end() if end else last
            first = last + len(after)

    def _without_frame(self, text: str, answers: Spans) -> tuple[str, Spans]:
        first = len(self.begin) if text.startswith(self.begin) else 0
        last = len(text.rstrip())
        if (end := self._tokenizer.eos_token) and text.endswith(end, first, last):
            last -= len(end)
        inside = [(max(a, first) - first, min(b, last) - first) for a, b in answers]
        return text[first:last], [(a, b) for a, b in inside if a < b]


def _refused(messages: list[dict[str, Any]], why: str) -> Refused:
    begins = json.dumps(messages[0]["content"][:40], ensure_ascii=False)
    return Refused(f"the tokenizer's chat template cannot write the conversation that begins with {begins}: {why}")


def _unmarked() -> ConfigError:
    return ConfigError(
        f"{KEY}: where the tokenizer's chat template puts the answers cannot be told, because it writes them changed "
        "or twice; mark them in it: {% generation %} ... {% endgeneration %}",
        KEY,
    )
