"""What follows from the text and the machine, for settings that nobody gave: decided once, then reused.

    any corpus          split by document or passage, and enough of it held out to rank trials by
    without --config    vocabulary, model, block size, batch, budget, evaluations, what is swept

A decision lies in <storage>/decided/ under a hash of what was given, so that the same command finds it again: later, on
another node, or when the corpus has grown. `--print-config` prints all of it as a file of one's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raylm import console
from raylm.config import Experiment, ModelConfig, override

if TYPE_CHECKING:  # whoever has a wrong setting is told before these are imported
    from transformers import PreTrainedConfig

    from raylm.corpus import Holdout, Source

logger = logging.getLogger(__name__)

TOKENS_PER_PARAMETER = 10
"""A larger model is taken as long as its budget has this many tokens for each parameter outside the embeddings. 20 are
best for the compute (Hoffmann et al. 2022, arXiv:2203.15556), and half of that costs little."""

SWEEP_SECONDS = 600.0
"""How long a sweep may take on this machine, once the tokens are prepared."""

START_SECONDS = 60.0
"""Of these: imports, Ray, the best model's last score and the report."""

OVERHEAD = 1.4
"""Time of a trial over that of its bare training steps: evaluations, checkpoints, and the trials beside it."""

HELD_OUT_BYTES = 300_000
"""Of a large corpus, for validation: 100,000 tokens are scored in seconds, and 5 % of a corpus of 3 GB in an hour."""

TRIALS = 8
ETA = 3
EVALUATIONS = ETA**2
"""Of a whole budget. With early stopping a trial waits after the first, and after the third."""

SHAPES = ((2, 64, 2), (2, 128, 4), (4, 128, 4), (4, 256, 4), (6, 384, 6), (8, 512, 8), (12, 768, 12))
"""Layers, width and heads of the models to choose from; the last is the smallest GPT-2."""

GO_INTO_SIZES = ("corpus", "tokenizer", "model", "blocks", "objective", "train")
"""Sections that sizes depend on; a sweep that is given another number of trials keeps those it has."""

BYTES_PER_TOKEN = 3.0
"""Of English and source code in a small vocabulary: 2.2 with 512 entries, 3.6 with 8,192."""


def text(experiment: Experiment, sources: list[Source]) -> Experiment:
    """The experiment with its split decided; without a config file also with a tokenizer, unless one was given.

    Reads some of the text, unless it was decided before.
    """
    return (_text if experiment.sizes_follow_text else _split)(experiment, sources)[0]


def training(experiment: Experiment, sources: list[Source]) -> Experiment:
    """`text`; without a config file also with a model, a budget of a few passes, and a sweep of ten minutes here."""
    if not experiment.sizes_follow_text:
        return _split(experiment, sources)[0]
    moot = {"train": {"micro_batch_tokens", "save_every_tokens", "keep_checkpoints"}}
    given = experiment.model_dump(mode="json", exclude_unset=True, include=set(GO_INTO_SIZES), exclude=moot)
    complete, held = _text(experiment, sources)
    sizes = _decided(experiment, "sizes", given, lambda: _sizes(complete, held))
    found = override(complete, {key: value for key, value in sizes.items() if not _is_given(experiment, key)})
    section = found.model
    layers, width = (section.config or {}).get("n_layer"), (section.config or {}).get("n_embd")
    what = section.path or (f"{layers} layers of width {width}" if layers and width else "the model that you gave")
    logger.info(
        f"No --config, so sizes follow from {console.format_size(_size(held))} of text and this machine: {what}, "
        f"{found.train.max_tokens or 0:,} tokens a training; --print-config shows them as a file"
    )
    return found


def _is_given(experiment: Experiment, key: str) -> bool:
    """Whether somebody set it, or what it excludes. A model's fields are completed, not replaced."""
    if key == "model.config":
        return experiment.model.path is not None
    section, name = key.split(".")
    given: set[str] = getattr(experiment, section).model_fields_set
    return name in given or (name == "max_tokens" and section == "train" and "num_epochs" in given)


def _split(experiment: Experiment, sources: list[Source]) -> tuple[Experiment, Holdout]:
    from raylm import corpus

    section = experiment.corpus

    def look() -> dict[str, Any]:
        with console.waiting("Looking at the text"):
            return dataclasses.asdict(corpus.holdout(sources, section))

    found = corpus.Holdout(**_decided(experiment, "split", section.model_dump(mode="json"), look))
    documents = f"{found.documents:,} document{'s' * (found.documents != 1)}"
    if found.split_by == "passage" and section.split_by is None and not (found.complete and found.units < 2):
        held = f"{100 * found.validation_fraction:.2g} %"
        if found.complete:
            held = f"about {max(1, found.units * found.validation_fraction):.0f} of {found.units:,}"
        logger.info(
            f"The text is {documents}, too few to hold any out: passages of them are held out for validation, {held}; "
            "corpus.split_by=document holds out whole documents"
        )
    elif found.validation_fraction > section.validation_fraction:
        logger.info(
            f"corpus.validation_fraction={section.validation_fraction:g} of {documents} is too little to rank trials "
            f"by: {found.validation_fraction:.2g} is held out"
        )
    settings = {"corpus.split_by": found.split_by, "corpus.validation_fraction": found.validation_fraction}
    return override(experiment, settings), found


def _text(experiment: Experiment, sources: list[Source]) -> tuple[Experiment, Holdout]:
    from raylm import corpus

    given = experiment.corpus
    experiment, held = _split(experiment, sources)
    enough = max(HELD_OUT_BYTES, 3 * corpus.ENOUGH_UNITS * held.unit_bytes)
    if "validation_fraction" not in given.model_fields_set and _size(held) * held.validation_fraction > enough:
        held = dataclasses.replace(held, validation_fraction=round(enough / _size(held), 7))
        experiment = override(experiment, {"corpus.validation_fraction": held.validation_fraction})
    section, objective = experiment.tokenizer, experiment.objective
    if section.path is not None or (section.train is None and experiment.model.path is not None):
        return experiment, held
    needs = {"masked": ("<mask>",), "fill_in_middle": objective.sentinels}.get(objective.kind, ())
    trained = {"vocab_size": _vocabulary(_size(held)), "special_tokens": ["<|endoftext|>", *needs]}
    if section.train is not None:
        trained |= section.train.model_dump(exclude_unset=True)
    return override(experiment, {"tokenizer.train": trained}), held


def _size(held: Holdout) -> int:
    """Bytes of the text; a data set that does not say is taken for a large one."""
    return held.num_bytes or 100_000_000


def _vocabulary(num_bytes: int) -> int:
    """Entries for so much text: 512 for 50 kB, 2,048 for 1 MB, 8,192 from 12 MB on.

    Twice the square root, as words grow with a text (Heaps' law), to a power of two: more would be seen too rarely.
    """
    return 2 ** min(13, max(9, round(math.log2(2 * math.sqrt(max(1, num_bytes))))))


# Decided once --------------------------------------------------------------------------------------------------------


_decisions: dict[str, dict[str, Any]] = {}
"""Those of this process by the file that they belong in, as long as `keep` has not written them."""


def keep() -> None:
    """Write down what was decided, once all else has been checked: an error leaves nothing behind."""
    from raylm import storage

    while _decisions:
        path, found = _decisions.popitem()
        storage.write(path, (json.dumps(found, indent=1) + "\n").encode())


def _decided(experiment: Experiment, what: str, given: Any, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was decided for these settings in the experiment's storage, or is decided now."""
    from raylm import storage

    name = hashlib.blake2b(json.dumps(given, sort_keys=True).encode(), digest_size=8).hexdigest()
    path = f"{experiment.storage.rstrip('/')}/decided/{what}-{name}.json"
    storage.look(experiment.storage)
    written = storage.read(path)
    if written is not None:
        return json.loads(written)
    _decisions[path] = decide()
    return _decisions[path]


# Sizes ---------------------------------------------------------------------------------------------------------------


def _sizes(experiment: Experiment, held: Holdout) -> dict[str, Any]:
    """Settings of model, blocks, budget, evaluations and sweep that go with what was given; dotted key -> value."""
    from raylm import budget, cluster, corpus

    cluster.check_reachable(experiment.cluster)  # before what takes seconds
    with console.waiting("Loading PyTorch and transformers"), console.importing():
        from raylm import model, tokenizer

    machine = cluster.this_machine()
    together = min(TRIALS, int(machine["GPU"] or machine["CPU"]))
    threads = max(1, int(machine["CPU"]) // together)
    known = tokenizer.choose(experiment.tokenizer, experiment.model)
    vocab_size = known.train.vocab_size if known.train is not None else len(tokenizer.load_section(known))
    masked = experiment.objective.is_masked
    text_tokens = max(1, int(_size(held) * (1 - experiment.corpus.validation_fraction) / BYTES_PER_TOKEN))
    seconds = (SWEEP_SECONDS - START_SECONDS) * EVALUATIONS / _rounds(together) / OVERHEAD

    def affordable(section: ModelConfig) -> int:
        """Training tokens of one trial of this model."""
        found = model.configuration(section, vocab_size=vocab_size, block_size=MEASURED[1], masked=masked)
        return min(budget.FEW_PASSES * text_tokens, int(_tokens_per_second(found, masked, threads) * seconds))

    section, width, rate = experiment.model, None, 1e-4
    with console.waiting("Measuring how fast this machine trains"):
        if section.path is not None or {"model_type", "path"} & (section.config or {}).keys():
            tokens = affordable(section)
        else:
            section, width, tokens = _largest(section, masked, affordable)
            rate = 5e-3 * min(1.0, 128 / width)
    train, blocks = experiment.train, experiment.blocks
    if train.max_tokens is not None:
        tokens = train.max_tokens
    sizes = [128, 256, 512] if tokens >= 1_000_000 else [64, 128, 256]
    if "block_size" in blocks.model_fields_set:
        sizes = [blocks.block_size]
    elif section.path is not None and (most := model.context(model.pretrained_configuration(section))):
        sizes = [size for size in sizes if size <= most] or [most]
    batch = train.batch_tokens
    workers = math.lcm(*range(experiment.cluster.fewest_workers, experiment.cluster.most_workers + 1))
    if "batch_tokens" in train.model_fields_set:
        sizes = [size for size in sizes if batch % (size * workers) == 0] or [batch // workers]
    else:  # some thousand steps, with examples of every size for every worker
        sizes = [size for size in sizes if size * workers <= tokens] or sizes[:1]  # a step is no more than the budget
        least = max(sizes) * workers
        batch = least * 2 ** max(0, min(6, round(math.log2(tokens / 1000 / least))))
    between = max(1, tokens // EVALUATIONS // batch) * batch
    evaluated = max(tokens // 30, int(corpus.ENOUGH_UNITS * held.unit_bytes / BYTES_PER_TOKEN))
    is_new = section.path is None
    return {
        **({"model.config": section.config} if is_new else {}),
        "blocks.block_size": sizes[len(sizes) // 2],
        "train.learning_rate": rate,
        "train.warmup_steps": 0.1,
        "train.batch_tokens": batch,
        "train.max_tokens": EVALUATIONS * between,
        "train.eval_every_tokens": between,
        "eval.max_tokens": evaluated,
        "tune.space": {
            "train.learning_rate": {"loguniform": [rate / 10, rate * 4] if is_new else [rate / 10, rate * 10]},
            "train.warmup_steps": {"uniform": [0.0, 0.2]},
            **({"blocks.block_size": {"choice": sizes}} if len(sizes) > 1 else {}),
        },
        "tune.num_samples": TRIALS,
        "tune.scheduler": {"kind": "asha", "grace_tokens": between, "reduction_factor": ETA},
    }


def _rounds(together: int) -> int:
    """Evaluations one after the other until all trials have ended, so many of them side by side."""
    waits = [(TRIALS, 1), (TRIALS // ETA, ETA - 1), (1, EVALUATIONS - ETA)]
    return sum(-(-trials // together) * evaluations for trials, evaluations in waits)


def _largest(
    section: ModelConfig, masked: bool, affordable: Callable[[ModelConfig], int]
) -> tuple[ModelConfig, int, int]:
    """The largest of SHAPES whose budget pays for its size, its width, and that budget."""
    found: tuple[ModelConfig, int, int] | None = None
    for layers, width, heads in SHAPES:
        config = _of_shape(layers, width, heads, masked) | (section.config or {})
        larger = section.model_copy(update={"config": config})
        if found is not None and found[2] < 12 * layers * width**2 * TOKENS_PER_PARAMETER:
            break  # not even the budget of the smaller one would do
        tokens = affordable(larger)
        if found is not None and tokens < 12 * layers * width**2 * TOKENS_PER_PARAMETER:
            break
        found = larger, width, tokens
    assert found is not None  # the smallest is taken whatever its budget
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


MEASURED = (4, 128)
"""Rows and columns of the batches by which the speed of training is measured."""

MEASURED_SECONDS = 1.0


def _tokens_per_second(found: PreTrainedConfig, masked: bool, threads: int) -> float:
    """How fast a trial trains a model of this configuration here, without evaluations; measured in about 2 s."""
    import torch

    from raylm import model, objective

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = model.device()
        network = model.untrained(found, masked=masked).to(device)
        objective.attach(network, shifted=not masked)
        optimizer = torch.optim.AdamW(network.parameters())
        ids = torch.zeros(MEASURED, dtype=torch.long, device=device)

        def step() -> None:
            loss = network(input_ids=ids, labels=ids)["loss"] / ids.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for a GPU

        step()
        steps, began = 0, time.monotonic()
        while time.monotonic() - began < MEASURED_SECONDS:
            step()
            steps += 1
        return steps * ids.numel() / (time.monotonic() - began)
    finally:
        torch.set_num_threads(before)
