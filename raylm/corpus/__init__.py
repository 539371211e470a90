"""Sources -> documents.

    sources      corpus.paths -> the files behind them, with size and version; no Ray
    file_part    a file, or a part of one, as bytes: compressed or not
    text         plain text, lines or parts between separators, and source code -> texts
    columns      what of a row is its text: corpus.text, prompt, messages or tokens -> text
    rows         files of rows with columns -> texts: JSON, CSV, Parquet, Arrow, data sets
    formats      each format of files: its suffixes, how it is read, where it can be cut
    listing      corpus.paths -> the files that can be read, and counts of other files
    passages     a document -> passages
    reader       shards of files -> documents: hashed, filtered, counted, of the train or the validation split
    minhash      documents that are nearly the same
    selection    of duplicates and under corpus.max_documents, which documents to keep
    profile      what a corpus looks like: columns of the text, lengths, duplicates, scripts
    split        how to split a corpus: by documents or passages, and how much of it to hold out

The content of a shard, the kept documents and their side of the split depend on the files and settings alone, not on
processes or their order.
"""

from raylm.corpus.file_part import BadDocument
from raylm.corpus.listing import find_sources, have_columns, left_out, list_sources, readable
from raylm.corpus.profile import Profile, TextColumns, guess_columns, profile
from raylm.corpus.reader import (
    Document,
    Ledger,
    Shard,
    content_hash,
    counted_as,
    documents,
    kept_fraction,
    nothing_left,
    shards,
)
from raylm.corpus.selection import SEEN, hashes, records, select, selected
from raylm.corpus.sources import File, Source
from raylm.corpus.split import ENOUGH_UNITS, Holdout, holdout

__all__ = [
    "ENOUGH_UNITS",
    "SEEN",
    "BadDocument",
    "Document",
    "File",
    "Holdout",
    "Ledger",
    "Profile",
    "Shard",
    "Source",
    "TextColumns",
    "content_hash",
    "counted_as",
    "documents",
    "find_sources",
    "guess_columns",
    "hashes",
    "have_columns",
    "holdout",
    "kept_fraction",
    "left_out",
    "list_sources",
    "nothing_left",
    "profile",
    "readable",
    "records",
    "select",
    "selected",
    "shards",
]
