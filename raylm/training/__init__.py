"""What every worker executes: the Hugging Face Trainer over the token store, scored by raylm's own perplexity.

arguments           train.* -> TrainingArguments; train.arguments checked against that class
callbacks           train.callbacks: the user's own TrainerCallbacks, by their dotted names
session             what a worker is given to do; its rank, and how it reports
sharding            the Trainer with DDP, FSDP or DeepSpeed; which of them allow what
muon                Muon for the matrices of the layers, AdamW for the rest
coordinates         a check how the sizes of activations depend on the width in the first steps
guards              what ends a training before it spoils its weights: no memory, gradients that are not finite
cooldown            at rungs: a branch with a decayed learning rate, by whose score trials are compared
sampling            texts of fixed prompts at each evaluation
peak_flops          the most operations a second of a worker's device: known of GPUs, measured on CPUs
costs               what a training costs: seconds of evaluations and saving, memory; how well steps use the devices
checkpoint_writer   one checkpoint, uploaded by all ranks and committed by the first; older ones removed
trainer             the Trainer of a worker: evaluations, training metrics, checkpoints, the order of examples
worker              one worker's training or scoring: threads, devices, errors
worker_errors       Ray Train's errors as raylm's: which failures may pass, and which would recur
worker_group        a worker group of Ray Train, of which nothing is left if it fails
launch              where workers run: one process here, a worker group of Ray, a trial; restarts after failures,
                    with smaller micro-batches if memory ran out
"""

from raylm.training.arguments import check_settings
from raylm.training.session import Outcome, RayTrainSession, ScoreTask, Session, SingleProcess, TrainTask
from raylm.training.worker import load_to_score, score_loop_per_worker, train_loop_per_worker

__all__ = [
    "Outcome",
    "RayTrainSession",
    "ScoreTask",
    "Session",
    "SingleProcess",
    "TrainTask",
    "check_settings",
    "load_to_score",
    "score_loop_per_worker",
    "train_loop_per_worker",
]
