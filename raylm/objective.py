"""What the model learns: labels and loss.

Causal: token t is predicted from the tokens before it in its block, so a block of B tokens has B - 1 predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from raylm import blocks
from raylm.blocks import IGNORED
from raylm.config import BlocksConfig


def collate(rows: Sequence[np.ndarray], section: BlocksConfig, eos_id: int) -> dict[str, torch.Tensor]:
    """A batch of int64 tensors of shape (len(rows), longest row): `input_ids`, `labels` and what the section asks for.

    The first label of a row is IGNORED: it has nothing before it. So the Trainer, which counts labels to divide the
    loss by, counts predictions, for every class of model. (It would count one too many a row for GPT-2.)
    """
    return {name: torch.from_numpy(values) for name, values in blocks.batch(rows, section, eos_id).items()}


def causal_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int) -> torch.Tensor:
    """Summed cross entropy of a micro-batch over the predictions of the whole global batch, in nats.

    Micro-batches' losses therefore add up to the mean of the global batch, however it is split.
    """
    logits = outputs.logits.float()
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)  # logits stay whole: no copy of them
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch
