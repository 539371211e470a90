"""Trained models on disk.

directory    one model: the files in its directory, and how it is loaded
manager      the checkpoints of a run: committed entirely or not at all, verified before use, older ones removed
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
from raylm.checkpoint.manager import CheckpointManager, cooldown_directory

__all__ = [
    "OF_TRAINING",
    "CheckpointManager",
    "TrainedModel",
    "cooldown_directory",
    "describe",
    "experiment_file",
    "load",
    "locate",
    "read_experiment",
    "read_record",
]
