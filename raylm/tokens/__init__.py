"""Documents -> token store: written once, memory-mapped ever after.

    store      read a store: documents as views of the memory map; verify it
    shard      one shard: tokenized and written by one task, and what is said of it
    write      a whole one: what it is made of, a task a shard, the manifest last

    <storage>/tokens/<fingerprint>/
        manifest.json                  written last: no manifest, no store
        tokenizer/                     save_pretrained
        train/shard-00000.arrow        Arrow IPC, uncompressed, one row a document:
        validation/shard-00000.arrow       tokens: list<uint16 or uint32>, num_bytes, doc_id, source
        rejected.jsonl                 documents that could not be read, if any were skipped
        progress/shard-00000.json      while it is written: the shards that are done; a killed run goes on after them

The store holds the tokens of the documents and nothing between them: end-of-text tokens are put in where blocks are
cut. The same files and settings give the same bytes, however many tasks write them: what a shard holds depends on the
files alone, and two writers of one store write the same files.
"""

from raylm.tokens.store import (
    COUNTED,
    SPLITS,
    Encoded,
    Split,
    Store,
    changed_inputs,
    damage,
    incomparable,
    is_store,
    local_copy,
    open_store,
    shown,
    tokenizer_section,
    verify,
    warnings,
)
from raylm.tokens.write import changes, encode_files, fingerprint, prepare, set_up_ray_data, store_path

__all__ = [
    "COUNTED",
    "SPLITS",
    "Encoded",
    "Split",
    "Store",
    "changed_inputs",
    "changes",
    "damage",
    "encode_files",
    "fingerprint",
    "incomparable",
    "is_store",
    "local_copy",
    "open_store",
    "prepare",
    "set_up_ray_data",
    "shown",
    "store_path",
    "tokenizer_section",
    "verify",
    "warnings",
]
