"""A sweep: which settings are tried, who goes on, and what has happened, so that it can go on where it stopped.

record      what has happened, on disk first
space       tune.space -> settings, drawn or searched for
asha        trials wait at rungs, and the best go on
schedule    which trials go on: schedulers over tokens, brought back to where they stood
queue       hands Tune the trials that are not over, then new ones
trial       what one trial does, in a process of its own
tuner       Ray Tune runs the trials, and neither prints nor keeps anything of its own

Who imports tuner imports what trials train with, 5 s; the rest is quick.
"""

from raylm.sweep.queue import TrialQueue
from raylm.sweep.record import SweepRecord, Trial, Unsaved, read
from raylm.sweep.schedule import RecordedScheduler, SweepStopper, scheduler
from raylm.sweep.space import keys, searcher, shown

__all__ = [
    "RecordedScheduler",
    "SweepRecord",
    "SweepStopper",
    "Trial",
    "TrialQueue",
    "Unsaved",
    "keys",
    "read",
    "scheduler",
    "searcher",
    "shown",
]
