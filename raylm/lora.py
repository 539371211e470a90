"""Low-rank updates (model.lora): added to a model, merged into its weights, and as an adapter that peft loads."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import pytorch_utils
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

from raylm.config import ModelConfig
from raylm.errors import ConfigError, did_you_mean, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from raylm.config.sections import Lora

CHECKPOINT_ADAPTER = {ADAPTER_SAFE_WEIGHTS_NAME: "lora.safetensors", ADAPTER_CONFIG_NAME: "lora.json"}
"""The file of peft's adapter -> its name in a checkpoint, whose model has the updates merged, and from which training
resumes. Under its own name transformers would find the adapter there, and add it to the merged model again."""

PEFT_PREFIX = "base_model.model."
"""What peft puts in front of the names of a model's weights."""


def add_updates(network: PreTrainedModel, section: ModelConfig, lora: Lora, *, masked: bool, added: list[int]) -> None:
    """Add updates to the layers in place: the model's class stays the same, and only the updates are trained, copies of
    the modules to save, and the rows of `added` tokens in embedding and output head."""
    from peft import LoraConfig, inject_adapter_in_model

    names: Any = list(lora.target_modules) or None
    if names == ["all-linear"]:
        names = "all-linear"
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        modules_to_save=list(lora.modules_to_save) or None,
        trainable_token_indices=_rows_to_train(network, lora, added) or None,
        fan_in_fan_out=any(
            isinstance(layer, pytorch_utils.Conv1D) for layer in network.modules()
        ),  # GPT-2's linear layers
        base_model_name_or_path=section.path,
        revision=section.revision,
        task_type=None if masked else "CAUSAL_LM",  # peft has none for masked models, but finds their class
        auto_mapping={"base_model_class": type(network).__name__, "parent_library": type(network).__module__}
        if masked
        else None,
    )
    layers = [name for name, _ in network.named_modules()]
    for name in lora.modules_to_save:
        if not any(layer.endswith(name) for layer in layers):  # as peft looks for them
            hint = did_you_mean(name, sorted({layer.rpartition(".")[2] for layer in layers}))
            raise ConfigError(
                f"model.lora.modules_to_save={name}: the model has no such module; {hint or 'for example lm_head'}",
                where="model.lora.modules_to_save",
            )
    try:
        inject_adapter_in_model(settings, network)
    except ValueError as error:
        raise ConfigError(
            f"model.lora.target_modules: {first_line(error)}; all-linear takes every linear layer",
            where="model.lora.target_modules",
        ) from None
    if _changed_ends(network):
        # Merged, they are no longer tied: transformers 5 finds both in the file, other libraries use the configuration.
        network.config.tie_word_embeddings = False


def _rows_to_train(network: PreTrainedModel, lora: Lora, added: list[int]) -> dict[str, list[int]]:
    """The rows of added tokens, by the names of the embedding and of an output head that is not tied to it."""
    if not added:
        return {}
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    ends = {name: layer for name, layer in network.named_modules() if layer in (embedding, head)}
    free = {
        name: layer for name, layer in ends.items() if not any(name.endswith(each) for each in lora.modules_to_save)
    }
    tied = head is not None and head.weight is embedding.weight
    for name, layer in free.items():
        is_updated = any(f".{name}".endswith(f".{target}") for target in lora.target_modules)
        has_bias = getattr(layer, "bias", None) is not None  # which peft would leave out
        if is_updated or has_bias or (tied and free.keys() != ends.keys()):
            raise ConfigError(
                f"model.lora: tokens were added to the model's tokenizer, and peft cannot train their rows of {name} "
                f"alone; train it entirely: name {', '.join(end.rpartition('.')[2] for end in ends)} in "
                "model.lora.modules_to_save, and not in model.lora.target_modules",
                where="model.lora.modules_to_save",
            )
    return {name: added for name, layer in free.items() if not (tied and layer is head)}  # peft trains tied ones as one


def _changed_ends(network: PreTrainedModel) -> list[torch.nn.Module]:
    """The embedding and the output head, if an adapter changes them."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    ends = network.get_input_embeddings(), network.get_output_embeddings()
    return [layer for layer in ends if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper)]


def untie_changed_ends(network: PreTrainedModel) -> None:
    """Untie the embedding and the output head where model.lora.modules_to_save trains a copy of one of them.

    The layer that was copied is not used any more, but its weight may be the other end's, and FSDP refuses a weight in
    two groups.
    """
    from peft.utils import ModulesToSaveWrapper

    for layer in _changed_ends(network):
        if isinstance(layer, ModulesToSaveWrapper):
            unused = layer.original_module
            unused.weight = torch.nn.Parameter(unused.weight.detach().clone(), requires_grad=False)


def merged_state_dict(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights with the updates merged, under the names of a model without updates.

    Computed on copies, because merging into the model and unmerging would round.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper

    state = network.state_dict()
    plain = {name.replace(".base_layer.", "."): weight for name, weight in state.items() if ".lora_" not in name}
    tied: dict[Any, torch.Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight.detach()
            plain[f"{name}.weight"] = weight + layer.get_delta_weight("default").detach().to(weight.dtype)
        elif isinstance(layer, ModulesToSaveWrapper | TrainableTokensWrapper):
            plain = {key: weight for key, weight in plain.items() if not key.startswith(f"{name}.")}
            if isinstance(layer, ModulesToSaveWrapper):
                own = layer.modules_to_save["default"].state_dict()
            else:  # one tensor for a head that is tied to its embedding
                first = layer.token_adapter.tied_adapter or layer.token_adapter
                own = {"weight": tied.setdefault(first, layer.weight.detach())}
            plain |= {f"{name}.{key}": weight for key, weight in own.items()}
    return plain


def updates(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the adapter by peft's names: the model's own tensors, not copies."""
    from peft import get_peft_model_state_dict

    # Not the embeddings that an update changes: peft would save them whole, but loading needs only the update.
    found = get_peft_model_state_dict(network, save_embedding_layers=False)
    return {f"{PEFT_PREFIX}{name}": weight for name, weight in found.items()}


def save_updates(network: PreTrainedModel, directory: str | Path) -> None:
    """Write the adapter of a checkpoint: the files that peft writes, under the names of CHECKPOINT_ADAPTER."""
    from safetensors.torch import save_file

    file = Path(directory) / CHECKPOINT_ADAPTER[ADAPTER_SAFE_WEIGHTS_NAME]
    whole = {name: weight.contiguous() for name, weight in updates(network).items()}
    save_file(whole, file, metadata={"format": "pt"})
    save_description(network, directory)


def save_description(network: PreTrainedModel, directory: str | Path) -> None:
    """Write the configuration of the adapter of a checkpoint."""
    described = Path(directory) / CHECKPOINT_ADAPTER[ADAPTER_CONFIG_NAME]
    settings = copy.copy(network.peft_config["default"])
    settings.inference_mode = True
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.to_dict().items()}
    described.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_updates(network: PreTrainedModel, directory: str | Path) -> None:
    """Load the adapter of a checkpoint, to train it further."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(Path(directory) / CHECKPOINT_ADAPTER[ADAPTER_SAFE_WEIGHTS_NAME])
    left = set_peft_model_state_dict(
        network, {name.removeprefix(PEFT_PREFIX): weight for name, weight in saved.items()}
    )
    assert not left.unexpected_keys


# Adapters ------------------------------------------------------------------------------------------------------------


def is_adapter(path: str) -> bool:
    """Whether a directory holds an adapter without its base model."""
    return os.path.isfile(os.path.join(path, ADAPTER_CONFIG_NAME)) and not os.path.exists(
        os.path.join(path, CONFIG_NAME)
    )


def base_of(section: ModelConfig) -> ModelConfig:
    """How the base model of the adapter at model.path is loaded."""
    assert section.path is not None
    settings = json.loads(Path(section.path, ADAPTER_CONFIG_NAME).read_bytes())
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"its {ADAPTER_CONFIG_NAME} does not name its base model", where="model.path")
    return section.model_copy(update={"path": base, "revision": settings.get("revision")})


def added_tokens(directory: str) -> set[int]:
    """The ids of the tokens of which an adapter has the rows of the embedding: of those that were added."""
    settings = json.loads(Path(directory, ADAPTER_CONFIG_NAME).read_bytes())
    indices = settings.get("trainable_token_indices") or {}
    return set().union(*indices.values()) if isinstance(indices, dict) else set(indices)


@contextlib.contextmanager
def loading_base() -> Iterator[None]:
    """Inside, the base model of an adapter is loaded; an error says so."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"it is an adapter, and its base model cannot be loaded: {error.message.removeprefix('model.path=')}; "
            f"if it is elsewhere now, change base_model_name_or_path in {ADAPTER_CONFIG_NAME}",
            where=error.where,
        ) from None


def with_adapter(network: PreTrainedModel, directory: str) -> PreTrainedModel:
    """The base model with the adapter of a directory merged."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("it is an adapter, which needs peft: pip install raylm[peft]", where="model.path")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings", category=UserWarning)
        adapted = PeftModel.from_pretrained(network, directory)
        for layer in _changed_ends(network):
            network.config.tie_word_embeddings = False
            if isinstance(layer, BaseTunerLayer):  # peft merges in place, into a weight that is perhaps the other end's
                base = layer.get_base_layer()
                base.weight = torch.nn.Parameter(base.weight.detach().clone())
        return adapted.merge_and_unload()
