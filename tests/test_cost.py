"""What evaluations cost: by hand, and by counting the tokens that a model really reads."""

import numpy as np
import pytest
import torch
from conftest import one_by_one
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from raylm import budget, cost, perplexity
from raylm import plan as plans
from raylm.perplexity import MaskedTokens
from raylm.pipeline import stores
from raylm.tokenizer import Frame
from raylm.tokens import write

MASKED = (
    "objective.kind=masked",
    "tokenizer.train.special_tokens=['<|endoftext|>', '<mask>']",
    "blocks.packing=chunked",
    "model.config={model_type: bert, num_hidden_layers: 1, hidden_size: 8, num_attention_heads: 1}",
)


@pytest.fixture
def prepared(tiny, monkeypatch):
    """settings -> (experiment, store)"""
    monkeypatch.setattr(write, "_each", one_by_one)

    def make(*settings):
        experiment = tiny(*settings)
        return experiment, stores.prepare(plans.resolve_tokens(experiment))[0]

    return make


class Documents(list):
    def document_bytes(self, index):
        return len(self[index])

    def answers(self, index):
        return None


@pytest.mark.parametrize("every", [None, False, True])
@pytest.mark.parametrize("stride", [None, 3])
def test_the_tokens_that_are_read_are_counted_before(stride, every):
    """Each document by itself, so that nothing is padding. Without `every` it is a causal model."""
    torch.manual_seed(0)
    if every is None:
        network = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_layer=1, n_head=1, n_embd=8, n_positions=8))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        network = BertForMaskedLM(BertConfig(vocab_size=23, max_position_embeddings=8, **sizes))
    masked = None if every is None else MaskedTokens(3, Frame(1, 2), every)
    for length in (1, 6, 8, 20):
        read = []
        hook = network.get_input_embeddings().register_forward_pre_hook(
            lambda _module, inputs, read=read: read.append(inputs[0].numel())
        )
        ids = np.arange(length) % 19 + 4
        how = {"frame": Frame(1, 2), "context": 8, "stride": stride, "batch_tokens": 1, "masked": masked}
        perplexity.score(network, Documents([ids]), **how)
        hook.remove()
        counted = perplexity.tokens_read(np.array([length]), 8, stride, masked)[0]
        probed = 2 * 10  # tokens, by which the scorer tries the model
        if every is False:  # a window of which no token is chosen is not read
            assert 0 < sum(read) - probed <= counted
        else:
            assert sum(read) - probed == counted


def test_the_share_of_evaluations_by_hand(prepared):
    """Three tokens forward for each that is trained on; six evaluations of documents of one window or several."""
    experiment, store = prepared()
    planned = budget.for_store(experiment, store)
    lengths = [len(store.validation[index]) for index in range(len(store.validation))]
    assert (planned.steps, planned.eval_every) == (10, 2)
    read = sum(length if length <= 32 else 32 * (1 + -(-(length - 32) // 32)) for length in lengths)
    assert cost.evaluation_share(experiment, store, planned) == pytest.approx(6 * read / (6 * read + 3 * 2560))
    assert cost.with_eval_limit(experiment, store) is experiment, "a causal model is scored on all"
    limited, _ = prepared("eval.max_tokens=1")
    again = 6 * (32 * (1 + -(-(lengths[0] - 32) // 32))) + read  # and the whole split in the end
    assert cost.evaluation_share(limited, store, planned) == pytest.approx(again / (again + 3 * 2560))


@pytest.mark.parametrize(("every", "save", "number"), [(2, 2, 6), (3, 3, 5), (4, 6, 5), (10, 10, 2), (20, 20, 2)])
def test_how_many_evaluations_a_run_has(prepared, every, save, number):
    experiment, store = prepared(f"train.eval_every_tokens={256 * every}", f"train.save_every_tokens={256 * save}")
    assert cost._number(budget.for_store(experiment, store)) == number


def test_an_evaluation_of_a_masked_model_costs_a_tenth_of_what_it_interrupts(prepared):
    experiment, store = prepared(*MASKED, "train.max_tokens=25600", "train.eval_every_tokens=2560")
    limited = cost.with_eval_limit(experiment, store)
    documents = perplexity.first_documents(store.validation, limited.eval.max_tokens)
    lengths = np.array([len(store.validation[index]) for index in range(len(store.validation))])
    masked = MaskedTokens.of(store.tokenizer, store.frame("auto"))
    read = perplexity.tokens_read(lengths, 32, None, masked).cumsum()
    assert read[documents - 1] <= 0.1 * 3 * 2560 < read[documents]
    assert cost.evaluation_share(limited, store, budget.for_store(limited, store)) < 0.15
    other = prepared(*MASKED, "eval.max_tokens=77")[0]
    assert cost.with_eval_limit(other, store) is other, "as somebody has said"
    assert not cost.whole_is_affordable(prepared(*MASKED)[0], store, budget.for_store(other, store), store.validation)
