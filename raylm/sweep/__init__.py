"""A sweep: which settings are tried, which trials are promoted, and the record of both from which it resumes.

record      the events of a sweep, written to disk before anything is done about them
space       tune.space -> settings, drawn at random or by Optuna
asha        trials pause at rungs, and the best are promoted
schedule    the schedulers of tune.scheduler; their decisions are replayed from the record
queue       the next trial to run: one to resume, or a new one
trial       the training of one trial, in its own process
tuner       Ray Tune runs the trials, without output or files of its own

Importing tuner takes 5 s, because it imports the training; the other modules are quick.
"""

from raylm.sweep.queue import TrialQueue
from raylm.sweep.record import SweepRecord, Trial, read
from raylm.sweep.schedule import RecordedScheduler, SweepStopper, scheduler
from raylm.sweep.space import keys, searcher, shown

__all__ = [
    "RecordedScheduler",
    "SweepRecord",
    "SweepStopper",
    "Trial",
    "TrialQueue",
    "keys",
    "read",
    "scheduler",
    "searcher",
    "shown",
]
