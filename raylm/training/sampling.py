"""What a model in training writes after fixed prompts (eval.prompts)."""

from __future__ import annotations

import copy

from transformers import GenerationConfig, PreTrainedModel

from raylm import scorer, tokens
from raylm.checkpoint import TrainedModel
from raylm.config import Experiment
from raylm.errors import ConfigError
from raylm.generation import TextGenerator


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
