"""Trained models on disk.

directory    one model: what lies in its directory, and how it is loaded
manager      the checkpoints of a run: committed whole or not at all, verified, and which of them are kept
"""

from raylm.checkpoint.directory import (
    OF_TRAINING,
    TrainedModel,
    describe,
    experiment_file,
    load,
    locate,
    read_experiment,
    read_record,
)
from raylm.checkpoint.manager import CheckpointManager

__all__ = [
    "OF_TRAINING",
    "CheckpointManager",
    "TrainedModel",
    "describe",
    "experiment_file",
    "load",
    "locate",
    "read_experiment",
    "read_record",
]
