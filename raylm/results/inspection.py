"""The data as a model will see it: documents, tokens, blocks and a batch, as values, on a terminal or in HTML."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from raylm import blocks, budget, console, corpus, tokens
from raylm.config import Experiment
from raylm.errors import DataError
from raylm.results import tables
from raylm.tokenizer import Frame
from raylm.tokens import Split, Store

SHOWN_TOKENS = 160
"""Most tokens of a document or block that are shown."""


@dataclass(frozen=True)
class Inspection:
    """The data as a model will see it."""

    record: dict[str, Any]
    """Documents, tokens, blocks, a batch, lengths and the ledger, as plain values."""

    def _repr_html_(self) -> str:
        return console.as_html(view(self.record))


def inspect(experiment: Experiment, store: Store, examples: int) -> dict[str, Any]:
    """Sources, ledger, splits, lengths, and the first `examples` documents and blocks, as plain values for --json."""
    section = experiment.blocks
    frame = store.frame(experiment.tokenizer.prefix)
    cut = blocks.build(store.train, section, frame)
    rows = [cut[index] for index in range(min(max(examples, 2), len(cut)))]
    marks = cut.marks(range(len(rows)))
    batch = blocks.batch(rows, section, frame, () if marks is None else marks) if rows else {}
    manifest = store.manifest
    passes = _passes(experiment, store) if section.mixture else {}
    return {
        "store": store.path,
        "fingerprint": store.fingerprint,
        "sources": store.sources,
        "ledger": manifest["ledger"],
        "kept_percent": 100 * corpus.kept_fraction(manifest["ledger"]),
        "splits": {name: store.counts(name) for name in store.splits},
        "tokenizer": {key: manifest["tokenizer"][key] for key in ("vocab_size", "eos_token", "encoder")},
        "frame": {
            name: None if token is None else {"token": store.tokenizer.convert_ids_to_tokens(token), "id": token}
            for name, token in frame._asdict().items()
        },
        "lengths": lengths(store.train),
        "documents": [
            {
                "bytes": store.train.document_bytes(index),
                "tokens": len(store.train[index]),
                "pieces": pieces(store, store.train[index]),
                **_of_answers(store.train.answers(index)),
            }
            for index in range(min(examples, len(store.train)))
        ],
        "blocks": {
            "packing": section.packing,
            "block_size": section.block_size,
            "isolate_documents": section.isolate_documents,
            "train": len(cut),
            "dropped_tokens": cut.dropped_tokens,
            **({"passes_over": passes} if passes else {}),
            "examples": [
                {
                    "tokens": len(row),
                    "documents_end": int(np.count_nonzero(_ends(row, None if marks is None else marks[number], frame))),
                    "pieces": pieces(store, row),
                    **_of_answers(None if marks is None else marks[number] & blocks.ANSWER),
                }
                for number, row in enumerate(rows[:examples])
            ],
        },
        "batch": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "begins": array[0, :8].tolist()}
            for name, array in batch.items()
        },
        "not_predicted": int((batch["labels"] == blocks.IGNORED).sum()) if batch else 0,
    }


def _passes(experiment: Experiment, store: Store) -> dict[str, float]:
    """How often the training reads each source of a mixture; empty if it cannot be trained."""
    try:
        return budget.for_store(experiment, store).passes_over
    except DataError:
        return {}


def lengths(split: Split) -> list[dict[str, int]]:
    """Documents and their tokens by length, in powers of two: from `at_least` up to twice that."""
    documents, summed = np.zeros(32, np.int64), np.zeros(32, np.int64)
    for batch in split.lengths():
        power = np.log2(np.maximum(batch, 1)).astype(np.int64)
        documents += np.bincount(power, minlength=32)
        summed += np.bincount(power, weights=batch, minlength=32).astype(np.int64)
    used = np.flatnonzero(documents)
    return [
        {"at_least": 2 ** int(power), "documents": int(documents[power]), "tokens": int(summed[power])}
        for power in range(used[0], used[-1] + 1)
    ]


def pieces(store: Store, ids: Any) -> list[str]:
    """The text of each of the first tokens; one that is part of a character is shown as �."""
    return [store.tokenizer.decode([token]) for token in ids[:SHOWN_TOKENS].tolist()]


def _ends(row: np.ndarray, marks: np.ndarray | None, frame: Frame) -> np.ndarray:
    """Which tokens of a block are the end of a document."""
    return row == frame.end if marks is None else marks & blocks.END


def _of_answers(answers: np.ndarray | None) -> dict[str, list[bool]]:
    """Which of the first tokens are of an answer; nothing without prompts."""
    return {} if answers is None else {"of_answers": answers[:SHOWN_TOKENS].astype(bool).tolist()}


# On a terminal and in HTML -------------------------------------------------------------------------------------------


def view(record: dict[str, Any]) -> RenderableType:
    """The record for people: tables, and the tokens of documents and blocks."""
    tokenizer, frame, cut = record["tokenizer"], record["frame"], record["blocks"]
    special = {part["token"] for part in frame.values() if part is not None}
    counted = corpus.counted_as(record["ledger"])
    has_prompts = tokens.ANSWERS in record["splits"]["train"]
    parts: list[RenderableType] = [
        Text(f"store {record['store']}"),
        _heading("Sources"),
        _sources(record["sources"]),
        _heading("Ledger"),
        _ledger(record["ledger"], record["kept_percent"]),
        _heading("Splits"),
        tables.splits(record["splits"]),
        *([Text(counted)] if counted else []),
        _heading(f"Tokens: vocabulary of {tokenizer['vocab_size']:,}; {_frame(frame)}"),
        Text(f"ids by {tokenizer['encoder']['name']} {tokenizer['encoder']['version']}"),
        *(
            [Text("only answers are learned and scored; they are green, between « and »", "green")]
            if has_prompts
            else []
        ),
        _heading("Lengths of training documents"),
        _histogram(record["lengths"]),
    ]
    for number, document in enumerate(record["documents"]):
        size = f"{document['bytes']:,} bytes{' of answers' * has_prompts}, {document['tokens']:,} tokens"
        parts.append(_heading(f"Document {number}: {size}"))
        parts.append(_tokens(document, special))
    parts.append(
        _heading(
            f"Blocks: {cut['packing']}, {cut['train']:,} of {cut['block_size']:,} tokens, "
            f"{cut['dropped_tokens']:,} tokens dropped"
        )
    )
    if passes := cut.get("passes_over"):
        listed = ", ".join(f"{name} {number:.2g} times" for name, number in passes.items())
        parts.append(Text(f"of the mixture the training reads {listed}"))
    for number, block in enumerate(cut["examples"]):
        parts.append(
            _heading(f"Block {number}: {block['tokens']:,} tokens, {block['documents_end']} documents end in it")
        )
        parts.append(_tokens(block, special))
    not_predicted = Text(f"labels that are not predicted: {record['not_predicted']:,}")
    return Group(*parts, _heading("Batch"), _batch(record["batch"]), not_predicted)


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold cyan")


def _sources(sources: list[dict[str, Any]]) -> Table:
    table = tables.numbers("source", "documents", "tokens", "bytes")
    for source in sources:
        table.add_row(source["name"], *(f"{source[count]:,}" for count in ("documents", "tokens", "bytes")))
    return table


def _ledger(ledger: dict[str, int], kept_percent: float) -> Table:
    table = tables.numbers("outcome", "documents or bytes")
    for outcome, count in ledger.items():
        table.add_row(outcome, f"{count:,}")
    table.add_row("data after filtering", f"{kept_percent:.2f}%")
    return table


def _histogram(rows: list[dict[str, int]]) -> Table:
    table = tables.numbers("tokens", "documents", "tokens in all", "")
    table.columns[3].justify = "left"
    most = max(row["documents"] for row in rows)
    for row in rows:
        bar = "█" * max(1, round(40 * row["documents"] / most)) if row["documents"] else ""
        span = f"{row['at_least']:,} to {2 * row['at_least'] - 1:,}"
        table.add_row(span, f"{row['documents']:,}", f"{row['tokens']:,}", bar)
    return table


def _batch(batch: dict[str, dict[str, Any]]) -> Table:
    table = tables.numbers("of a batch", "shape", "type", "begins")
    for name, array in batch.items():
        table.add_row(name, str(array["shape"]), array["dtype"], " ".join(map(str, array["begins"])) + " …")
    return table


def _frame(frame: dict[str, Any]) -> str:
    """The tokens around a document, in words."""
    prefix = repr(frame["prefix"]["token"]) if frame["prefix"] else "nothing"
    return f"{prefix} in front of a document, {frame['end']['token']!r} behind it"


def _tokens(shown: dict[str, Any], special: Collection[str]) -> Text:
    """Tokens with a bar between them, line ends and tabs made visible, special tokens and answers highlighted."""
    text = Text()
    pieces, num_tokens = shown["pieces"], shown["tokens"]
    answers = shown.get("of_answers", [False] * len(pieces))
    for piece, is_answer, was_answer in zip(pieces, answers, [False, *answers[:-1]], strict=True):
        if is_answer != was_answer:
            text.append("«" if is_answer else "»", "dim")
        style = "bold white on red" if piece in special else "bold green" if is_answer else ""
        text.append(piece.replace("\n", "⏎\n").replace("\t", "⇥   "), style)
        text.append("|", "dim")
    if answers and answers[-1]:
        text.append("»", "dim")
    if num_tokens > len(pieces):
        text.append(f" … and {num_tokens - len(pieces):,} more", "dim")
    return text
