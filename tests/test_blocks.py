import numpy as np
import pytest

from raylm.blocks import Packed, _Rows, batch, build
from raylm.config import BlocksConfig
from raylm.examples import Stream
from raylm.tokenizer import Frame

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

    def lengths(self):
        return (np.diff(self.arrays(shard)[1]) for shard in range(len(self._shards)))

    def __getitem__(self, index):
        return np.array([document for shard in self._shards for document in shard][index], np.uint16)


def blocks_of(*shards, **settings):
    return build(Documents(*shards), BlocksConfig(**settings), Frame(0, 0))


def packed(*shards, block_size):
    return Packed(Documents(*shards), BlocksConfig(block_size=block_size), Frame(0, 0))


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


@pytest.mark.parametrize("frame", [Frame(0, 0), Frame(None, 0), Frame(100, 0)])
def test_every_window_of_the_joined_stream(frame):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 99, size=size).tolist() for size in rng.integers(0, 6, size=40)]
    before = [100] if frame.prefix == 100 else []
    joined = [token for document in documents for token in (*before, *document, 0)]
    values, offsets = Documents(documents).arrays(0)
    for start in range(len(joined)):
        for stop in range(start + 1, min(start + 20, len(joined)) + 1):
            rows = _Rows(1, stop - start, values.dtype, frame)
            rows.append_stream(values.data, offsets.data, start, stop)
            assert rows.finish().tolist() == [joined[start:stop]]


@pytest.mark.parametrize("shards", [[DOCUMENTS], [DOCUMENTS[:1], DOCUMENTS[1:]], [[d] for d in DOCUMENTS]])
def test_chunked_blocks_stay_inside_a_document(shards):
    blocks = blocks_of(*shards, block_size=4, packing="chunked")
    assert [block.tolist() for block in blocks] == [[0, 5, 6, 7], [0, 8, 9, 0], [0, 10, 11, 12]]
    assert blocks.dropped_tokens == 3  # E, and 13 E
    assert [block.tolist() for block in blocks_of(*shards, block_size=3, packing="chunked")] == [
        [0, 5, 6],
        [0, 8, 9],
        [0, 10, 11],
        [12, 13, 0],
    ]


def test_padded_blocks_are_documents_cut_off():
    blocks = blocks_of(DOCUMENTS, block_size=4, packing="padded")
    assert [block.tolist() for block in blocks] == [[0, 5, 6, 7], [0, 8, 9, 0], [0, 10, 11, 12]]
    assert blocks.dropped_tokens == 3


def test_every_way_to_cut_accounts_for_every_token():
    rng = np.random.default_rng(1)
    shards = [[rng.integers(1, 99, size=n).tolist() for n in rng.integers(0, 30, size=20)] for _ in range(3)]
    documents = [document for shard in shards for document in shard]
    for packing, around in (("packed", 1), ("chunked", 2), ("padded", 2)):
        total = sum(len(document) + around for document in documents)
        blocks = blocks_of(*shards, block_size=8, packing=packing)
        assert sum(len(block) for block in blocks) + blocks.dropped_tokens == total


def test_a_batch_of_packed_blocks():
    section = BlocksConfig(block_size=4)
    made = batch([np.array([5, 6, 7, 0]), np.array([8, 9, 0, 10])], section, Frame(0, 0))
    assert {name: array.tolist() for name, array in made.items()} == {
        "input_ids": [[5, 6, 7, 0], [8, 9, 0, 10]],
        "labels": [[-100, 6, 7, 0], [-100, 9, 0, 10]],
    }


def test_a_batch_of_padded_rows():
    made = batch([np.array([5, 6, 7, 0]), np.array([8, 0])], BlocksConfig(block_size=4, packing="padded"), Frame(0, 0))
    assert {name: array.tolist() for name, array in made.items()} == {
        "input_ids": [[5, 6, 7, 0], [8, 0, 0, 0]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0]],
        "labels": [[-100, 6, 7, 0], [-100, 0, -100, -100]],
    }


def test_a_batch_of_isolated_documents():
    section = BlocksConfig(block_size=6, isolate_documents=True)
    made = batch([np.array([5, 6, 0, 8, 9, 0]), np.array([0, 0, 7, 8, 9, 10])], section, Frame(0, 0))
    assert {name: array.tolist() for name, array in made.items()} == {
        "input_ids": [[5, 6, 0, 8, 9, 0], [0, 0, 7, 8, 9, 10]],
        "position_ids": [[0, 1, 0, 1, 2, 0], [0, 0, 1, 2, 3, 4]],
        "labels": [[-100, 6, 0, 8, 9, 0], [-100, 0, 7, 8, 9, 10]],
    }


def test_a_prefix_of_its_own_stands_before_every_document_and_is_not_predicted():
    """As Llama's <s> (1) before and </s> (0) behind."""
    frame, documents = Frame(1, 0), Documents(DOCUMENTS)
    rows = list(build(documents, BlocksConfig(block_size=5), frame))
    assert [row.tolist() for row in rows] == [[1, 5, 6, 7, 0], [1, 8, 9, 0, 1], [10, 11, 12, 13, 0]]
    section = BlocksConfig(block_size=5, isolate_documents=True)
    assert {name: array.tolist() for name, array in batch(rows, section, frame).items()} == {
        "input_ids": [[1, 5, 6, 7, 0], [1, 8, 9, 0, 1], [10, 11, 12, 13, 0]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 0], [0, 1, 2, 3, 4]],
        "labels": [[-100, 5, 6, 7, 0], [-100, 8, 9, 0, -100], [-100, 11, 12, 13, 0]],
    }
    for packing in ("chunked", "padded"):
        (first, *_) = build(documents, BlocksConfig(block_size=4, packing=packing), frame)
        assert first.tolist() == [1, 5, 6, 7]


def test_without_a_prefix_the_first_token_of_a_document_is_not_predicted():
    frame = Frame(None, 0)
    rows = list(build(Documents(DOCUMENTS), BlocksConfig(block_size=6), frame))
    assert [row.tolist() for row in rows] == [[5, 6, 7, 0, 8, 9], [0, 10, 11, 12, 13, 0]]
    for isolated, positions in ((False, None), (True, [[0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4]])):
        made = batch(rows, BlocksConfig(block_size=6, isolate_documents=isolated), frame)
        assert made["labels"].tolist() == [[-100, 6, 7, 0, -100, 9], [-100, -100, 11, 12, 13, 0]]
        assert (made["position_ids"].tolist() if isolated else None) == positions
    (first, *_) = build(Documents(DOCUMENTS), BlocksConfig(block_size=4, packing="padded"), frame)
    assert first.tolist() == [5, 6, 7, 0]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_isolated_documents_are_predicted_as_if_each_stood_alone(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32},
        "llama": {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
        },
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=100, bos_token_id=0, eos_token_id=0, **sizes[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    documents = [[0, 5, 6, 7], [0, 8, 9], [0, 10, 11, 12, 13]]
    block = np.concatenate(documents)

    def logits(section, rows):
        made = batch(rows, section, Frame(0, 0))
        del made["labels"]
        with torch.no_grad():
            return model(**{name: torch.from_numpy(array) for name, array in made.items()}, use_cache=False).logits

    isolated = logits(BlocksConfig(block_size=12, isolate_documents=True), [block, block])
    joined = logits(BlocksConfig(block_size=12), [block, block])
    alone = torch.cat([logits(BlocksConfig(block_size=12), [np.array(document)])[0] for document in documents])
    assert torch.allclose(isolated[0], alone, atol=1e-5)
    assert torch.allclose(isolated[1], alone, atol=1e-5)
    assert not torch.allclose(joined[0], alone, atol=1e-3)


@pytest.mark.parametrize("packing", ["packed", "chunked", "padded"])
@pytest.mark.parametrize("frame", [Frame(0, 0), Frame(None, 0), Frame(100, 0)])
def test_examples_read_together_are_those_read_one_by_one(packing, frame):
    rng = np.random.default_rng(2)
    shards = [[rng.integers(1, 99, size=n).tolist() for n in rng.integers(0, 30, size=20)] for _ in range(3)]
    documents = [frame.around(document).tolist() for shard in shards for document in shard]
    blocks = build(Documents(*shards), BlocksConfig(block_size=8, packing=packing), frame)
    stream = Stream(blocks, seed=3, length=100)
    numbers = [90, 4, 4, 71]
    together = stream.rows(numbers)
    assert [row.tolist() for row in together] == [stream[number].tolist() for number in numbers]
    if packing == "chunked":
        whole = [document[at : at + 8] for document in documents for at in range(0, len(document) - 7, 8)]
        assert [row.tolist() for row in blocks] == whole
    with pytest.raises(IndexError):
        blocks.rows([0, len(blocks)])
