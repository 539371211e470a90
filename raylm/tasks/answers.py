"""The workers' part of an evaluation on tasks: windows -> likelihoods, prompts -> texts.

Batches are made of all windows before they are dealt out, so that the result does not depend on the number of workers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from raylm import config, perplexity, scorer
from raylm.config import Experiment
from raylm.generation import TextGenerator
from raylm.tasks.requests import Window
from raylm.training import ScoreTask, load_to_score
from raylm.training.session import gathered

PROMPTS = 16
"""Prompts of a batch."""


def likelihoods(windows: Sequence[Window], num_slots: int, task: ScoreTask) -> np.ndarray:
    """The nll of each slot and how many of its tokens are not the likeliest, float64 of shape (slots, 2); the same on
    every worker."""
    session, trained = task.session(), load_to_score(task)
    slots = torch.zeros((num_slots, 2), dtype=torch.float64)
    longest = max((len(window.ids) for window in windows), default=1)
    batches = perplexity.batches_of(windows, longest, task.section.batch_tokens)
    end = trained.frame(task.tokenizer.prefix).end
    done, total = 0, sum(len(window.ids) for window in windows)
    with scorer.scoring(trained.model, task.section.precision, scorer.nll_and_misses) as score:
        for number, batch in enumerate(batches):
            done += sum(len(window.ids) for window in batch)
            if number % session.world_size == session.rank:
                places, targets, inputs = perplexity.tensors_of(batch, end, masked=False)
                each = score(places, targets, **inputs).cpu()
                slots.index_add_(0, torch.from_numpy(np.concatenate([window.slots for window in batch])), each)
            if task.progress is not None:
                task.progress(done, total)
    if session.world_size > 1:
        slots = slots.to(trained.model.device)
        torch.distributed.all_reduce(slots)  # the others' slots are zero
    return slots.cpu().numpy()


def texts(prompts: Sequence[str], settings: GenerationConfig, task: ScoreTask) -> list[str]:
    """What the model writes after each prompt; the same on every worker."""
    session, trained = task.session(), load_to_score(task)
    prefix = task.tokenizer.prefix
    framed = config.override(trained.experiment or Experiment(), {"tokenizer.prefix": prefix})
    generator = TextGenerator(dataclasses.replace(trained, experiment=framed), settings, seed=0)
    trained.model.eval()
    by_length = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = [by_length[start : start + PROMPTS] for start in range(0, len(prompts), PROMPTS)]
    own: dict[int, str] = {}
    for batch in itertools.islice(batches, session.rank, None, session.world_size):
        found = generator.texts([prompts[number] for number in batch])
        own |= {number: each.text[len(prompts[number]) :] for number, each in zip(batch, found, strict=True)}
        if task.progress is not None:
            task.progress(len(own) * session.world_size, len(prompts))
    every = {number: text for found in gathered(session, own) for number, text in found.items()}
    return [every[number] for number in range(len(prompts))]
