"""What a model can do is found out by running it, not by its name."""

import pytest
import torch
import transformers
from tokenizers import AddedToken
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raylm import evaluate, model, objective, probe
from raylm import tokenizer as tokenizers
from raylm.config import BlocksConfig, Experiment, ModelConfig, ObjectiveConfig, TrainedTokenizer
from raylm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}

ISOLATED = {
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 16},
    "llama": GROUPED,
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen3": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "gpt_neox": SIZES,
    "ctrl": {"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2},
}
"""Models for which position ids that start again are the end of attention."""

JOINED = {
    "opt": {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "word_embed_proj_dim": 16}
    | {"num_attention_heads": 2},
    "xglm": {"d_model": 16, "ffn_dim": 16, "num_layers": 1, "attention_heads": 2},
    "biogpt": SIZES,
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "mpt": {"d_model": 16, "n_layers": 1, "n_heads": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "mamba2": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
    },
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    "recurrent_gemma": {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 16},
    "falcon_h1": {**GROUPED, **MAMBA, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    "granitemoehybrid": {**GROUPED, **MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16}
    | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "bart": {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16},
}
"""Causal models that do not look for documents in position ids."""

SEEING = {
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
    "bert-generation": SIZES,
}
"""Models that transformers loads as causal ones, and that see the future."""


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["the cat sat on a mat"], TrainedTokenizer(vocab_size=300))


def tried(kind, sizes, tokenizer, *, dtype=torch.float32, one_row=False, objective_kind="causal", **section):
    """Raises what a worker raises before it trains such a model."""
    experiment = Experiment(
        model=ModelConfig(config={"model_type": kind, **sizes}),
        blocks=BlocksConfig(**{"block_size": 16, **section}),
        objective=ObjectiveConfig(kind=objective_kind),
        train={"batch_tokens": 32 * section.get("block_size", 16)},
    )
    masked = experiment.objective.is_masked
    network = model.build(experiment.model, tokenizer, block_size=experiment.blocks.block_size, masked=masked)
    objective.attach(network, shifted=not masked)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        probe.check_training(network, experiment, tokenizer, tokenizers.frame(tokenizer), one_row=one_row)
    assert network.training, "it is as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ISOLATED)
def test_documents_are_isolated_where_position_ids_are_looked_at(kind, dtype, tokenizer):
    for one_row in (False, True):
        tried(kind, ISOLATED[kind], tokenizer, dtype=dtype, one_row=one_row, isolate_documents=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", JOINED)
def test_isolation_is_refused_of_a_model_that_sees_the_document_before(kind, dtype, tokenizer):
    tried(kind, JOINED[kind], tokenizer, dtype=dtype)
    message = rf"^blocks.isolate_documents=true: model.config.model_type={kind} .* sees the document before"
    with pytest.raises(ConfigError, match=message):
        tried(kind, JOINED[kind], tokenizer, dtype=dtype, isolate_documents=True)
    tried(kind, JOINED[kind], tokenizer, dtype=dtype, isolate_documents=True, packing="padded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SEEING)
def test_a_model_that_sees_the_future_is_refused(kind, dtype, tokenizer):
    message = rf"^model.config.model_type={kind} \(model_type {kind}\) sees later tokens, .* take a causal model"
    with pytest.raises(ConfigError, match=message) as refused:
        tried(kind, SEEING[kind], tokenizer, dtype=dtype)
    assert refused.value.where == "model.config"


def test_the_way_out_of_seeing_the_future_is_one(tokenizer):
    with pytest.raises(ConfigError, match=r"or set model.config.is_decoder=true$"):
        tried("bert-generation", SIZES, tokenizer)
    tried("bert-generation", {**SIZES, "is_decoder": True}, tokenizer)


def test_a_masked_model_has_to_see_later_tokens(tokenizer):
    masking = tokenizers.train(["a b"], TrainedTokenizer(vocab_size=300, special_tokens=["<|endoftext|>", "<mask>"]))
    tried("bert", SIZES, masking, objective_kind="masked")
    with pytest.raises(
        ConfigError, match=r"^objective.kind=masked: model.config.model_type=bert .* does not see later"
    ):
        tried("bert", {**SIZES, "is_decoder": True}, masking, objective_kind="masked")


def test_an_id_that_the_model_has_not_is_refused_before_it_runs(tokenizer):
    network = model.build(ModelConfig(config={"model_type": "gpt2", **ISOLATED["gpt2"]}), tokenizer, block_size=16)
    network.resize_token_embeddings(len(tokenizer) - 1)
    network.forward = None
    frame = tokenizers.frame(tokenizer)
    with pytest.raises(
        ConfigError, match=r"^MODEL \(model_type gpt2\): the largest id .* is 257, .* has 257 embeddings"
    ):
        probe.check_scoring(network, tokenizer, frame, named="MODEL", context=16, masked=False)


def test_a_block_for_which_the_model_has_no_positions_is_refused_whatever_its_configuration_tells(tokenizer):
    experiment = Experiment(
        model=ModelConfig(config={"model_type": "gpt2", **ISOLATED["gpt2"]}), blocks={"block_size": 64}
    )
    network = model.build(experiment.model, tokenizer, block_size=64)
    network.transformer.wpe = torch.nn.Embedding(63, 16)
    objective.attach(network, shifted=True)
    with pytest.raises(ConfigError, match=r"^blocks.block_size=64: .* runs on .* not on so many \(index out of range"):
        probe.check_training(network, experiment, tokenizer, tokenizers.frame(tokenizer))
    network.transformer.wpe = torch.nn.Embedding(64, 16)
    probe.check_training(network, experiment, tokenizer, tokenizers.frame(tokenizer))


def test_a_special_token_that_no_text_has_needs_no_embedding(tokenizer, tmp_path):
    """Gemma 3 270M: 262,144 embeddings, and an id 262,144 for images."""
    tokenizer.save_pretrained(tmp_path)
    with_images = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model.untrained(transformers.GPT2Config(vocab_size=len(tokenizer), **ISOLATED["gpt2"])).save_pretrained(tmp_path)
    section = ModelConfig(path=str(tmp_path))
    with_images.add_tokens([AddedToken("<image>", special=True)])
    with_images.save_pretrained(tmp_path)  # it is the model's own, not one with tokens added
    network = model.build(section, with_images, block_size=16)
    assert len(network.get_input_embeddings().weight) == len(tokenizer)
    probe.check_scoring(network, with_images, tokenizers.frame(tokenizer), named="MODEL", context=16, masked=False)
    with_images.add_tokens(["a word"])
    network = model.build(section, with_images, block_size=16)
    assert len(network.get_input_embeddings().weight) == len(with_images)


@pytest.mark.parametrize("block_size", range(2, 14))
def test_the_probe_fits_into_the_smallest_block(block_size, tokenizer):
    tried("gpt2", {**ISOLATED["gpt2"], "n_positions": block_size}, tokenizer, block_size=block_size)
    with pytest.raises(ConfigError, match="^model.config.model_type=bert-generation .* sees later"):
        tried("bert-generation", SIZES, tokenizer, block_size=block_size)
    tried("llama", GROUPED, tokenizer, block_size=block_size, isolate_documents=True)
    if block_size > 2:
        with pytest.raises(ConfigError, match="^blocks.isolate_documents"):
            tried("falcon", JOINED["falcon"], tokenizer, block_size=block_size, isolate_documents=True)


def test_a_corpus_of_few_tokens_can_be_probed(tmp_path):
    """A vocabulary of four letters and an end."""
    from tokenizers import Tokenizer, models

    vocabulary = {letter: number for number, letter in enumerate(["<end>", *"ACGT"])}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="A")), eos_token="<end>"
    )
    tried("llama", GROUPED, made, isolate_documents=True)


# Where the model runs ------------------------------------------------------------------------------------------------


def test_a_training_refuses_before_its_first_step(tiny, train_run):
    sizes = (
        "model.config={model_type: opt, hidden_size: 16, ffn_dim: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    )
    with pytest.raises(ConfigError, match=r"^blocks.isolate_documents=true: model.config.model_type=opt "):
        train_run(tiny(sizes + "word_embed_proj_dim: 16}", "blocks.isolate_documents=true"))
    with pytest.raises(ConfigError, match=r"^model.config.model_type=xlnet \(model_type xlnet\) sees later tokens"):
        train_run(tiny("model.config={model_type: xlnet, d_model: 16, n_layer: 1, n_head: 2, d_inner: 16}"))


def test_a_model_runs_for_the_first_time_where_and_how_it_is_trained(tiny, train_run):
    """As flash_attention_2 has to, which refuses float32; here an attention that takes bfloat16 alone."""
    seen = []

    def two_bytes(module, query, key, value, attention_mask, **options):
        seen.append(query.dtype)
        assert query.dtype is torch.bfloat16, "FlashAttention only supports fp16 and bf16 data type"
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS.register("two_bytes", two_bytes)
    ALL_MASK_ATTENTION_FUNCTIONS.register("two_bytes", flash_attention_mask)
    attention = "model.attn_implementation=two_bytes"
    tokens = "train.max_tokens=512"
    outcome, _ = train_run(tiny(attention, "train.precision=bfloat16", "eval.precision=bfloat16", tokens))
    assert outcome.step == 2
    assert set(seen) == {torch.bfloat16}


def test_a_model_that_sees_the_future_has_no_perplexity(tmp_path, tokenizer):
    network = model.untrained(transformers.BertGenerationConfig(vocab_size=300, **SIZES))
    network.save_pretrained(tmp_path / "seeing")
    tokenizer.save_pretrained(tmp_path / "seeing")
    (tmp_path / "text.txt").write_text("the cat sat on a mat")
    message = rf"^{tmp_path}/seeing \(model_type bert-generation\) sees later tokens"
    with pytest.raises(ConfigError, match=message):
        evaluate.evaluate(str(tmp_path / "seeing"), text=[str(tmp_path / "text.txt")])
