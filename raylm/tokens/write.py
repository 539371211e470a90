"""Write a token store: its fingerprint, a task for each shard, the manifest last."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from raylm import console
from raylm import tokenizer as tokenizers
from raylm.config import CorpusConfig, TokenizerConfig
from raylm.corpus import Ledger, Shard, Source, documents, hashes, left_out, nothing_left, select, selected, shards
from raylm.corpus.sources import HUB
from raylm.errors import RaylmError, StorageUnavailable, first_of
from raylm.storage import names, read, remove
from raylm.tokens import reuse
from raylm.tokens.shard import FRAMES, encoded, encoder_of, facts_name, finished, ready, write_shard
from raylm.tokens.store import (
    ANSWERS,
    COUNTED,
    FORMAT,
    SEEN_IN_TRAINING,
    SPLITS,
    Encoded,
    Store,
    changed_inputs,
    checksum,
    damage,
    document_ids,
    is_store,
    local_tokenizer,
    open_store,
    shown,
    write,
)

logger = logging.getLogger(__name__)

# Text to train a tokenizer on, bytes an entry of the vocabulary. On the standard library with 4096 entries, 8 MB give
# 0.4 % more tokens than all 31 MB, in a quarter of the time.
SAMPLE_BYTES = 2000

CHECKED_BYTES = 500_000
"""Of text on which a fast encoder must agree with the tokenizer: well below a second."""

HASHES_AT_ONCE = 10_000_000
"""Hashes of documents, 8 bytes each, that are in memory while duplicates are counted."""

SHARING_THREADS = 8
"""Shards that are shared with other stores at a time: each is a request to the storage, or the checksum of a file."""

TASK_CPUS = 1.0
"""CPUs that a task for a shard reserves."""

Progress = Callable[[float, float | None], None]


# What a store is made of ---------------------------------------------------------------------------------------------


def fingerprint(corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: list[Source]) -> str:
    """Identifies the inputs of a store: files with size and time, filters, split, tokenizer. No blocks, no model."""
    made_of = [FORMAT, _settings(corpus, tokenizer), [[list(file) for file in source.files] for source in sources]]
    return checksum(json.dumps(made_of, sort_keys=True).encode())[:16]


def store_path(storage: str, corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: list[Source]) -> str:
    """The path of the store of these settings, which may not exist yet."""
    return f"{storage.rstrip('/')}/tokens/{fingerprint(corpus, tokenizer, sources)}"


def _settings(corpus: CorpusConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    version = tokenizers.fingerprint(tokenizer)
    # The tokenizer's files identify it, wherever they are and whatever revision was asked for.
    elsewhere = {"path", "revision"} if version and tokenizer.gguf_file is None else set()
    unused = {"test_paths", "test_fraction"} if "test" not in corpus.splits else set()
    template = {"chat_template": _chat_template(tokenizer)} if corpus.messages is not None else {}
    return {
        "corpus": {
            **corpus.model_dump(mode="json", exclude=unused | corpus.not_given),
            "split_by": corpus.split_by or "document",
        },
        "tokenizer": tokenizer.model_dump(mode="json", exclude={"prefix", *elsewhere}),
        "tokenizer_version": version,
        **template,
    }


@lru_cache(maxsize=8)  # a command asks several times
def _chat_template(section: TokenizerConfig) -> str:
    """A checksum of the chat template of a tokenizer to load."""
    return checksum(tokenizers.template_of(tokenizers.load_section(section), str(section.path)).encode())


# The store -----------------------------------------------------------------------------------------------------------


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    *,
    storage: str,
    sources: list[Source],
    progress: Progress = lambda done, total: None,
) -> tuple[Store, bool]:
    """The store of these settings, and whether it existed. `sources`: the files of the corpus, as listed.

    Ray must be connected unless the store exists. A killed run resumes with the unfinished shards.
    """
    path = store_path(storage, corpus, tokenizer, sources)
    if (faults := damage(path)) == []:
        return open_store(path), True
    if faults:
        logger.info(f"{path} is damaged: {shown(faults)}; it is written again")
        remove(f"{path}/progress")
        if any(fault.startswith("tokenizer/") for fault in faults):
            remove(f"{path}/tokenizer")
    elif older := _older_store(storage, corpus, tokenizer, sources):
        logger.info(f"{_changed(older, sources)}; a new store is written")
        if tokenizer.train is not None:
            logger.info(
                "tokenizer.train: a new tokenizer is trained on the changed text, so all of it is tokenized again; "
                f"with tokenizer.path={older.path}/tokenizer instead, only what is new is tokenized"
            )
    if others := left_out(sources):
        logger.info(f"corpus.paths: left out, because they are no text to train on: {others}")
    settings = _settings(corpus, tokenizer)
    try:
        manifest = _write_store(path, corpus, tokenizer, sources, progress)
    except OSError:
        if is_store(path):  # another writer finished and removed the progress
            return open_store(path), False
        raise
    manifest = {"format": FORMAT, "fingerprint": os.path.basename(path), "settings": settings, **manifest}
    write(path, "manifest.json", json.dumps(manifest, indent=1).encode())
    with contextlib.suppress(StorageUnavailable):  # the store is complete
        remove(f"{path}/progress")
    return open_store(path), False


def _write_store(
    path: str, corpus: CorpusConfig, section: TokenizerConfig, sources: list[Source], progress: Progress
) -> dict[str, Any]:
    to_read = shards(sources)
    duplicates: Ledger = Ledger()
    if selected(corpus):

        def hashes_of(some: list[Shard]) -> Iterator[bytes]:
            return _each(lambda index, shard: hashes(shard, corpus), enumerate(some))

        to_read = select(to_read, hashes_of, corpus, duplicates)
    _write_tokenizer(path, section, to_read, corpus)
    if corpus.tokens is not None:
        encoder = tokenizers.the_only(tokenizers.GIVEN)
    elif corpus.has_prompts:  # of which token is of which character, the fast one says nothing
        encoder = tokenizers.the_only("tokenizers")
    else:
        encoder = tokenizers.choose_encoder(local_tokenizer(path), _sample(to_read, corpus, CHECKED_BYTES))
    if encoder["differs"]:
        logger.warning("%s; encoding with %s instead, many times slower", encoder["differs"], encoder["name"])
    written = _write_shards(path, to_read, corpus, encoder, progress)
    write(path, reuse.SHARDS, json.dumps(written).encode())
    written = [_of_all_sources(result, shard) for result, shard in zip(written, to_read, strict=True)]
    splits: dict[str, Any] = {name: _split(written, name) for name in corpus.splits}
    ledger = sum((Ledger(shard["ledger"]) for shard in written), Ledger()) + duplicates
    ledger.update(_repeated(path, splits))
    for source in sources:
        ledger.update({f"left out: {kind}": count for kind, count in source.left_out.items()})
    if not splits["train"]["documents"]:
        raise nothing_left(ledger)
    if frames := {what.removeprefix(FRAMES): count for what, count in ledger.items() if what.startswith(FRAMES)}:
        counts = ", ".join(f"{count:,} had {what}" for what, count in frames.items())
        logger.info(
            f"corpus.tokens: of {ledger['documents']:,} documents {counts}: removed, because raylm puts them there"
        )
    if inside := ledger["special tokens inside"]:
        logger.warning(
            f"corpus.tokens: {inside:,} special tokens are inside documents, as if each row were several documents; "
            "they are trained on and scored like text"
        )
    rejected = [fault for shard in written for fault in shard["rejected"]]
    if rejected:
        write(path, "rejected.jsonl", "".join(json.dumps(fault) + "\n" for fault in rejected).encode())
        logger.info(f"{ledger['bad rows']:,} documents cannot be read and are left out; see {path}/rejected.jsonl")
    return {
        "tokenizer": {**_tokenizer_facts(path), "encoder": encoder},
        "ledger": dict(ledger),
        "sources": [
            {
                "name": source.label,
                **({"path": source.path} if source.name else {}),
                **_of_source(written, index, splits),
                "files": [list(file) for file in source.files],
            }
            for index, source in enumerate(sources)
        ],
        **splits,
    }


def changes(storage: str, corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: list[Source]) -> str:
    """If a store of the same settings has other files, which store and which files; else empty."""
    older = _older_store(storage, corpus, tokenizer, sources)
    return _changed(older, sources) if older else ""


def _changed(older: Store, sources: list[Source]) -> str:
    found = changed_inputs(older, sources)
    return f"the corpus has changed since store {os.path.basename(older.path)}: {first_of(found, 5)}"


def _older_store(storage: str, corpus: CorpusConfig, tokenizer: TokenizerConfig, sources: list[Source]) -> Store | None:
    """A store of the same settings and other files: of the same paths, else of others with a file in common."""
    settings = _settings(corpus, tokenizer)
    files = {file.path for source in sources for file in source.files}
    related: Store | None = None
    for name in names(f"{storage.rstrip('/')}/tokens"):
        path = f"{storage.rstrip('/')}/tokens/{name}"
        manifest = json.loads(read(f"{path}/manifest.json") or b"{}")
        if manifest.get("settings") == settings:
            return Store(path, manifest)
        if _but_paths(manifest.get("settings")) == _but_paths(settings) and not files.isdisjoint(
            file[0] for source in manifest["sources"] for file in source["files"]
        ):
            related = Store(path, manifest)
    return related


def _but_paths(settings: dict[str, Any] | None) -> dict[str, Any] | None:
    """Settings of a store without the paths of its corpus."""
    if settings is None:
        return None
    others = {name: value for name, value in settings["corpus"].items() if not name.endswith("paths")}
    return {**settings, "corpus": others}


# Tokenizer -----------------------------------------------------------------------------------------------------------


def _write_tokenizer(path: str, section: TokenizerConfig, plan: list[Shard], corpus: CorpusConfig) -> None:
    """Load or train the tokenizer and save it in the store, unless the store has one."""
    if read(f"{path}/tokenizer/tokenizer_config.json") is not None:
        return
    if section.train is not None:
        most = SAMPLE_BYTES * section.train.vocab_size
        share = min(most, sum(shard.num_bytes for shard in plan))
        size = console.format_size(share)
        logger.info(f"Training a tokenizer of {section.train.vocab_size:,} entries on {size} of text")
        made = tokenizers.train(_sample(plan, corpus, most), section.train)
    else:
        made = tokenizers.load_section(section)
    if "://" not in path:
        os.makedirs(f"{path}/progress", exist_ok=True)
        partial = f"{path}/progress/tokenizer.{uuid.uuid4().hex}"
        made.save_pretrained(partial)
        try:
            os.rename(partial, f"{path}/tokenizer")
        except OSError:  # another writer was faster
            shutil.rmtree(partial)
        return
    with tempfile.TemporaryDirectory() as directory:
        made.save_pretrained(directory)
        files = [file for file in Path(directory).iterdir() if file.is_file()]  # not additional chat templates
        for file in sorted(files, key=lambda file: file.name == "tokenizer_config.json"):
            write(path, f"tokenizer/{file.name}", file.read_bytes())


def _sample(plan: list[Shard], corpus: CorpusConfig, most: int) -> Iterator[str]:
    """About `most` bytes of training documents, evenly from all shards; long documents are cut.

    With corpus.test_paths they are the same as without.
    """
    plan = [shard for shard in plan if shard.parts[0].split != "test"]
    share = most / max(1, sum(shard.num_bytes for shard in plan))
    for shard in plan:
        left = share * shard.num_bytes
        for document in documents(shard, corpus, Ledger()):
            if left <= 0:
                break
            if document.split == "train":
                size = len(document.text.encode())
                yield document.text if size <= most else document.text[: max(1, int(left))]
                left -= size


def bytes_per_token(sources: list[Source], corpus: CorpusConfig, section: TokenizerConfig, most: int) -> float:
    """UTF-8 bytes of a token, of about `most` bytes of training text: by the tokenizer to load, or one trained on them.

    hub:// sources are skipped because reading them would download them; infinite without any text.
    """
    local = [source for source in sources if not source.path.startswith(HUB)]
    texts = list(_sample(shards(local), corpus, most))
    if not texts:
        return math.inf
    if corpus.tokens is not None:  # then the bytes are those of the ids in decimal
        return sum(map(len, texts)) / sum(len(text.split()) for text in texts)
    made = tokenizers.load_section(section) if section.train is None else tokenizers.train(texts, section.train)
    num_tokens = sum(map(len, made(texts, add_special_tokens=False)["input_ids"]))
    return sum(len(text.encode()) for text in texts) / max(1, num_tokens)


def _tokenizer_facts(path: str) -> dict[str, Any]:
    directory = local_tokenizer(path)
    made = tokenizers.load(directory)
    files = {file.name: checksum(file.read_bytes()) for file in sorted(Path(directory).iterdir()) if file.is_file()}
    prefixes = ("auto", "eos", "none", *(["bos"] if made.bos_token_id is not None else []))
    frames = {prefix: tokenizers.frame(made, prefix) for prefix in prefixes}
    return {"vocab_size": len(made), "eos_token": made.eos_token, "frames": frames, "files": files}


# Shards --------------------------------------------------------------------------------------------------------------


def _write_shards(
    path: str, plan: list[Shard], corpus: CorpusConfig, encoder: dict[str, Any], progress: Progress
) -> list[dict[str, Any]]:
    """Write every missing shard, or take it from another store. Returns the result of `write_shard` for each."""
    common = reuse.made_of(corpus, local_tokenizer(path), encoder)
    keys = [reuse.key(common, shard) for shard in plan]
    total = sum(shard.num_bytes for shard in plan)
    done_before = set(names(f"{path}/progress"))
    found = {
        index: finished(path, index, key) if facts_name(index) in done_before else None
        for index, key in enumerate(keys)
    }
    done = sum(shard.num_bytes for index, shard in enumerate(plan) if found[index])
    progress(done, total)
    missing = [index for index in found if not found[index]]
    others = reuse.OtherStores(path) if missing else None
    if others is not None:
        with ThreadPoolExecutor(SHARING_THREADS) as pool:
            taken = pool.map(lambda index: others.take(index, keys[index]), missing)
            for index, result in zip(missing, taken, strict=True):
                found[index] = result
                done += plan[index].num_bytes if result else 0
                progress(done, total)
        if count := sum(found[index] is not None for index in missing):
            logger.info(
                f"{count:,} of {len(plan):,} shards were made of the same files and settings for another token store "
                "and are shared with it; only the others are tokenized"
            )

    def tokenize(index: int, shard: Shard) -> dict[str, Any]:
        key = keys[index]
        return finished(path, index, key) or write_shard(path, index, shard, key, corpus, encoder["name"])

    missing = [index for index in found if not found[index]]
    tasks = _each(tokenize, ((index, plan[index]) for index in missing))
    for index, written in zip(missing, tasks, strict=True):
        found[index] = written
        done += plan[index].num_bytes
        progress(done, total)
    return [shard for shard in found.values() if shard is not None]


def _of_all_sources(written: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """The result of `write_shard`, with the numbers that the corpus gives its sources."""
    result = dict(written)
    for name in SPLITS:
        if name in result:
            result[name] = [
                {**file, "sources": {str(shard.sources[int(at)]): counts for at, counts in file["sources"].items()}}
                | ({} if shard.sources == list(range(len(shard.sources))) else {"source_numbers": shard.sources})
                for file in result[name]
            ]
    return result


def _split(written: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """A split of the manifest: its sums and shards."""
    found = [file for shard in written for file in shard[name]]
    counted = [what for what in (*COUNTED, ANSWERS) if what in COUNTED or any(what in shard for shard in found)]
    sums = {what: sum(shard[what] for shard in found) for what in counted}
    return {**sums, "shards": [{key: value for key, value in shard.items() if key != "sources"} for shard in found]}


def _repeated(path: str, splits: dict[str, Any]) -> Counter[str]:
    """The documents of each split that repeat an earlier one exactly, and those held out that are also trained on."""
    files = [(name, shard["file"]) for name in splits for shard in splits[name]["shards"]]
    passes = -(-sum(split["documents"] for split in splits.values()) // HASHES_AT_ONCE)
    repeated: Counter[str] = Counter()
    for number in range(passes):

        def ids(file: tuple[str, str], number: int = number) -> np.ndarray:
            found = document_ids(f"{path}/{file[1]}")
            return found[found % np.uint64(passes) == number] if passes > 1 else found

        with ThreadPoolExecutor(SHARING_THREADS) as pool:
            found = list(pool.map(ids, files))
        hashes = {}
        for name in splits:
            of_split = [each for (split, _), each in zip(files, found, strict=True) if split == name]
            hashes[name] = np.concatenate([np.empty(0, np.uint64), *of_split])
        for name, own in hashes.items():
            repeated[f"duplicates: in {name}"] += len(own) - len(np.unique(own))
            if name != "train":
                repeated[f"{SEEN_IN_TRAINING}{name}"] += int(np.isin(own, hashes["train"]).sum())
    return Counter({what: repeated[what] for what in sorted(repeated) if repeated[what]})


def _of_source(written: list[dict[str, Any]], index: int, splits: Iterable[str]) -> dict[str, int]:
    """Kept documents, tokens and bytes of one source in all splits."""
    files = [file for shard in written for name in splits for file in shard[name]]
    found = [file["sources"].get(str(index), {}) for file in files]
    return {what: sum(counts.get(what, 0) for counts in found) for what in ("documents", "tokens", "bytes")}


# Without a store -----------------------------------------------------------------------------------------------------


def encode_files(corpus: CorpusConfig, sources: list[Source], tokenizer: str) -> Encoded:
    """The documents of a corpus, encoded with the tokenizer of a directory, in this process."""
    encode = encoder_of(corpus, tokenizer, "tokenizers")
    found = Encoded()
    for shard in shards(sources):
        for document in ready(shard, corpus, encode, Ledger()):
            ids, _, *answers = encoded(encode, [document])
            marks = answers[0].astype(bool) if answers else None
            found.append(ids, document.num_bytes, document.hash, corpus.labels[document.source], marks)
    return found


# Ray Data ------------------------------------------------------------------------------------------------------------


def _each(function: Callable[[int, Shard], Any], numbered: Iterable[tuple[int, Shard]]) -> Iterator[Any]:
    """function(index, shard) for every shard, in tasks of TASK_CPUS, streamed in the given order.

    One row for each task, because Ray Data would merge small blocks into one task. Only counts are returned.
    """
    import ray.data

    items = [{"shard": pickle.dumps(item)} for item in numbered]
    if not items:
        return
    set_up_ray_data(ray.data.DataContext.get_current())

    def row(item: dict[str, Any]) -> dict[str, Any]:
        # A user's error is returned as a value, because Ray would wrap it in a traceback.
        try:
            return {"found": pickle.dumps(function(*pickle.loads(item["shard"])))}
        except RaylmError as error:
            return {"found": pickle.dumps(error)}

    tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(row, num_cpus=TASK_CPUS)
    for answer in tasks.iter_rows():
        found = pickle.loads(answer["found"])
        if isinstance(found, RaylmError):
            raise found
        yield found


def set_up_ray_data(context: Any) -> None:
    """Have Ray Data keep the order of rows and print nothing."""
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    levels = {
        "": logging.WARNING,
        "._internal.progress": logging.ERROR,  # it warns that its bars are off
        ".exceptions": logging.CRITICAL,  # errors are raised as well
    }
    for name, level in levels.items():
        logging.getLogger(f"ray.data{name}").setLevel(level)
