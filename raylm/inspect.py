"""Look at the data as the model will see it: text, tokens, blocks, a batch; and what became of the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylm import cli
from raylm.config import Experiment

if TYPE_CHECKING:
    from collections.abc import Collection

    from rich.console import RenderableType
    from rich.text import Text

    from raylm.tokens import Split, Store

logger = logging.getLogger(__name__)

SHOWN_TOKENS = 160
"""Of a document or block on the screen; more than that nobody reads."""

Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write what is shown as a page, too.")]
Examples = Annotated[int, typer.Option("--examples", min=1, max=100, help="Documents and blocks to show.")]


def inspect(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    examples: Examples = 2,
    html: Html = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Show the data as the model will see it: documents, their tokens, blocks, a batch, lengths, the ledger."""
    from raylm import plan, tokens, views
    from raylm.pipeline import stores

    experiment = cli.experiment(config, settings, print_config, plan.complete_text)
    resolved = plan.resolve_tokens(experiment)
    if dry_run:
        return cli.CommandResult(*views.tokens_plan(resolved))
    store, _ = stores.open_or_prepare(resolved)
    for warning in tokens.warnings(store):
        logger.warning(warning)
    record = look(resolved.experiment, store, examples)
    shown = view(record)
    if html is not None:
        html.write_text(page(shown), encoding="utf-8")
        logger.info(f"written: {html}")
    return cli.CommandResult(record, shown)


def look(experiment: Experiment, store: Store, examples: int) -> dict[str, Any]:
    """Everything that is shown, as plain values."""
    from raylm import blocks, corpus, tokens

    section = experiment.blocks
    frame = store.frame(experiment.tokenizer.prefix)
    cut = blocks.build(store.train, section, frame)
    rows = [cut[index] for index in range(min(max(examples, 2), len(cut)))]
    batch = blocks.batch(rows, section, frame) if rows else {}
    manifest = store.manifest
    return {
        "store": store.path,
        "fingerprint": store.fingerprint,
        "sources": [{key: value for key, value in source.items() if key != "files"} for source in manifest["sources"]],
        "ledger": manifest["ledger"],
        "kept_percent": 100 * corpus.kept_fraction(manifest["ledger"]),
        "splits": {name: {what: manifest[name][what] for what in tokens.COUNTED} for name in tokens.SPLITS},
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
            }
            for index in range(min(examples, len(store.train)))
        ],
        "blocks": {
            "packing": section.packing,
            "block_size": section.block_size,
            "isolate_documents": section.isolate_documents,
            "train": len(cut),
            "dropped_tokens": cut.dropped_tokens,
            "examples": [
                {"tokens": len(row), "documents_end": int((row == frame.end).sum()), "pieces": pieces(store, row)}
                for row in rows[:examples]
            ],
        },
        "batch": {
            name: {"shape": list(array.shape), "dtype": str(array.dtype), "begins": array[0, :8].tolist()}
            for name, array in batch.items()
        },
        "not_predicted": int((batch["labels"] == blocks.IGNORED).sum()) if batch else 0,
    }


def lengths(split: Split) -> list[dict[str, int]]:
    """Documents and their tokens by length, in powers of two: from `at_least` up to twice that."""
    import numpy as np

    documents, summed = np.zeros(32, np.int64), np.zeros(32, np.int64)
    for found in split.lengths():
        power = np.log2(np.maximum(found, 1)).astype(np.int64)
        documents += np.bincount(power, minlength=32)
        summed += np.bincount(power, weights=found, minlength=32).astype(np.int64)
    used = np.flatnonzero(documents)
    return [
        {"at_least": 2 ** int(power), "documents": int(documents[power]), "tokens": int(summed[power])}
        for power in range(used[0], used[-1] + 1)
    ]


def pieces(store: Store, ids: Any) -> list[str]:
    """The text of each of the first tokens; one that is part of a character is shown as �."""
    return [store.tokenizer.decode([token]) for token in ids[:SHOWN_TOKENS].tolist()]


# On the screen -------------------------------------------------------------------------------------------------------


def view(record: dict[str, Any]) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from raylm import corpus

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold")
        for number, column in enumerate(columns):
            made.add_column(column, justify="right" if number else "left")
        return made

    def heading(text: str) -> Text:
        return Text(f"\n{text}", style="bold cyan")

    sources = table("source", "documents", "tokens", "bytes")
    for source in record["sources"]:
        sources.add_row(source["name"], *(f"{source[what]:,}" for what in ("documents", "tokens", "bytes")))
    splits = table("split", "documents", "tokens", "bytes", "bytes/token", "unknown tokens")
    for name, split in record["splits"].items():
        each = f"{split['bytes'] / split['tokens']:.2f}" if split["tokens"] else "-"
        counts = [f"{split[what]:,}" for what in ("documents", "tokens", "bytes")]
        splits.add_row(name, *counts, each, f"{split['unknown_tokens']:,}")
    ledger = table("what became of it", "documents or bytes")
    for what, count in record["ledger"].items():
        ledger.add_row(what, f"{count:,}")
    ledger.add_row("data after filtering", f"{record['kept_percent']:.2f}%")
    histogram = table("tokens", "documents", "tokens in all", "")
    histogram.columns[3].justify = "left"
    most = max(row["documents"] for row in record["lengths"])
    for row in record["lengths"]:
        bar = "█" * max(1, round(40 * row["documents"] / most)) if row["documents"] else ""
        span = f"{row['at_least']:,} to {2 * row['at_least'] - 1:,}"
        histogram.add_row(span, f"{row['documents']:,}", f"{row['tokens']:,}", bar)
    batch = table("of a batch", "shape", "type", "begins")
    for name, array in record["batch"].items():
        batch.add_row(name, str(array["shape"]), array["dtype"], " ".join(map(str, array["begins"])) + " …")
    tokenizer, cut = record["tokenizer"], record["blocks"]
    parts: list[RenderableType] = [
        Text(f"store {record['store']}"),
        heading("Sources"),
        sources,
        heading("Ledger"),
        ledger,
        heading("Splits"),
        splits,
        *([Text(counted)] if (counted := corpus.counted_as(record["ledger"])) else []),
        heading(f"Tokens: vocabulary of {tokenizer['vocab_size']:,}; {framed(record['frame'])}"),
        Text(f"ids by {tokenizer['encoder']['name']} {tokenizer['encoder']['version']}"),
        heading("Lengths of training documents"),
        histogram,
    ]
    special = {side["token"] for side in record["frame"].values() if side is not None}
    for number, document in enumerate(record["documents"]):
        parts.append(heading(f"Document {number}: {document['bytes']:,} bytes, {document['tokens']:,} tokens"))
        parts.append(marked(document["pieces"], document["tokens"], special))
    parts.append(
        heading(
            f"Blocks: {cut['packing']}, {cut['train']:,} of {cut['block_size']:,} tokens, "
            f"{cut['dropped_tokens']:,} tokens dropped"
        )
    )
    for number, block in enumerate(cut["examples"]):
        parts.append(
            heading(f"Block {number}: {block['tokens']:,} tokens, {block['documents_end']} documents end in it")
        )
        parts.append(marked(block["pieces"], block["tokens"], special))
    parts += [heading("Batch"), batch, Text(f"labels that are not predicted: {record['not_predicted']:,}")]
    return Group(*parts)


def framed(frame: dict[str, Any]) -> str:
    """The tokens around a document, in words."""
    prefix = repr(frame["prefix"]["token"]) if frame["prefix"] else "nothing"
    return f"{prefix} in front of a document, {frame['end']['token']!r} behind it"


def marked(found: list[str], tokens: int, special: Collection[str]) -> Text:
    """Tokens in their order with a bar between them, new lines shown, those of the frame standing out."""
    from rich.text import Text

    text = Text()
    for piece in found:
        style = "bold white on red" if piece in special else ""
        text.append(piece.replace("\n", "⏎\n").replace("\t", "⇥   "), style)
        text.append("|", "dim")
    if tokens > len(found):
        text.append(f" … and {tokens - len(found):,} more", "dim")
    return text


def page(shown: RenderableType) -> str:
    """The same, as one HTML page that needs nothing else."""
    import io

    from rich.console import Console

    console = Console(record=True, width=130, file=io.StringIO(), highlight=False)
    console.print(shown)
    return console.export_html(inline_styles=True)


def main() -> None:
    cli.run(inspect)


if __name__ == "__main__":
    from raylm.inspect import main  # by its real name, so that Ray ships functions by reference

    main()
