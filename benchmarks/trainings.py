"""What the benchmarks of scores share: trainings of the built-in text in this process, without Ray."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

SETTINGS = ("tracking.uri=null", "cluster.cpus_per_worker=1")


def prepare(place: str, *settings: str) -> None:
    """Prepare the tokens of the built-in text in a storage."""
    subprocess.run([sys.executable, "-m", "raylm", "prepare", f"storage={place}", *SETTINGS, *settings], check=True)


def scores(
    place: str, settings: Iterable[str], changes: Mapping[str, Any], cooldowns: Mapping[int, int]
) -> dict[tuple[int, bool], float]:
    """(tokens, whether it is a cooldown's) -> perplexity of the evaluations of a training with one thread.

    `settings` are as typed, `changes` on top by their dotted keys.
    """
    from raylm import budget, config, plan, tracking, training

    experiment = config.override(
        config.load(None, [f"storage={place}", *SETTINGS, *settings]), {**changes, "tune.space": {}}
    )
    prepared = plan.resolve(experiment).prepared
    assert prepared is not None, "its tokens are ready"
    _Collecting.reports = {}
    with tempfile.TemporaryDirectory() as directory:
        outcome = training.train_loop_per_worker(
            training.TrainTask(
                experiment,
                prepared.store.path,
                budget.for_store(experiment, prepared.store),
                tracking.Run(),
                directory,
                session=_Collecting,
                cooldowns=cooldowns,
            )
        )
    if outcome.error is not None:
        raise outcome.error
    return dict(sorted(_Collecting.reports.items()))


class _Collecting:
    """A session that keeps the score of each report."""

    rank, world_size = 0, 1
    reports: ClassVar[dict[tuple[int, bool], float]] = {}

    def report(self, metrics: dict[str, Any]) -> None:
        self.reports[metrics["tokens"], "cooldown_step" in metrics] = metrics["perplexity"]

    def lost_nodes(self) -> list[str]:
        return []


def in_two_processes(function: Any, jobs: list[tuple[Any, ...]]) -> Iterator[Any]:
    """The result of each job, in order; two run at a time."""
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, *zip(*jobs, strict=True))
