"""A sweep: which settings are tried, who goes on, and what has happened, so that it can go on where it stopped.

record      what has happened, on disk first
space       tune.space -> settings, drawn or searched for
schedule    which trials go on: schedulers over tokens, brought back to where they stood
trials      hands Tune the trials that are not over, then new ones
"""

from raylm.sweep.record import NotSaved, Record, Trial, read
from raylm.sweep.schedule import Limits, Recorded, scheduler
from raylm.sweep.space import keys, points, shown
from raylm.sweep.trials import Trials, keep_credentials

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
    "scheduler",
    "shown",
]
