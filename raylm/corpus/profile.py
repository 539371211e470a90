"""A profile of a corpus, from a sample: the columns of its text, the length of documents, their script."""

from __future__ import annotations

import json
import statistics
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from raylm.config import CorpusConfig
from raylm.corpus import minhash
from raylm.corpus.columns import WHOLE_ROW
from raylm.corpus.formats import FORMATS, format_of, texts, whole_file
from raylm.corpus.reader import Ledger, content_hash, kept, shards
from raylm.corpus.sources import HUB, Source
from raylm.errors import DataError

ROWS = 200
"""Rows of a table that are read to find its text columns."""

MOST_TABLES = 20
"""Tables of which it is checked that they have these columns."""

TABLES = {name for name, found in FORMATS.items() if found.has_columns} - {"json", "hub"}
"""Formats of rows with columns. A .json file beside text counts as settings of some program, and hub:// is not read."""

CONVERSATIONS = (("role", "content"), ("from", "value"))
"""Fields of the messages of a chat, as OpenAI's and ShareGPT's data sets name them."""

PAIRS = (
    ("instruction", "input", "output"), ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("question", "answer"), ("query", "response"), ("input", "output"),
)  # fmt: skip
"""Columns of prompts and their answers, as data sets for instruction tuning name them."""

DOCUMENTS = 2_000
MOST_BYTES = 8_000_000
CHARS = 2_000
"""Of a document whose script is looked at."""

MOST_CHARS = 100_000
"""Of a document that is compared with others."""
"""Characters of a document whose letters are counted."""


class TextColumns(NamedTuple):
    """A guess at corpus.text and corpus.join."""

    text: str
    join: str
    why: str


def guess_columns(sources: list[Source], corpus: CorpusConfig) -> TextColumns | None:
    """The columns of a table that hold its text; None if the corpus is not a table, or has a column named corpus.text.

    Tables beside plain text count only if they are the larger part. Reads the first ROWS rows of the largest table.
    DataError if another table lacks its columns.
    """
    formats = [(source, file, format_of(file.path, source.path)[0]) for source in sources for file in source.files]
    tables = [each for each in formats if each[2] in TABLES or each[2] == "json"]
    plain = sum(file.size for _, file, kind in formats if kind in ("text", "python"))
    if plain:
        tables = [each for each in tables if each[2] in TABLES]
    if sum(file.size for _, file, _ in tables) <= plain:
        return None
    largest, *others = sorted(tables, key=lambda each: -each[1].size)
    whole_rows = corpus.model_copy(update={"text": WHOLE_ROW})
    found = islice(texts(whole_file(largest[1], 0, largest[0]), whole_rows), ROWS)
    rows = [json.loads(row) for row in found if isinstance(row, str)]
    guessed = _text_of(rows, corpus.text)
    if guessed is not None:
        guess = corpus.model_copy(update={"text": guessed.text, "join": guessed.join})
        for source, file, _ in others[:MOST_TABLES]:
            try:
                next(texts(whole_file(file, 0, source), guess), None)
            except DataError as error:
                raise DataError(
                    f"{error.message}. {largest[1].path} has it, but one corpus.text is for all tables of a corpus; "
                    "name tables of one kind in corpus.paths, or give their columns the same name",
                    "corpus.paths",
                ) from error
    return guessed


def _text_of(rows: list[dict[str, Any]], default: str) -> TextColumns | None:
    values: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in _leaves(row):
            values.setdefault(name, []).append(value)
    simple = {name: of for name, of in values.items() if not {*"{}:!"} & {*name}}  # which are a template's own
    if default in simple or not rows:
        return None
    for name, of in simple.items():
        for fields in CONVERSATIONS:
            if all(_has_messages(value, fields) for value in of):
                who, says = (f"{{{name}.{field}}}" for field in fields)
                return TextColumns(
                    f"{who}: {says}",
                    "\n",
                    f"the messages of {name}, a chat; corpus.messages={name} learns answers alone",
                )
    strings = {name.lower(): name for name, of in simple.items() if all(isinstance(value, str) for value in of)}
    for names in PAIRS:
        if all(name in strings for name in names):
            template = "\n".join(f"{{{strings[name]}}}" for name in names)
            *asked, answer = (f"{{{strings[name]}}}" for name in names)
            prompt = json.dumps("\n".join(asked) + "\n")
            why = f"prompts and their answers; prompt: {prompt} with text: '{answer}' learns the answers alone"
            return TextColumns(template, " ", why)
    prose = {name: of for name, of in simple.items() if _are_prose(of)}
    if not prose:
        return None
    length = {name: sum(map(_length, of)) for name, of in prose.items()}
    name = max(length, key=length.__getitem__)
    others = ", ".join(other for other in values if other != name)
    return TextColumns(name, " ", f"the column with the most text{f'; the others are {others}' if others else ''}")


def _leaves(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _are_prose(values: list[Any]) -> bool:
    """Whether values are texts, or lists of them, of more than a word on average."""
    found = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if not found or not all(isinstance(text, str) for text in found):
        return False
    return statistics.fmean(len(text) for text in found) >= 10


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else sum(map(len, value))


def _has_messages(value: Any, fields: tuple[str, str]) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(field), str) for field in fields) for message in value
    )


@dataclass(frozen=True)
class Profile:
    """What a sample of a corpus shows."""

    formats: dict[str, int]
    """Format -> files of it; the most frequent first."""
    seen: int
    """Documents in the sample."""
    median_chars: int
    """Length of a document."""
    duplicates: float
    """Fraction of the seen documents that repeat an earlier one exactly."""
    near_duplicates: float
    """Fraction of them that repeat an earlier one exactly or nearly, by MinHash."""
    scripts: dict[str, float]
    """Script, such as LATIN or CJK -> fraction of the letters; those of at least 1 %."""


def profile(sources: list[Source], corpus: CorpusConfig) -> Profile:
    """A profile of up to DOCUMENTS documents that pass the filters, sampled evenly over the corpus.

    hub:// sources are skipped because reading them would download them.
    """
    formats = Counter(format_of(file.path, source.path)[0] for source in sources for file in source.files)
    local = [source for source in sources if not source.path.startswith(HUB)]
    parts = [shard._replace(parts=(part,)) for shard in shards(local) for part in shard.parts]
    parts = parts[:: max(1, len(parts) // DOCUMENTS)]
    of_each = max(1, DOCUMENTS // max(1, len(parts)))
    # Python's own sources have no bad rows; the command that reads the corpus reports what cannot be read.
    lenient = corpus.model_copy(update={"on_bad_row": "skip"})
    lengths: list[int] = []
    hashes: set[int] = set()
    signatures: list[np.ndarray] = []
    letters: Counter[str] = Counter()
    num_bytes = 0
    for shard in parts:
        for _, text, encoded in islice(kept(shard, lenient, Ledger()), of_each):
            num_bytes += len(encoded)
            lengths.append(len(text))
            hashes.add(content_hash(encoded))
            signatures.append(minhash.bands(text[:MOST_CHARS]))
            letters.update(_script(letter) for letter in text[:CHARS] if letter.isalpha())
        if num_bytes > MOST_BYTES:
            break
    total = max(1, letters.total())
    return Profile(
        dict(formats.most_common()),
        seen=len(lengths),
        median_chars=round(statistics.median(lengths)) if lengths else 0,
        duplicates=1 - len(hashes) / len(lengths) if lengths else 0.0,
        near_duplicates=1 - len(np.unique(minhash.components(np.array(signatures)))) / len(lengths) if lengths else 0.0,
        scripts={name: count / total for name, count in letters.most_common() if count >= 0.01 * total},
    )


def _script(letter: str) -> str:
    """The first word of a letter's Unicode name, which names its script: LATIN, CYRILLIC, HIRAGANA, CJK."""
    return unicodedata.name(letter, "OTHER").partition(" ")[0]
