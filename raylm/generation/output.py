"""Texts -> a .jsonl or .parquet file, written entirely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from raylm.errors import StorageError

FORMATS = (".jsonl", ".parquet")


@contextlib.contextmanager
def output_file(output: Path) -> Iterator[Callable[[list[dict[str, str]]], None]]:
    """Yields a function that writes rows; the file exists once the context has ended without an error."""
    partial = output.with_name(f"{output.name}.{uuid.uuid4().hex}.partial")

    @contextlib.contextmanager
    def failures() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"--output {output} cannot be written: {error.strerror or error}", str(output)
            ) from error

    with failures():
        output.parent.mkdir(parents=True, exist_ok=True)
        file: Any = _Parquet(partial) if output.suffix == ".parquet" else _JsonLines(partial)

    def write(rows: list[dict[str, str]]) -> None:
        with failures():
            file.write(rows)

    try:
        yield write
        with failures():
            file.close()
            os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)


class _JsonLines:
    def __init__(self, path: Path):
        self.stream = path.open("w", encoding="utf-8")

    def write(self, rows: list[dict[str, str]]) -> None:
        self.stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self.stream.close()


class _Parquet:
    """Row groups of ROWS rows, so that readers can read one at a time."""

    ROWS = 1000

    def __init__(self, path: Path):
        self.schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "text", "source", "doc_id")])
        self.writer = pyarrow.parquet.ParquetWriter(path, self.schema)
        self.waiting: list[dict[str, str]] = []

    def write(self, rows: list[dict[str, str]]) -> None:
        self.waiting += rows
        if len(self.waiting) >= self.ROWS:
            self._flush()

    def close(self) -> None:
        if self.waiting:
            self._flush()
        self.writer.close()

    def _flush(self) -> None:
        self.writer.write_table(pyarrow.Table.from_pylist(self.waiting, self.schema))
        self.waiting = []
