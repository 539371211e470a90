"""Shards that a store shares with other stores of the same storage, because they were made of the same.

A corpus that has grown, shrunk or changed has a store of its own. Where one of its shards is made of the same files,
settings, tokenizer and encoder as one of another store, it is that one's file: a hard link, on remote storage a copy
that the server makes. So only what is new is tokenized, and the store has the bytes of one that was prepared from
nothing. Removing one of the stores leaves the others whole.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from typing import Any

from raylm import storage
from raylm import tokenizer as tokenizers
from raylm.config import CorpusConfig
from raylm.corpus import Shard
from raylm.errors import StorageError
from raylm.storage import is_remote, names, read
from raylm.tokens.store import FORMAT, SPLITS, checksum

SHARDS = "shards.json"
"""The result of `write_shard` for each shard of a complete store, in order."""

OF_OTHER_DOCUMENTS = {"paths", "validation_paths", "test_paths", "deduplicate", "max_documents"}
"""Settings that decide which files and documents a shard has, not what becomes of them."""

Result = dict[str, Any]
"""What `write_shard` returns."""


def made_of(corpus: CorpusConfig, tokenizer: str, encoder: dict[str, Any]) -> str:
    """A checksum of all that decides the content of a store's shards, except which documents they have.

    `tokenizer`: its local directory.
    """
    settings = corpus.model_dump(mode="json", exclude=OF_OTHER_DOCUMENTS | corpus.not_given)
    settings |= {
        "split_by": corpus.split_by or "document",
        "splits": corpus.splits,
        "validation_paths": bool(corpus.validation_paths),
        "test_paths": bool(corpus.test_paths),
        "max_documents": corpus.max_documents is not None,
    }
    rules = tokenizers.rules(tokenizer)
    if corpus.messages is not None:
        rules += tokenizers.template_of(tokenizers.load(tokenizer), tokenizer)
    return checksum(json.dumps([FORMAT, settings, rules, encoder["name"], encoder["version"]]).encode())


def key(common: str, shard: Shard) -> str:
    """Identifies the content of a shard. `common`: what all shards of the store are made of."""
    numbers = shard.sources
    parts = [part._replace(source=numbers.index(part.source)) for part in shard.parts]
    keep = None if shard.keep is None else [shard.num_bits, checksum(shard.keep)]
    return checksum(json.dumps([common, parts, keep]).encode())


class OtherStores:
    """The finished shards of the other stores of a storage, complete or not, by key."""

    def __init__(self, path: str):
        self._path = path
        self._found: dict[str, tuple[str, Result]] = {}
        parent, _, own = path.rpartition("/")
        for name in names(parent):
            if name != own:
                for result in _results(f"{parent}/{name}"):
                    self._found.setdefault(result["key"], (f"{parent}/{name}", result))

    def take(self, index: int, key: str) -> Result | None:
        """Shard `index` of the store as `write_shard` would return it; None if no other store has it whole."""
        if key not in self._found:
            return None
        store, result = self._found[key]
        result = copy.deepcopy(result)
        for name in SPLITS:
            for entry in result.get(name, ()):
                theirs = f"{store}/{entry['file']}"
                entry["file"] = re.sub(r"shard-\d+", f"shard-{index:05}", entry["file"])
                if not self._share(theirs, entry):
                    return None
        return result

    def _share(self, theirs: str, entry: dict[str, Any]) -> bool:
        ours = f"{self._path}/{entry['file']}"
        try:
            storage.share(theirs, ours, scratch=f"{self._path}/progress")
            if storage.size(ours) != entry["size"]:
                return False
            if is_remote(ours):  # reading it would take as long as to tokenize it
                return True
            with storage.reading(ours) as stream:
                found = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            return found == entry["checksum"]
        except (FileNotFoundError, NotImplementedError, StorageError):  # its store is being removed; nothing is copied
            return False


def _results(store: str) -> list[Result]:
    """The results of the finished shards of a store; none of a store of an earlier version."""
    contents = [read(f"{store}/{SHARDS}")]
    if contents == [None]:
        progress = [name for name in names(f"{store}/progress") if re.fullmatch(r"shard-\d+\.json", name)]
        contents = [read(f"{store}/progress/{name}") for name in progress]
    found: list[Result] = []
    for content in contents:
        with contextlib.suppress(ValueError):  # damaged
            read_back = json.loads(content or b"[]")
            found += read_back if isinstance(read_back, list) else [read_back]
    return [result for result in found if isinstance(result, dict) and "key" in result]
