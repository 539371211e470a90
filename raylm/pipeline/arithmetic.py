"""The arithmetic of a run or sweep: train.precision and eval.precision where they are auto, decided when it starts.

A resumed run keeps what it has, on any machine, and all trials of a sweep have the same.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from raylm import cluster
from raylm.config import Experiment, get, is_local, override
from raylm.local_worker import is_alone
from raylm.perplexity import Score
from raylm.training import arguments, launch

if TYPE_CHECKING:
    from raylm.cluster import Resources
    from raylm.plan import Prepared
    from raylm.runs import ActiveRun

logger = logging.getLogger(__name__)

CHECKED_TOKENS = 16384
"""Validation tokens, of which the first documents are scored in both arithmetics."""

MOST_APART = 1e-3
"""By which fraction their perplexities may differ for eval.precision=auto to be that of the training."""

TRAINING, SCORES = "train.precision", "eval.precision"


def settled(prepared: Prepared, active: ActiveRun, resources: Resources) -> Prepared:
    """The same with the arithmetic of training and scores decided, which is saved for when the run resumes."""
    experiment = prepared.experiment
    if get(experiment, TRAINING) == "auto":
        chosen = active.kept(TRAINING) or _of_training(experiment, resources)
        experiment = active.settled(experiment, {TRAINING: chosen})
    if get(experiment, SCORES) == "auto":
        chosen = active.kept(SCORES) or _of_scores(dataclasses.replace(prepared, experiment=experiment), resources)
        experiment = active.settled(experiment, {SCORES: chosen})
    return dataclasses.replace(prepared, experiment=experiment)


def _of_training(experiment: Experiment, resources: Resources) -> str:
    """The precision for train.precision=auto, as a worker finds it: this machine need not have its devices."""
    on_gpu, section = bool(resources.gpus_per_worker), experiment.cluster
    if is_alone(section) or (is_local(section) and not on_gpu):
        return arguments.fastest(on_gpu)
    return cluster.on_a_worker(resources, arguments.fastest, on_gpu)


def _of_scores(prepared: Prepared, resources: Resources) -> str:
    """The precision for eval.precision=auto: that of the training if the model scores alike in it before its first
    step, else float32."""
    experiment, kind = prepared.experiment, prepared.experiment.train.precision
    if kind == "float32":
        return kind
    limit = min(CHECKED_TOKENS, experiment.eval.max_tokens or CHECKED_TOKENS)
    exact, other = (
        Score.of(
            launch.score_untrained(
                prepared.store, override(experiment, {SCORES: each, "eval.max_tokens": limit}), resources
            )
        ).perplexity
        for each in ("float32", kind)
    )
    apart = abs(other / exact - 1)
    chosen = kind if apart <= MOST_APART else "float32"
    logger.info(f"{SCORES}={chosen}: in {kind} the first documents score {apart:.1e} apart from float32")
    return chosen
