"""What evaluations cost beside the training, in tokens that go forward through the model.

Never by a clock: it is the same on every machine, for every trial and when a run resumes. A token that is trained on
counts three, since backward costs twice what forward does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from raylm import budget, model, perplexity
from raylm.budget import Budget
from raylm.config import Experiment, override
from raylm.perplexity import Documents, MaskedTokens
from raylm.tokens import Store

OF_TRAINING = 3
"""Forward passes that a token costs in training."""

SHARE = 0.1
"""Of the training that it interrupts, which an evaluation of a masked model costs by default."""


def with_eval_limit(experiment: Experiment, store: Store) -> Experiment:
    """The experiment with eval.max_tokens decided where it is left to raylm: of a masked model, so many tokens that an
    evaluation costs a tenth of the training since the one before."""
    if not experiment.objective.is_masked or experiment.eval.max_tokens is not None:
        return experiment
    planned = budget.for_store(experiment, store)
    between = min(planned.eval_every, planned.steps) * planned.batch_tokens
    read = np.cumsum(_read(experiment, store, store.validation))
    documents = max(1, int(np.searchsorted(read, SHARE * OF_TRAINING * between, side="right")))
    if documents >= len(read):
        return experiment
    most = sum(len(store.validation[index]) for index in range(documents))
    return override(experiment, {"eval.max_tokens": max(1, most)})


def whole_is_affordable(experiment: Experiment, store: Store, planned: Budget) -> bool:
    """Whether the best model is scored on the whole validation split in the end: a masked one, if that costs at most a
    tenth of the training."""
    if not experiment.objective.is_masked:
        return True
    return _read(experiment, store, store.validation).sum() <= SHARE * OF_TRAINING * planned.tokens


def evaluation_share(experiment: Experiment, store: Store, planned: Budget, sets: Iterable[Documents] = ()) -> float:
    """The part of a run that evaluations take, of the validation split and of evaluation sets."""
    scored: list[Documents] = [store.validation, *sets]
    section = experiment.eval
    each = sum(
        _read(experiment, store, documents, perplexity.first_documents(documents, section.max_tokens)).sum()
        for documents in scored
    )
    read = each * _number(planned)
    if section.max_tokens is not None and whole_is_affordable(experiment, store, planned):
        read += _read(experiment, store, store.validation).sum()
    return float(read / (read + OF_TRAINING * planned.tokens))


def _number(planned: Budget) -> int:
    """Evaluations of a run: there is one before the first step, before each checkpoint and after the last step, too."""
    steps, every = planned.steps, (planned.eval_every, planned.save_every)
    number = sum(steps // each for each in every) - steps // math.lcm(*every)
    return 1 + number + all(steps % each for each in every)


def _read(experiment: Experiment, store: Store, documents: Documents, count: int | None = None) -> np.ndarray:
    """Tokens that the model reads to score each of the first documents."""
    section, masked = experiment.eval, None
    if experiment.objective.is_masked:
        frame = store.frame(experiment.tokenizer.prefix)
        masked = MaskedTokens.of(store.tokenizer, frame, section.pseudo_perplexity)
    positions = model.context(model.config_of(experiment, len(store.tokenizer)))
    context = perplexity.context_of(section, positions, experiment.blocks.block_size)
    lengths = [len(documents[index]) for index in range(len(documents) if count is None else count)]
    return perplexity.tokens_read(np.array(lengths, np.int64), context, section.stride, masked)
