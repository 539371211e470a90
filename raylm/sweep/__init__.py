"""A sweep: which settings are tried, which trials are promoted, and a record of both from which it resumes.

record      the events of a sweep, on disk first
space       tune.space -> settings, drawn at random or by Optuna
asha        trials pause at rungs, and the best are promoted
schedule    the schedulers of tune.scheduler; their decisions are replayed from the record
queue       the next trial to run: one to resume, or a new one, as long as there is room
trial       the training of one trial, in a process of its own
tuner       Ray Tune runs the trials, and neither prints nor keeps anything of its own

tuner imports what trials train with, which takes 5 s; the others are quick.
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
