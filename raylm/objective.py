"""What the model learns: labels and loss.

Causal: token t is predicted from the tokens before it in its block, so a block of B tokens has B - 1 predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

IGNORED = -100  # the label of a position that is not predicted, as in torch and transformers


def collate(blocks: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch of `input_ids` and `labels`, both int64 of shape (len(blocks), block_size).

    The first label of a block is IGNORED: it has nothing before it. So the Trainer, which counts labels to divide the
    loss by, counts predictions, for every class of model. (It would count B of them for GPT-2, one too many.)
    """
    input_ids = torch.from_numpy(np.stack(blocks).astype(np.int64, copy=False))
    labels = input_ids.clone()
    labels[:, 0] = IGNORED
    return {"input_ids": input_ids, "labels": labels}


def causal_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Summed cross entropy of a micro-batch over the predictions of the whole global batch, in nats.

    Micro-batches' losses therefore add up to the mean of the global batch, however it is split.
    """
    logits = outputs.logits.float()
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # logits stay whole: no copy of them
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch
