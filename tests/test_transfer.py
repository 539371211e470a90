"""model.transfer: the initial values and rates of a model relative to those of a base."""

import copy
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

from raylm import export, transfer
from raylm.config import override
from raylm.errors import ConfigError
from raylm.results import coordinates as shown
from raylm.training import coordinates
from raylm.training.muon import MuonWithAdamW, matrices
from raylm.transfer import Factors

SMALL = {"n_embd": 16, "n_layer": 2}
WIDER = "model.config={model_type: gpt2, n_layer: 3, n_head: 4, n_embd: 32}"
"""Twice the width and 1.5 times the depth of SMALL."""
TRANSFER = "model.transfer.base={n_embd: 16, n_layer: 2}"
LLAMA = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 96, num_hidden_layers: 4, num_attention_heads: 4, "
    "num_key_value_heads: 4}"
)
OF_LLAMA = "model.transfer.base={hidden_size: 16, num_hidden_layers: 2}"


def gpt2(**sizes):
    given = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 16}
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(**{**given, **off, **sizes})


def llama(kind=LlamaConfig, **sizes):
    given = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    return kind(**{**given, "intermediate_size": 96, "vocab_size": 50, **sizes})


def new(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def of_first_layer(found):
    return {name.split(".0.")[-1]: own for name, own in found.items() if ".1." not in name and ".2." not in name}


# Factors -------------------------------------------------------------------------------------------------------------


def test_the_factors_of_gpt2():
    """Four times as wide, twice as deep; its matrices are transposed."""
    found = of_first_layer(transfer.factors(gpt2(n_embd=64, n_layer=4, n_head=8), SMALL))
    embedding, vector = Factors(1, 1, 1, 1 / 4), Factors(1, 1, 1, 1 / 8)
    assert found["transformer.wte.weight"] == found["transformer.wpe.weight"] == embedding
    assert found["attn.c_attn.weight"] == found["mlp.c_fc.weight"] == Factors(1 / 2, 1 / 4, 1 / 2, 1 / 8)
    assert found["ln_1.weight"] == found["ln_1.bias"] == found["attn.c_attn.bias"] == vector
    # A multiplier of 1 / 2, and transformers draws it smaller by the root of 2 for twice the layers.
    end = Factors(2**0.5 / 4, 1 / 8, 1 / 4, 1 / 4, 1 / 2)
    assert found["attn.c_proj.weight"] == found["mlp.c_proj.weight"]
    assert vars(found["mlp.c_proj.weight"]) == pytest.approx(vars(end))
    assert found["mlp.c_proj.bias"] == Factors(1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 2)
    assert found["transformer.ln_f.weight"] == found["transformer.ln_f.bias"] == Factors(1 / 4, 1 / 4, 1 / 4, 1, 1 / 4)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("tied", [True, False])
def test_the_factors_of_llama_and_qwen(kind, tied):
    """Four times as wide, its MLP three times; twice as deep."""
    base = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
    found = of_first_layer(transfer.factors(llama(kind, tie_word_embeddings=tied), base))
    assert found["model.embed_tokens.weight"] == Factors(1, 1, 1, 1 / 4)
    assert ("lm_head.weight" in found) is not tied
    if not tied:
        assert found["lm_head.weight"] == Factors(1, 1, 1, 1 / 4)
    assert found["self_attn.q_proj.weight"] == Factors(1 / 2, 1 / 4, 1 / 2, 1 / 8)
    assert found["self_attn.o_proj.weight"] == Factors(1 / 4, 1 / 8, 1 / 4, 1 / 4, 1 / 2)
    up, down = found["mlp.gate_proj.weight"], found["mlp.down_proj.weight"]
    assert (up.start, up.rate) == (1 / 2, 1 / 4)
    assert up.muon_rate == pytest.approx((3 / 4 / 3) ** 0.5)
    assert (down.start, down.rate, down.epsilon) == pytest.approx((3**-0.5 / 2, 1 / 6, 1 / 4))
    assert down.muon_rate == pytest.approx((4 / 3 / 3) ** 0.5 / 2)
    assert found["model.norm.weight"] == Factors(1 / 4, 1 / 4, 1 / 4, 1, 1 / 4)


def test_larger_heads_have_smaller_queries():
    """Their scale is 1 / head size, and transformers' 1 / sqrt(head size)."""
    base = {"hidden_size": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
    found = of_first_layer(transfer.factors(llama(), base))  # 8 for 2
    assert found["self_attn.q_proj.weight"] == Factors(1 / 4, 1 / 8, 1 / 4, 1 / 2, 1 / 2)
    assert found["self_attn.k_proj.weight"] == Factors(1 / 2, 1 / 4, 1 / 2, 1 / 4)
    found = of_first_layer(transfer.factors(llama(Qwen3Config, head_dim=8), {**base, "head_dim": 2}))
    assert found["self_attn.q_norm.weight"] == Factors(1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2)
    assert found["self_attn.q_proj.weight"].rate == 1 / 4, "what is normalized afterwards has no scale"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("deeper", [1, 2])
def test_a_multiplier_is_the_same_as_a_scaled_weight(deeper, optimizer):
    """A model with the multipliers, initial values, rates, epsilon and weight decay of the papers' tables, and one with
    all of it in its weights, have the same logits before and after some steps, and the same norm of their gradients."""
    m, depth = 2, deeper
    rate, decay, epsilon = 1e-2, 0.5, 1e-4
    of_matrix = m if optimizer == "adamw" else m**0.5
    found = gpt2(n_embd=32, n_layer=2 * depth, n_head=4)
    folded, plain = new(found), new(found)
    by_name = transfer.factors(found, SMALL)
    transfer.scale_weights(folded, by_name)
    groups = []
    for name, weight in plain.named_parameters():
        in_layer, is_end, is_matrix = ".h." in name, ".c_proj." in name, weight.ndim == 2 and ".h." in name
        with torch.no_grad():
            weight *= (m**-0.5 if is_matrix else 1) * (depth**0.5 if is_end and is_matrix else 1)
        groups.append(
            {
                "params": [weight],
                "lr": rate / of_matrix if is_matrix else rate,
                "weight_decay": 0 if weight.ndim == 1 else decay * of_matrix if is_matrix else decay,
                "eps": epsilon / m / (depth if in_layer else 1),
            }
        )
    for name, module in plain.named_modules():
        if name.endswith(("c_proj", "ln_f")):
            by = m if name.endswith("ln_f") else depth
            module.register_forward_hook(lambda _, inputs, output, by=by: output / by)
    decayed = [weight for weight in folded.parameters() if weight.ndim == 2]
    rest = [weight for weight in folded.parameters() if weight.ndim != 2]

    def made(model, groups):
        if optimizer == "adamw":
            return AdamW(groups, lr=rate, eps=epsilon)
        return MuonWithAdamW(groups, matrices(model), lr=rate, eps=epsilon)

    ours = made(folded, [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}])
    transfer.scale_groups(ours, folded, by_name)
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    untouched = folded(input_ids=ids).logits
    assert torch.allclose(plain(input_ids=ids).logits, untouched, atol=1e-6)
    norms: list[list[float]] = []
    for stepping, model, own in (
        (ours, folded, by_name),
        (made(plain, groups), plain, dict.fromkeys(by_name, Factors(1, 1, 1, 1))),
    ):
        norms.append([])
        for _ in range(5):
            model(input_ids=ids, labels=ids).loss.backward()
            with transfer.gradients_without_multipliers(model, own):
                norms[-1].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            stepping.step()
            stepping.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    logits = folded(input_ids=ids).logits
    assert (logits - untouched).abs().max() > 0.1
    assert torch.allclose(logits, plain(input_ids=ids).logits, atol=1e-5)


# Groups --------------------------------------------------------------------------------------------------------------


def test_the_groups_of_the_base_stay_as_they_are():
    model = new(gpt2())
    optimizer = MuonWithAdamW([{"params": list(model.parameters()), "weight_decay": 0.1}], matrices(model), lr=1e-2)
    before = copy.copy(optimizer.param_groups)
    transfer.scale_groups(optimizer, model, transfer.factors(model.config, SMALL))
    assert [{**group, "params": None} for group in optimizer.param_groups] == [
        {**group, "params": None} for group in before
    ]
    same = zip(optimizer.param_groups, before, strict=True)
    assert all(list(map(id, group["params"])) == list(map(id, old["params"])) for group, old in same)


def test_muon_has_factors_of_its_own_and_the_first_group_has_the_bases_rate():
    model = new(gpt2(n_embd=64, n_head=8))
    optimizer = MuonWithAdamW([{"params": list(model.parameters()), "weight_decay": 0.1}], matrices(model), lr=1e-2)
    transfer.scale_groups(optimizer, model, transfer.factors(model.config, SMALL))
    rates = {"ns_steps" in group: [] for group in optimizer.param_groups}
    for group in optimizer.param_groups:
        rates["ns_steps" in group].append(group["lr"])
        assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3)
        assert group["eps"] == pytest.approx(1e-7) or "ns_steps" not in group
    assert rates == {False: [1e-2, 2.5e-3], True: [5e-3]}, "embeddings and layers' vectors, the final norm; matrices"
    assert optimizer.param_groups[0]["lr"] == 1e-2


# Trainings -----------------------------------------------------------------------------------------------------------


def weights_of(job, step=None):
    return load_file(f"{job.checkpoints.path(step or job.checkpoints.steps()[-1])}/model.safetensors")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("config", "base"),
    [
        ("{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 16}", "{n_embd: 16, n_layer: 2}"),
        (LLAMA, "{hidden_size: 32, num_hidden_layers: 4}"),
    ],
)
def test_the_base_is_trained_as_without_the_setting(tiny, train_run, config, base, optimizer):
    """Bit by bit."""
    plain = tiny(f"model.config={config}", f"train.optimizer={optimizer}")
    _, without = train_run(plain)
    _, with_it = train_run(override(plain, {"model.transfer": {"base": json_of(base)}}))
    first, second = weights_of(without), weights_of(with_it)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def json_of(mapping):
    return {name: int(value) for name, value in (pair.split(": ") for pair in mapping.strip("{}").split(", "))}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_with_several_rates_resumes_where_it_was_stopped(tiny, train_run, optimizer):
    """Bit by bit; and with another peak, as a population's trial has after it copied a better one, all rates change in
    proportion."""
    experiment = tiny(WIDER, TRANSFER, f"train.optimizer={optimizer}", "train.keep_checkpoints=20")
    whole, job = train_run(experiment)
    last = weights_of(job)
    steps = sorted(job.checkpoints.steps())
    for step in steps[len(steps) // 2 :]:
        job.checkpoints.discard(step)
    before = rates(job)
    outcome = train_run.go_on(job, experiment)
    assert {**outcome.best, "seconds": None} == {**whole.best, "seconds": None}
    assert all(torch.equal(last[name], weight) for name, weight in weights_of(job).items())
    for step in steps[len(steps) // 2 :]:
        job.checkpoints.discard(step)
    train_run.go_on(job, override(experiment, {"train.learning_rate": 2 * experiment.train.learning_rate}))
    assert rates(job) == pytest.approx([2 * rate for rate in before])


def rates(job):
    """The peak learning rates in the newest checkpoint."""
    directory = job.checkpoints.path(job.checkpoints.steps()[-1])
    groups = torch.load(f"{directory}/optimizer.pt", weights_only=True)["param_groups"]
    scheduler = torch.load(f"{directory}/scheduler.pt", weights_only=True)
    assert scheduler["base_lrs"] == [group["initial_lr"] for group in groups]
    assert len(set(scheduler["base_lrs"])) > 2
    return scheduler["base_lrs"]


@pytest.mark.slow
def test_sharded_weights_have_the_same_rates(tiny, new_job, worker_processes):
    two_workers = ("cluster.num_workers=2", "cluster.cpus_per_worker=0.5", "train.max_tokens=1024")
    experiment = tiny(WIDER, TRANSFER, *two_workers, "eval.max_tokens=800")
    whole = worker_processes(new_job(experiment), 2)
    job = new_job(override(experiment, {"train.arguments.fsdp": True}))
    sharded = worker_processes(job, 2)
    assert sharded.best["perplexity"] == pytest.approx(whole.best["perplexity"], rel=1e-4)
    steps = job.checkpoints.steps()
    job.checkpoints.discard(steps[-1])
    resumed = worker_processes(job, 2)
    assert {**resumed.best, "seconds": None} == {**sharded.best, "seconds": None}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "settings",
    [
        (WIDER, TRANSFER),
        (f"model.config={LLAMA}", OF_LLAMA),
        (f"model.config={LLAMA.replace('llama', 'qwen2')}", OF_LLAMA),
        (f"model.config={LLAMA.replace('llama, ', 'qwen3, tie_word_embeddings: true, head_dim: 8, ')}", OF_LLAMA),
    ],
    ids=["gpt2", "llama", "qwen2", "qwen3"],
)
def test_an_export_has_the_same_logits_in_plain_transformers(
    tiny, train_run, settings, optimizer, tmp_path, monkeypatch
):
    from raylm.training import trainer

    models, run = [], trainer._Trainer.run
    monkeypatch.setattr(trainer._Trainer, "run", lambda self: (models.append(self.model), run(self))[1])
    outcome, job = train_run(tiny(*settings, f"train.optimizer={optimizer}"))
    directory = export.export(job.checkpoints.path(outcome.step), tmp_path / "model")
    found, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert (set(told["missing_keys"]), set(told["unexpected_keys"])) == (set(), set())
    ids = torch.arange(8)[None]
    trained = models[0].eval()(input_ids=ids)["logits"]
    assert torch.allclose(found(input_ids=ids).logits, trained, atol=1e-6, rtol=0)
    assert trained.std() > 0.1


# A coordinate check --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(tiny):
    experiment = tiny("train.learning_rate=2e-3", "blocks.block_size=64")
    return coordinates.check(experiment, gpt2(n_positions=64, initializer_range=0.1))


def test_changes_have_the_same_size_at_every_width_with_transfer_and_not_without(checked):
    assert checked["widths"] == [32, 64, 128, 256]
    for kind in ("attention", "MLP", "logits"):
        scaled, plain = (checked[way][kind]["slopes"][1:] for way in ("with_transfer", "without"))
        assert max(map(abs, scaled)) < 0.25, (kind, scaled)
        assert min(plain) > 0.4, kind
    narrowest = [[step[0] for step in checked[way]["MLP"]["sizes"]] for way in ("with_transfer", "without")]
    assert narrowest[0] == narrowest[1], "it is the base"


def test_a_check_is_shown_as_tables_and_a_plot(checked):
    assert json.loads(json.dumps(checked)) == checked
    page = shown.page(checked)
    assert "slope with model.transfer" in page
    assert "size after step 8, without" in page
    assert page.count("<html") == page.count("</html>") == 1
    assert ("Plotly.newPlot" in page) is bool(importlib.util.find_spec("plotly"))


def test_inspect_checks_models_like_the_experiments(command, tmp_path):
    settings = [f"storage={tmp_path}", "tracking.uri=null"]
    done = command("inspect", "--coordinates", "--json", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["optimizer"], record["text"]) == ("adamw", "random")
    assert set(record["without"]) == {"embedding", "attention", "MLP", "logits"}
    refused = command("inspect", "--coordinates", "model.config={model_type: opt}", *settings, cwd=tmp_path)
    assert refused.returncode == 2
    assert "got model.config.model_type=opt" in refused.stderr


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.optimizer=sgd"], r"train.optimizer: must be adamw or muon with model.transfer, got sgd"),
        (["model.path=gpt2", "model.config=null"], r"model.transfer: is for a new model .* model.path, got gpt2"),
        (
            ["model.config=null"],
            r"model.transfer: must come with model.config, whose sizes it",
        ),
        (["model.lora={}"], r"model.transfer: cannot be given with model.lora"),
        (["train.arguments.deepspeed=zero.json"], r"deepspeed: cannot be given with model.transfer"),
        (["model.transfer.base={}"], r"model.transfer.base"),
        (["model.transfer.base={n_embd: 0}"], r"model.transfer.base.n_embd: must be at least 1, got 0"),
        (["model.transfer.base={n_embd: 1.5}"], r"model.transfer.base.n_embd: must be a whole number, got 1.5"),
    ],
)
def test_settings_that_do_not_go_together(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(WIDER, TRANSFER, *settings)


@pytest.mark.parametrize(
    ("found", "base", "message"),
    [
        (gpt2(), {"hidden_size": 16}, r"base.hidden_size: not a size of gpt2.*; it takes: n_embd, n_layer, n_head"),
        (gpt2(), {"n_embed": 16}, r"base.n_embed: not a size of gpt2, did you mean n_embd"),
        (gpt2(), {"n_embd": 12}, r"base must name n_head, or a width that divides: in proportion it is 1.5"),
        (gpt2(), {"n_head": 4}, r"base.n_head must make heads of 8, the model's, got 4, and heads of 4: in gpt2"),
        (llama(), {"hidden_size": 8}, r"base must name num_key_value_heads, .*: in proportion it is 0.5"),
    ],
)  # fmt: skip
def test_a_base_that_is_none(found, base, message):
    with pytest.raises(ConfigError, match=message):
        transfer.base_configuration(found, base)


def test_other_architectures_are_refused_before_anything_is_trained(tiny):
    from raylm import model

    section = tiny("model.config={model_type: opt, hidden_size: 32}", "model.transfer.base={hidden_size: 16}").model
    message = r"are for gpt2, llama, mistral, qwen2, qwen3, got model.config.model_type=opt"
    with pytest.raises(ConfigError, match=message):
        model.configuration(section, vocab_size=300, block_size=32)
