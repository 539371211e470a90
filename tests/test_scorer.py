"""A model as it is run to be scored, against its own whole logits in float32."""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    ModernBertConfig,
    OPTConfig,
)

from raylm import objective, scorer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16, "num_attention_heads": 2}
ENDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GPT2 = GPT2Config(vocab_size=61, n_layer=2, n_head=2, n_embd=16, n_positions=32, initializer_range=0.3)
CAUSAL = [
    GPT2,
    LlamaConfig(vocab_size=61, **SIZES),
    Gemma2Config(vocab_size=61, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.5, **SIZES),  # capped
    GraniteConfig(vocab_size=61, logits_scaling=7.0, **SIZES),  # scaled
    OPTConfig(vocab_size=61, ffn_dim=16, word_embed_proj_dim=16, **SIZES),  # calls the decoder in its base model
    MambaConfig(vocab_size=61, state_size=4, hidden_size=16, num_hidden_layers=1),
]
MASKED = [BertConfig(vocab_size=61, **SIZES), ModernBertConfig(vocab_size=61, **SIZES, **ENDS)]


@pytest.fixture
def ids():
    return torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(1))


def made(config, kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    return kind.from_config(copy.deepcopy(config)).eval()


def everywhere(ids):
    """All places of a batch."""
    return torch.arange(len(ids)).repeat_interleave(ids.shape[1]), torch.arange(ids.shape[1]).repeat(len(ids))


@torch.no_grad()
def reference(network, ids):
    return F.cross_entropy(network(input_ids=ids).logits.flatten(0, 1), ids.flatten(), reduction="none").double()


def scored(network, ids, precision="float32"):
    with scorer.scoring(network, precision) as nll:
        return nll(everywhere(ids), ids.flatten(), input_ids=ids)


@pytest.mark.parametrize("config", [*CAUSAL, *MASKED], ids=lambda config: config.model_type)
def test_scores_are_those_of_whole_logits_of_which_a_few_are_held(config, ids, monkeypatch):
    monkeypatch.setattr(scorer, "LOGITS", 4 * 61)
    network = made(config, AutoModelForMaskedLM if config in MASKED else AutoModelForCausalLM)
    expected = reference(network, ids)
    held = []
    with scorer.scoring(network) as nll:
        network.get_output_embeddings().register_forward_hook(lambda _module, _inputs, logits: held.append(logits))
        found = nll(everywhere(ids), ids.flatten(), input_ids=ids)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert max(logits.numel() for logits in held) == 4 * 61


def test_the_places_that_are_asked_for(ids):
    network = made(GPT2)
    expected = reference(network, ids).view(ids.shape)
    rows, columns = torch.tensor([2, 0]), torch.tensor([1, 8])
    with scorer.scoring(network) as nll:
        found = nll((rows, columns), ids[rows, columns], input_ids=ids)
        none = nll((rows[:0], columns[:0]), rows[:0], input_ids=ids)
    assert found.tolist() == pytest.approx(expected[rows, columns].tolist(), rel=1e-6)
    assert len(none) == 0


class Counting(GPT2LMHeadModel):
    """A head whose logits depend on how many tokens there are."""

    def forward(self, input_ids, **kwargs):
        made = super().forward(input_ids, **kwargs)
        made.logits = made.logits * input_ids.shape[1]
        return made


def test_a_head_that_looks_at_all_tokens_is_given_all(ids):
    torch.manual_seed(0)
    network = Counting(GPT2).eval()
    assert scored(network, ids).tolist() == pytest.approx(reference(network, ids).tolist(), rel=1e-6)


def under_autocast(network):
    """What accelerate makes of a model in mixed precision."""
    forward = torch.autocast("cpu", torch.bfloat16)(network.forward.__func__)
    network.forward = MethodType(convert_outputs_to_fp32(forward), network)


def test_the_precision_of_the_training_changes_nothing_and_is_as_it_was_afterwards(ids):
    network = made(GPT2)
    expected = reference(network, ids)
    objective.attach(network, shifted=True)
    under_autocast(network)
    before = reference(network, ids)
    assert before.tolist() != pytest.approx(expected.tolist(), rel=1e-4)
    assert scored(network, ids).tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert reference(network, ids).tolist() == before.tolist()
    labelled = network(input_ids=ids, labels=ids)["loss"]
    assert labelled.item() > 0, "the loss is still the training's"


def test_weights_of_half_precision_are_scored_in_float32_and_stay(ids):
    network = made(GPT2).bfloat16()
    parameters = list(network.parameters())
    expected = reference(copy.deepcopy(network).float(), ids)
    assert scored(network, ids).tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert all(one is other for one, other in zip(network.parameters(), parameters, strict=True))
    assert network.lm_head.weight is network.transformer.wte.weight


def test_another_precision_where_it_is_asked_for(ids):
    network = made(GPT2)
    expected = reference(network, ids)
    half = scored(network, ids, "bfloat16")
    assert half.tolist() != pytest.approx(expected.tolist(), rel=1e-5)
    assert half.tolist() == pytest.approx(expected.tolist(), rel=0.1)
    network.bfloat16()
    assert scored(network, ids, "bfloat16").tolist() == pytest.approx(half.tolist(), rel=0.1)


def test_tf32_is_off_while_a_gpu_scores_and_as_it_was_afterwards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.fp32_precision
    try:
        for _ in range(3):  # transformers' own switch works once each way
            scorer.set_tf32(True)
            with scorer.scoring(made(GPT2)):
                assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            scorer.set_tf32(False)
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_attention_that_knows_half_precision_alone_is_put_aside(ids):
    network = made(GPT2)
    expected = reference(network, ids)
    network.config._attn_implementation = "flash_attention_2"
    assert scored(network, ids).tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert network.config._attn_implementation == "flash_attention_2"


def test_an_error_leaves_the_model_as_it_was():
    network = made(GPT2).train()
    with pytest.raises(IndexError), scorer.scoring(network) as nll:
        nll((torch.tensor([5]), torch.tensor([0])), torch.tensor([1]), input_ids=torch.tensor([[1]]))
    assert network.training
    assert "forward" not in network.__dict__
    assert "forward" not in network.transformer.__dict__
