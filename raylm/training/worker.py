"""One worker's training or scoring, from beginning to end."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from raylm import checkpoint, model, objective, perplexity, probe, storage
from raylm.training.session import CollectiveError, Outcome, ScoreTask, TrainTask


def train_loop_per_worker(job: TrainTask) -> Outcome:
    """Train one model to the end of its budget, from its newest checkpoint if it has one."""
    from raylm.training import trainer  # 4 s, which whoever only hands out jobs does not need

    session = job.session()
    cpus = job.experiment.cluster.cpus_per_worker
    assert cpus != "auto", "it is decided when a run starts (Begun.settled)"
    model.set_up_torch(cpus)
    # One directory a rank: ranks on a node must not share files.
    scratch = tempfile.mkdtemp(prefix=f"raylm-rank{session.rank}-")
    try:
        return trainer.build(job, session, Path(scratch)).run()
    except CollectiveError as agreed:
        return Outcome({}, 0, error=agreed.args[0])
    finally:
        if session.rank == 0:
            job.run.flush()  # Ray kills the process, and lines for a remote storage wait some seconds
        shutil.rmtree(scratch, ignore_errors=True)


def score_loop_per_worker(job: ScoreTask) -> np.ndarray:
    """What perplexity.score_documents tells of a saved model, the documents shared out among the workers."""
    session = job.session()
    model.set_up_torch(job.cpus)
    with storage.here(job.model, but_for=checkpoint.OF_TRAINING) as directory:
        trained = checkpoint.load(directory, job.loaded, job.tokenizer, masked=job.masked)
    network, prefix = trained.model.to(model.device(job.use_gpu)), job.tokenizer.prefix
    frame, masked = trained.frame(prefix), trained.masked(prefix, job.section.pseudo_perplexity)
    probe.check_scoring(
        network, trained.tokenizer, frame, named=job.model, context=trained.context, masked=masked is not None
    )
    return perplexity.score_documents(
        network,
        job.documents,
        frame=frame,
        context=perplexity.context_of(job.section, model.context(trained.model.config), trained.context),
        stride=job.section.stride,
        batch_tokens=job.section.batch_tokens,
        precision=job.section.precision,
        masked=masked,
        keywords=objective.Keywords(job.keywords, trained.tokenizer),
        rank=session.rank,
        world_size=session.world_size,
        progress=job.progress,
    )
