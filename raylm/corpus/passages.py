"""A document -> passages, so that a corpus of few documents can also be split."""

from __future__ import annotations

import re
from collections.abc import Iterator

FEWEST_CHARS, MOST_CHARS = 500, 1000
"""Length of a passage. 50 kB of text give 65 to 90 passages of 120 to 250 tokens. The perplexity of a shorter one would
mostly be that of its first words, which have little context."""

ENDS = [re.compile(end) for end in (r"\n\s*\n", r"\n", r"[.!?。！？…]['\"’”»)\]]*\s+|[。！？]", r"\s+")]
"""Where a passage may end: after a blank line, else a line, else a sentence, else a word."""


def passages(text: str) -> Iterator[str]:
    """The text cut into passages; joined again they are the text.

    Each has FEWEST_CHARS to MOST_CHARS characters, unless the whole text has fewer. It ends at the first paragraph end
    in that range, so short paragraphs are joined; without one at the end of a line, else a sentence, else a word, else
    after MOST_CHARS.
    """
    start = 0
    while len(text) - start > MOST_CHARS:
        # The rest must not be shorter than a passage.
        latest = min(start + MOST_CHARS, len(text) - FEWEST_CHARS)
        found = (end.search(text, start + FEWEST_CHARS - 1, latest) for end in ENDS)
        stop = next((match.end() for match in found if match), latest)
        yield text[start:stop]
        start = stop
    yield text[start:]
