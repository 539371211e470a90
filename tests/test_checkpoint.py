import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from raylm import checkpoint, config, tokenizer
from raylm.config import TrainedTokenizer
from raylm.errors import StorageError


@pytest.fixture
def saved(tmp_path):
    sizes = {"vocab_size": 260, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    directory = tmp_path / "model"
    network.save_pretrained(directory)
    tokenizer.train(["a b c"], TrainedTokenizer(vocab_size=260)).save_pretrained(directory)
    return directory, network


def test_a_plain_model_directory_loads(saved):
    directory, network = saved
    trained = checkpoint.load(directory)
    assert torch.equal(trained.model.transformer.wte.weight, network.transformer.wte.weight)
    assert (trained.experiment, trained.record, trained.context) == (None, {}, 16)


def test_what_raylm_wrote_beside_a_model_comes_back(saved):
    directory, _ = saved
    experiment = config.load(None, ["train.seed=7"])
    checkpoint.describe(directory, experiment, {"store": "s", "best": {"perplexity": 3.5}})
    trained = checkpoint.load(directory)
    assert trained.experiment == experiment
    assert trained.record["best"]["perplexity"] == 3.5


def test_what_is_not_a_model_is_named(saved, tmp_path):
    with pytest.raises(StorageError, match="missing is not a directory"):
        checkpoint.check(tmp_path / "missing")
    with pytest.raises(StorageError, match=r"has no config.json; did you mean .*model\?"):
        checkpoint.check(tmp_path)


def test_a_torn_model_is_named(saved):
    directory, _ = saved
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"model cannot be loaded: Safetensor"):
        checkpoint.load(directory)
