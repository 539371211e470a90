"""Muon for the matrices of a model's layers and AdamW for its other weights, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch.optim import AdamW, Muon, Optimizer
from transformers import TrainingArguments


class MuonWithAdamW(Optimizer):
    """torch.optim.Muon (Jordan et al. 2024) where it applies, torch.optim.AdamW elsewhere.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate, one
    schedule and one weight decay serve both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], matrices: Collection[int], **of_adamw: Any):
        """`matrices`: the `id` of each weight for Muon. Weights of a group may be of both kinds."""
        groups = list(groups)

        def part(of_muon: bool) -> list[dict[str, Any]]:
            chosen = [[weight for weight in group["params"] if (id(weight) in matrices) is of_muon] for group in groups]
            return [{**group, "params": own} for group, own in zip(groups, chosen, strict=True) if own]

        self._muon = Muon(part(True), lr=of_adamw["lr"], adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(part(False), **of_adamw)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        # Loading a state and changing a learning rate replace or change what this optimizer has, not what they have.
        for inner in (self._muon, self._adamw):
            inner.state = self.state
            inner.param_groups = [
                group for group in self.param_groups if ("ns_steps" in group) is (inner is self._muon)
            ]
            inner.step()


def optimizer_of(network: torch.nn.Module, args: TrainingArguments) -> tuple[type[Optimizer], dict[str, Any]]:
    """What the Trainer takes as optimizer_cls_and_kwargs."""
    return MuonWithAdamW, {
        "matrices": matrices(network),
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def matrices(network: Any) -> set[int]:
    """The `id` of each weight for Muon: the matrices of the layers, not embeddings, the head, biases or norms."""
    embeddings = [module for module in network.modules() if isinstance(module, torch.nn.Embedding)]
    outside = {id(weight) for module in embeddings for weight in module.parameters()}
    if (head := network.get_output_embeddings()) is not None:
        outside |= {id(weight) for weight in head.parameters()}
    return {id(weight) for weight in network.parameters() if weight.ndim == 2 and id(weight) not in outside}
