"""tune.searcher -> the searcher of a sweep."""

from __future__ import annotations

from raylm.config import TuneConfig
from raylm.sweep.optuna_search import OptunaSearch
from raylm.sweep.prior import PriorSearch
from raylm.sweep.space import RandomSearch, Searcher
from raylm.sweep.start import Start


def searcher(section: TuneConfig, seed: int, start: Start | None = None) -> Searcher:
    """The searcher of tune.searcher and tune.prior. Without `start` it starts from the settings of tune.points."""
    if start is None:
        assert section.points != "suggested", "what is suggested depends on more than the section"
        start = Start(section.points)
    if section.searcher.kind == "optuna":
        return OptunaSearch(section, seed, start)
    return PriorSearch(section, seed, start) if section.prior else RandomSearch(section, seed, start)
