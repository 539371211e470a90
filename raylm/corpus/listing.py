"""The sources of a corpus with the files that can be read, before anything starts."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import lzma
import os
import zlib
from collections import Counter
from functools import lru_cache

from raylm.config import CorpusConfig
from raylm.corpus.columns import columns_of
from raylm.corpus.file_part import BYTE_ORDER_MARKS, BadDocument, FilePart, decompressed, lfs_pointer
from raylm.corpus.formats import DATA_SETS, FORMATS, texts, whole_file
from raylm.corpus.rows import begins_with_text
from raylm.corpus.sources import File, Source, find, suffix
from raylm.errors import DataError

FIRST_FILES = 100  # files of a source that are opened before anything starts: well below a second

HEAD_BYTES = 1024
"""Bytes of a file that are checked for text."""

TABLES_OF_ANYTHING = ("json", "csv", "tsv")
"""Formats that often hold something else than text: settings, figures, logs."""


def find_sources(corpus: CorpusConfig, key: str = "corpus.paths") -> list[Source]:
    """The files of every source, by their names alone; DataError if a source has no files, or if a file would be both
    trained on and tested on.

    `key` is the setting that gave the paths.
    """
    if not corpus.paths and not corpus.validation_paths:
        raise DataError("corpus.paths is empty; give files, directories or globs of text", "corpus.paths")
    sources = [find(key, path, name=name) for name, path in corpus.entries]
    sources += [find("corpus.validation_paths", path, "validation") for path in corpus.validation_paths]
    tests = [find("corpus.test_paths", path, "test") for path in corpus.test_paths]
    _check_unseen(tests, sources, may_share=bool(corpus.deduplicate))
    return sources + tests


def _check_unseen(tests: list[Source], others: list[Source], *, may_share: bool) -> None:
    """DataError if a file of the test split is one of the training or validation split, too.

    If they `may_share` files, which are then kept for the test alone, only if that leaves none to train on.
    """
    keys = {file.path: _key(source, "corpus.paths") for source in others for file in source.files}
    shared = [file.path for source in tests for file in source.files if file.path in keys]
    if shared and may_share:
        left = keys.keys() - set(shared)
        if not any(file.path in left for source in others if source.split == "train" for file in source.files):
            raise DataError(
                "corpus.test_paths: it has every file of corpus.paths, too, and with corpus.deduplicate such "
                "files are kept for the test alone: none is left to train on; give other files",
                "corpus.test_paths",
            )
    elif shared:
        several = f" and {len(shared) - 1:,} more are" if len(shared) > 1 else " is"
        raise DataError(
            f"corpus.test_paths: {shared[0]}{several} in {keys[shared[0]]}, too, but nothing may be learned from or "
            "chosen by it; give other files, or corpus.deduplicate=exact, which keeps each document in one split",
            "corpus.test_paths",
        )


def _key(source: Source, key: str) -> str:
    """The setting that has a source; `key` is that of training text."""
    return key if source.split == "train" else f"corpus.{source.split}_paths"


def readable(sources: list[Source], corpus: CorpusConfig, key: str = "corpus.paths") -> list[Source]:
    """The sources with the files that can be read; DataError if a file that was named itself cannot be read.

    Files from a directory or glob that are not text are left out and counted by kind. So are files with columns but
    without corpus.text, if other files have text.

    Reads the first bytes or the first document of files (all of a .json file that is one object):
    no Ray, and below a second for some thousand local files.
    """
    checked = []
    for source in sources:
        if source.is_found:
            source = _readable(_key(source, key), source, corpus)
        checked.append(source)
        for file in source.files[:FIRST_FILES]:
            part = whole_file(file, 0, source)
            if part.format not in DATA_SETS and corpus.on_bad_row == "error" and (pointer := _pointer(file)):
                raise pointer.error(file)
            if part.format in ("text", "python", "hub") and not part.compression:
                continue
            problem = _problem(part, corpus)
            if isinstance(problem, DataError):
                raise problem
            if problem and corpus.on_bad_row == "error" and not (part.format == "text" and part.is_found):
                raise problem.error(file)
    return checked


def list_sources(corpus: CorpusConfig, key: str = "corpus.paths") -> list[Source]:
    """The files of every source that can be read: `find_sources`, then `readable`."""
    return readable(find_sources(corpus, key), corpus, key)


def have_columns(sources: list[Source], corpus: CorpusConfig) -> bool:
    """Whether a file of the sources has rows with the columns that a corpus names."""
    parts = (whole_file(file, 0, source) for source in sources for file in source.files)
    return any(FORMATS[part.format].has_columns and _problem(part, corpus) is None for part in parts)


def left_out(sources: list[Source]) -> str:
    """The files of the corpus that are not read, in one line: "12 .png, 2 .csv without corpus.text"; empty if none."""
    return _counted(sum((Counter(source.left_out) for source in sources), Counter()))


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())


def _readable(key: str, source: Source, corpus: CorpusConfig) -> Source:
    """The source without the files that cannot be read; DataError if no file is left."""
    kinds = Counter(source.left_out)
    parts = []
    for part in (whole_file(file, 0, source) for file in source.files):
        if part.format not in DATA_SETS and (pointer := _pointer(part.file)):
            if corpus.on_bad_row == "error":  # its text would be missing
                raise pointer.error(part.file)
            kinds["git-lfs pointers"] += 1
        elif part.format == "text" and not _is_text(part, corpus.encoding):
            kinds[suffix(part.file.path)] += 1
        else:
            parts.append(part)
    useless = _useless(parts, corpus)
    kinds.update(f"{suffix(part.file.path)} without {columns_of(corpus).key}" for part in useless)
    files = tuple(part.file for part in parts if part not in useless)
    if not files:
        raise DataError(
            f"{key}: {source.path}: nothing to read in it: {_counted(kinds)}; text is UTF-8, or has a byte order mark, "
            "or is of another corpus.encoding",
            key,
        )
    return dataclasses.replace(source, files=files, left_out=dict(kinds))


def _useless(parts: list[FilePart], corpus: CorpusConfig) -> set[FilePart]:
    """The files with columns that have no corpus.text, in a directory where others give text.

    If corpus.text is set, only other files with columns count: else a misspelled column would leave out every table.
    """
    if len({part.format for part in parts}) < 2:
        return set()
    tables = [part for part in parts if part.format != "text"]
    problems = {part: problem for part in tables if (problem := _problem(part, corpus))}
    has_rows = len(problems) < len(tables)
    is_asked = corpus.has_prompts or corpus.tokens or corpus.text != CorpusConfig.model_fields["text"].default
    has_text = len(tables) < len(parts) and not is_asked
    if not has_rows and not has_text:
        return set()
    # A torn .parquet is a loss; a .json that is not JSON is the settings of some program.
    return {part for part, it in problems.items() if part.format in TABLES_OF_ANYTHING or _is_no_column(it)}


def _is_no_column(problem: BadDocument | DataError) -> bool:
    setting = problem.where if isinstance(problem, DataError) else problem.setting
    return setting in ("corpus.text", "corpus.prompt", "corpus.messages", "corpus.tokens")


def _problem(part: FilePart, corpus: CorpusConfig) -> BadDocument | DataError | None:
    """The fault of a file or its first document; None if there is none."""
    return _problem_of(part, corpus.model_copy(update={"paths": ()}))  # a mapping of named sources has no hash


@lru_cache(maxsize=100_000)  # a command asks several times, and some .json files must be read whole
def _problem_of(part: FilePart, corpus: CorpusConfig) -> BadDocument | DataError | None:
    if part.format == "json":
        with contextlib.suppress(
            EOFError, OSError, zlib.error, lzma.LZMAError, UnicodeDecodeError
        ):  # raised again below
            if begins_with_text(part, corpus):
                return None
    try:
        first = next(texts(part, corpus), None)
    except DataError as error:
        return error
    return first if isinstance(first, BadDocument) else None


@lru_cache(maxsize=100_000)
def _pointer(file: File) -> BadDocument | None:
    """The fault of a local file that is a git-lfs pointer; None of any other."""
    return lfs_pointer(file) if "://" not in file.path and os.access(file.path, os.R_OK) else None


@lru_cache(maxsize=100_000)
def _is_text(part: FilePart, encoding: str) -> bool:
    """Whether a local file starts like text: no byte is 0, and all are valid in its encoding."""
    if "://" in part.file.path:  # one request for each file: reading finds what is not text
        return True
    try:
        with decompressed(part) as stream:
            head = stream.read(HEAD_BYTES)
    except PermissionError:
        return False
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return True  # torn: reading it gives a better error
    if head.startswith(tuple(BYTE_ORDER_MARKS)):
        return True
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return "\0" not in text
