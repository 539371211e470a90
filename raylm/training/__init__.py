"""What every worker executes: the Hugging Face Trainer over the token store, scored by raylm's own perplexity.

arguments    train.* -> TrainingArguments, and train.arguments checked against that class
session      what a worker is given to do, and where it stands among the others
sharding     the Trainer, whose weights may be shared out among the workers
guards       what ends a training before it spoils its weights
saves        a checkpoint as the ranks make it together: uploaded by each, committed by the first
trainer      the Trainer of sharding, with raylm's evaluation, checkpoints and order of examples in place of its own
worker       one worker's training or scoring, from beginning to end
"""

from raylm.training.arguments import check_settings
from raylm.training.session import Outcome, RayTrainSession, ScoreTask, Session, SingleProcess, TrainTask
from raylm.training.worker import score_loop_per_worker, train_loop_per_worker

__all__ = [
    "Outcome",
    "RayTrainSession",
    "ScoreTask",
    "Session",
    "SingleProcess",
    "TrainTask",
    "check_settings",
    "score_loop_per_worker",
    "train_loop_per_worker",
]
