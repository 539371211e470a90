import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    RobertaConfig,
    TrainingArguments,
    XLNetConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from raylm import checkpoint, export, lora, model, objective, training
from raylm import plan as plans
from raylm import tokenizer as tokenizers
from raylm.config import Experiment, ModelConfig, TrainedTokenizer
from raylm.errors import ConfigError, RaylmError
from raylm.training.trainer import _Trainer

SMALL = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8}
UNTIED = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
LLAMA = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


def configuration(block_size=16, vocab_size=30, **fields):
    section = ModelConfig(config={**SMALL, **fields})
    return model.configuration(section, vocab_size=vocab_size, block_size=block_size, eos_id=3)


def test_a_new_model_follows_tokenizer_and_block_size():
    found = configuration()
    assert (found.vocab_size, found.n_positions, model.context(found)) == (30, 16, 16)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (3, 3, 3)


def test_positions_may_be_more_than_the_block():
    assert model.context(configuration(n_positions=64)) == 64


def test_a_block_beyond_the_positions_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"block_size must be at most 8.*got 16; lower it, or set model.config.n_pos"):
        configuration(n_positions=8)
    GPT2Config(n_positions=8, vocab_size=30).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"block_size must be at most 8.*got 16; lower it$"):
        model.configuration(ModelConfig(path=str(tmp_path)), vocab_size=30, block_size=16)


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path):
    section = ModelConfig(config={**SMALL, "vocab_size": 20})
    with pytest.raises(ConfigError, match="30 tokens.*embedding 20 rows.*leave out model.config.vocab_size"):
        model.configuration(section, vocab_size=30, block_size=4)
    GPT2Config(n_positions=8, vocab_size=20).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="30 tokens.*embedding 20 rows.*leave out the section tokenizer"):
        model.configuration(ModelConfig(path=str(tmp_path)), vocab_size=30, block_size=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.config.vocab_size=280"], "the tokenizer has 300 tokens, the model's embedding 280 rows"),
        (["model.config.n_positions=16"], "blocks.block_size must be at most 16"),
        (
            ["model.config={model_type: bert}", "objective.kind=masked"],
            "no mask token; .*tokenizer.train.special_tokens",
        ),
        (["model.config={model_type: bert}"], "objective.kind: bert reads in both directions"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_model_that_does_not_fit_is_refused_by_the_verb_before_ray_starts(settings, message, tiny):
    with pytest.raises(ConfigError, match=message):
        plans.resolve(tiny(*settings))


MASKED = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 8}
OF_ITS_OWN = {
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 1},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 4, "entity_emb_size": 4},
    "xmod": {"default_language": "en_XX"},
}


@pytest.mark.parametrize("kind", sorted(model.AFTER_PADDING))
def test_positions_of_roberta_and_its_kin_begin_after_the_padding_token(kind, tokenizer):
    fields = {"model_type": kind, **MASKED, **OF_ITS_OWN.get(kind, {})}
    network = model.build(ModelConfig(config=fields), tokenizer, block_size=8, masked=True).eval()
    assert model.context(network.config) == 8
    network(input_ids=torch.arange(5, 13)[None], attention_mask=torch.ones(1, 8).long())
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.arange(5, 14)[None], attention_mask=torch.ones(1, 9).long())


def test_a_pretrained_roberta_has_the_positions_that_its_card_tells(tmp_path):
    RobertaConfig(max_position_embeddings=514, **MASKED).save_pretrained(tmp_path)
    section = ModelConfig(path=str(tmp_path))
    assert model.context(model.configuration(section, vocab_size=9, block_size=512, masked=True)) == 512
    with pytest.raises(ConfigError, match="blocks.block_size must be at most 512, .* got 513"):
        model.configuration(section, vocab_size=9, block_size=513, masked=True)


def test_every_model_of_transformers_whose_positions_begin_after_the_padding_token_is_known():
    """Those that count positions as fairseq does and are trained to fill masks."""
    sources = Path(transformers.__file__).parent / "models"
    found = {
        kind
        for kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        for file in sources.glob(f"{kind.replace('-', '_').removesuffix('_text')}/modeling_*.py")
        if "create_position_ids_from_input_ids(" in file.read_text(encoding="utf-8")
    }
    assert found == model.AFTER_PADDING


def test_a_model_may_have_no_table_of_positions():
    assert model.context(XLNetConfig()) is None


def test_an_unknown_model_type_names_near_ones():
    with pytest.raises(ConfigError, match=r"model_type=gtp2.*gpt2"):
        configuration(model_type="gtp2")


def test_an_unknown_field_names_a_near_one():
    with pytest.raises(ConfigError, match=r"model.config.n_layers: unknown field of gpt2; did you mean n_layer\?"):
        configuration(n_layers=3)


def test_a_weight_of_the_routers_loss_is_refused_where_there_is_no_such_loss():
    def made(**fields):
        return model.configuration(ModelConfig(config=fields), vocab_size=9, block_size=8)

    with pytest.raises(ConfigError, match=r"^model.config.router_aux_loss_coef=0.02 is of no effect: mixtral .*=true$"):
        made(model_type="mixtral", router_aux_loss_coef=0.02)
    with pytest.raises(ConfigError, match=r"^model.config.aux_loss_coef=0.02 is of no effect"):
        made(model_type="jetmoe", aux_loss_coef=0.02)
    assert made(model_type="mixtral", router_aux_loss_coef=0.02, output_router_logits=True).output_router_logits


def test_a_path_that_holds_no_model_is_refused(tmp_path):
    def refused(path, why, **given):
        with pytest.raises(ConfigError, match=rf"^model.path={path}: {why}"):
            model.configuration(ModelConfig(path=str(path), **given), vocab_size=1, block_size=2)

    refused(tmp_path / "gone", "there is no such directory$")
    refused(tmp_path, "the directory is empty$")
    (tmp_path / "text.txt").touch()
    refused(tmp_path / "text.txt", "it is a file; give the directory that it is in")
    refused(tmp_path, "it has no config.json$")
    (tmp_path / "step_1").mkdir()
    GPT2Config().save_pretrained(tmp_path / "step_1")
    refused(tmp_path, f"it has no config.json; did you mean {tmp_path}/step_1")
    (tmp_path / "q4.gguf").touch()
    refused(tmp_path, "it has no config.json; give model.gguf_file=q4.gguf$")
    refused(tmp_path, "there is no q8.gguf in it; its GGUF files: q4.gguf$", gguf_file="q8.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": "three"}')
    refused(tmp_path, "it cannot be loaded: .*n_layer")


def test_a_directory_without_weights_is_refused_by_the_plan(tmp_path, tiny):
    GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"no weights, no model.safetensors; .* model.config={{path: {tmp_path}}}$"):
        plans.resolve(tiny(f"model.path={tmp_path}"))


def test_damaged_weights_are_the_settings_fault(tmp_path, tokenizer):
    """And not the worker's, which would be begun again."""
    GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=300).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=rf"^model.path={tmp_path}: it cannot be loaded: SafetensorError: "):
        model.build(ModelConfig(path=str(tmp_path)), tokenizer, block_size=8)


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


def test_parameters_without_embeddings_are_those_of_the_layers():
    """GPT-2 as published: 124M, of which 85M are in 12 layers of 12 x 768^2 and biases and norms."""
    tied = model.parameters(GPT2Config())
    assert tied == (124_439_808, 124_439_808 - (50_257 + 1024) * 768, 50_257 * 768)
    assert tied.multiplied == tied.all - 1024 * 768, "the embedding of tokens is the head, too"
    untied = model.parameters(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    both = model.parameters(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    assert untied.without_embeddings == both.without_embeddings == both.all - 100 * 64
    assert untied.all - both.all == untied.output_head == 100 * 64
    assert untied.multiplied == both.multiplied


def test_floating_point_operations_are_those_that_torch_counts():
    gpt2 = GPT2Config(vocab_size=100, n_layer=2, n_embd=64, n_head=4, bos_token_id=0, eos_token_id=0)
    for found in (gpt2, LlamaConfig(**LLAMA)):
        found._attn_implementation = "eager"  # torch counts no fused attention of a CPU
        network = model.untrained(found)
        tokens = torch.arange(32)[None]
        with FlopCounterMode(display=False) as counter:
            network(tokens, labels=tokens).loss.backward()
        counts = model.parameters(found)
        assert 32 * model.flops_per_token(found, counts, block_size=32) == pytest.approx(
            counter.get_total_flops(), rel=0.02
        )
        of_updates = model.flops_per_token(found, counts, block_size=32, only_updates=True)
        assert of_updates == model.flops_per_token(found, counts, block_size=32) - 2 * counts.multiplied
    recurrent = MambaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=2)
    counts = model.parameters(recurrent)
    assert model.flops_per_token(recurrent, counts, block_size=32) == 6 * counts.multiplied


def test_positions_and_vocabulary_of_another_models_configuration_follow_too(tmp_path):
    GPT2Config(n_layer=7, n_embd=24, n_head=3, n_positions=99, vocab_size=99).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        section = ModelConfig(config={"path": str(path), "n_layer": 2})
        found = model.configuration(section, vocab_size=30, block_size=16, eos_id=3)
        assert (found.n_layer, found.n_embd, found.n_positions, found.vocab_size) == (2, 24, 16, 30)
        assert (found.eos_token_id, found.pad_token_id) == (3, 3)
    with pytest.raises(ConfigError, match=r"model.config.n_layers: .* did you mean n_layer\?"):
        model.configuration(ModelConfig(config={"path": str(tmp_path), "n_layers": 2}), vocab_size=3, block_size=2)
    with pytest.raises(ConfigError, match=r"model.config.path=.*nowhere: there is no such directory"):
        model.configuration(ModelConfig(config={"path": str(tmp_path / "nowhere")}), vocab_size=3, block_size=2)


def test_the_vocabulary_is_rounded_up(tokenizer):
    section = ModelConfig(config=SMALL, pad_vocab_to=64)
    assert model.build(section, tokenizer, block_size=8).transformer.wte.weight.shape == (320, 8)
    assert model.configuration(section, vocab_size=320, block_size=8).vocab_size == 320


def test_the_end_of_text_token_is_learned_though_it_is_the_padding_token_too(tokenizer):
    """Llama's embedding leaves out its padding token, which would stay zero."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = model.build(ModelConfig(config={"model_type": "llama", **sizes}), tokenizer, block_size=8)
    network(torch.tensor([[tokenizer.eos_token_id, 5]])).logits[0, 0].sum().backward()
    embedding = network.get_input_embeddings().weight
    assert embedding[tokenizer.eos_token_id].abs().sum() > 0
    assert embedding.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_a_model_that_looks_both_ways_is_for_masked_only(tokenizer):
    bert = {"model_type": "bert", "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8}
    bert["intermediate_size"] = 8
    network = model.build(ModelConfig(config=bert), tokenizer, block_size=8, masked=True)
    assert (type(network).__name__, network.config.max_position_embeddings) == ("BertForMaskedLM", 8)
    found = model.configuration(ModelConfig(config=bert), vocab_size=257, block_size=8, eos_id=0, masked=True)
    assert model.num_parameters(found, masked=True) == network.num_parameters()
    with pytest.raises(ConfigError, match=r"objective.kind: bert reads in both directions.*objective.kind=masked"):
        model.configuration(ModelConfig(config=bert), vocab_size=260, block_size=8)
    with pytest.raises(ConfigError, match=r"objective.kind=masked: gpt2 reads in one direction"):
        model.configuration(ModelConfig(config=SMALL), vocab_size=260, block_size=8, masked=True)


def test_a_pretrained_encoder_without_its_head_gets_one_by_the_seed(tmp_path, tokenizer):
    from transformers import BertModel

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
    encoder = BertModel(BertConfig(vocab_size=260, max_position_embeddings=8, **sizes))
    encoder.save_pretrained(tmp_path)
    made = [model.build(ModelConfig(path=str(tmp_path)), tokenizer, block_size=8, seed=1, masked=True) for _ in "ab"]
    dense = [network.cls.predictions.transform.dense.weight for network in made]
    assert torch.equal(*dense)
    assert torch.equal(made[0].bert.embeddings.word_embeddings.weight, encoder.embeddings.word_embeddings.weight)


def test_precision_and_attention_are_as_asked(tokenizer):
    section = ModelConfig(config=SMALL, dtype="bfloat16", attn_implementation="eager")
    network = model.build(section, tokenizer, block_size=8)
    assert (network.dtype, network.config._attn_implementation) == (torch.bfloat16, "eager")
    section = ModelConfig(config=SMALL, attn_implementation="flash_attention_9")
    with pytest.raises(ConfigError, match=r"model.attn_implementation: .*flash_attention_9"):
        model.num_parameters(model.configuration(section, vocab_size=30, block_size=8))


def test_code_that_comes_with_a_model_runs_only_if_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}})
    )
    (tmp_path / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Own(PretrainedConfig):\n    model_type = 'own'\n    vocab_size = 3\n"
    )
    with pytest.raises(ConfigError, match="let it run with model.trust_remote_code=true"):
        model.configuration(ModelConfig(path=str(tmp_path)), vocab_size=1, block_size=2)
    assert not (tmp_path / "ran").exists()
    model.configuration(ModelConfig(path=str(tmp_path), trust_remote_code=True), vocab_size=1, block_size=2)
    assert (tmp_path / "ran").exists()


OWN_MODEL = """
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class Own(PretrainedConfig):
    model_type = "own"
    def __init__(self, vocab_size=300, width=8, **rest):
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, 1
        super().__init__(**rest)

class Model(PreTrainedModel, GenerationMixin):
    config_class = Own
    def __init__(self, config):
        super().__init__(config)
        self.embedding = torch.nn.Embedding(config.vocab_size, config.width)
        self.head = torch.nn.Linear(config.width, config.vocab_size)
        self.post_init()
    def _init_weights(self, layer):
        torch.nn.init.normal_(layer.weight)
    def get_input_embeddings(self):
        return self.embedding
    def forward(self, input_ids, labels=None, **_):
        logits = self.head(self.embedding(input_ids).cumsum(1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""


def test_a_model_with_code_of_its_own_is_trained_and_saved_with_that_code(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    given, scratch = tmp_path / "given", tmp_path / "scratch"
    given.mkdir()
    (given / "own.py").write_text(OWN_MODEL)
    mapped = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    (given / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": mapped}))
    config = AutoConfig.from_pretrained(given, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(given)
    section = ModelConfig(path=str(given), trust_remote_code=True)
    assert model.num_parameters(model.pretrained_configuration(section)) == 300 * 8 + 8 * 300 + 300
    experiment = Experiment(model=section, blocks={"block_size": 8})
    trainer = trainer_of(experiment, tokenizer, scratch, save_strategy="steps", save_steps=4)
    trainer.train()
    tokenizer.save_pretrained(scratch / "checkpoint-4")
    record = {"step": 4, "tokens": 64, "perplexity": 12.25, "bits_per_byte": 1.5, "store": "/nowhere"}
    checkpoint.describe(scratch / "checkpoint-4", experiment, record)
    exported = export.export(scratch / "checkpoint-4", tmp_path / "model")
    ids = torch.arange(8)[None]
    for directory in (scratch / "checkpoint-4", exported):
        with pytest.raises(ConfigError, match="comes with code of its own.*model.trust_remote_code=true"):
            model.pretrained_configuration(ModelConfig(path=str(directory)))
        # Though experiment.yaml beside it says to trust it: that may be anybody's.
        with pytest.raises(RaylmError, match="custom code|code of its own"):
            checkpoint.load(directory)
        again = checkpoint.load(directory, ModelConfig(trust_remote_code=True)).model
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    "targets", [(), ("all-linear",), ("c_attn", "c_proj"), ("lm_head",), ("wte",), ("wte", "lm_head")], ids=str
)
def test_low_rank_updates_are_trained_alone_and_saved_merged(tmp_path, tokenizer, targets):
    base = model.build(ModelConfig(config=SMALL), tokenizer, block_size=8, seed=3)
    section = ModelConfig(config=SMALL, lora={"r": 2, "target_modules": targets})
    network = model.build(section, tokenizer, block_size=8, seed=3)
    trained = {name for name, weight in network.named_parameters() if weight.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name in trained:
                weight.normal_()
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    network.save_pretrained(tmp_path, state_dict=lora.merged_state_dict(network))
    lora.save_updates(network, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    given = torch.arange(8)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(given).logits, network.eval()(given).logits, rtol=1e-4, atol=1e-5)
    ends = {"wte", "lm_head"}.intersection(targets)
    assert plain.config.tie_word_embeddings == (not ends)  # GPT-2's input and output are one matrix, unless one changes
    assert not torch.allclose(plain(given).logits, base.eval()(given).logits, atol=1e-3)
    again = model.build(section, tokenizer, block_size=8, seed=3)
    lora.load_updates(again, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in again.state_dict().items())


def test_low_rank_training_resumes_bit_identically(tmp_path, tokenizer):
    updates = {"r": 2, "dropout": 0.1, "modules_to_save": ["ln_f", "lm_head"]}
    experiment = Experiment(model=ModelConfig(config=SMALL, lora=updates), blocks={"block_size": 8})
    trainer = trainer_of(experiment, tokenizer, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    last, halfway = tmp_path / "checkpoint-4", tmp_path / "checkpoint-2"
    names = ["model.safetensors", *lora.CHECKPOINT_ADAPTER.values()]
    written = [(last / name).read_bytes() for name in names]
    assert written[1] != (halfway / names[1]).read_bytes()
    again = trainer_of(experiment, tokenizer, tmp_path / "again", save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(halfway))
    last = tmp_path / "again" / "checkpoint-4"
    assert [(last / name).read_bytes() for name in names] == written


ADAPTERS = {
    "default": {},
    "every linear layer": {"target_modules": ["all-linear"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding and head": {"modules_to_save": ["wte", "embed_tokens", "lm_head"]},
    "norm": {"modules_to_save": ["ln_f", "model.norm"]},
    "update of the embedding": {"target_modules": ["wte", "embed_tokens"]},
    "update of the head": {"target_modules": ["lm_head"]},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    """A causal model whose embedding is its head, and one whose embedding is not, in directories."""
    directories = {}
    for name, config in {"tied": SMALL, "untied": {**UNTIED, "tie_word_embeddings": False}}.items():
        network = model.build(ModelConfig(config={**config, "initializer_range": 0.5}), tokenizer, block_size=8, seed=3)
        directories[name] = tmp_path_factory.mktemp(name)
        network.save_pretrained(directories[name])
        tokenizer.save_pretrained(directories[name])
    return directories


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_the_trained_model_in_plain_peft(tmp_path, tokenizer, bases, kind, adapter):
    base, given = str(bases[kind]), torch.arange(8)[None]
    layers = {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_modules()}
    settings = {
        key: [name for name in names if name == "all-linear" or any(layer.endswith(name) for layer in layers)]
        for key, names in ADAPTERS[adapter].items()
    }
    section = ModelConfig(path=base, lora={"r": 2, **settings})
    network = model.build(section, tokenizer, block_size=8).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) / 4
    expected = network(given).logits
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(given).logits, expected, atol=1e-2)
    saved, adapter = tmp_path / "checkpoint", tmp_path / "adapter"
    network.save_pretrained(saved, state_dict=lora.merged_state_dict(network))
    lora.save_updates(network, saved)
    tokenizer.save_pretrained(saved)
    adapter.mkdir()
    files = export.model_files(saved, "adapter")
    assert not {"config.json", "model.safetensors"} & {*files}
    for name, content in files.items():
        (adapter / name).write_bytes(content.read_bytes())
    described = json.loads((adapter / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["task_type"]) == (base, "CAUSAL_LM")
    found = {
        "peft": peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
        "peft, by its own name": peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
        "transformers": AutoModelForCausalLM.from_pretrained(adapter),
        "raylm": checkpoint.load(adapter).model,
        "merged": AutoModelForCausalLM.from_pretrained(saved),
    }
    for name, loaded in found.items():
        torch.testing.assert_close(loaded.eval()(given).logits, expected, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(found["raylm"](given).logits, found["merged"](given).logits)
    again = model.build(section, tokenizer, block_size=8).eval()
    lora.load_updates(again, saved)
    assert torch.equal(again(given).logits, expected)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_an_adapter_has_the_rows_of_tokens_that_were_added(tmp_path, bases, kind):
    base = str(bases[kind])
    extended = AutoTokenizer.from_pretrained(base)
    extended.add_tokens(["<tool>", "<result>"])
    size, given = len(extended), torch.tensor([[1, 2, len(extended) - 2, 3, len(extended) - 1]])
    whole = model.build(ModelConfig(path=base), extended, block_size=8)
    assert whole.config.vocab_size == len(whole.get_input_embeddings().weight) == size
    section = ModelConfig(path=base, lora={"r": 2})
    network = model.build(section, extended, block_size=8).eval()
    rows = [name for name, weight in network.named_parameters() if weight.requires_grad and ".lora_" not in name]
    assert len(rows) == (1 if kind == "tied" else 2)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight) / 4
    expected = network(given).logits
    network.save_pretrained(tmp_path, state_dict=lora.merged_state_dict(network))
    lora.save_updates(network, tmp_path)
    extended.save_pretrained(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name, content in export.model_files(tmp_path, "adapter").items():
        (adapter / name).write_bytes(content.read_bytes())
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(size)
    found = {
        "peft": peft.PeftModel.from_pretrained(grown, adapter),
        "peft, by its own name": peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
        "raylm": checkpoint.load(adapter).model,
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path),
    }
    for name, loaded in found.items():
        torch.testing.assert_close(loaded.eval()(given).logits, expected, rtol=1e-4, atol=1e-5, msg=name)
    for loaded in (found["raylm"], found["merged"]):
        assert loaded.config.tie_word_embeddings == (kind == "tied")
        assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (kind == "tied")
    again = model.build(section, extended, block_size=8).eval()
    lora.load_updates(again, tmp_path)
    assert torch.equal(again(given).logits, expected)
    with pytest.raises(ConfigError, match=r"train it entirely: name \w+, lm_head in model.lora.modules_to_save"):
        model.build(ModelConfig(path=base, lora={"target_modules": ["lm_head"]}), extended, block_size=8)
    other = tokenizers.train(["d e f"], TrainedTokenizer(vocab_size=280, special_tokens=("<s>",)))
    other.add_tokens([f"<{number}>" for number in range(30)])
    with pytest.raises(ConfigError, match="leave out the section tokenizer"):
        model.build(ModelConfig(path=base), other, block_size=8)


def test_an_adapter_of_a_masked_model(tmp_path, tokenizer):
    base, saved = tmp_path / "base", tmp_path / "adapter"
    config = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer)
    )
    transformers.BertForMaskedLM(config).save_pretrained(base)
    section = ModelConfig(path=str(base), lora={"r": 2, "modules_to_save": ["predictions.transform"]})
    network = model.build(section, tokenizer, block_size=8, masked=True).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight += torch.randn_like(weight)
    saved.mkdir()
    lora.save_updates(network, saved)
    for name, stored in lora.CHECKPOINT_ADAPTER.items():
        (saved / stored).rename(saved / name)
    tokenizer.save_pretrained(saved)
    given = torch.arange(8)[None]
    for loaded in (peft.AutoPeftModel.from_pretrained(saved), checkpoint.load(saved).model):
        torch.testing.assert_close(loaded.eval()(given).logits, network(given).logits, rtol=1e-4, atol=1e-5)


def test_what_keeps_an_adapter_from_being_loaded_is_told(tmp_path, tokenizer, bases):
    network = model.build(ModelConfig(path=str(bases["tied"]), lora={"r": 2}), tokenizer, block_size=8)
    lora.save_updates(network, tmp_path)
    for name, stored in lora.CHECKPOINT_ADAPTER.items():
        (tmp_path / stored).rename(tmp_path / name)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="it is an adapter, which cannot be trained further"):
        model.configuration(ModelConfig(path=str(tmp_path)), vocab_size=4, block_size=8)
    file = tmp_path / "adapter_config.json"
    described = json.loads(file.read_text())
    for base, problem in (
        (f"{tmp_path}/gone", f"{tmp_path}/gone: there is no such directory"),
        ("someone/gone", "someone/gone: there is no such directory, and it is not in this machine's cache"),
        (None, "its adapter_config.json does not name its base model"),
    ):
        file.write_text(json.dumps({**described, "base_model_name_or_path": base}))
        with pytest.raises(ConfigError) as raised:
            checkpoint.load(tmp_path)
        assert str(raised.value).startswith(f"model.path={tmp_path}: it")
        assert problem in str(raised.value)
        assert "model.path=" not in str(raised.value)[len("model.path=") :]


def test_modules_to_save_that_the_model_has_not_are_named(tokenizer):
    section = ModelConfig(config=SMALL, lora={"modules_to_save": ["lm_heat"]})
    with pytest.raises(ConfigError, match=r"model.lora.modules_to_save=lm_heat: .*did you mean lm_head"):
        model.build(section, tokenizer, block_size=8)


def test_activation_checkpointing_changes_no_weight(tmp_path, tokenizer):
    still = {**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    experiment = Experiment(model=ModelConfig(config=still), blocks={"block_size": 8})
    trainers = [trainer_of(experiment, tokenizer, tmp_path, activation_checkpointing=on) for on in (False, True)]
    for trainer in trainers:
        trainer.train()
    plain, spared = (trainer.model for trainer in trainers)
    assert spared.is_activation_checkpointing
    for one, other in zip(plain.parameters(), spared.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_biases_and_norms_do_not_decay(tmp_path, tokenizer):
    experiment = Experiment(model=ModelConfig(config=SMALL), blocks={"block_size": 8})
    trainer = trainer_of(experiment, tokenizer, tmp_path, weight_decay=0.3)
    groups = trainer.create_optimizer().param_groups
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    for name, weight in trainer.model.named_parameters():
        spared = name.endswith("bias") or ".ln_" in name
        assert decay[id(weight)] == (0.0 if spared else 0.3), name


class Rows(list):
    """What NumberedExamples asks of a Stream, over rows."""

    def rows(self, numbers):
        return [self[number] for number in numbers]

    def marks(self, numbers):
        return None


def trainer_of(experiment, tokenizer, directory, **arguments):
    """raylm's Trainer for four steps of two random blocks, without Ray."""
    network = model.build(experiment.model, tokenizer, block_size=8)
    batches = objective.build(experiment.objective, experiment.blocks, tokenizer, tokenizers.frame(tokenizer), 0)
    objective.attach(network, shifted=batches.shifted)
    common = {
        "output_dir": str(directory),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    settings = TrainingArguments(**(common | arguments))
    rows = [np.random.default_rng(number).integers(0, len(tokenizer), 8) for number in range(8)]
    dataset = objective.NumberedExamples(Rows(rows))
    job = training.TrainTask(experiment, "", None, None, "")
    return _Trainer(
        job, training.SingleProcess, None, model=network, args=settings, train_dataset=dataset, data_collator=batches
    )


def test_a_gguf_file_is_unpacked_to_weights_that_can_be_trained_and_saved(tmp_path, tokenizer):
    import gguf

    writer = gguf.GGUFWriter(str(tmp_path / "small.gguf"), "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    writer.add_rope_dimension_count(4)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (300, 8), "output": (300, 8), "output_norm": (8,), "blk.0.attn_norm": (8,)}
    shapes |= {f"blk.0.attn_{part}": (8, 8) for part in ("q", "k", "v", "output")} | {"blk.0.ffn_norm": (8,)}
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    written = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in written.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    section = ModelConfig(path=str(tmp_path), gguf_file="small.gguf")
    network = model.build(section, tokenizer, block_size=16)
    assert network.get_output_embeddings().weight.tolist() == written["output"].tolist()
    network(torch.arange(4)[None]).logits.sum().backward()
    assert all(weight.grad is not None for weight in network.parameters())
    network.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.get_output_embeddings().weight, network.get_output_embeddings().weight)


def test_layers_that_the_model_has_not_are_named(tokenizer):
    section = ModelConfig(config=SMALL, lora={"target_modules": "q_proj"})
    with pytest.raises(ConfigError, match=r"model.lora.target_modules: .*q_proj.*all-linear"):
        model.build(section, tokenizer, block_size=8)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["a b c"], TrainedTokenizer(vocab_size=260))


@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ({"hidden_size": -64}, "model.config.hidden_size must be a number above 0, got -64"),
        ({"num_attention_heads": 0}, "model.config.num_attention_heads must be a number above 0, got 0"),
        ({"hidden_size": 100}, "model.config: RoPE requires an even rotary dimension"),
    ],
)
def test_sizes_that_no_model_has_are_told(tiny, sizes, problem):
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, **sizes}
    with pytest.raises(ConfigError, match=f"^{problem}"):
        model.config_of(tiny(f"model.config={json.dumps(config)}"), 300)
