import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raylm import objective
from raylm.config import BlocksConfig
from raylm.objective import IGNORED, causal_loss


@pytest.fixture
def network():
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 6}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids)).double().eval()


def collate(rows):
    return objective.collate(rows, BlocksConfig(), eos_id=0)


def blocks(count):
    return [np.random.default_rng(seed).integers(0, 11, 6) for seed in range(count)]


def test_the_first_token_of_a_block_is_not_predicted():
    batch = collate([np.array([5, 6, 7]), np.array([8, 9, 10])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, 10]]


def test_loss_is_the_mean_over_the_predicted_tokens(network):
    batch = collate(blocks(2))
    outputs = network(batch["input_ids"])
    loss = causal_loss(outputs, batch["labels"], num_items_in_batch=10)
    chance = outputs.logits.log_softmax(-1)
    by_hand = [-chance[row, t, batch["input_ids"][row, t + 1]] for row in range(2) for t in range(5)]
    assert loss.item() == pytest.approx(sum(by_hand).item() / 10, rel=1e-6)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_global_batch_has_one_gradient_however_it_is_split(network, micro_batch):
    def gradient(size):
        network.zero_grad()
        all_blocks = blocks(8)
        for start in range(0, 8, size):
            batch = collate(all_blocks[start : start + size])
            causal_loss(network(batch["input_ids"]), batch["labels"], num_items_in_batch=8 * 5).backward()
        return torch.cat([weight.grad.flatten() for weight in network.parameters()])

    torch.testing.assert_close(gradient(micro_batch), gradient(8), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_trainer_counts_predictions_for_every_class_of_model(kind, tmp_path):
    """It counts all labels for GPT-2 and labels[1:] for Llama; with ours both are block_size - 1 a block."""
    from transformers import Trainer, TrainingArguments

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_layer=1, n_head=1, n_embd=8, n_positions=6, **ids))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes, **ids))
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=arguments, compute_loss_func=causal_loss)
    count = trainer._get_num_items_in_batch([collate(blocks(2)), collate(blocks(1))], torch.device("cpu"))
    assert int(count) == 3 * 5
