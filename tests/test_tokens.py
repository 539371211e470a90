import json
import os
import pickle
import random
import re
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import one_by_one

from raylm import config, storage, tokens
from raylm import corpus as corpora
from raylm import tokenizer as tokenizers
from raylm.blocks import Packed
from raylm.config import BlocksConfig, CorpusConfig, TokenizerConfig, TrainedTokenizer
from raylm.errors import DataError, StorageError, StorageUnavailable
from raylm.tokens import store as store_module
from raylm.tokens import write

TOKENIZER = TokenizerConfig(train=TrainedTokenizer(vocab_size=300))


def prepare(corpus, tokenizer, **options):
    return tokens.prepare(corpus, tokenizer, sources=corpora.list_sources(corpus), **options)


def fingerprint(corpus, tokenizer):
    return tokens.fingerprint(corpus, tokenizer, corpora.list_sources(corpus))


pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for number in range(40):
        (directory / f"{number:02}.txt").write_text(f"Document {number} says hello hello, naïve. " * (number + 1))
    return CorpusConfig(paths=str(directory), validation_fraction=0.2)


def contents(path):
    return {
        os.path.relpath(os.path.join(parent, file), path): open(os.path.join(parent, file), "rb").read()
        for parent, _, files in os.walk(path)
        for file in files
    }


def small_shards(monkeypatch, corpus, num_bytes):
    """Make shards of few bytes, so that a small corpus has several."""
    whole = write.shards

    def cut(sources):
        parts = [part for shard in whole(sources) for part in shard.parts]
        made, some, size = [], [], 0
        for part in parts:
            some.append(part)
            size += part.file.size
            if size >= num_bytes:
                made.append(corpora.Shard(tuple(some), size))
                some, size = [], 0
        return [*made, corpora.Shard(tuple(some), size)] if some else made

    monkeypatch.setattr(write, "shards", cut)


def test_a_store_gives_back_every_document(corpus, tmp_path):
    seen = []
    store, reused = prepare(
        corpus, TOKENIZER, storage=str(tmp_path), progress=lambda done, total: seen.append((done, total))
    )
    assert not reused
    texts = sorted(store.tokenizer.decode(ids) for split in (store.train, store.validation) for ids in split)
    files = sorted(path.read_text() for path in (tmp_path / "corpus").iterdir())
    assert texts == files
    assert len(store.train) + len(store.validation) == 40
    assert 0 < len(store.validation) < 20
    assert store.train.num_tokens == sum(len(ids) for ids in store.train)
    assert store.train.num_bytes == sum(len(store.tokenizer.decode(ids).encode()) for ids in store.train)
    assert store.train.document_bytes(3) == len(store.tokenizer.decode(store.train[3]).encode())
    total = sum(len(text.encode()) for text in files)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert store.manifest["ledger"] == {"documents": 40, "bytes": total, "kept": 40, "kept bytes": total}


def test_text_that_spells_a_special_token_is_text_and_is_counted(tmp_path):
    (tmp_path / "page.txt").write_text("GPT-2 ends a text with <|endoftext|>, as in a.<|endoftext|>b.")
    (tmp_path / "other.txt").write_text("and the others with </s>")
    corpus = CorpusConfig(paths=f"{tmp_path}/*.txt", validation_fraction=0)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert not any(store.tokenizer.eos_token_id in ids for ids in store.train)
    assert {store.tokenizer.decode(ids) for ids in store.train} == {path.read_text() for path in tmp_path.glob("*.txt")}
    assert store.manifest["ledger"]["spell a special token"] == 1
    assert store.manifest["ledger"]["special tokens as text"] == 2


def test_unknown_tokens_are_counted_of_each_split(tmp_path):
    """The characters that a tokenizer does not know are one unknown token each, and lost."""
    (tmp_path / "a.txt").write_text("hello " * 50)
    (tmp_path / "b.txt").write_text("hello 東 京 hello")
    section = TokenizerConfig(train=TrainedTokenizer(kind="wordpiece", vocab_size=300))
    first = CorpusConfig(paths=f"{tmp_path}/a.txt", validation_fraction=0)
    known, _ = prepare(first, section, storage=str(tmp_path))
    assert (known.train.unknown_tokens, tokens.warnings(known)) == (0, [])
    section = TokenizerConfig(path=f"{known.path}/tokenizer")
    corpus = first.model_copy(update={"validation_paths": (f"{tmp_path}/b.txt",)})
    store, _ = prepare(corpus, section, storage=str(tmp_path))
    assert (store.train.unknown_tokens, store.validation.unknown_tokens) == (0, 2)
    assert store.manifest["validation"]["unknown_tokens"] == 2
    (warning,) = tokens.warnings(store)
    assert re.search(r"2 of the 4 tokens of the validation split \(50 %\) are its unknown token '\[UNK\]'", warning)


def test_a_store_without_a_test_split_is_the_one_that_earlier_versions_wrote():
    """Its fingerprint, as of the commit before there were test splits; its bytes are in golden/manifest.json."""
    files = (corpora.File("/text/a.txt", 3, "1"), corpora.File("/text/b.txt", 4, "2"))
    corpus = CorpusConfig(paths="/text", validation_fraction=0.2)
    found = {
        fraction: tokens.fingerprint(
            corpus.model_copy(update={"test_fraction": fraction}), TOKENIZER, [corpora.Source("/text", files)]
        )
        for fraction in (0.0, 0.1, 0.2)
    }
    assert found[0.0] == "4bcd19d2b0b649d1"
    assert len({*found.values()}) == 3


@pytest.mark.parametrize("tested", [{"test_fraction": 0.2}, {"test_paths": "more"}])
def test_a_test_split_has_shards_of_its_own_and_leaves_the_validation_split_as_it_is(
    corpus, tmp_path, monkeypatch, tested
):
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").write_text("Another document says hello.")
    first, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "first"))
    assert first.test is None
    assert not Path(first.path, "test").exists()
    known = TokenizerConfig(path=f"{first.path}/tokenizer")
    small_shards(monkeypatch, corpus, 3000)
    before, _ = prepare(corpus, known, storage=str(tmp_path))
    section = CorpusConfig(**{**corpus.model_dump(), **tested})
    after, _ = prepare(section, known, storage=str(tmp_path))
    files = [contents(f"{store.path}/validation") for store in (before, after)]
    assert files[0] == files[1] != {}
    assert before.manifest["validation"] == after.manifest["validation"]
    ids = {name: [split.document_id(index) for index in range(len(split))] for name, split in after.splits.items()}
    assert all(ids.values())
    assert len({*ids["train"], *ids["validation"], *ids["test"]}) == sum(map(len, ids.values()))
    count = after.manifest["ledger"]["kept"]
    assert count == sum(after.manifest[name]["documents"] for name in after.splits) == 40 + ("test_paths" in tested)
    assert sum(source["documents"] for source in after.manifest["sources"]) == count
    assert pickle.loads(pickle.dumps(after.test))[0].tolist() == after.test[0].tolist()
    assert "test" in repr(after)
    assert tokens.verify(after) == []
    damaged = next(Path(after.path, "test").iterdir())
    whole = damaged.read_bytes()
    damaged.write_bytes(bytes(len(whole)))
    assert tokens.verify(after) == [f"test/{damaged.name}: its checksum differs"]
    damaged.unlink()
    assert tokens.damage(after.path) == [f"test/{damaged.name}: missing"]
    assert not prepare(section, known, storage=str(tmp_path))[1]
    assert damaged.read_bytes() == whole


def test_a_killed_preparation_and_a_remote_one_have_the_test_split_too(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small_shards(monkeypatch, corpus, 3000)
    corpus = corpus.model_copy(update={"test_fraction": 0.2})
    whole, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "whole"))
    written = []

    def killed(function, numbered):
        for index, shard in numbered:
            if index == 3:
                raise KeyboardInterrupt
            written.append(index)
            yield function(index, shard)

    monkeypatch.setattr(write, "_each", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, TOKENIZER, storage=str(tmp_path / "killed"))
    monkeypatch.setattr(write, "_each", one_by_one)
    resumed, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "killed"))
    assert contents(resumed.path) == contents(whole.path)
    remote, _ = prepare(corpus, TOKENIZER, storage=f"file://{tmp_path}/remote")
    assert contents(tokens.local_copy(remote.path)) == contents(whole.path)
    assert remote.test[0].tolist() == whole.test[0].tolist()


def test_a_tokenizer_is_not_trained_on_test_text(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").write_text("Zweitausend Zebras zogen zusammen. " * 1000)
    plain, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    tested, _ = prepare(corpus.model_copy(update={"test_paths": ("test",)}), TOKENIZER, storage=str(tmp_path))
    assert tested.tokenizer.get_vocab() == plain.tokenizer.get_vocab()


def test_documents_are_views_of_the_file(corpus, tmp_path):
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert store.train[0].dtype == np.uint16
    assert not store.train[0].flags.owndata
    assert np.shares_memory(store.train[0], store.train.arrays(0)[0])


def test_shards_are_plain_arrow(corpus, tmp_path):
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    table = pa.ipc.open_file(os.path.join(store.path, "train", "shard-00000.arrow")).read_all()
    assert table.schema.names == ["tokens", "num_bytes", "doc_id", "source"]
    assert table.num_rows == len(store.train)
    assert table["doc_id"][0].as_py() == store.train.document_id(0)


def test_the_second_time_it_is_there_already(corpus, tmp_path):
    first, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    again, reused = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert reused
    assert again.path == first.path == tokens.store_path(str(tmp_path), corpus, TOKENIZER, corpora.list_sources(corpus))


def test_a_changed_file_or_setting_is_another_store(corpus, tmp_path):
    first = fingerprint(corpus, TOKENIZER)
    assert fingerprint(corpus, TOKENIZER) == first
    assert fingerprint(corpus.model_copy(update={"keep_any": ("hello",)}), TOKENIZER) != first
    (tmp_path / "corpus" / "00.txt").write_text("changed")
    assert fingerprint(corpus, TOKENIZER) != first


def test_a_killed_run_resumes_where_it_stopped(corpus, tmp_path, monkeypatch):
    small_shards(monkeypatch, corpus, 2000)
    whole, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "whole"))

    each, done = write._each, []

    def killed(function, numbered):
        for found in each(function, list(numbered)[:3]):
            done.append(found)
            yield found
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_each", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, TOKENIZER, storage=str(tmp_path / "torn"))
    path = tokens.store_path(str(tmp_path / "torn"), corpus, TOKENIZER, corpora.list_sources(corpus))
    assert not tokens.is_store(path)
    assert len(done) == 3

    redone = []
    monkeypatch.setattr(
        write, "_each", lambda function, numbered: (redone.append(item[0]) or function(*item) for item in numbered)
    )
    again, reused = prepare(corpus, TOKENIZER, storage=str(tmp_path / "torn"))
    assert not reused
    assert min(redone) == 3
    assert contents(again.path) == contents(whole.path)


def test_the_first_documents_are_the_same_ones_however_they_are_cut(corpus, tmp_path, monkeypatch):
    few = corpus.model_copy(update={"max_documents": 7})
    first, _ = prepare(few, TOKENIZER, storage=str(tmp_path / "one"))
    assert len(first.train) + len(first.validation) == 7
    small_shards(monkeypatch, corpus, 500)
    second, _ = prepare(few, TOKENIZER, storage=str(tmp_path / "many"))
    assert [ids.tolist() for ids in first.train] == [ids.tolist() for ids in second.train]


def test_blocks_of_a_store_are_its_joined_documents(corpus, tmp_path, monkeypatch):
    small_shards(monkeypatch, corpus, 2000)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    joined = [token for ids in store.train for token in (*ids.tolist(), store.frame("auto").end)]
    blocks = Packed(store.train, BlocksConfig(block_size=32), store.frame("auto"))
    assert len(blocks) == len(joined) // 32
    assert np.concatenate(list(blocks)).tolist() == joined[: len(blocks) * 32]


def test_a_shard_of_very_many_tokens_has_several_files(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    whole, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "whole"))
    monkeypatch.setattr("raylm.tokens.shard.MOST_TOKENS", 2000)
    monkeypatch.setattr("raylm.tokenizer.BATCH", 4)
    several, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "several"))
    names = [file["file"] for file in several.manifest["train"]["shards"]]
    assert names[:2] == ["train/shard-00000.arrow", "train/shard-00000-001.arrow"]
    assert len(names) > 2
    assert [ids.tolist() for ids in several.train] == [ids.tolist() for ids in whole.train]
    for what in ("documents", "tokens", "bytes"):
        assert several.manifest["train"][what] == whole.manifest["train"][what]
    assert several.manifest["sources"] == whole.manifest["sources"]
    assert tokens.verify(several) == []


def test_a_store_travels_by_its_path(corpus, tmp_path):
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    blocks = Packed(store.train, BlocksConfig(block_size=32), store.frame("auto"))
    blocks[0]
    sent = pickle.dumps(blocks)
    assert len(sent) < 1000
    assert pickle.loads(sent)[1].tolist() == blocks[1].tolist()
    assert len(pickle.loads(pickle.dumps(store)).train) == len(store.train)


def test_a_bad_file_fails_by_name_and_leaves_no_store(corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    corpus = corpus.model_copy(update={"paths": (*corpus.paths, f"{tmp_path}/bad.txt")})
    with pytest.raises(DataError, match=r"bad\.txt: byte 3: invalid UTF-8"):
        prepare(corpus, TokenizerConfig(path=str(_tokenizer(tmp_path))), storage=str(tmp_path))
    assert not list(tmp_path.glob("tokens/*/manifest.json"))


def _tokenizer(tmp_path):
    from raylm import tokenizer

    tokenizer.train(["hello"] * 10, TOKENIZER.train).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_no_manifest_no_store(tmp_path):
    with pytest.raises(DataError, match=r"no token store there"):
        tokens.open_store(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match=r"format 99"):
        tokens.open_store(tmp_path)


@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_the_same_bytes_from_any_number_of_tasks(corpus, tmp_path, monkeypatch, num_tasks):
    """Tasks of 2, 1 and half a CPU on two CPUs: one, two and four at a time."""
    small_shards(monkeypatch, corpus, 2000)
    monkeypatch.setattr(write, "TASK_CPUS", 2 / num_tasks)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "some"))
    monkeypatch.setattr(write, "_each", one_by_one)
    expected, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "one"))
    assert contents(store.path) == contents(expected.path)


def test_two_writers_of_one_store_do_not_harm_each_other(corpus, tmp_path, monkeypatch):
    """The second starts and ends while the first is between two shards."""
    small_shards(monkeypatch, corpus, 2000)
    monkeypatch.setattr(write, "_each", one_by_one)
    expected, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "alone"))
    others = []

    def interrupted(function, numbered):
        for index, item in enumerate(numbered):
            if index == 2:
                monkeypatch.setattr(write, "_each", one_by_one)
                others.append(prepare(corpus, TOKENIZER, storage=str(tmp_path / "both")))
            yield function(*item)

    monkeypatch.setattr(write, "_each", interrupted)
    store, reused = prepare(corpus, TOKENIZER, storage=str(tmp_path / "both"))
    assert not reused
    assert not others[0][1]
    assert contents(store.path) == contents(expected.path)
    assert tokens.verify(store) == []


def test_a_remote_store_is_the_same_store(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    small_shards(monkeypatch, corpus, 2000)
    monkeypatch.setattr(write, "_each", one_by_one)
    local, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path / "local"))
    remote, reused = prepare(corpus, TOKENIZER, storage=f"file://{tmp_path}/remote")
    assert not reused
    assert remote.path.startswith("file://")
    assert contents(remote.path.removeprefix("file://")) == contents(local.path)
    assert [ids.tolist() for ids in remote.train] == [ids.tolist() for ids in local.train]
    assert remote.frame("auto") == local.frame("auto")
    assert tokens.verify(remote) == []
    assert prepare(corpus, TOKENIZER, storage=f"file://{tmp_path}/remote")[1]


def test_verify_finds_every_change_of_a_file(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert tokens.verify(store) == []
    shard = tmp_path / "tokens" / store.fingerprint / "train" / "shard-00000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    assert tokens.verify(store) == [f"train/shard-00000.arrow: {len(content) - 7} of {len(content)} bytes"]
    shard.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    assert tokens.verify(store) == ["train/shard-00000.arrow: its checksum differs"]
    shard.unlink()
    assert tokens.verify(store) == ["train/shard-00000.arrow: missing"]


@pytest.mark.parametrize("uri", ["{}", "file://{}/remote"])
@pytest.mark.parametrize(
    "file", ["train/shard-00001.arrow", "validation/shard-00000.arrow", "tokenizer/tokenizer.json"]
)
def test_a_store_that_lacks_a_file_is_named_where_it_is_opened_and_written_again(
    corpus, tmp_path, monkeypatch, capfd, file, uri
):
    monkeypatch.setattr(write, "_each", one_by_one)
    small_shards(monkeypatch, corpus, 20_000)
    storage = uri.format(tmp_path)
    store, _ = prepare(corpus, TOKENIZER, storage=storage)
    path = Path(store.path.removeprefix("file://"))
    assert tokens.damage(store.path) == []
    before = contents(path)
    faults = [f"{file}: missing"]
    if not file.startswith("tokenizer/"):
        faults.append(f"{file}: 7 of {len(before[file])} bytes")
    for fault in faults:
        (path / file).unlink()
        if "7 of" in fault:
            (path / file).write_bytes(b"partial")
        assert tokens.damage(store.path) == [fault]
        with pytest.raises(
            DataError, match=rf"^{store.path} is damaged: {fault}; run raylm prepare .* writes it again$"
        ):
            tokens.open_store(store.path)
        capfd.readouterr()
        again, reused = prepare(corpus, TOKENIZER, storage=storage)
        assert (again.path, reused) == (store.path, False)
        assert f"{store.path} is damaged: {fault}; it is written again" in capfd.readouterr().err
        assert contents(path) == before


def test_a_manifest_that_is_none_is_written_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    manifest = Path(store.path) / "manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(before[:100])
    with pytest.raises(DataError, match=r"manifest.json is damaged; remove .* and run raylm prepare"):
        tokens.open_store(store.path)
    assert prepare(corpus, TOKENIZER, storage=str(tmp_path))[1] is False
    assert manifest.read_bytes() == before


def test_a_shard_of_other_bytes_is_named_when_it_is_read(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    shard = Path(store.path) / "train" / "shard-00000.arrow"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError, match=rf"^{shard} cannot be read: .*; remove {store.path} and run raylm prepare"):
        tokens.open_store(store.path).train[0]


def test_a_copy_of_a_remote_store_that_lost_a_file_is_made_again(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    store, _ = prepare(corpus, TOKENIZER, storage=f"file://{tmp_path}/remote")
    copy = Path(tokens.local_copy(store.path))
    (copy / "train" / "shard-00000.arrow").unlink()
    tokens.store.local_copy.cache_clear()
    assert tokens.local_copy(store.path) == str(copy)
    assert (copy / "train" / "shard-00000.arrow").exists()
    copied = Path(tokens.store.local_tokenizer(store.path))
    (copied / "tokenizer.json").unlink()
    tokens.store.local_tokenizer.cache_clear()
    assert (Path(tokens.store.local_tokenizer(store.path)) / "tokenizer.json").exists()


def test_copies_of_remote_stores_are_their_users_alone(corpus, tmp_path, monkeypatch):
    """They lie in the temporary directory of all users; a directory that was open before is closed."""
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    (tmp_path / "node" / f"raylm-{os.getuid()}").mkdir(parents=True, mode=0o755)
    store, _ = prepare(corpus, TOKENIZER, storage=f"file://{tmp_path}/remote")
    copy = Path(tokens.local_copy(store.path))
    for directory in (copy, *copy.parents[:3]):
        assert directory.stat().st_mode & 0o777 == 0o700
    tokens.store.local_copy.cache_clear()
    shutil.move(tmp_path / "node", tmp_path / "elsewhere")
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / f"raylm-{os.getuid()}").symlink_to(tmp_path / "elsewhere" / f"raylm-{os.getuid()}")
    (tmp_path / "elsewhere" / copy.relative_to(tmp_path / "node") / "manifest.json").unlink()
    with pytest.raises(StorageError, match=r"is not a directory of this user.*; remove it, or set TMPDIR"):
        tokens.local_copy(store.path)


def test_a_read_that_fails_is_no_damage_of_a_store(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.setattr(storage.retries, "RETRIES_SECONDS", (0.01,))
    monkeypatch.setattr(storage.retries, "_last_failure", -storage.retries.PAUSE_SECONDS)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    failures, plain = [1, 2], pa.memory_map

    def memory_map(path):
        if failures:
            raise OSError(f"Input/output error {failures.pop()}")
        return plain(path)

    monkeypatch.setattr(pa, "memory_map", memory_map)
    with pytest.raises(StorageUnavailable, match=r"shard-00000.arrow cannot be reached: Input/output error 1"):
        tokens.open_store(store.path).train[0]
    failures.append(1)
    storage.retries._last_failure = -storage.retries.PAUSE_SECONDS
    assert len(tokens.open_store(store.path).train[0])


def test_input_that_changed_is_named_and_makes_another_store(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(write, "_each", one_by_one)
    before, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert tokens.changed_inputs(before, corpora.list_sources(corpus)) == []
    directory = tmp_path / "corpus"
    (directory / "00.txt").write_text("another text")
    (directory / "01.txt").unlink()
    (directory / "99.txt").write_text("new")
    assert [
        change.removeprefix(f"{directory}/") for change in tokens.changed_inputs(before, corpora.list_sources(corpus))
    ] == [
        "00.txt: changed (37 -> 12 bytes)",
        "01.txt: removed",
        "99.txt: added",
    ]
    after, reused = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert not reused
    assert after.path != before.path
    said = capfd.readouterr().err
    assert f"the corpus has changed since store {before.fingerprint}" in said
    assert "01.txt: removed" in said


def test_figures_of_each_source(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.txt").write_text(f"text of {name} " * 20)
        (tmp_path / name / "2.txt").write_text(f"more of {name} " * 30)
    corpus = CorpusConfig(paths=(f"{tmp_path}/a", f"{tmp_path}/b"), validation_fraction=0.5)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    figures = [{key: source[key] for key in ("documents", "bytes")} for source in store.manifest["sources"]]
    assert figures == [{"documents": 2, "bytes": 500}, {"documents": 2, "bytes": 500}]
    assert sum(source["tokens"] for source in store.manifest["sources"]) == (
        store.train.num_tokens + store.validation.num_tokens
    )


def test_skipped_rows_are_listed_in_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": 5}\n' + b'{"text": "good too"}\n' * 9)
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl", on_bad_row="skip", validation_fraction=0)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert store.manifest["ledger"]["bad rows"] == 1
    assert json.loads(Path(store.path, "rejected.jsonl").read_text()) == {
        "file": f"{tmp_path}/a.jsonl",
        "place": "row 2",
        "fault": "corpus.text: column 'text' must hold text, got 5",
    }


def test_a_corpus_of_which_nothing_is_left_says_why(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    nothing = corpus.model_copy(update={"keep_any": ("no such word",)})
    with pytest.raises(DataError, match=r"no document is left to train on.*filtered: keep_any: 40"):
        prepare(nothing, TOKENIZER, storage=str(tmp_path))


def test_odd_documents_and_very_long_ones(tmp_path, monkeypatch):
    """A document of one line of 5 MB, ten thousand of one letter, and control characters: all there, unchanged."""
    monkeypatch.setattr(write, "_each", one_by_one)
    rng = random.Random(0)
    long = " ".join(rng.choice(["hello", "document", "naïve", "\u2028", "\f"]) for _ in range(800_000))
    odd = ["a\0b", "\ufeffx", "cr\r\nlf", "\u2028x\u0085\f"]
    rows = [long, *rng.choices("abcdefgh", k=10_000), *odd]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl", validation_fraction=0)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert len(store.train) == len(rows)
    assert store.tokenizer.decode(store.train[0]) == long
    assert "".join(store.tokenizer.decode(ids) for ids in (store.train[i] for i in range(1, 10_001))) == "".join(
        rows[1:10_001]
    )
    assert [store.tokenizer.decode(store.train[i]) for i in range(10_001, len(rows))] == odd


def test_files_are_encoded_without_a_store(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    store, _ = prepare(corpus.model_copy(update={"validation_fraction": 0}), TOKENIZER, storage=str(tmp_path))
    found = tokens.encode_files(corpus, corpora.list_sources(corpus), f"{store.path}/tokenizer")
    assert len(found) == len(store.train)
    assert all(found[i].tolist() == store.train[i].tolist() for i in range(len(found)))
    assert [found.document_bytes(i) for i in range(40)] == [store.train.document_bytes(i) for i in range(40)]


ELI5 = [
    {
        "q_id": "1",
        "title": "Why is the sky blue?",
        "answers": {"text": ["Scattering.", "Blue bends."], "score": [5, 3]},
    },
    {"q_id": "2", "title": "Why is snow white?", "answers": {"text": ["It scatters all light."], "score": [2]}},
]


def test_the_eli5_config_on_rows_of_the_same_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ELI5))
    file = Path(__file__).parents[1] / "configs" / "eli5_finetune.yaml"
    settings = [f"corpus.paths={tmp_path}/qa.jsonl", "corpus.validation_fraction=0"]
    experiment = config.load(file, [*settings, "tokenizer.train={vocab_size: 300}"])
    store, _ = prepare(experiment.corpus, experiment.tokenizer, storage=str(tmp_path))
    assert [store.tokenizer.decode(ids) for ids in store.train] == [
        "Question: Why is the sky blue?\nAnswer: Scattering.\n\nBlue bends.",
        "Question: Why is snow white?\nAnswer: It scatters all light.",
    ]


@pytest.mark.slow
def test_the_code_config_on_what_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    file = Path(__file__).parents[1] / "configs" / "code_from_scratch.yaml"
    settings = ["corpus.paths=[python://matplotlib]", "tokenizer.train.vocab_size=1000"]
    experiment = config.load(file, settings)
    store, _ = prepare(experiment.corpus, experiment.tokenizer, storage=str(tmp_path))
    assert store.manifest["ledger"]["filtered: keep_any"] > 0
    texts = (store.tokenizer.decode(ids) for ids in store.train)
    assert all(any(word in text for word in experiment.corpus.keep_any) for text in texts)


@pytest.mark.parametrize("source", ["saved", "hub", "stream"])
def test_data_sets_reach_the_store_through_ray(tmp_path, source):
    rows = [{"text": f"Row {row} says hello."} for row in range(30)]
    if source == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        path = f"{tmp_path}/saved"
    else:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = f"hub://{tmp_path}/data?split=train[5:]" if source == "hub" else f"hub://{tmp_path}/data?streaming=true"
    corpus = CorpusConfig(paths=path, validation_fraction=0)
    store, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    expected = [row["text"] for row in rows][5 if source == "hub" else 0 :]
    assert [store.tokenizer.decode(ids) for ids in store.train] == expected


@pytest.mark.parametrize("hashes_at_once", [10_000_000, 5])
def test_duplicates_of_each_split_are_counted(corpus, tmp_path, monkeypatch, hashes_at_once):
    """Those that are trained on and scored are warned of; without them nothing is."""
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.setattr(write, "HASHES_AT_ONCE", hashes_at_once)
    for name, text in {"40": "again", "41": "again", "42": "again", "43": "seen", "44": "once"}.items():
        (tmp_path / "corpus" / f"{name}.txt").write_text(text)
    (tmp_path / "held").mkdir()
    for name, text in {"a": "seen", "b": "not seen", "c": "not seen"}.items():
        (tmp_path / "held" / f"{name}.txt").write_text(text)
    held = corpus.model_copy(update={"validation_paths": (f"{tmp_path}/held",)})
    store, _ = prepare(held, TOKENIZER, storage=str(tmp_path))
    counted = {what: count for what, count in store.manifest["ledger"].items() if "duplicates" in what}
    assert counted == {
        "duplicates: in train": 2, "duplicates: in validation": 1, "duplicates: trained on and in validation": 1,
    }  # fmt: skip
    (warning,) = tokens.warnings(store)
    assert "1 of the 3 documents of the validation split are documents of the training split, too" in warning
    store, _ = prepare(held.model_copy(update={"deduplicate": "exact"}), TOKENIZER, storage=str(tmp_path))
    counted = {what: count for what, count in store.manifest["ledger"].items() if "duplicates" in what}
    assert counted == {"filtered: duplicates": 4, "duplicates: of another split": 1}
    assert tokens.warnings(store) == []


# Token ids that are there already ------------------------------------------------------------------------------------


@pytest.fixture
def of_ids(tmp_path, monkeypatch):
    """(texts, their ids, a tokenizer): the ids as rows of a .jsonl, a .parquet and a .csv file."""
    monkeypatch.setattr(write, "_each", one_by_one)
    texts = [f"naïve text {number} of 東京 " * (number + 1) for number in range(12)]
    made = tokenizers.train(texts, TrainedTokenizer(vocab_size=300, special_tokens=["</s>", "<s>"]))
    made.save_pretrained(tmp_path / "tokenizer")
    ids = [made(text, add_special_tokens=False)["input_ids"] for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"x": {"input_ids": row}}) + "\n" for row in ids[:4]))
    pa.parquet.write_table(pa.table({"x": [{"input_ids": row} for row in ids[4:8]]}), tmp_path / "b.parquet")
    rows = "\n".join(" ".join(map(str, row)) for row in ids[8:])
    (tmp_path / "c.csv").write_text(f"x.input_ids\n{rows}\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts, ids, TokenizerConfig(path=f"{tmp_path}/tokenizer")


def test_a_column_of_token_ids_gives_the_store_of_its_text(of_ids, tmp_path):
    _, ids, section = of_ids
    options = {"tokens": "x.input_ids", "validation_fraction": 0}
    corpus = CorpusConfig(paths=[f"{tmp_path}/{name}" for name in ("a.jsonl", "b.parquet", "c.csv")], **options)
    store, _ = prepare(corpus, section, storage=str(tmp_path))
    assert [document.tolist() for document in store.train] == ids
    of_text, _ = prepare(
        CorpusConfig(paths=f"{tmp_path}/texts.jsonl", validation_fraction=0), section, storage=str(tmp_path)
    )
    for what in (store.train.document_bytes, store.train.document_id):
        assert [what(index) for index in range(12)] == [
            getattr(of_text.train, what.__name__)(index) for index in range(12)
        ]
    assert store.manifest["ledger"] == of_text.manifest["ledger"]
    assert store.manifest["tokenizer"]["encoder"]["name"] == "corpus.tokens"


def test_special_tokens_around_token_ids_are_removed_and_counted(of_ids, tmp_path, caplog):
    texts, ids, section = of_ids
    eos = [0]
    rows = [[*eos, *ids[0], *eos], [*ids[1], *eos, *eos], ids[2], [*ids[3], *eos, *ids[4]], [*eos, *eos], []]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    corpus = CorpusConfig(paths=f"{tmp_path}/rows.jsonl", tokens="input_ids", validation_fraction=0)
    with caplog.at_level("INFO", logger="raylm"):
        store, _ = prepare(corpus, section, storage=str(tmp_path))
    assert [document.tolist() for document in store.train] == [*ids[:3], rows[3]]
    num_bytes = sum(len(text.encode()) for text in [*texts[:5], "</s>"])
    assert store.manifest["ledger"] == {
        "documents": 6, "kept": 4, "empty": 2, "bytes": num_bytes, "kept bytes": num_bytes, "special tokens inside": 1,
        "removed: </s> in front": 2, "removed: </s> at the end": 2,
    }  # fmt: skip
    assert "of 6 documents 2 had </s> in front, 2 had </s> at the end" in caplog.text
    assert "1 special tokens are inside documents" in caplog.text


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([5, 99_999], "token id 99,999 is not in the vocabulary of the tokenizer that made the ids"),
        ([5, -1], r"row 2: corpus\.tokens: column 'input_ids' must hold a list of token ids, got \[5, -1\]"),
        (["5"], "must hold a list of token ids"),
        ([True], "must hold a list of token ids"),
        ("some text", "must hold a list of token ids"),
    ],
)
def test_a_row_that_holds_no_token_ids_is_named(of_ids, tmp_path, row, says):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"input_ids": each}) + "\n" for each in ([7, 8], row)))
    corpus = CorpusConfig(paths=f"{tmp_path}/rows.jsonl", tokens="input_ids", validation_fraction=0)
    with pytest.raises(DataError, match=rf"rows\.jsonl: .*{says}.*on_bad_row=skip"):
        prepare(corpus, of_ids[2], storage=str(tmp_path))
    store, _ = prepare(corpus.model_copy(update={"on_bad_row": "skip"}), of_ids[2], storage=str(tmp_path))
    assert store.manifest["ledger"]["bad rows"] == 1
    assert [document.tolist() for document in store.train] == [[7, 8]]


def test_a_corpus_without_the_column_of_token_ids_names_the_setting(of_ids, tmp_path):
    corpus = CorpusConfig(paths=f"{tmp_path}/a.jsonl", tokens="ids")
    with pytest.raises(DataError, match=r"corpus\.tokens: no column 'ids'; columns: x") as caught:
        corpora.list_sources(corpus)
    assert caught.value.where == "corpus.tokens"


def test_a_large_vocabulary_that_does_not_know_the_text_is_warned_of(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_each", one_by_one)
    monkeypatch.setattr(store_module, "LARGE_VOCABULARY", 250)
    made, _ = prepare(corpus, TOKENIZER, storage=str(tmp_path))
    assert tokens.warnings(made) == []
    for path in (tmp_path / "corpus").iterdir():
        path.write_text("".join(random.Random(path.name).choices("αβγδεζηθικλμνξοπ", k=300)))
    section = TokenizerConfig(path=f"{made.path}/tokenizer")
    store, _ = prepare(corpus, section, storage=str(tmp_path))
    (warning,) = tokens.warnings(store)
    assert "a token is 1.00 bytes of text on average, which is little for a vocabulary of" in warning
