"""Texts of fixed prompts that the model writes at each evaluation (eval.prompts), kept in the run's directory.

<run>/samples.jsonl    {"step": 40, "tokens": 20480, "prompt": "The cat", "text": "The cat sat ..."}    a line a prompt
"""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from raylm import scorer, storage, tokens
from raylm.checkpoint import TrainedModel
from raylm.config import Experiment
from raylm.errors import ConfigError
from raylm.generation import TextGenerator

FILE = "samples.jsonl"


def check_prompts(experiment: Experiment, store: tokens.Store) -> None:
    """ConfigError if a masked model has nothing to fill in a prompt."""
    mask = store.tokenizer.mask_token
    for prompt in experiment.eval.prompts if experiment.objective.is_masked else ():
        if mask not in prompt:
            raise ConfigError(f"eval.prompts: {prompt!r}: a masked model fills {mask}; put one in", "eval.prompts")


def texts(network: PreTrainedModel, experiment: Experiment, store: tokens.Store) -> list[str]:
    """The text of each prompt, which begins with it: the likeliest tokens, in float32. Neither the model nor a random
    generator is changed."""
    section = experiment.eval
    known = copy.deepcopy(store.tokenizer)  # of which the generator sets the padding
    frame = store.frame(experiment.tokenizer.prefix)
    own = network.__dict__.get("generation_config")  # a masked model may have none
    settings = GenerationConfig(do_sample=False, max_new_tokens=section.sample_tokens, eos_token_id=[frame.end])
    trained = TrainedModel(network, known, experiment, {}, fills_in=experiment.objective.is_masked)
    try:
        with scorer.undisturbed(network):
            generator = TextGenerator(trained, settings, seed=0)
            return [each.text for each in generator.texts(section.prompts)]
    finally:
        network.__dict__.pop("generation_config", None)
        if own is not None:
            network.generation_config = own


def write(directory: str, step: int, rows: list[dict[str, Any]]) -> str:
    """Write the rows of an evaluation behind those of the evaluations before it, and return the file. A resumed run
    repeats evaluations: what the file has of this one and of later ones is replaced."""
    path = f"{directory}/{FILE}"
    earlier = [row for row in read(directory) if row["step"] < step]
    lines = [json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows]
    kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in earlier]
    storage.write(path, "".join([*kept, *lines]).encode("utf-8", "replace"))
    return path


def read(directory: str) -> list[dict[str, Any]]:
    """The rows of all evaluations of a run; empty if it has none."""
    content = storage.read(f"{directory}/{FILE}") or b""
    return [json.loads(line) for line in content.decode().splitlines()]
