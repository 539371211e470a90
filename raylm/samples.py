"""Texts that a model in training writes at each evaluation (eval.prompts), kept in the run's directory.

<run>/samples.jsonl    {"step": 40, "tokens": 20480, "prompt": "The cat", "text": "The cat sat ..."}    a line a prompt
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from raylm import storage

FILE = "samples.jsonl"


def write(directory: str, step: int, rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows of an evaluation behind those of the evaluations before it, and return the file. A resumed run
    repeats evaluations: what the file has of this one and of later ones is replaced."""
    path = f"{directory}/{FILE}"
    kept = [row for row in read(directory) if row["step"] < step]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *({"step": step, **row} for row in rows)]]
    storage.write(path, "".join(lines).encode("utf-8", "replace"))
    return path


def read(directory: str) -> list[dict[str, Any]]:
    """The rows of all evaluations of a run; empty if it has none."""
    content = storage.read(f"{directory}/{FILE}") or b""
    return [json.loads(line) for line in content.decode().split("\n") if line]
