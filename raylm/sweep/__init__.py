"""A sweep: which settings are tried, who goes on, and what has happened, so that it can go on where it stopped.

record      what has happened, on disk first
space       tune.space -> settings, drawn or searched for
schedule    which trials go on: schedulers over tokens, brought back to where they stood
queue       hands Tune the trials that are not over, then new ones
trial       what one trial does, in a process of its own
"""

from raylm.sweep.queue import Trials, keep_credentials
from raylm.sweep.record import NotSaved, Record, Trial, read
from raylm.sweep.schedule import Limits, Recorded, scheduler
from raylm.sweep.space import keys, points, shown
from raylm.sweep.trial import release, run_trial, trial_resources

__all__ = [
    "Limits",
    "NotSaved",
    "Record",
    "Recorded",
    "Trial",
    "Trials",
    "keep_credentials",
    "keys",
    "points",
    "read",
    "release",
    "run_trial",
    "scheduler",
    "shown",
    "trial_resources",
]
