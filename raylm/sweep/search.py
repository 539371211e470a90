"""tune.searcher -> the searcher of a sweep."""

from __future__ import annotations

from raylm.config import TuneConfig
from raylm.sweep.optuna_search import OptunaSearch
from raylm.sweep.space import RandomSearch, Searcher


def searcher(section: TuneConfig, seed: int) -> Searcher:
    """The searcher of tune.searcher."""
    return OptunaSearch(section, seed) if section.searcher.kind == "optuna" else RandomSearch(section, seed)
