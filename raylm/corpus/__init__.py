"""Sources -> documents.

    sources      corpus.paths -> the files behind them, with size and version; no Ray
    formats      a file, or a part of one -> texts: plain text, JSON, CSV, Parquet, Arrow, data sets; compressed or not
    reader       shards of files -> documents: hashed, filtered, counted, of the train or the validation split

What a shard holds, which documents are kept and which side of the split they fall on depends on the files and the
settings alone, not on processes or their order.
"""

from raylm.corpus.formats import Fault
from raylm.corpus.reader import (
    Document,
    Ledger,
    Shard,
    check,
    documents,
    hashes,
    kept_fraction,
    select,
    selected,
    shards,
)
from raylm.corpus.sources import File, Source

__all__ = [
    "Document",
    "Fault",
    "File",
    "Ledger",
    "Shard",
    "Source",
    "check",
    "documents",
    "hashes",
    "kept_fraction",
    "select",
    "selected",
    "shards",
]
