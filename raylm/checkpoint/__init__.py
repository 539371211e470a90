"""Trained models on disk.

directory    one model: what lies in its directory, and how it is loaded
series       the checkpoints of a run: written whole or not at all, verified, the older ones removed
"""

from raylm.checkpoint.directory import (
    OF_TRAINING,
    Trained,
    check,
    describe,
    experiment_file,
    load,
    read_experiment,
    read_record,
)
from raylm.checkpoint.series import MANIFEST, Series

__all__ = [
    "MANIFEST",
    "OF_TRAINING",
    "Series",
    "Trained",
    "check",
    "describe",
    "experiment_file",
    "load",
    "read_experiment",
    "read_record",
]
