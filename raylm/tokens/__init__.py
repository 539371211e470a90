"""Documents -> token store: written once, then memory-mapped.

    store      read a store: documents as views of the memory map; verify it
    source_split   the documents of one source of a split
    shard      write one shard, in one task
    reuse      shards that another store has already
    write      write a store: its fingerprint, a task for each shard, the manifest last

    <storage>/tokens/<fingerprint>/
        manifest.json                  written last: no manifest, no store
        tokenizer/                     save_pretrained
        train/shard-00000.arrow        Arrow IPC, uncompressed, one row a document:
        validation/shard-00000.arrow       tokens: list<uint16 or uint32>, num_bytes, doc_id, source
        test/shard-00000.arrow             with prompts also answers: list<uint8>, whether each token is of one;
                                       test/ only if the corpus has a test split
        shards.json                    what each shard was made of, and its counts: other stores may share its files
        rejected.jsonl                 documents that could not be read, if any were skipped
        progress/shard-00000.json      while it is written: the finished shards, after which a killed run resumes

The store holds the tokens of the documents and nothing between them: end-of-text tokens are added when blocks are cut.
The same files and settings give the same bytes, however many tasks write them, because the content of a shard depends
on the files alone. Two writers of one store write the same files.
"""

from raylm.tokens.source_split import SourceSplit
from raylm.tokens.store import (
    ANSWERS,
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
    splits,
    tokenizer_section,
    verify,
    warnings,
)
from raylm.tokens.write import bytes_per_token, changes, encode_files, fingerprint, prepare, set_up_ray_data, store_path

__all__ = [
    "ANSWERS",
    "Encoded",
    "SourceSplit",
    "Split",
    "Store",
    "bytes_per_token",
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
    "splits",
    "store_path",
    "tokenizer_section",
    "verify",
    "warnings",
]
