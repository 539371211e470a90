"""A sweep: which settings are tried, which trials are promoted, and the record of both from which it resumes.

record         the events of a sweep, written to disk before anything is done about them
start          what a sweep starts from, decided once: settings to try first, earlier trials
space          tune.space -> settings, drawn at random
prior          settings drawn around a guess and around the best trial so far
optuna_search  settings drawn by Optuna
ladder         tune.ladder -> sizes of models and lengths of trainings, as an entry of the space
suggested      tune.points=suggested: values of published formulas
search         tune.searcher -> one of these three
asha           trials pause at rungs, and the best are promoted
schedule       the schedulers of tune.scheduler; their decisions are replayed from the record
queue          the next trial to run: one to resume, or a new one
requests       what other commands ask of a running sweep
repeats        the best few settings, trained again with other seeds
trial          the training of one trial, in its own process
tuner          Ray Tune runs the trials, without output or files of its own

The record is quick to import. The names of the other modules are imported when they are first used: Ray Tune takes
2.5 s, which commands that only read a sweep do not spend. Importing tuner takes 5 s, because it imports the training.
"""

import importlib
from typing import TYPE_CHECKING, Any

from raylm.sweep import start
from raylm.sweep.record import SweepRecord, Trial, read

if TYPE_CHECKING:
    from raylm.sweep import ladder, repeats, suggested
    from raylm.sweep.queue import TrialQueue
    from raylm.sweep.schedule import RecordedScheduler, SweepStopper, scheduler
    from raylm.sweep.search import searcher
    from raylm.sweep.space import keys, shown

__all__ = [
    "RecordedScheduler",
    "SweepRecord",
    "SweepStopper",
    "Trial",
    "TrialQueue",
    "keys",
    "ladder",
    "read",
    "repeats",
    "scheduler",
    "searcher",
    "shown",
    "start",
    "suggested",
]

_LATER = {
    "TrialQueue": "queue",
    "repeats": "repeats",
    "ladder": "ladder",
    "suggested": "suggested",
    "RecordedScheduler": "schedule",
    "SweepStopper": "schedule",
    "scheduler": "schedule",
    "keys": "space",
    "searcher": "search",
    "shown": "space",
}
"""The module of each name that is imported when it is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module = importlib.import_module(f"{__name__}.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)
