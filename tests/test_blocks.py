import pickle

import numpy as np
import pytest

from raylm.blocks import Packed, Stream, cut, permuted
from raylm.config import BlocksConfig
from raylm.errors import DataError

DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


class Documents:
    """What Packed asks of a Split, over lists: shards of documents."""

    def __init__(self, *shards):
        self._shards = shards
        self.shards = [(len(shard), sum(map(len, shard))) for shard in shards]
        self.num_tokens = sum(tokens for _, tokens in self.shards)

    def __len__(self):
        return sum(map(len, self._shards))

    def arrays(self, shard):
        documents = self._shards[shard]
        offsets = np.cumsum([0, *map(len, documents)]).astype(np.int32)
        return np.array([token for document in documents for token in document], np.uint16), offsets


def packed(*shards, block_size):
    return Packed(Documents(*shards), BlocksConfig(block_size=block_size), eos_id=0)


def test_blocks_span_documents():
    blocks = packed(DOCUMENTS, block_size=4)
    assert [block.tolist() for block in blocks] == [[5, 6, 7, 0], [8, 9, 0, 10], [11, 12, 13, 0]]
    assert blocks[0].dtype == np.int64


def test_the_tail_is_dropped():
    assert [block.tolist() for block in packed(DOCUMENTS, block_size=5)] == [[5, 6, 7, 0, 8], [9, 0, 10, 11, 12]]


def test_blocks_span_shards():
    assert [block.tolist() for block in packed(DOCUMENTS[:1], DOCUMENTS[1:], block_size=5)] == [
        [5, 6, 7, 0, 8],
        [9, 0, 10, 11, 12],
    ]


def test_every_window_of_the_joined_stream():
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, size=size).tolist() for size in rng.integers(0, 6, size=40)]
    joined = [token for document in documents for token in (*document, 0)]
    values, offsets = Documents(documents).arrays(0)
    for start in range(len(joined)):
        for stop in range(start + 1, min(start + 20, len(joined)) + 1):
            assert cut(values, offsets, start, stop, 0).tolist() == joined[start:stop]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_an_order_has_every_index_once(size):
    assert sorted(permuted(position, size, (0, 0)) for position in range(size)) == list(range(size))


def test_an_order_looks_shuffled():
    order = np.array([permuted(position, 10_000, (7, 0)) for position in range(10_000)])
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert (np.diff(order) == 1).sum() < 10


def test_epochs_follow_each_other_each_in_its_own_order():
    blocks = packed([list(range(1, 401))], block_size=4)
    stream = Stream(blocks, seed=3, length=250)
    epochs = [[stream.index(k) for k in range(start, start + 100)] for start in (0, 100)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]
    assert [stream.index(k) for k in range(250)] == [Stream(blocks, seed=3, length=250).index(k) for k in range(250)]
    assert epochs[0] != [Stream(blocks, seed=4, length=250).index(k) for k in range(100)]
    assert stream[5].tolist() == blocks[stream.index(5)].tolist()
    assert len(pickle.loads(pickle.dumps(stream))) == 250


def test_a_split_shorter_than_a_block_is_an_error():
    with pytest.raises(DataError, match=r"blocks\.block_size: the split has 12 tokens.*one block of 64"):
        Stream(packed(DOCUMENTS, block_size=64), seed=0, length=1)
