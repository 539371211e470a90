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
from typing import TYPE_CHECKING, Any

from raylm.errors import ConfigError
from raylm.tokenizer.frame import frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "corpus.messages"

Spans = list[tuple[int, int]]
"""(first character, one after the last)"""


class Unanswered(Exception):
    """Why nothing can be learned from a conversation, in the words of the ledger."""


class Refused(Exception):
    """Why the template cannot write a conversation."""


def template_of(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    """The chat template of the tokenizer from `path`; ConfigError if it has none."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            f"{KEY} needs a tokenizer with a chat template, which {path} has not; give one that has as tokenizer.path, "
            "or write the messages as text with corpus.text, such as '{messages.role}: {messages.content}'",
            KEY,
        ) from None


def adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts its begin-of-text token in front of a text, as Llama's does. That of SmolLM2 is the
    beginning of a turn, which its chat template writes."""
    return tokenizer.bos_token_id is not None and frame(tokenizer).prefix == tokenizer.bos_token_id


class Conversations:
    """Conversations of a tokenizer with a chat template -> text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, path: str):
        self._tokenizer, self._path = tokenizer, path
        self._template = template_of(tokenizer, path)
        self._begin = tokenizer.bos_token if adds_begin(tokenizer) else None
        self._is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", self._template) is not None
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = sorted({*added, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, special)))

    def text(self, content: str) -> tuple[str, Spans]:
        """(text, answers) of messages as JSON: without the begin-of-text token in front and the end-of-text token
        behind, which raylm puts there itself.

        Unanswered if the assistant says nothing, or if a message spells a special token, which would become one.
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
        return self._without_frame(text, answers)

    def _rendered(self, messages: list[dict[str, Any]], marks: bool = False) -> tuple[str, list[Any]]:
        """(text, what the template marks as generated)"""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marked = render_jinja_template(
                [messages],
                chat_template=self._template,
                return_assistant_tokens_mask=marks,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # any, of the template's own code
            raise Refused(f"the chat template refuses it: {error}") from None
        return texts[0], marked[0] if marks else []

    def _found(self, text: str, messages: list[dict[str, Any]]) -> Iterator[tuple[int, int]]:
        """The answers in the text of a template that does not mark them."""
        shown = [dict(message) for message in messages]
        places = [message for message in shown if message["role"] == "assistant"]
        for number, message in enumerate(places):
            if set(message) != {"role", "content"}:
                raise self._unmarked(f"a message has {', '.join(sorted(set(message) - {'role', 'content'}))}")
            message["content"] = f"\ue000{number}\ue001"
        around = re.split("\ue000\\d+\ue001", self._rendered(shown)[0])
        if len(around) != len(places) + 1 or not text.startswith(around[0]) or not text.endswith(around[-1]):
            raise self._unmarked("its text depends on what the assistant says")
        first = len(around[0])
        for number, after in enumerate(around[1:], 1):
            last = len(text) - len(after) if number == len(places) else text.find(after, first)
            if last < first:
                raise self._unmarked("its text depends on what the assistant says")
            end = self._special.match(text, last)
            yield first, end.end() if end else last
            first = last + len(after)

    def _unmarked(self, why: str) -> ConfigError:
        return ConfigError(
            f"{KEY}: where the chat template of {self._path} puts the answers cannot be told: {why}; mark them in it, "
            " {% generation %} ... {% endgeneration %}",
            KEY,
        )

    def _without_frame(self, text: str, answers: Spans) -> tuple[str, Spans]:
        first, last = 0, len(text)
        if self._begin is not None and text.startswith(self._begin):
            first = len(self._begin)
        last = len(text.rstrip())
        if (end := self._tokenizer.eos_token) and text.endswith(end, first, last):
            last -= len(end)
        inside = [(max(a, first) - first, min(b, last) - first) for a, b in answers]
        return text[first:last], [(a, b) for a, b in inside if a < b]
