"""Weights sharded over the workers by train.arguments.fsdp.

Each worker writes its own shards of them and of the optimizer's states, and reads those that it needs, so none has the
whole state while it trains. Any number of workers can resume from a checkpoint; raylm.shards merges one into a plain
Hugging Face directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from transformers.core_model_loading import revert_weight_conversion

from raylm import lora, shards

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""Of the states in a checkpoint of version 0.1, which were not sharded."""


class ShardingTrainer(Trainer):
    is_fsdp_enabled: bool
    is_sharded = False
    """Whether train.arguments.fsdp is set, also for a single worker, because there may be more later."""
    stored = ""
    """The directory, local or remote, of the checkpoint that training resumes from."""

    def create_accelerator_and_postprocess(self) -> None:
        """Apply train.arguments.fsdp on CPUs too, where accelerate silently ignores it."""
        super().create_accelerator_and_postprocess()
        if not self.args.fsdp_plugin_args:
            return
        state = self.accelerator.state
        if not self.is_fsdp_enabled:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy) and not torch.cuda.is_available():
            state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # there is nothing to pin it for
        if state.mixed_precision == "bf16":  # as with autocast, sums of gradients and losses are not rounded
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer of torch."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm  # the norm of each worker's shards

    # Weights

    def reshard(self) -> None:
        """Shard the outermost weights again, which are unsharded after a forward pass alone."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def float32_shards(self) -> Iterator[None]:
        """Inside, sharded weights are gathered in float32, whatever the training's precision."""
        groups = {
            module: module._get_fsdp_state()._fsdp_param_groups
            for module in self.model.modules()
            if isinstance(module, FSDPModule)
        }
        before = {module: module._get_fsdp_state()._mp_policy for module in groups}

        def gather(policies: dict[FSDPModule, MixedPrecisionPolicy]) -> None:
            for module, policy in policies.items():
                module.reshard()
                module._get_fsdp_state()._mp_policy = policy
                for group in groups[module]:
                    group.mp_policy = policy
                    group._init_mp_dtypes()
                    for weight in group.fsdp_params:  # created once, in the first precision
                        weight.all_gather_outputs = []
                        weight.__dict__.pop("_unsharded_param", None)

        gather(dict.fromkeys(groups, MixedPrecisionPolicy(torch.float32)))
        try:
            yield
        finally:
            gather(before)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        directory = Path(output_dir or self.args.output_dir)
        try:
            self._save(str(directory), {})  # the configuration and the tokenizer
        finally:  # the other workers wait for this one's part
            shards.write(self._weights(), directory / shards.WEIGHTS)
            if self._is_adapted:
                shards.write(lora.updates(self.model), directory / shards.ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model_to_load: Any = None) -> None:
        if shards.is_sharded(resume_from_checkpoint):
            of_training = shards.ADAPTER if self._is_adapted else shards.WEIGHTS
            state = lora.updates(self.model) if self._is_adapted else self._weights()
            shards.read(state, f"{self.stored}/{of_training}")  # into the weights themselves
        elif self._is_adapted:
            lora.load_updates(self.model, resume_from_checkpoint)
        elif self.is_fsdp_enabled:
            whole: dict[str, Any] = {}
            for file in Path(resume_from_checkpoint).glob("model*.safetensors"):
                whole |= load_file(file)
            left = set_model_state_dict(self.model, whole, options=WHOLE)
            assert not {*left.missing_keys, *left.unexpected_keys} - self._tied, left
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model_to_load)

    def _weights(self) -> dict[str, Any]:
        """The weights as they are exported, with an adapter merged, by their names there: this worker's shards, or all
        of them if it is the only one. Those without an adapter are the model's own tensors, not copies."""
        self.reshard()
        state = lora.merged_state_dict(self.model) if self._is_adapted else get_model_state_dict(self.model)
        left_out = self._tied | set(self.model._keys_to_ignore_on_save or ())
        return _exported_names(self.model, {name: weight for name, weight in state.items() if name not in left_out})

    @property
    def _is_adapted(self) -> bool:
        """Whether the model has an adapter (model.lora)."""
        return hasattr(self.model, "peft_config")

    @property
    def _tied(self) -> set[str]:
        """The names of weights that are tied to others."""
        is_tied = getattr(self.model.config, "tie_word_embeddings", True)  # not if an adapter changes them
        return set(self.model.all_tied_weights_keys) if is_tied else set()

    # The optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self.inner_optimizer)
        shards.write(state, Path(output_dir) / shards.OPTIMIZER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if shards.is_sharded(checkpoint):
            state = get_optimizer_state_dict(self.model, self.inner_optimizer)
            shards.read(state, f"{self.stored}/{shards.OPTIMIZER}")
            set_optimizer_state_dict(self.model, self.inner_optimizer, state)
        else:
            # Memory-mapped, because a worker's part of the state is a view that keeps all of it: of 64 MiB, each of two
            # workers kept 135 for the rest of the run, and now keeps 67 to 79.
            state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
            set_optimizer_state_dict(self.model, self.inner_optimizer, state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))


def _exported_names(network: PreTrainedModel, state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights by the names that save_pretrained gives them.

    A model whose weights it also cuts or joins, such as a mixture of experts, keeps its own names, which transformers
    loads, too: whole weights would be needed for more.
    """
    empty = {name: torch.empty(weight.shape, dtype=weight.dtype, device="meta") for name, weight in state.items()}
    names = {id(weight): name for name, weight in empty.items()}
    exported = revert_weight_conversion(network, empty)
    if any(id(weight) not in names for weight in exported.values()):
        return dict(state)
    return {name: state[names[id(weight)]] for name, weight in exported.items()}
