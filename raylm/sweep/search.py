"""tune.searcher -> the searcher of a sweep."""

from __future__ import annotations

from raylm.config import TuneConfig
from raylm.sweep.optuna_search import OptunaSearch
from raylm.sweep.prior import PriorSearch
from raylm.sweep.space import RandomSearch, Searcher


def searcher(section: TuneConfig, seed: int) -> Searcher:
    """The searcher of tune.searcher and tune.prior."""
    if section.searcher.kind == "optuna":
        return OptunaSearch(section, seed)
    return PriorSearch(section, seed) if section.prior else RandomSearch(section, seed)
