"""train.optimizer=muon: Muon for the matrices of the layers, AdamW for the rest."""

import copy

import pytest
import torch
from torch.optim import AdamW, Muon
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from raylm import training
from raylm.errors import ConfigError
from raylm.training.muon import MuonWithAdamW, matrices


def network(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes, tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gpt2", {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}),
        (
            "llama",
            {f"self_attn.{name}_proj.weight" for name in "qkvo"}
            | {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
        ),
    ],
)
def test_muon_has_the_matrices_of_the_layers_and_neither_embeddings_nor_the_head(kind, expected):
    model = network(kind)
    chosen = matrices(model)
    names = {name.split(".", 3)[-1] for name, weight in model.named_parameters() if id(weight) in chosen}
    assert names == expected
    assert len(chosen) == 2 * len(expected), "of both layers"


def groups(model):
    decayed = [weight for weight in model.parameters() if weight.ndim == 2]
    plain = [weight for weight in model.parameters() if weight.ndim != 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]


def steps(model, *optimizers, seed, count=3):
    for number in range(count):
        ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(seed + number))
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def weights(model):
    return torch.cat([weight.flatten() for weight in model.parameters()])


def test_the_steps_are_those_of_torchs_own_optimizers():
    ours, theirs = network("gpt2"), network("gpt2")
    chosen = matrices(theirs)
    optimizer = MuonWithAdamW(groups(ours), matrices=matrices(ours), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    others = [weight for weight in theirs.parameters() if id(weight) not in chosen]
    adamw = [
        {"params": [weight for weight in others if weight.ndim == 2], "weight_decay": 0.1},
        {"params": [weight for weight in others if weight.ndim != 2], "weight_decay": 0.0},
    ]
    mine = [weight for weight in theirs.parameters() if id(weight) in chosen]
    plain = (
        Muon(mine, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(adamw, lr=1e-2, betas=(0.9, 0.95), eps=1e-8),
    )
    for model, used in ((ours, (optimizer,)), (theirs, plain)):
        torch.manual_seed(1)  # dropout
        steps(model, *used, seed=0)
    assert torch.equal(weights(ours), weights(theirs))


def test_a_saved_state_and_a_new_learning_rate_are_taken_over():
    model = network("llama")
    optimizer = MuonWithAdamW(groups(model), matrices=matrices(model), lr=1e-2)
    steps(model, optimizer, seed=0)
    again = copy.deepcopy(model)
    resumed = MuonWithAdamW(groups(again), matrices=matrices(again), lr=5.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        for group in each.param_groups:
            group["lr"] = 3e-3
    before = weights(model)
    steps(model, optimizer, seed=9)
    steps(again, resumed, seed=9)
    assert torch.equal(weights(model), weights(again))
    assert 0 < (weights(model) - before).abs().max() < 0.1


def test_a_training_with_muon_resumes_where_it_was_stopped(tiny, train_run, tmp_path):
    """Bit by bit: in one piece, and with a checkpoint in the middle from which another run goes on."""
    settings = ("train.optimizer=muon", "train.learning_rate=1e-2", "train.keep_checkpoints=20")
    whole, job = train_run(tiny(*settings))
    adamw, _ = train_run(tiny(*settings[1:]))
    assert whole.best["perplexity"] != adamw.best["perplexity"]
    steps_kept = sorted(job.checkpoints.steps())
    for step in steps_kept[len(steps_kept) // 2 :]:
        job.checkpoints.discard(step)
    outcome = train_run.go_on(job, job.experiment)
    assert outcome.step == whole.step
    assert {**outcome.best, "seconds": None} == {**whole.best, "seconds": None}


@pytest.mark.parametrize("setting", ["train.arguments.fsdp=true"])
def test_muon_is_refused_where_matrices_are_sharded(tiny, setting):
    with pytest.raises(
        ConfigError, match=r"train.optimizer must be another one with train.arguments.fsdp .*, got muon"
    ):
        training.check_settings(tiny("train.optimizer=muon", setting).train)
