"""How fast this machine trains a model: measured, in a second or two."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

from raylm import model, objective

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS, COLUMNS = 4, 128
"""Of the batches by which the speed is measured; fewer columns for a model of fewer positions."""

SECONDS = 1.0

MOST_PARAMETERS = 50_000_000
"""Of a model that is made only to be measured: 0.8 GB with its optimizer, and a step of some seconds on a laptop."""


def tokens_per_second(found: PreTrainedConfig, *, masked: bool, threads: int) -> float:
    """Training tokens a second of a model of this configuration on so many threads, without evaluations."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = model.device()
        network = model.untrained(found, masked=masked).to(device)
        objective.attach(network, shifted=not masked)
        optimizer = torch.optim.AdamW(network.parameters())
        ids = torch.zeros((ROWS, min(COLUMNS, model.context(found) or COLUMNS)), dtype=torch.long, device=device)

        def step() -> None:
            loss = network(input_ids=ids, labels=ids)["loss"] / ids.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU

        step()
        times: list[float] = []
        while sum(times) < SECONDS:
            started = time.monotonic()
            step()
            times.append(time.monotonic() - started)
        return ids.numel() / statistics.median(times)  # some steps are slow if others use the machine
    finally:
        torch.set_num_threads(before)
