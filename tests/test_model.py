import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raylm import model
from raylm.config import ModelConfig
from raylm.errors import ConfigError

SMALL = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8}


def configuration(block_size=16, vocab_size=30, **fields):
    section = ModelConfig(config={**SMALL, **fields})
    return model.configuration(section, vocab_size=vocab_size, block_size=block_size, eos_id=3)


def test_a_new_model_follows_tokenizer_and_block_size():
    found = configuration()
    assert (found.vocab_size, found.n_positions, model.context(found)) == (30, 16, 16)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (3, 3, 3)


def test_positions_may_be_more_than_the_block():
    assert model.context(configuration(n_positions=64)) == 64


def test_a_block_beyond_the_positions_is_refused():
    with pytest.raises(ConfigError, match=r"blocks.block_size must be at most 8.*got 16"):
        configuration(n_positions=8)


def test_a_vocabulary_beyond_the_embedding_is_refused():
    section = ModelConfig(config={**SMALL, "vocab_size": 20})
    with pytest.raises(ConfigError, match="30 tokens.*embedding 20 rows"):
        model.configuration(section, vocab_size=30, block_size=4)


def test_an_unknown_model_type_names_near_ones():
    with pytest.raises(ConfigError, match=r"model_type=gtp2.*gpt2"):
        configuration(model_type="gtp2")


def test_an_unknown_field_names_a_near_one():
    with pytest.raises(ConfigError, match=r"model.config.n_layers: unknown field of gpt2; did you mean n_layer\?"):
        configuration(n_layers=3)


def test_a_path_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.path="):
        model.configuration(ModelConfig(path=str(tmp_path)), vocab_size=1, block_size=2)


def test_new_weights_depend_on_the_seed_alone(tokenizer):
    section = ModelConfig(config=SMALL)
    torch.manual_seed(7)
    first = model.build(section, tokenizer, block_size=8, seed=1)
    torch.manual_seed(8)
    again = model.build(section, tokenizer, block_size=8, seed=1)
    other = model.build(section, tokenizer, block_size=8, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.transformer.wte.weight, other.transformer.wte.weight)


def test_a_pretrained_model_keeps_its_weights(tmp_path, tokenizer):
    sizes = {"vocab_size": len(tokenizer), "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8}
    saved = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    saved.save_pretrained(tmp_path)
    loaded = model.build(ModelConfig(path=str(tmp_path)), tokenizer, block_size=8)
    assert torch.equal(loaded.transformer.wte.weight, saved.transformer.wte.weight)


def test_parameters_are_counted_without_making_them():
    found = configuration()
    assert model.num_parameters(found) == GPT2LMHeadModel(found).num_parameters()


@pytest.fixture(scope="module")
def tokenizer():
    from raylm import tokenizer
    from raylm.config import TrainedTokenizer

    return tokenizer.train(["a b c"], TrainedTokenizer(vocab_size=260))
