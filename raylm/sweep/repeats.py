"""Repeats: the best few settings of a sweep are trained again with other seeds, once all its trials have ended.

    trial_00003  120   as good as the best by its documents, so both settings are repeated
    trial_00001  118
    trial_00008  123   repeats trial_00001 with the first seed
    trial_00009  121   repeats trial_00003 with the first seed
    trial_00010  119   repeats trial_00001 with the second seed ...

Documents tell which of two models is better. Which settings are better is another question: train them again, and
another seed gives another model. Repeats answer it. They are further trials of the sweep, each trained to the end of
its budget. The trials by which the settings were chosen do not count, because they were chosen for their scores, and
some of them were stopped early.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from ray.tune.schedulers import FIFOScheduler

from raylm.budget import Budget
from raylm.config import TrainConfig
from raylm.sweep.record import SweepRecord, Trial
from raylm.sweep.schedule import RecordedScheduler

FEWEST_SETTINGS, MOST_SETTINGS = 2, 3
"""Settings that are repeated."""


def expected(count: int, trials: int) -> tuple[int, int]:
    """The fewest and the most repeats of a sweep with so many trials, for tune.repeats=count."""
    return (0, 0) if count == 1 else (count * FEWEST_SETTINGS, count * min(MOST_SETTINGS, trials))


def choose(ranked: Sequence[Trial], as_good: Collection[str]) -> list[str]:
    """The trials whose settings are repeated: the best one and the best of those in `as_good`, at most three in all.

    If no trial is as good as the best, or that cannot be told, the second best as well. Settings that several trials
    have count once; none are repeated if there are no others to compare them with.
    """
    distinct: list[Trial] = []
    for trial in ranked:
        if all(trial.settings != other.settings for other in distinct):
            distinct.append(trial)
    if len(distinct) < FEWEST_SETTINGS:
        return []
    best, *others = [trial.trial_id for trial in distinct]
    ties = [trial_id for trial_id in others if trial_id in as_good]
    return [best, *(ties or others[: FEWEST_SETTINGS - 1])][:MOST_SETTINGS]


def seeds(section: TrainConfig, number: int) -> dict[str, int]:
    """The seeds of the repeats with this number, from 1: the same for all settings, which are compared seed by seed."""

    def drawn(seed: int) -> int:
        return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])

    given = {} if section.data_seed is None else {"train.data_seed": drawn(section.data_seed)}
    return {"train.seed": drawn(section.seed), **given}


def add(record: SweepRecord, section: TrainConfig, count: int) -> None:
    """Add the repeats that the record does not have yet, `count` of each repeated trial, seed by seed."""
    known = [(trial.repeat_of, trial.seeds) for trial in record.trials.values()]
    lost = record.lost()
    for number in range(1, count + 1):
        for trial_id in record.repeated or []:
            if (trial_id, seeds(section, number)) not in known:
                record.add_repeat(record.free_id(lost), trial_id, seeds(section, number))


class NoSearcher:
    """A searcher that draws nothing, because the repeats are all in the record.

    The searcher of the sweep is not told the scores of repeats.
    """

    total = 0

    def draw(self, trial_id: str) -> dict[str, Any]:
        raise AssertionError(f"{trial_id}: all repeats are in the record")

    def add(self, trial_id: str, settings: Mapping[str, Any]) -> None:
        pass

    def tell(self, trial_id: str, values: Sequence[float] | None) -> None:
        pass


def scheduler(record: SweepRecord, budget: Budget, stopping: Callable[[], bool]) -> RecordedScheduler:
    """The scheduler of repeats, which stops none of them."""
    return RecordedScheduler(FIFOScheduler(), record, budget, stopping)
