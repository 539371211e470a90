import itertools
import pickle

import numpy as np
import pytest
from conftest import one_by_one
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import DOCUMENTS, packed
from test_tokens import TOKENIZER, prepare, small_shards

from raylm import blocks, budget, config, examples
from raylm.config import BlocksConfig, CorpusConfig
from raylm.errors import ConfigError, DataError
from raylm.examples import WINDOW, Mixture, Stream, permuted
from raylm.tokens import SourceSplit, write


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_an_order_has_every_index_once(size):
    assert sorted(permuted(position, size, (0, 0)) for position in range(size)) == list(range(size))


def test_an_order_stays_what_it_was():
    """Or a run would go on from a checkpoint with other examples than those that are left."""
    assert [permuted(position, 10, (7, 1)) for position in range(10)] == [1, 8, 5, 2, 6, 7, 4, 3, 0, 9]
    assert permuted(5, 10**9, (0, 0)) == 16_340_667


def test_an_order_looks_shuffled():
    order = np.array([permuted(position, 10_000, (7, 0)) for position in range(10_000)])
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 10


def test_epochs_follow_each_other_each_in_its_own_order():
    cut = packed([list(range(1, 401))], block_size=4)
    stream = Stream(cut, seed=3, length=250)
    epochs = [[stream.index(k) for k in range(start, start + 100)] for start in (0, 100)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]
    assert [stream.index(k) for k in range(250)] == [Stream(cut, seed=3, length=250).index(k) for k in range(250)]
    assert epochs[0] != [Stream(cut, seed=4, length=250).index(k) for k in range(100)]
    assert stream[5].tolist() == cut[stream.index(5)].tolist()
    assert len(pickle.loads(pickle.dumps(stream))) == 250


def test_a_split_shorter_than_a_block_is_an_error():
    with pytest.raises(DataError, match=r"blocks\.block_size: the split has 12 tokens.*one block of 64"):
        Stream(packed(DOCUMENTS, block_size=64), seed=0, length=1)


# A mixture -----------------------------------------------------------------------------------------------------------


class Numbers:
    """Blocks that say what they are."""

    def __init__(self, source, count):
        self.source, self.count = source, count

    def __len__(self):
        return self.count

    def rows(self, indices):
        return [(self.source, index) for index in indices]


def mixture(weights, counts=(70, 1000, 13, 5)):
    streams = [Stream(Numbers(n, count), 3, 10**9, n) for n, count in enumerate(counts[: len(weights)])]
    return Mixture(streams, weights, 10**9)


@settings(deadline=None)
@given(st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=4), st.integers(0, 10**6))
def test_shares_are_exact_to_one_example_in_every_thousand(weights, window):
    mixed = mixture(weights)
    sources = [mixed.place(k)[0] for k in range(window * WINDOW, (window + 1) * WINDOW)]
    counts = np.bincount(sources, minlength=len(weights))
    assert np.abs(counts - WINDOW * np.array(weights) / sum(weights)).max() < 1 + 1e-9


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=4))
def test_shares_are_right_in_the_long_run(weights):
    mixed = mixture(weights)
    seen = mixed._before(10_000)
    assert seen.sum() == 10_000 * WINDOW
    assert np.abs(seen / seen.sum() - np.array(weights) / sum(weights)).max() < 2e-6


def test_the_examples_of_a_source_are_all_used_in_order_and_evenly_spaced():
    mixed = mixture([0.62, 0.3334, 0.04])
    places = [mixed.place(k) for k in range(20 * WINDOW)]
    for source in range(3):
        own = [(k, rank) for k, (each, rank) in enumerate(places) if each == source]
        assert [rank for _, rank in own] == list(range(len(own)))
        gaps = np.diff([k for k, _ in own])
        assert gaps.max() <= 2.1 * len(places) / len(own)


def test_an_example_of_a_mixture_does_not_depend_on_those_read_before():
    numbers = [12_345_678, 0, 999, 1000, 12_345_677, 12_346_000, 7]
    one_after_another = mixture([1, 2, 3.3])
    for k in range(3000):
        one_after_another.place(k)
    for k in numbers:
        assert one_after_another.place(k) == mixture([1, 2, 3.3]).place(k)
    assert mixture([1, 2, 3.3]).rows(numbers) == [mixture([2, 4, 6.6])[k] for k in numbers]
    copied = pickle.loads(pickle.dumps(one_after_another))
    assert copied.rows(numbers) == one_after_another.rows(numbers)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name, count in {"a": 12, "b": 30, "c": 20}.items():
        (root / name).mkdir()
        for number in range(count):
            (root / name / f"{number:02}.txt").write_text(f"{name} {number} is one of many texts. " * (number + 3))
    corpus = CorpusConfig(paths={"books": (f"{root}/a",), "code": (f"{root}/b", f"{root}/c")}, validation_fraction=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "_each", one_by_one)
        small_shards(patch, corpus, 1500)
        found, _ = prepare(corpus, TOKENIZER, storage=str(root))
    return found


def test_the_documents_of_a_source(store):
    split = store.train
    assert split.sources == ["books", "code", "code"]
    for name in ("books", "code"):
        own = [split[n].tolist() for n in range(len(split)) if split.document_source(n) == name]
        part = pickle.loads(pickle.dumps(SourceSplit(split, name)))
        assert [document.tolist() for document in part] == own
        assert part.num_tokens == sum(map(len, own))
        assert list(itertools.chain.from_iterable(part.lengths())) == [len(each) for each in own]
        assert [tokens for _, tokens in part.shards] == [int(lengths.sum()) for lengths in part.lengths()]
    assert len(SourceSplit(split, "books").shards) > 1


@pytest.mark.parametrize("packing", ["packed", "chunked", "padded"])
def test_an_example_of_a_mixture_is_a_block_of_its_source_alone(store, packing):
    section = BlocksConfig(block_size=16, packing=packing, mixture={"books": 3, "code": 1})
    frame = store.frame("auto")
    mixed = examples.build(store.train, section, frame, seed=5, length=2000)
    own = {
        name: {row.tobytes() for row in cut} for name, cut in examples.of_sources(store.train, section, frame).items()
    }
    rows = [row.tobytes() for row in mixed.rows(range(1000))]
    found = [sum(row in own[name] for row in rows) for name in ("books", "code")]
    assert found[0] >= 750
    assert found[1] >= 250
    whole = {row.tobytes() for row in blocks.build(store.train, BlocksConfig(block_size=16, packing=packing), frame)}
    assert packing == "packed" or own["books"] | own["code"] == whole


def test_how_often_a_source_is_repeated(store, tiny):
    mix = {
        "books": 3.0,
        "code": 1.0,
    }
    experiment = config.override(
        tiny(),
        {
            "corpus.paths": {"books": ["a"], "code": ["b"]},
            "blocks.mixture": mix,
            "train.num_epochs": None,
            "train.max_tokens": 100_000,
        },
    )
    planned = budget.for_store(experiment, store)
    books, code = (SourceSplit(store.train, name) for name in mix)
    assert planned.passes_over == pytest.approx(
        {"books": 0.75 * planned.tokens / books.num_tokens, "code": 0.25 * planned.tokens / code.num_tokens}, rel=0.05
    )
    told = list(planned.warnings(experiment.train))
    assert len(told) == sum(passes > 4 for passes in planned.passes_over.values()) > 0
    assert told[0].startswith(f"{planned.passes_over['books']:.2g} passes over source books: more than 4 teach little")
    without = config.override(experiment, {"blocks.mixture": {"books": 0.0, "code": 1.0}})
    assert list(budget.for_store(without, store).passes_over) == ["code"]


def test_a_source_without_a_block_is_named(store):
    section = BlocksConfig(block_size=10**6, mixture={"books": 3, "code": 1})
    with pytest.raises(DataError, match=r"^blocks\.mixture\.books: its training text has less than one block of bl"):
        examples.of_sources(store.train, section, store.frame("auto"))


@pytest.mark.parametrize(
    ("given_settings", "told"),
    [
        (["corpus.paths=a", "blocks.mixture={a: 1}"], "must be left out unless corpus.paths names its sources"),
        (["corpus.paths={a: x, b: y}", "blocks.mixture={a: 1}"], "b has no weight"),
        (["corpus.paths={a: x}", "blocks.mixture={a: 1, c: 2}"], "names, a; c is no source"),
        (["corpus.paths={a: x}", "blocks.mixture={a: 0}"], "must have a weight above 0"),
        (["corpus.paths={a: x}", "blocks.mixture.a=-1"], r"blocks\.mixture\.a: must be at least 0"),
        (["corpus.paths={a/b: x}"], "must have names of letters"),
    ],
)
def test_weights_that_fit_no_source_are_refused(given_settings, told):
    with pytest.raises(ConfigError, match=told):
        config.load(None, given_settings)


def test_a_weight_can_be_swept():
    space = "tune.space={blocks.mixture.b: {loguniform: [0.25, 4]}}"
    experiment = config.load(None, ["corpus.paths={a: x, b.c: y, b: z}", "blocks.mixture={a: 1, b.c: 1, b: 1}", space])
    changed = config.override(experiment, {"blocks.mixture.b": 2.5, "blocks.mixture.b.c": 3.0})
    assert changed.blocks.mixture == {"a": 1, "b.c": 3.0, "b": 2.5}
