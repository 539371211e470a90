"""The language model: pretrained or new from a configuration."""

from __future__ import annotations

import copy
import importlib.util
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GgufConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from raylm import hub, lora, shards, transfer
from raylm import tokenizer as tokenizers
from raylm.config import Experiment, ModelConfig, TokenizerConfig
from raylm.errors import ConfigError, did_you_mean, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

AFTER_PADDING = frozenset(
    "camembert data2vec-text esm ibert longformer luke mpnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl "
    "xmod".split()
)
"""Model types in which positions start after the padding token's id, as in fairseq: the earlier rows of the position
table are unused."""


def configuration(
    section: ModelConfig,
    *,
    vocab_size: int,
    block_size: int,
    eos_id: int | None = None,
    masked: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedConfig:
    """The model's transformers configuration, checked against vocabulary, blocks and objective; no weights are made.

    A new model has the tokenizer's vocabulary, and block_size positions unless model.config has another number. The
    vocabulary of a pretrained one grows by the tokens that `tokenizer` has in addition to the model's own.
    """
    if section.path is not None:
        if lora.is_adapter(section.path):
            raise ConfigError(
                f"model.path={section.path}: it is an adapter, which cannot be trained further; give a model, such as "
                "one that was exported with model.lora.export=merged",
                where="model.path",
            )
        found = pretrained_configuration(section)
        if tokenizer is not None and len(tokenizer) > found.vocab_size:
            found.vocab_size = max([found.vocab_size, *(number + 1 for number in _added(section, tokenizer))])
    elif section.config is not None:
        rows = _rounded_up(vocab_size, section.pad_vocab_to or 1)
        found = _new_configuration(section.config, vocab_size=rows, block_size=block_size, eos_id=eos_id)
    else:
        raise ConfigError("model.path or model.config must be given", where="model")
    if section.attn_implementation is not None:
        found._attn_implementation = section.attn_implementation
    _check_direction(found, masked)
    positions = context(found)
    if positions is not None and block_size > positions:
        more = "" if section.path else f", or set model.config.{_name_of_positions(type(found))} higher"
        raise ConfigError(
            f"blocks.block_size must be at most {positions}, the positions of the model "
            f"({section.path or section.config}), got {block_size}; lower it{more}",
            where="blocks.block_size",
        )
    if vocab_size > found.vocab_size:
        way_out = (
            "use the model's own tokenizer, perhaps with tokens added: leave out the section tokenizer"
            if section.path
            else "leave out model.config.vocab_size, and it follows the tokenizer"
        )
        raise ConfigError(
            f"the tokenizer has {vocab_size} tokens, the model's embedding {found.vocab_size} rows "
            f"({section.path or section.config}); {way_out}",
            where="model.path" if section.path else "model.config.vocab_size",
        )
    if section.transfer is not None:
        transfer.base_configuration(found, section.transfer.base)
    if section.lora is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError("model.lora needs peft: pip install raylm[peft]", where="model.lora")
    return found


def _added(section: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the tokens that a tokenizer has in addition to those of the pretrained model's own; none if it is
    another one."""
    try:
        own = tokenizers.load_section(tokenizers.choose(TokenizerConfig(), section)).get_vocab()
    except ConfigError:  # the model comes without a tokenizer
        return []
    known = tokenizer.get_vocab()
    if any(known.get(token) != number for token, number in own.items()):
        return []
    return sorted(number for token, number in known.items() if token not in own)


def num_ids(section: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that the embedding must have: for all ids of the tokenizer if the model is new, else for those of text.

    Gemma 3's tokenizer has an image token beyond the last row of the text models' embedding.
    """
    if section.path is None:
        return len(tokenizer)
    return 1 + max(ids_of_text(tokenizer), default=-1)


def ids_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that text can have, ascending."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted({*tokenizer.get_vocab().values()} - special)


def config_of(
    experiment: Experiment, vocab_size: int = 0, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreTrainedConfig:
    """The configuration of an experiment's model, for `tokenizer` or one of `vocab_size` tokens; ConfigError if a
    pretrained model has no weights."""
    _check_weights(experiment.model)
    return configuration(
        experiment.model,
        vocab_size=num_ids(experiment.model, tokenizer) if tokenizer is not None else vocab_size,
        tokenizer=tokenizer,
        block_size=experiment.blocks.block_size,
        masked=experiment.objective.is_masked,
    )


def build(
    section: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    seed: int = 0,
    masked: bool = False,
) -> PreTrainedModel:
    """The model in model.dtype on the CPU. New weights depend on `seed` alone."""
    found = configuration(
        section,
        vocab_size=num_ids(section, tokenizer),
        block_size=block_size,
        eos_id=tokenizer.eos_token_id,
        masked=masked,
        tokenizer=tokenizer,
    )
    dtype = getattr(torch, section.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a pretrained model may lack its head, and LoRA's first weights are random too
        if section.path is None:
            network = untrained(found, masked=masked, dtype=dtype)
        else:
            with hub.loading(ConfigError, "model.path", section.path):
                network, _ = pretrained(section, found, masked=masked, dtype=dtype)
        _learn_padding(network, tokenizer.eos_token_id, new=section.path is None)
        if section.transfer is not None:
            transfer.scale_weights(network, transfer.factors(found, section.transfer.base))
        if section.lora is not None:
            added = [] if section.path is None else _added(section, tokenizer)
            lora.add_updates(network, section, section.lora, masked=masked, added=added)
    return network


def pretrained(
    section: ModelConfig, found: PreTrainedConfig, *, masked: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, list[str]]:
    """The model at model.path with the configuration `found`, and the names of the weights that its files lack.

    Of an adapter it is the base model with the adapter merged. If `found` has a larger vocabulary than the model, its
    embedding gets new rows, drawn by torch's generator as transformers does it.
    """
    assert section.path is not None
    if lora.is_adapter(section.path):
        base = lora.base_of(section)
        with lora.loading_base(), hub.loading(ConfigError, "model.path", str(base.path)):
            network, missing = pretrained(base, found, masked=masked, dtype=dtype)
        return lora.with_adapter(network, section.path), missing
    rows, own_rows = (getattr(each, "vocab_size", 0) for each in (found, pretrained_configuration(section)))
    if rows > own_rows:
        found = copy.deepcopy(found)
        found.vocab_size = own_rows
    with shards.merged(section.path) as plain:
        network, loading = _auto_class(masked).from_pretrained(
            str(plain), config=found, dtype=dtype, output_loading_info=True, **options(section)
        )
    if rows > own_rows:
        network.resize_token_embeddings(rows)
    return network, sorted(loading["missing_keys"])


def untrained(found: PreTrainedConfig, *, masked: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of this configuration, its weights drawn by torch's generator."""
    return _auto_class(masked).from_config(found, dtype=dtype)


class Parameters(NamedTuple):
    """The parameters of a model, tied ones once."""

    all: int
    without_embeddings: int
    """As Kaplan et al. 2020 (arXiv:2001.08361) count: without the embeddings of tokens and positions, and without an
    output head of its own, if the model has one."""
    output_head: int
    """The weights of the output head, also if they are those of the embedding."""

    @property
    def multiplied(self) -> int:
        """The parameters that are multiplied for each token. An embedding is looked up, but for one that is the head,
        too."""
        return self.without_embeddings + self.output_head


def parameters(found: PreTrainedConfig, *, masked: bool = False) -> Parameters:
    """The parameters of a model of this configuration, counted without allocating them."""
    try:
        with torch.device("meta"):
            # Code that came with the model runs only if it was trusted when the configuration was made.
            trusted = type(found).__module__.startswith("transformers_modules")
            network = _auto_class(masked).from_config(found, trust_remote_code=trusted)
    except (ImportError, ValueError) as error:
        key = "model.attn_implementation" if str(found._attn_implementation) in str(error) else "model"
        raise ConfigError(f"{key}: {first_line(error)}", where=key) from None
    embeddings = [module for module in network.modules() if isinstance(module, torch.nn.Embedding)]
    head = network.get_output_embeddings()
    left_out = {weight for module in [*embeddings, *filter(None, [head])] for weight in module.parameters()}
    total = sum(weight.numel() for weight in network.parameters())
    of_head = 0 if head is None else sum(weight.numel() for weight in head.parameters())
    return Parameters(total, total - sum(weight.numel() for weight in left_out), of_head)


def num_parameters(found: PreTrainedConfig, *, masked: bool = False, embeddings: bool = True) -> int:
    """All parameters of a model of this configuration, or those without the embeddings."""
    counts = parameters(found, masked=masked)
    return counts.all if embeddings else counts.without_embeddings


def flops_per_token(found: PreTrainedConfig, counts: Parameters, *, block_size: int, only_updates: bool = False) -> int:
    """Floating-point operations of a training for each token, by the formula of PaLM (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B): 6 for each parameter that is multiplied, and 12 for each layer, each dimension of its
    heads and each token of a block, for the attention.

    With `only_updates`, of LoRA, no gradient of the other weights is computed: 4 for each parameter. It is an upper
    bound where a token attends only to some others (a causal mask is not deducted, as usual) or goes only to some of
    the experts. Recurrent layers have their parameters alone.
    """
    text = found.get_text_config()  # of a model that reads pictures, too

    def number(name: str) -> int:
        value = getattr(text, name, None)
        return value if isinstance(value, int) else 0

    heads = number("num_attention_heads")
    width = heads * number("head_dim") or (number("hidden_size") if heads else 0)
    attention = 12 * number("num_hidden_layers") * width * block_size
    return (4 if only_updates else 6) * counts.multiplied + attention


def flops_of_experiment(experiment: Experiment, found: PreTrainedConfig, counts: Parameters) -> int:
    """`flops_per_token` of an experiment whose model has this configuration and so many parameters."""
    return flops_per_token(
        found, counts, block_size=experiment.blocks.block_size, only_updates=experiment.model.lora is not None
    )


def context(found: PreTrainedConfig) -> int | None:
    """The most tokens the model has positions for; None if it has no such limit (recurrent models, ALiBi)."""
    positions = getattr(found, "max_position_embeddings", None)
    if positions is None or positions < 0:  # -1 of XLNet
        return None
    return positions - _positions_before(found.model_type, getattr(found, "pad_token_id", None))


def _positions_before(kind: str, pad_id: int | None) -> int:
    """Unused positions before the first token."""
    if kind not in AFTER_PADDING:
        return 0
    return 2 if kind == "mpnet" else (pad_id or 0) + 1  # mpnet: whatever its padding token is


def _name_of_positions(kind: type[PreTrainedConfig]) -> str:
    return kind.attribute_map.get("max_position_embeddings", "max_position_embeddings")


def is_masked(found: PreTrainedConfig) -> bool:
    """Whether a saved model is a masked language model."""
    return any(name.endswith("ForMaskedLM") for name in found.architectures or ())


def _auto_class(masked: bool) -> Any:
    return AutoModelForMaskedLM if masked else AutoModelForCausalLM


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def options(section: ModelConfig) -> dict[str, Any]:
    """Arguments of from_pretrained for the weights at model.path."""
    if section.gguf_file is None:
        return _options(section)
    # Without GgufConfig the weights stay quantized, and the model can be neither trained nor saved.
    return {**_options(section), "gguf_file": section.gguf_file, "quantization_config": GgufConfig(dequantize=True)}


def _options(section: ModelConfig) -> dict[str, Any]:
    return {"revision": section.revision or "main", "trust_remote_code": section.trust_remote_code}


def pretrained_configuration(section: ModelConfig) -> PreTrainedConfig:
    """The configuration of the model at model.path; ConfigError if there is none, or if it needs code not trusted."""
    path = section.path
    assert path is not None
    if section.gguf_file is not None and importlib.util.find_spec("gguf") is None:
        raise ConfigError("model.gguf_file needs gguf: pip install gguf", where="model.gguf_file")
    packed = {"gguf_file": section.gguf_file} if section.gguf_file else {}
    with hub.loading(ConfigError, "model.path", path, gguf_file=section.gguf_file):
        if section.gguf_file is None and lora.is_adapter(path):
            base = lora.base_of(section)
            with lora.loading_base():
                found = pretrained_configuration(base)
            if added := lora.added_tokens(path):
                found.vocab_size = max(found.vocab_size, *(number + 1 for number in added))
            return found
        if section.gguf_file is None and os.path.isdir(path):
            _check_configuration(path)
        try:
            return AutoConfig.from_pretrained(path, **_options(section), **packed)
        except ValueError as error:
            if "custom code" not in str(error):
                raise
            raise ConfigError(
                "it comes with code of its own; read it, then let it run with model.trust_remote_code=true",
                where="model.trust_remote_code",
            ) from None


def _check_configuration(directory: str) -> None:
    """ConfigError if there is no model's configuration in a directory."""
    names = sorted(os.listdir(directory))
    if CONFIG_NAME in names:
        return
    if packed := [name for name in names if name.endswith(".gguf")]:
        raise ConfigError(f"it has no {CONFIG_NAME}; give model.gguf_file={packed[0]}", where="model.gguf_file")
    inside = [name for name in names if os.path.isfile(os.path.join(directory, name, CONFIG_NAME))]
    hint = f"; did you mean {os.path.join(directory, inside[-1])}?" if inside else ""
    raise ConfigError(f"it has no {CONFIG_NAME}{hint}", where="model.path")


def _check_weights(section: ModelConfig) -> None:
    """ConfigError if the model's directory has no weights."""
    path = section.path
    if path is None or section.gguf_file is not None or not os.path.isdir(path) or shards.is_sharded(path):
        return
    if not any(name.endswith((".safetensors", ".bin", ".index.json")) for name in os.listdir(path)):
        raise ConfigError(
            f"model.path={path}: it has a {CONFIG_NAME} and no weights, no {SAFE_WEIGHTS_NAME}; for a new model of "
            f"that shape give model.config={{path: {path}}}",
            where="model.path",
        )


def _new_configuration(fields: dict, *, vocab_size: int, block_size: int, eos_id: int | None) -> PreTrainedConfig:
    fields = dict(fields)
    if (path := fields.pop("path", None)) is not None:
        with hub.loading(ConfigError, "model.config.path", path, or_file=True):
            given = AutoConfig.from_pretrained(path).to_dict()
    else:
        given = {"model_type": fields.pop("model_type", None)}
    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(str(kind), CONFIG_MAPPING) or "for example gpt2 or llama"
        raise ConfigError(f"model.config.model_type={kind} is not a model of transformers; {hint}", "model.config")
    kind_class = CONFIG_MAPPING[kind]
    defaults = kind_class()
    unknown = [field for field in fields if not hasattr(defaults, field)]
    if unknown:
        known = sorted(defaults.to_dict())
        hint = did_you_mean(unknown[0], known) or f"{kind} takes: {', '.join(known)}"
        raise ConfigError(f"model.config.{unknown[0]}: unknown field of {kind}; {hint}", f"model.config.{unknown[0]}")
    for name, value in fields.items():
        default = getattr(defaults, name)
        is_size = name.startswith(("n_", "num_")) or name.endswith(("_size", "_dim"))
        if is_size and isinstance(default, int) and default > 0 and isinstance(value, int) and value < 1:
            raise ConfigError(f"model.config.{name} must be a number above 0, got {value}", f"model.config.{name}")
    fields.setdefault("vocab_size", vocab_size)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(token, eos_id)
    if context(defaults) is not None:
        first = _positions_before(kind, fields["pad_token_id"])
        fields.setdefault(_name_of_positions(kind_class), block_size + first)
    try:
        made = kind_class.from_dict({**given, **fields}) if path else kind_class(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.config: {first_line(error)}", where="model.config") from None
    except StrictDataclassError as error:  # the last line is the error of the check, with its kind
        problem = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ConfigError(f"model.config: {problem}", where="model.config") from None
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if fields.get(name) and getattr(made, "output_router_logits", None) is False:
            key = f"model.config.{name}"
            raise ConfigError(
                f"{key}={fields[name]} is of no effect: {kind} has its routers' load-balancing loss, which is added to "
                "the training loss, only with model.config.output_router_logits=true",
                where=key,
            )
    return made


def _check_direction(found: PreTrainedConfig, masked: bool) -> None:
    """ConfigError if the model's type does not fit the objective. The rest is checked by the probe."""
    kind = type(found)
    if masked and kind not in MODEL_FOR_MASKED_LM_MAPPING:
        raise ConfigError(
            f"objective.kind=masked: {found.model_type} reads in one direction; "
            "take a model such as bert, modernbert or deberta-v2, or objective.kind=causal",
            where="objective.kind",
        )
    # BART and its relatives fill masks as encoder-decoders, and are causal as decoders alone.
    is_decoder = found.is_encoder_decoder or getattr(found, "is_decoder", False)
    if not masked and kind in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder:
        raise ConfigError(
            f"objective.kind: {found.model_type} reads in both directions, so it would see what it is to predict; "
            "set objective.kind=masked",
            where="objective.kind",
        )
    if not masked and kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(found, "auto_map"):
        raise ConfigError(f"model: transformers has no {found.model_type} that predicts next tokens", where="model")


def _learn_padding(network: PreTrainedModel, eos_id: int, *, new: bool) -> None:
    """Train the embedding of the end-of-text token if it is also the padding token, which some models keep at zero."""
    embedding = network.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) != eos_id:
        return
    embedding.padding_idx = None
    if new:
        with torch.no_grad():
            embedding.weight[eos_id].normal_(std=getattr(network.config, "initializer_range", 0.02))


# Low-rank updates ----------------------------------------------------------------------------------------------------


# Where it runs -------------------------------------------------------------------------------------------------------


def set_up_torch(cpus: float) -> None:
    """Set torch's threads to the CPUs of this process: Ray sets one, and the default is all of the machine."""
    torch.set_num_threads(max(1, int(cpus)))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def device(use_gpu: bool | None = None) -> torch.device:
    """This process's GPU if it has one and may use it, else the CPU. A worker of Ray sees only its own GPU."""
    return torch.device("cuda" if use_gpu is not False and torch.cuda.is_available() else "cpu")
