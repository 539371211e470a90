"""Training and scoring on workers of Ray Train, in a process of its own, or in this process.

A training restarts from its last checkpoint: with smaller micro-batches if memory ran out, on the remaining nodes if
one is taken away, and as it was if a worker died. Failures are counted here alone: Ray Train (2.60) takes a death
during the start of a worker group for a failure of its controller, which ends the run, or does not count it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from raylm import cluster, training
from raylm.cluster import Resources
from raylm.config import Experiment, ModelConfig, TokenizerConfig, is_local
from raylm.errors import OutOfMemory, WorkerFailed
from raylm.local_worker import is_alone, local_worker
from raylm.perplexity import Documents
from raylm.tokens import Store
from raylm.training import Outcome, ScoreTask, TrainTask
from raylm.training.worker_errors import UncountedFailure

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def fit(task: TrainTask, resources: Resources, callbacks: Sequence[Any] = ()) -> Outcome:
    """Train until the end of the budget or a stop."""

    def attempt() -> Outcome:
        if is_alone(task.experiment.cluster) and not callbacks:
            return with_smaller_batches(task, lambda: _in_process(task))
        while True:
            outcome = with_smaller_batches(task, lambda: _in_group(task, resources, callbacks))
            if not outcome.lost_nodes or stopped() is not None:
                return outcome
            # A command ends if too few resources are left, and the same command resumes. A trial, which nobody
            # restarts, waits for other nodes.
            if not callbacks and not resources.without(outcome.lost_nodes).most_runs:
                return outcome
            task.say(f"a node is being taken away; resuming without it from step {outcome.step:,}")

    def stopped() -> Outcome | None:
        """The outcome if the training was asked to stop and has a checkpoint: no worker has to start for it."""
        if task.channel is None or not task.channel.is_stopping():
            return None
        step, _ = task.checkpoints.newest()
        return Outcome({}, step, stopped=True) if step is not None else None

    return _with_retries(attempt, task.experiment.cluster.max_failures, task.say, task.directory, stopped)


def _with_retries(
    attempt: Callable[[], Result],
    max_failures: int,
    say: Callable[[str], None],
    where: str,
    stopped: Callable[[], Result | None] = lambda: None,
) -> Result:
    """The result of an attempt that is repeated if a worker fails, at most `max_failures` times.

    After a failure the result of `stopped`, if it has one, replaces another attempt.
    """
    failures = 0
    while True:
        try:
            return attempt()
        except (WorkerFailed, UncountedFailure) as error:
            failures += isinstance(error, WorkerFailed)
            if (outcome := stopped()) is not None:
                return outcome
            if failures > max_failures:
                tried = f"tried {failures} times" if max_failures else "tried once"
                message = f"{error} ({tried}: cluster.max_failures={max_failures})"
                raise WorkerFailed(message, getattr(error, "where", None) or where) from error
            attempts = f", attempt {failures + 1} of at most {max_failures + 1}" if failures else ""
            say(f"{error}; starting again{attempts}")


def fit_in_this_process(task: TrainTask) -> Outcome:
    """Train in this process: a trial whose only worker is its own process."""
    return with_smaller_batches(task, lambda: _in_local_mode(task))


def _in_local_mode(task: TrainTask) -> Outcome:
    """Train in Ray Train's local mode."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    train = functools.partial(training.train_loop_per_worker, task)
    return TorchTrainer(train, scaling_config=ScalingConfig(num_workers=0)).fit().return_value


def _in_process(task: TrainTask) -> Outcome:
    """Train in another process of this machine."""
    with local_worker() as process:
        alone = dataclasses.replace(task, session=task.session or training.SingleProcess)
        return process.call(training.train_loop_per_worker, alone)


def with_smaller_batches(task: TrainTask, train: Callable[[], Outcome]) -> Outcome:
    """The outcome of a training, restarted with smaller micro-batches each time memory runs out."""
    while True:
        try:
            outcome = train()
            if outcome.error is None:
                return outcome
            raise outcome.error
        except OutOfMemory as error:
            if error.where != "train.micro_batch_tokens":  # they cannot be smaller
                raise
            task.say(error.message)


def _in_group(task: TrainTask, resources: Resources, callbacks: Sequence[Any]) -> Outcome:
    from raylm.training import worker_group  # imports Ray: 0.5 s, which the only worker of this machine does without

    train = functools.partial(training.train_loop_per_worker, task)
    return worker_group.run(train, task.experiment, resources, task.directory, callbacks)


def score(
    directory: str,
    documents: Documents,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None = None,
    *,
    as_given: bool = False,
    max_tokens: int | None = None,
    positions: tuple[int, ...] = (),
) -> np.ndarray:
    """perplexity.score_documents of a saved model: in this process if there are no `resources`, else on Ray's workers.

    The model is loaded with the experiment's sections model and tokenizer if `as_given`, else as a trained model: a
    plain directory with its own tokenizer. Only the first documents up to `max_tokens` tokens are scored.
    """
    task = score_task(
        directory, documents, experiment, resources, as_given=as_given, max_tokens=max_tokens, positions=positions
    )
    return on_workers(training.score_loop_per_worker, task, experiment, resources, progress)


def score_task(
    directory: str,
    documents: Documents,
    experiment: Experiment,
    resources: Resources | None,
    *,
    as_given: bool,
    max_tokens: int | None = None,
    positions: tuple[int, ...] = (),
) -> ScoreTask:
    """What a worker needs to score a saved model; the arguments are those of `score`."""
    section, tokenizer = experiment.model, experiment.tokenizer
    if not as_given:
        section = ModelConfig(trust_remote_code=section.trust_remote_code)
        tokenizer = TokenizerConfig(prefix=tokenizer.prefix)
    return training.ScoreTask(
        directory,
        documents,
        experiment.eval,
        cpus=resources.cpus_per_worker if resources is not None else cluster.cpus_here(),
        use_gpu=experiment.cluster.use_gpu,
        keywords=experiment.objective.keywords,
        positions=positions,
        loaded=section,
        tokenizer=tokenizer,
        masked=experiment.objective.is_masked,
        max_tokens=max_tokens,
    )


def score_untrained(
    store: Store,
    experiment: Experiment,
    resources: Resources,
    progress: Callable[[float, float | None], None] | None = None,
) -> np.ndarray:
    """perplexity.score_documents of an experiment's model before its first step, as an evaluation scores it."""
    task = training.ScoreTask(
        "",
        store.validation,
        experiment.eval,
        cpus=resources.cpus_per_worker,
        use_gpu=experiment.cluster.use_gpu,
        keywords=experiment.objective.keywords,
        loaded=experiment.model,
        tokenizer=TokenizerConfig(prefix=experiment.tokenizer.prefix),
        max_tokens=experiment.eval.max_tokens,
        untrained=(experiment, store.path),
    )
    return on_workers(training.score_loop_per_worker, task, experiment, resources, progress)


def on_workers(
    loop: Callable[[ScoreTask], Result],
    task: ScoreTask,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None = None,
) -> Result:
    """The result of a worker's loop on rank 0, in this process where there is no need for others."""
    if resources is None or (resources.num_workers == 1 and is_local(experiment.cluster)):
        alone = dataclasses.replace(task, cpus=cluster.cpus_here(), session=training.SingleProcess, progress=progress)
        return loop(alone)
    from raylm.training import worker_group

    return _with_retries(
        lambda: worker_group.run(functools.partial(loop, task), experiment, resources, task.model),
        experiment.cluster.max_failures,
        logger.info,
        task.model,
    )
