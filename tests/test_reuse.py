import json
import os
import random
import shutil

import pytest
from conftest import one_by_one
from hypothesis import given, settings
from hypothesis import strategies as st

from raylm import cleaning, storage, tokenizer, tokens
from raylm import corpus as corpora
from raylm.config import CorpusConfig, TokenizerConfig, TrainedTokenizer
from raylm.corpus import reader
from raylm.errors import DataError
from raylm.tokens import reuse, write

WORDS = "the of and to a in is that for it as was with be by on not he his but at are this have from".split()


def text(seed):
    """About 300 bytes of text."""
    return " ".join(random.Random(seed).choices(WORDS, k=80))


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """A tokenizer of a directory."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train([text(seed) for seed in range(20)], TrainedTokenizer(vocab_size=300)).save_pretrained(directory)
    return TokenizerConfig(path=str(directory))


@pytest.fixture
def in_process(monkeypatch):
    """Shards of about a kilobyte, tokenized in this process; the numbers of those that were."""
    monkeypatch.setattr(reader, "_most_bytes", lambda total: 1000)
    tokenized = []

    def each(function, numbered):
        for index, shard in numbered:
            tokenized.append(index)
            yield function(index, shard)

    monkeypatch.setattr(write, "_each", each)
    return tokenized


def prepare(corpus, tokenizer, place):
    return tokens.prepare(corpus, tokenizer, storage=str(place), sources=corpora.list_sources(corpus))[0]


def contents(path):
    return {
        os.path.relpath(os.path.join(parent, file), path): open(os.path.join(parent, file), "rb").read()
        for parent, _, files in os.walk(path)
        for file in files
    }


def corpus_of(directory, count=60, **options):
    directory.mkdir(exist_ok=True)
    for number in range(count):
        (directory / f"{number:03}.txt").write_text(text(number))
    return CorpusConfig(paths=str(directory), validation_fraction=0.1, **options)


def test_a_grown_corpus_tokenizes_only_what_is_new(tmp_path, section, in_process, caplog):
    corpus = corpus_of(tmp_path / "corpus")
    before = prepare(corpus, section, tmp_path / "runs")
    num_shards = len(in_process)
    assert num_shards > 15
    (tmp_path / "corpus" / "0305.txt").write_text(text("new"))
    del in_process[:]
    grown = prepare(corpus, section, tmp_path / "runs")
    assert 1 <= len(in_process) <= 4
    assert grown.path != before.path
    alone = prepare(corpus, section, tmp_path / "alone")
    assert contents(grown.path) == contents(alone.path)
    assert tokens.verify(grown) == []
    inodes = {entry.stat().st_ino for entry in os.scandir(f"{before.path}/train")}
    shared = [entry for entry in os.scandir(f"{grown.path}/train") if entry.stat().st_ino in inodes]
    assert len(shared) > num_shards // 2, "hard links take no room"


def test_through_ray(tmp_path, section, ray_cluster, monkeypatch, caplog):
    monkeypatch.setattr(reader, "_most_bytes", lambda total: 1000)
    corpus = corpus_of(tmp_path / "corpus", count=12)
    prepare(corpus, section, tmp_path / "runs")
    (tmp_path / "corpus" / "zzz.txt").write_text(text("new"))
    with caplog.at_level("INFO", logger="raylm"):
        grown = prepare(corpus, section, tmp_path / "runs")
    assert "shards were made of the same files and settings for another token store" in caplog.text
    assert contents(grown.path) == contents(prepare(corpus, section, tmp_path / "alone").path)


CHANGES = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "change", "again", "source"]), st.integers(0, 39)), max_size=6
)
OPTIONS = st.sampled_from(
    [
        {},
        {"split_by": "passage"},
        {"deduplicate": True},
        {"deduplicate": True, "split_by": "passage"},
        {"deduplicate": "near"},
        {"max_documents": 25},
        {"test_fraction": 0.1},
    ]
)


@settings(max_examples=10, deadline=None)
@given(OPTIONS, st.lists(CHANGES, min_size=1, max_size=3))
def test_a_grown_store_has_the_bytes_of_one_prepared_from_nothing(tmp_path_factory, section, options, times):
    """Files are added, removed and changed, some with the text of others, and sources come and go."""
    root = tmp_path_factory.mktemp("grown")
    for name in ("a", "b", "held out"):
        (root / name).mkdir()
    for number in range(0, 40, 2):
        (root / "a" / f"{number:02}.txt").write_text(text(number) * (1 + number % 3))
        (root / "b" / f"{number:02}.txt").write_text(text(number + 1))
    (root / "held out" / "c.txt").write_text(text("c"))
    sources = ["a"]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reader, "_most_bytes", lambda total: 1000)
        patched.setattr(write, "_each", one_by_one)
        for time, changes in enumerate([[], *times]):
            for what, number in changes:
                file = root / "a" / f"{number:02}.txt"
                if what == "source":
                    sources = sources[::-1] if "b" in sources else [*sources, "b"]
                elif what == "remove":
                    file.unlink(missing_ok=True)
                else:
                    file.write_text(text(number - number % 4 if what == "again" else f"{what} {time}"))
                    os.utime(file, ns=(time, time))
            corpus = CorpusConfig(
                paths=[f"{root}/{name}" for name in sources],
                validation_paths=[f"{root}/held out"] if time % 2 else [],
                validation_fraction=0.1,
                **options,
            )
            try:
                grown = prepare(corpus, section, root / "runs")
            except DataError:
                continue  # nothing is left
            alone = prepare(corpus, section, root / f"alone{time}")
            assert contents(grown.path) == contents(alone.path)
            names = {grown.train.document_source(index) for index in range(len(grown.train))}
            assert names <= {f"{root}/{name}" for name in sources}
    shutil.rmtree(root)


def test_a_crash_in_the_middle_and_then_new_files(tmp_path, section, in_process, monkeypatch):
    """What the crashed command finished serves the next one, though its corpus has another file."""
    corpus = corpus_of(tmp_path / "corpus")
    whole = write.write_shard

    def crash(path, index, *rest):
        if index == 9:
            raise KeyboardInterrupt
        return whole(path, index, *rest)

    monkeypatch.setattr(write, "write_shard", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, section, tmp_path / "runs")
    monkeypatch.setattr(write, "write_shard", whole)
    (tmp_path / "corpus" / "zzz.txt").write_text(text("new"))
    del in_process[:]
    grown = prepare(corpus, section, tmp_path / "runs")
    assert min(in_process) == 9
    assert contents(grown.path) == contents(prepare(corpus, section, tmp_path / "alone").path)


def test_two_commands_at_the_same_time_while_the_store_they_share_with_is_removed(
    tmp_path, section, in_process, monkeypatch
):
    corpus = corpus_of(tmp_path / "corpus")
    before = prepare(corpus, section, tmp_path / "runs")
    (tmp_path / "corpus" / "000.txt").write_text(text("new"))
    whole, others = storage.share, []

    def interrupted(source, path, scratch):
        if len(others) == 3:
            others.append(None)
            others.append(prepare(corpus, section, tmp_path / "runs"))
            shutil.rmtree(before.path)
        others.append(None)
        whole(source, path, scratch)

    monkeypatch.setattr(storage, "share", interrupted)
    monkeypatch.setattr(write, "SHARING_THREADS", 1)
    store = prepare(corpus, section, tmp_path / "runs")
    (other,) = [each for each in others if each is not None]
    assert other.path == store.path
    monkeypatch.setattr(storage, "share", whole)
    assert contents(store.path) == contents(prepare(corpus, section, tmp_path / "alone").path)


def test_a_store_is_whole_after_those_it_shares_with_are_removed(tmp_path, section, in_process):
    corpus = corpus_of(tmp_path / "corpus")
    before = prepare(corpus, section, tmp_path / "runs")
    (tmp_path / "corpus" / "000.txt").write_text(text("new"))
    grown = prepare(corpus, section, tmp_path / "runs")
    leftovers = cleaning.unused_stores(str(tmp_path / "runs"))
    assert {leftover.path for leftover in leftovers} == {before.path, grown.path}
    (unneeded,) = [leftover for leftover in leftovers if leftover.path == before.path]
    assert cleaning.remove([unneeded]) < sum(map(len, contents(grown.path).values())) // 2, "the rest is shared"
    assert not os.path.exists(before.path)
    assert tokens.verify(tokens.open_store(grown.path)) == []


def test_a_damaged_shard_is_not_shared(tmp_path, section, in_process):
    """Neither a shorter one nor one of other bytes."""
    corpus = corpus_of(tmp_path / "corpus")
    before = prepare(corpus, section, tmp_path / "runs")
    torn, changed = (f"{before.path}/train/shard-0000{number}.arrow" for number in (3, 5))
    os.truncate(torn, 10)
    with open(changed, "r+b") as stream:
        stream.seek(200)
        stream.write(b"not what was written")
    (tmp_path / "corpus" / "zzz.txt").write_text(text("new"))
    del in_process[:]
    grown = prepare(corpus, section, tmp_path / "runs")
    assert {3, 5} < {*in_process}
    assert tokens.verify(grown) == []


@pytest.mark.parametrize(
    "setting", [{"min_chars": 10}, {"validation_fraction": 0.2}, {"test_fraction": 0.1}, {"split_by": "passage"}]
)
def test_with_other_settings_nothing_is_shared(tmp_path, section, in_process, setting):
    corpus = corpus_of(tmp_path / "corpus", count=20)
    prepare(corpus, section, tmp_path / "runs")
    num_shards = len(in_process)
    prepare(corpus.model_copy(update=setting), section, tmp_path / "runs")
    assert len(in_process) == 2 * num_shards


def test_a_new_tokenizer_is_said_and_the_old_one_can_be_kept(tmp_path, in_process, caplog):
    corpus = corpus_of(tmp_path / "corpus")
    trained = TokenizerConfig(train=TrainedTokenizer(vocab_size=300))
    before = prepare(corpus, trained, tmp_path / "runs")
    (tmp_path / "corpus" / "zzz.txt").write_text("zyx " * 200)
    with caplog.at_level("INFO", logger="raylm"):
        other = prepare(corpus, trained, tmp_path / "runs")
    way_out = f"tokenizer.path={before.path}/tokenizer"
    assert "the corpus has changed since store" in caplog.text
    assert (
        f"a new tokenizer is trained on the changed text, so all of it is tokenized again; with {way_out}"
        in caplog.text
    )
    assert other.tokenizer.backend_tokenizer.to_str() != before.tokenizer.backend_tokenizer.to_str()
    del in_process[:]
    prepare(corpus, TokenizerConfig(path=f"{before.path}/tokenizer"), tmp_path / "runs")
    assert len(in_process) == 1


def test_remote_stores_share_copies_that_the_server_makes(tmp_path, section, in_process):
    corpus = corpus_of(tmp_path / "corpus")
    place = f"memory://{tmp_path}"
    prepare(corpus, section, place)
    (tmp_path / "corpus" / "zzz.txt").write_text(text("new"))
    del in_process[:]
    grown = prepare(corpus, section, place)
    assert len(in_process) == 1
    assert tokens.verify(grown) == []
    alone = prepare(corpus, section, tmp_path / "alone")
    assert json.loads(storage.read(f"{grown.path}/{reuse.SHARDS}")) == json.loads(
        storage.read(f"{alone.path}/{reuse.SHARDS}")
    )
