"""Weights sharded over the workers by train.arguments.fsdp.

A checkpoint has them unsharded: a plain Hugging Face directory, from which any number of workers can resume.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import Trainer

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
"""States by the names of the weights, not by shards."""


class ShardingTrainer(Trainer):
    is_fsdp_enabled: bool
    is_sharded = False
    """Whether train.arguments.fsdp is set, also for a single worker, because there may be more later."""

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
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state: dict[str, torch.Tensor] = {}
        for name, weight in self.model.state_dict().items():
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight  # all workers take part
            if self.args.should_save and name not in self._tied:  # gathered weights are no longer tied
                state[name] = whole.cpu()
        self._save(output_dir, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model_to_load: Any = None) -> None:
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model_to_load)
            return
        state: dict[str, Any] = {}
        for file in Path(resume_from_checkpoint).glob("model*.safetensors"):
            state |= load_file(file)
        left = set_model_state_dict(self.model, state, options=WHOLE)
        assert not {*left.missing_keys, *left.unexpected_keys} - self._tied, left

    @property
    def _tied(self) -> set[str]:
        """The names of weights that are tied to others."""
        return set(getattr(self.model, "all_tied_weights_keys", ()))

    # The optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = get_optimizer_state_dict(self.model, self.inner_optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Memory-mapped, because a worker's part of the state is a view that keeps all of it: of 64 MiB, each of two
        # workers kept 135 for the rest of the run, and now keeps 67 to 79.
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        set_optimizer_state_dict(self.model, self.inner_optimizer, state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
