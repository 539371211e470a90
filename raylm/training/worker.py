"""One worker's training or scoring, from start to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raylm import checkpoint, model, objective, perplexity, probe, scratch, storage, timeline, tokens
from raylm.config import Experiment
from raylm.training.session import CollectiveError, Outcome, RayTrainSession, ScoreTask, Session, TrainTask


def train_loop_per_worker(task: TrainTask) -> Outcome:
    """Train one model to the end of its budget, from its newest checkpoint if it has one."""
    from raylm.training import cooldown, trainer  # 4 s, which a process that only starts workers does not need

    session = (task.session or RayTrainSession)()
    timeline.start(f"worker {session.rank}")
    cpus = task.experiment.cluster.cpus_per_worker
    assert cpus != "auto", "it is decided when a run starts (runs.ActiveRun.settled)"
    model.set_up_torch(cpus)
    # One directory a rank: ranks on a node must not share files.
    with scratch.directory(f"rank{session.rank}") as directory:

        def train_to_end(task: TrainTask, session: Session) -> Outcome:
            with timeline.phase("build the Trainer"):
                built = trainer.build(task, session, Path(directory))
            with timeline.phase("train"):
                return built.run()

        try:
            return cooldown.train(task, session, train_to_end)
        except CollectiveError as agreed:
            return Outcome({}, 0, error=agreed.args[0])
        finally:
            if session.rank == 0:
                task.run.flush()  # Ray kills the process, and lines for a remote storage wait some seconds


def score_loop_per_worker(task: ScoreTask) -> np.ndarray:
    """The result of perplexity.score_documents for a saved model, with the documents sharded over the workers."""
    session, trained = task.session(), load_to_score(task)
    prefix = task.tokenizer.prefix
    masked = trained.masked(prefix, task.section.pseudo_perplexity)
    return perplexity.score_documents(
        trained.model,
        task.documents,
        frame=trained.frame(prefix),
        context=perplexity.context_of(task.section, model.context(trained.model.config), trained.context),
        stride=task.section.stride,
        batch_tokens=task.section.batch_tokens,
        max_tokens=task.max_tokens,
        precision=task.section.precision,
        masked=masked,
        keywords=objective.Keywords(task.keywords, trained.tokenizer),
        positions=task.positions,
        rank=session.rank,
        world_size=session.world_size,
        progress=task.progress,
    )


def load_to_score(task: ScoreTask) -> checkpoint.TrainedModel:
    """The model of a task on this worker's device, after a check that it can be scored."""
    model.set_up_torch(task.cpus)
    if task.untrained is not None:
        trained = _untrained(*task.untrained)
    else:
        with storage.here(task.model, but_for=checkpoint.OF_TRAINING) as directory:
            trained = checkpoint.load(directory, task.loaded, task.tokenizer, masked=task.masked)
    network = trained.model.to(model.device(task.use_gpu))
    probe.check_scoring(
        network,
        trained.tokenizer,
        trained.frame(task.tokenizer.prefix),
        named=task.model,
        context=trained.context,
        masked=trained.masked(task.tokenizer.prefix, task.section.pseudo_perplexity) is not None,
    )
    return trained


def _untrained(experiment: Experiment, store: str) -> checkpoint.TrainedModel:
    """The model of an experiment before its first step."""
    tokenizer, masked = tokens.open_store(store).tokenizer, experiment.objective.is_masked
    network = model.build(
        experiment.model,
        tokenizer,
        block_size=experiment.blocks.block_size,
        seed=experiment.train.seed,
        masked=masked,
    )
    return checkpoint.TrainedModel(network.float(), tokenizer, experiment, {}, fills_in=masked)
