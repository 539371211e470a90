"""A coordinate check: how the sizes of activations, and of what the first steps change in them, depend on the width.

The test of a parametrization by Yang et al. 2022 (arXiv:2203.03466, appendix D.1): what a step changes in an activation
must have the same size at every width, so log size must have a slope of 0 against log width. With rates that do not
follow the width it grows until a wide model diverges, or shrinks until it learns nothing.

Before the first step, the logits of a model with model.transfer have a slope of -1/2: they are a sum of `width` random
terms, divided by the width. What is learned adds up. Later the logits are those of the tokens to predict, because those
of others still change at random in the first steps: with 128 random tokens at a rate of 2e-3 all logits together had
slopes of -0.27 to -0.37 up to a width of 256, those of the tokens to predict 0.01 to 0.03.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.optim import AdamW, Optimizer

from raylm import blocks, model, transfer
from raylm.config import Experiment
from raylm.training.muon import MuonWithAdamW, matrices

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from raylm.tokens import Store

WIDTHS = (32, 64, 128, 256)
STEPS = (0, 1, 2, 4, 8)
LAYERS = 2
HEAD_SIZE = 16
"""Of every width; the number of heads grows."""
TOKENS = 16
"""Of each step, from one block: fewer than the narrowest width. What a step changes for one of more tokens than the
width is mostly a random sum, which is smaller the wider the model: with the built-in text, three seeds and 128 tokens
slopes of the MLP went down to -0.09, with 512 random tokens to -0.12."""
KINDS = ("embedding", "attention", "MLP", "logits")


def check(
    experiment: Experiment, found: PreTrainedConfig, store: Store | None = None, seeds: Sequence[int] = (0,)
) -> dict[str, Any]:
    """Sizes and slopes for models like `found` with WIDTHS and LAYERS, with and without transfer, as plain values.

    The optimizer and its learning rate are the experiment's. Every step trains on the first tokens of the store, or on
    random tokens without one. A size is a root mean square: at step 0 that of the activations, at later steps that of
    their difference from step 0. Several seeds: the mean.
    """
    ids = _first_tokens(experiment, store) if store is not None else None
    text = "random" if ids is None else "training"
    if ids is None:
        frequencies = 1 / torch.arange(1.0, found.vocab_size + 1)  # Zipf's law
        draws = torch.Generator().manual_seed(0)
        ids = torch.multinomial(frequencies, TOKENS, replacement=True, generator=draws).view(1, -1)

    def by_kind(is_scaled: bool) -> dict[str, Any]:
        by_width = []
        for width in WIDTHS:
            runs = [_sizes(experiment, found, width, ids, is_scaled, seed) for seed in seeds]
            by_width.append({key: statistics.mean(run[key] for run in runs) for key in runs[0]})
        table = {kind: [[sizes[step, kind] for sizes in by_width] for step in STEPS] for kind in KINDS}
        return {
            kind: {"sizes": rows, "slopes": [slope(WIDTHS, sizes) for sizes in rows]} for kind, rows in table.items()
        }

    return {
        "optimizer": experiment.train.optimizer,
        "learning_rate": experiment.train.learning_rate,
        "layers": LAYERS,
        "text": text,
        "tokens": ids.numel(),
        "widths": list(WIDTHS),
        "steps": list(STEPS),
        "seeds": list(seeds),
        "with_transfer": by_kind(True),
        "without": by_kind(False),
    }


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The slope of log size against log width, by least squares."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def _first_tokens(experiment: Experiment, store: Store) -> torch.Tensor | None:
    """The beginning of the first block of the training split; None if it has no block."""
    cut = blocks.build(store.train, experiment.blocks, store.frame(experiment.tokenizer.prefix))
    if not len(cut) or len(cut[0]) < 2:
        return None
    return torch.from_numpy(np.asarray(cut[0][:TOKENS]).astype(np.int64))[None]


def _sizes(
    experiment: Experiment, found: PreTrainedConfig, width: int, ids: torch.Tensor, is_scaled: bool, seed: int
) -> dict[tuple[int, str], float]:
    """(step, kind) -> size, of a model of this width relative to the narrowest."""
    narrowest, sizes = (
        transfer.sizes_of_width(found, each, layers=LAYERS, head_size=HEAD_SIZE) for each in (WIDTHS[0], width)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.untrained(transfer.resized(found, sizes)).eval()  # without dropout
    optimizer = _optimizer(network, experiment.train.optimizer, experiment.train.learning_rate)
    if is_scaled:
        by_name = transfer.factors(network.config, narrowest)
        transfer.scale_weights(network, by_name)
        transfer.scale_groups(optimizer, network, by_name)
    activations = _watched(network)
    result = {}
    for step in range(max(STEPS) + 1):
        output = network(input_ids=ids, output_hidden_states=True)
        predicted, labels = output.logits[:, :-1], ids[:, 1:]
        of_labels = predicted.gather(-1, labels[..., None])
        now = activations() | {"embedding": [output.hidden_states[0]], "logits": [of_labels]}
        if step == 0:
            before = {kind: [each.detach() for each in found_now] for kind, found_now in now.items()}
        if step in STEPS:
            for kind in KINDS:
                pairs = zip(now[kind], before[kind], strict=True)
                parts = [each - old if step else each for each, old in pairs]
                result[step, kind] = torch.stack(parts).detach().square().mean().sqrt().item()
        functional.cross_entropy(predicted.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result


def _optimizer(network: torch.nn.Module, name: str, learning_rate: float) -> Optimizer:
    if name == "adamw":
        return AdamW(network.parameters(), lr=learning_rate, weight_decay=0.0)
    groups = [{"params": list(network.parameters()), "weight_decay": 0.0}]
    return MuonWithAdamW(groups, matrices(network), lr=learning_rate)


def _watched(network: Any) -> Callable[[], dict[str, list[torch.Tensor]]]:
    """() -> what attention and MLP of each layer gave in the last forward pass."""
    shape, seen = transfer.shape_of(network.config), defaultdict(list)

    def watch(module: torch.nn.Module, kind: str) -> None:
        def keep(_: Any, __: Any, output: Any) -> None:
            seen[kind].append(output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(keep)

    for layer in network.get_submodule(shape.layers):
        watch(layer.get_submodule(shape.attention), "attention")
        watch(layer.mlp, "MLP")

    def taken() -> dict[str, list[torch.Tensor]]:
        found = dict(seen)
        seen.clear()
        return found

    return taken
