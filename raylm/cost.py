"""The cost of evaluations relative to training, in tokens of forward passes.

No time is measured, so the cost is the same on every machine, for every trial and after a resume. A training token
counts three because backward costs twice as much as forward.
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
"""Cost of an evaluation of a masked model, by default, as a fraction of the training since the last one."""


def with_eval_limit(experiment: Experiment, store: Store) -> Experiment:
    """The experiment with eval.max_tokens decided if it is unset: for a masked model, so many tokens that an evaluation
    costs a tenth of the training since the last one."""
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


def whole_is_affordable(experiment: Experiment, store: Store, planned: Budget, split: Documents) -> bool:
    """Whether the best model is scored on the whole of a split at the end; a masked model only if that costs at most a
    tenth of the training."""
    if not experiment.objective.is_masked:
        return True
    return _read(experiment, store, split).sum() <= SHARE * OF_TRAINING * planned.tokens


def test_limit(experiment: Experiment, store: Store, planned: Budget, test: Documents) -> int | None:
    """The limit of tokens of the test split that the best model is scored on: as many as an evaluation scores, if the
    whole of it is not affordable; else None."""
    if whole_is_affordable(experiment, store, planned, test):
        return None
    return experiment.eval.max_tokens or store.validation.num_tokens


def evaluation_share(experiment: Experiment, store: Store, planned: Budget, sets: Iterable[Documents] = ()) -> float:
    """The fraction of a run's cost that is evaluations, on the validation split and evaluation sets, and the score on
    the test split."""
    scored: list[Documents] = [store.validation, *sets]
    section = experiment.eval
    each = sum(
        _read(experiment, store, documents, perplexity.first_documents(documents, section.max_tokens)).sum()
        for documents in scored
    )
    read = each * _number(planned)
    if section.max_tokens is not None and whole_is_affordable(experiment, store, planned, store.validation):
        read += _read(experiment, store, store.validation).sum()
    if store.test is not None:
        limit = test_limit(experiment, store, planned, store.test)
        read += _read(experiment, store, store.test, perplexity.first_documents(store.test, limit)).sum()
    return float(read / (read + OF_TRAINING * planned.tokens))


def _number(planned: Budget) -> int:
    """Number of evaluations of a run, with those before the first step, before checkpoints and after the last step."""
    steps, every = planned.steps, (planned.eval_every, planned.save_every)
    number = sum(steps // each for each in every) - steps // math.lcm(*every)
    return 1 + number + all(steps % each for each in every)


def _read(experiment: Experiment, store: Store, documents: Documents, count: int | None = None) -> np.ndarray:
    """Tokens that the model reads to score each of the first documents."""
    section, masked = experiment.eval, None
    if experiment.objective.is_masked:
        frame = store.frame(experiment.tokenizer.prefix)
        masked = MaskedTokens.of(store.tokenizer, frame, section.pseudo_perplexity)
    positions = model.context(model.config_of(experiment, tokenizer=store.tokenizer))
    context = perplexity.context_of(section, positions, experiment.blocks.block_size)
    lengths = [len(documents[index]) for index in range(len(documents) if count is None else count)]
    return perplexity.tokens_read(np.array(lengths, np.int64), context, section.stride, masked)
