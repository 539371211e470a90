"""What follows from text and machine: model, batch, budget, evaluations, and a sweep of about ten minutes here."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm import config, console
from raylm.config import Experiment, ModelConfig, is_local, override
from raylm.derived import decisions
from raylm.derived.text import Derived, size, with_split, with_tokenizer

if TYPE_CHECKING:
    from raylm.corpus import Holdout, Source

logger = logging.getLogger(__name__)

TOKENS_PER_PARAMETER = 10
"""A larger model is taken as long as its budget has this many tokens for each parameter outside the embeddings. 20 are
best for the compute (Hoffmann et al. 2022, arXiv:2203.15556), and half of that costs little."""

SWEEP_SECONDS = 600.0
"""How long a sweep may take on this machine, once the tokens are prepared."""

START_SECONDS = 60.0
"""Of these: imports, Ray, the best model's last score and the report."""

OVERHEAD = 1.27
"""Time of a trial over that of its bare steps and evaluations: checkpoints, batches, and the trials beside it."""

TRIALS = 8
ETA = 3
EVALUATIONS = ETA**2
"""Of a whole budget. With early stopping a trial waits after the first, and after the third."""

SCORING = EVALUATIONS / 3
"""Cost of all evaluations of a trial, in training tokens for each scored token: a step has a backward pass too."""

SHAPES = ((2, 64, 2), (2, 128, 4), (4, 128, 4), (4, 256, 4), (6, 384, 6), (8, 512, 8), (12, 768, 12))
"""Layers, width and heads of the models to choose from; the last is the smallest GPT-2."""

LEAST_TRAINED, MOST_TRAINED = 4, 30
"""Training tokens for each token of an evaluation."""

GIVEN = ("corpus", "tokenizer", "model", "blocks", "objective", "train")
"""Sections that sizes depend on; a sweep that is given another number of trials keeps those it has."""

BYTES_PER_TOKEN = 3.0
"""Of English and source code in a small vocabulary: 2.2 with 512 entries, 3.6 with 8,192. It stands for a text of more
than SMALL_TEXT bytes, of which no few passes are made."""

SMALL_TEXT = 2_000_000
"""Bytes of a text of which it is measured: with a budget of four passes, an estimate would make them three or five."""

TRAINED_BYTES = 16
"""Memory of a trained parameter: weight, gradient and AdamW's two moments in float32."""

STEP_LAW = "Step Law (Li et al. 2025, arXiv:2503.04715)"

PRETRAINED_RATES = {False: (1e-5, 1e-4, 1e-3), True: (5e-5, 3e-4, 2e-3)}
"""Lowest, first and highest learning rate for a pretrained model: of all weights, and of LoRA, which wants several
times as much (Biderman et al. 2024, arXiv:2405.09673)."""


def step_law(num_parameters: int, tokens: int) -> tuple[float, float]:
    """The best learning rate and tokens of a batch for a new model (Li et al. 2025, arXiv:2503.04715).

    Of so many parameters outside the embeddings, trained on so many tokens. It was fitted to models of 60M to 1B
    parameters on 2B to 100B tokens; for the small ones here it is an extrapolation, and too high: with 100,096
    parameters it gives 0.022 for 225,280 tokens, where perplexities were 222, 101, 78, 115, 199 at rates of 0.002,
    0.005, 0.01, 0.02, 0.04; and 0.036 for 1,069,056 tokens, where the best of eight trials had 0.0099.
    """
    return 1.79 * num_parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def training(experiment: Experiment, sources: list[Source], *, anew: bool = False) -> Derived:
    """The experiment with its split; without a config file also with tokenizer, model, a budget of a few passes, and a
    sweep of ten minutes here: as decided before, unless they are wanted `anew`."""
    (complete, reasons), held = (with_tokenizer if experiment.sizes_follow_text else with_split)(experiment, sources)
    if held.complete and held.units < 2 and not experiment.corpus.validation_paths:
        from raylm import budget, corpus

        raise budget.no_validation(complete) if held.units else corpus.nothing_left(held.ledger)
    if not experiment.sizes_follow_text:
        return Derived(complete, reasons)
    given = _given(experiment)
    path = decisions.path(experiment, experiment.name, given, "yaml")
    decided = None if anew else decisions.find(path)
    if decided is None:
        settings, why = _sizes(complete, held, sources)
        reasons = {**reasons, **why}
        head = f"What raylm derived from {console.format_size(size(held))} of text and the machine it ran on."
        file = {"name": experiment.name, **_given(complete), **settings}
        decisions.decide(path, config.outline(file, reasons, head))
    else:
        settings = config.settings_of(decided)
    found = override(complete, {key: value for key, value in settings.items() if not _is_given(experiment, key)})
    if not anew:
        how = "follow from" if decided is None else f"were derived before ({path}) from"
        logger.info(
            f"No --config, so settings {how} {console.format_size(size(held))} of text and this machine: "
            f"{shown(found.model)}, {found.train.max_tokens or 0:,} tokens a training"
        )
    return Derived(found, reasons)


def shown(section: ModelConfig) -> str:
    """A model in a few words."""
    fields = section.config or {}
    layers, width = (
        next((fields[name] for name in names if name in fields), None)
        for names in (("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size"))
    )
    kind = f"{fields.get('model_type', 'a new model')}" + f", {layers} layers of width {width}" * bool(layers and width)
    return (section.path or kind) + ", LoRA" * (section.lora is not None)


def _given(experiment: Experiment) -> dict[str, Any]:
    """What was set of the sections that sizes depend on, by dotted keys."""
    moot = {"train": {"micro_batch_tokens", "save_every_tokens", "keep_checkpoints"}}
    tree = experiment.model_dump(mode="json", exclude_unset=True, include=set(GIVEN), exclude=moot)
    return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}


def _is_given(experiment: Experiment, key: str) -> bool:
    """Whether somebody set it, or what it excludes. A model's fields are completed, not replaced."""
    if key == "model.config":
        return experiment.model.path is not None
    section, _, name = key.partition(".")
    given: set[str] = getattr(experiment, section).model_fields_set if name else {section}
    return (name or section) in given or (key == "train.max_tokens" and "num_epochs" in given)


@dataclass(frozen=True)
class _Sized:
    """A model with the budget that this machine can afford for it."""

    section: ModelConfig
    num_parameters: int
    """Outside the embeddings."""
    tokens: int
    """Of a training."""
    speed: float
    """Tokens a second, of one trial."""


@dataclass(frozen=True)
class _Limits:
    """What text and machine allow."""

    concurrent_trials: int
    threads: int
    """Of a trial."""
    memory: float
    """Bytes that the models of all concurrent trials may have."""
    text_tokens: int
    """Estimated tokens of the training split."""
    tokens_to_rank_by: int
    """Estimated tokens of as many documents as rank trials."""
    context: int | None
    """Most positions of a pretrained model; None if it has no limit, or the model is new."""


def _limits(experiment: Experiment, held: Holdout, sources: list[Source]) -> _Limits:
    from raylm import cluster, corpus, model, tokenizer, tokens

    bytes_per_token = BYTES_PER_TOKEN
    if 0 < held.num_bytes <= SMALL_TEXT:
        chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
        measured = tokens.bytes_per_token(sources, experiment.corpus, chosen, SMALL_TEXT)
        bytes_per_token = measured if math.isfinite(measured) else BYTES_PER_TOKEN
    machine = cluster.this_machine()
    concurrent_trials = min(TRIALS, int(machine["GPU"] or machine["CPU"]))
    text = experiment.corpus
    held_out = text.validation_fraction + (0 if text.test_paths else text.test_fraction)
    is_new = experiment.model.path is None
    return _Limits(
        concurrent_trials=concurrent_trials,
        threads=max(1, int(machine["CPU"]) // concurrent_trials),
        memory=_memory(machine),
        text_tokens=max(1, int(size(held) * (1 - held_out) / bytes_per_token)),
        tokens_to_rank_by=int(corpus.ENOUGH_UNITS * held.unit_bytes / bytes_per_token),
        context=None if is_new else model.context(model.pretrained_configuration(experiment.model)),
    )


def _sizes(experiment: Experiment, held: Holdout, sources: list[Source]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of model, blocks, budget, evaluations and sweep that go with what was given, by dotted keys; and why."""
    if not is_local(experiment.cluster):
        from raylm import cluster

        cluster.check_reachable(experiment.cluster)  # before what takes seconds
    with console.loading():
        limits = _limits(experiment, held, sources)
    with console.waiting("Measuring how fast this machine trains"):
        found = _affordable_model(experiment, limits)
    section = experiment.model
    is_new = section.path is None
    given_tokens = experiment.train.max_tokens
    tokens = given_tokens if given_tokens is not None else found.tokens
    needed = TRAINED_BYTES * found.num_parameters * limits.concurrent_trials
    lora = section.lora is not None or (
        not is_new and needed > limits.memory / 2 and importlib.util.find_spec("peft") is not None
    )
    if is_new:
        rate, batch = step_law(found.num_parameters, tokens)
        rates = [_rounded(rate / 16), _rounded(rate / 3), _rounded(rate)]
        formula = f"a third of what {STEP_LAW} gives for {found.num_parameters:,} parameters and {tokens:,} tokens"
    else:
        rates, batch = list(PRETRAINED_RATES[lora]), tokens / 1000
        formula = "usual for a pretrained model" + ", and LoRA (Biderman et al. 2024, arXiv:2405.09673)" * lora
    block_sizes, batch_tokens = _blocks_and_batch(experiment, tokens, batch, limits.context)
    between_evaluations = max(1, tokens // EVALUATIONS // batch_tokens) * batch_tokens
    evaluated = _evaluated(tokens, limits.tokens_to_rank_by)
    budget_tokens = EVALUATIONS * between_evaluations
    duration = (
        START_SECONDS
        + _rounds(limits.concurrent_trials) * (between_evaluations + evaluated / 3) * OVERHEAD / found.speed
    )
    settings = {
        **({"model.config": found.section.config} if is_new else {}),
        **({"model.lora": {}} if lora and section.lora is None else {}),
        "blocks.block_size": block_sizes[len(block_sizes) // 2],
        "train.learning_rate": rates[1],
        "train.warmup_steps": 0.1,
        "train.batch_tokens": batch_tokens,
        "train.max_tokens": budget_tokens,
        "train.eval_every_tokens": between_evaluations,
        "eval.max_tokens": evaluated,
        "tune.space": {
            "train.learning_rate": {"loguniform": [rates[0], rates[2]]},
            "train.warmup_steps": {"uniform": [0.0, 0.2]},
            **({"blocks.block_size": {"choice": block_sizes}} if len(block_sizes) > 1 else {}),
        },
        "tune.num_samples": TRIALS,
        "tune.scheduler": {"kind": "asha", "grace_tokens": between_evaluations, "reduction_factor": ETA},
    }
    trials = console.counted(limits.concurrent_trials, "trial")
    reasons = {
        "model.config": f"{found.num_parameters:,} parameters outside the embeddings, for each of which the budget "
        f"has about {tokens / found.num_parameters:.2g} tokens",
        "model.lora": f"training all weights of {trials} at a time would take {console.format_size(needed)}",
        "train.learning_rate": formula,
        "train.batch_tokens": f"{STEP_LAW}: {batch:,.0f}, in whole examples" if is_new else "about a thousand steps",
        "train.max_tokens": f"about {budget_tokens / limits.text_tokens:.2g} epochs; at {found.speed:,.0f} tokens/s, "
        f"measured here on {console.counted(limits.threads, 'thread')}, "
        f"{console.format_duration(budget_tokens / found.speed)}",
        "train.eval_every_tokens": f"{EVALUATIONS} evaluations",
        "eval.max_tokens": "a small part of the training"
        + ", and enough documents to rank trials by" * (evaluated >= limits.tokens_to_rank_by),
        "tune.space": f"learning rates around what is {'published' if is_new else 'usual'}",
        "tune.num_samples": f"with {trials} at a time and early stopping about "
        f"{console.format_duration(duration)} here",
        "tune.scheduler": f"one of {ETA} trials goes on after one evaluation, and again after {ETA}",
    }
    return settings, {key: reason for key, reason in reasons.items() if key in settings}


def _affordable_model(experiment: Experiment, limits: _Limits) -> _Sized:
    """The model of the experiment, or the largest new one, with the budget for which SWEEP_SECONDS suffice."""
    from raylm import budget, model, tokenizer
    from raylm.derived import speed

    known = tokenizer.choose(experiment.tokenizer, experiment.model)
    vocab_size = known.train.vocab_size if known.train is not None else len(tokenizer.load_section(known))
    masked = experiment.objective.is_masked
    seconds = (SWEEP_SECONDS - START_SECONDS) * EVALUATIONS / _rounds(limits.concurrent_trials) / OVERHEAD
    columns = min(speed.COLUMNS, limits.context or speed.COLUMNS)

    def sized(section: ModelConfig) -> _Sized:
        found = model.configuration(section, vocab_size=vocab_size, block_size=columns, masked=masked)
        num_parameters = model.num_parameters(found, masked=masked, embeddings=False)
        scale, measured = 1.0, found
        if num_parameters > speed.MOST_PARAMETERS:  # time grows with the parameters, so a smaller one tells
            fields = _of_shape(*SHAPES[-2], masked)
            smaller = section.model_copy(update={"path": None, "transfer": None, "config": fields})
            measured = model.configuration(smaller, vocab_size=1024, block_size=columns, masked=masked)
            scale = model.num_parameters(measured, masked=masked, embeddings=False) / num_parameters
        a_second = scale * speed.tokens_per_second(measured, masked=masked, threads=limits.threads)
        tokens = int(_affordable(a_second * seconds, limits.tokens_to_rank_by))
        return _Sized(section, num_parameters, min(budget.FEW_PASSES * limits.text_tokens, tokens), a_second)

    section = experiment.model
    if section.path is not None or {"model_type", "path"} & (section.config or {}).keys():
        return sized(section)
    return _largest(section, masked, sized)


def _evaluated(tokens: int, tokens_to_rank_by: int) -> int:
    """Tokens of an evaluation in a training of so many: enough to rank trials, within a thirtieth to a quarter."""
    return max(tokens // MOST_TRAINED, min(tokens_to_rank_by, tokens // LEAST_TRAINED))


def _affordable(tokens: float, tokens_to_rank_by: int) -> float:
    """The training tokens that cost as much, with all evaluations of `_evaluated` tokens, as `tokens` without any."""
    return max(
        tokens / (1 + SCORING / LEAST_TRAINED),
        min(tokens / (1 + SCORING / MOST_TRAINED), tokens - SCORING * tokens_to_rank_by),
    )


def _blocks_and_batch(experiment: Experiment, tokens: int, batch: float, context: int | None) -> tuple[list[int], int]:
    """Block sizes to sweep, and tokens of a batch: near to `batch`, in whole examples of each size for every worker."""
    train, blocks = experiment.train, experiment.blocks
    sizes = [128, 256, 512] if tokens >= 1_000_000 else [64, 128, 256]
    if "block_size" in blocks.model_fields_set:
        sizes = [blocks.block_size]
    elif context is not None:
        sizes = [each for each in sizes if each <= context] or [context]
    workers = math.lcm(*range(experiment.cluster.fewest_workers, experiment.cluster.most_workers + 1))
    if "batch_tokens" in train.model_fields_set:
        given = train.batch_tokens
        return [each for each in sizes if given % (each * workers) == 0] or [given // workers], given
    sizes = [each for each in sizes if each * workers <= tokens] or sizes[:1]  # a step is no more than the budget
    least = max(sizes) * workers
    return sizes, least * 2 ** max(0, min(6, round(math.log2(batch / least))))


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def _memory(machine: Mapping[str, float]) -> float:
    """Bytes that the models of this machine's trials may have in all."""
    import torch

    if machine["GPU"]:
        return machine["GPU"] * torch.cuda.get_device_properties(0).total_memory
    return machine["memory"]


def _rounds(together: int) -> int:
    """Evaluations one after the other until all trials have ended, so many of them side by side."""
    waits = [(TRIALS, 1), (TRIALS // ETA, ETA - 1), (1, EVALUATIONS - ETA)]
    return sum(-(-trials // together) * evaluations for trials, evaluations in waits)


def _largest(section: ModelConfig, masked: bool, sized: Any) -> _Sized:
    """The largest of SHAPES whose budget pays for its size; the smallest whatever its budget."""
    found: _Sized | None = None
    for layers, width, heads in SHAPES:
        least = 12 * layers * width**2 * TOKENS_PER_PARAMETER
        if found is not None and found.tokens < least:
            break  # not even the budget of the smaller one would do
        fields = _of_shape(layers, width, heads, masked) | (section.config or {})
        larger = sized(section.model_copy(update={"config": fields}))
        if found is not None and larger.tokens < least:
            break
        found = larger
    assert found is not None
    return found


def _of_shape(layers: int, width: int, heads: int, masked: bool) -> dict[str, Any]:
    """Fields of a new model: GPT-2's, or BERT's for a masked one.

    transformers' initializer_range of 0.02 is meant for a width of some 1,000 and learns slower in a narrow model; text
    of which at most a few passes are made needs no dropout.
    """
    spread = round(width**-0.5, 3)
    if masked:
        return {
            "model_type": "bert",
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "initializer_range": spread,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "initializer_range": spread,
        **dropout,
    }
