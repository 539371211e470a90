"""What every worker executes: the Hugging Face Trainer over the token store, scored by raylm's own perplexity.

arguments    train.* -> TrainingArguments, and train.arguments checked against that class
session      what a worker is given to do, and where it stands among the others
sharding     the Trainer, whose weights may be shared out among the workers
guards       what ends a training before it spoils its weights
saves        a checkpoint as the ranks make it together: uploaded by each, committed by the first
trainer      the Trainer of sharding, with raylm's evaluation, checkpoints and order of examples in place of its own
worker       one worker's training or scoring, from beginning to end
"""

from raylm.loop.arguments import check
from raylm.loop.session import Alone, Job, Outcome, Scoring, Session, WorkerGroup
from raylm.loop.worker import score_loop_per_worker, train_loop_per_worker

__all__ = [
    "Alone",
    "Job",
    "Outcome",
    "Scoring",
    "Session",
    "WorkerGroup",
    "check",
    "score_loop_per_worker",
    "train_loop_per_worker",
]
