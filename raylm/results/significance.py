"""Which trials of a sweep are as good as the best one, by the documents that all of them were scored on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm import document_scores, statistics
from raylm.document_scores import DocumentScores
from raylm.sweep.record import Place, evaluated_in

if TYPE_CHECKING:
    from raylm.sweep import Trial


@dataclass(frozen=True)
class Standing:
    """How sure the score of a trial is, and whether it is worse than that of the best trial."""

    low: float | None
    """The lower end of the 95 % interval of its best perplexity; None for fewer than six documents."""
    high: float | None
    as_good_as_best: bool | None
    """Whether the documents show no difference to the best trial; None if they are too few to tell."""
    p: float | None = None
    """p-value of the difference to the best trial, corrected for all pairs of trials; None for the best trial."""
    least_percent: float | None = None
    """The smallest difference in perplexity that these documents could have shown, in percent."""
    compared_at_tokens: int | None = None
    """Training tokens of the deepest evaluation that this trial and the best one both had."""
    bits_per_byte_low: float | None = None
    """The lower end of the 95 % interval of the bits per byte of the same evaluation."""
    bits_per_byte_high: float | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any], measure: str) -> Standing | None:
        """The standing of a trial in result.json; None if it has none."""
        if "as_good_as_best" not in record:
            return None
        names = {"low": f"{measure}_low", "high": f"{measure}_high"}
        return cls(**{name: record.get(names.get(name, name)) for name in cls.__dataclass_fields__})

    def record(self, measure: str) -> dict[str, Any]:
        fields = dict(vars(self))
        return {f"{measure}_low": fields.pop("low"), f"{measure}_high": fields.pop("high"), **fields}


def standings(directory: str, trials: Sequence[Trial]) -> dict[str, Standing]:
    """The standing of each trial whose document scores were kept, by its id.

    `trials`: those with a score, the best first. Two trials are compared at the deepest evaluation that both had, so
    that early stopping does not make a trial worse.
    """
    if not trials:
        return {}
    kept = {trial.trial_id: _Evaluations(directory, trial) for trial in trials}
    best, *others = kept.values()
    standings = {best.trial_id: Standing(**best.intervals(), as_good_as_best=True)}
    differences = _differences(best, others)
    for each in others:
        depth, difference = differences.get(each.trial_id, (None, None))
        if difference is None:
            standings[each.trial_id] = Standing(**each.intervals(), as_good_as_best=None)
        else:
            standings[each.trial_id] = Standing(
                **each.intervals(),
                as_good_as_best=not difference.is_real,
                p=difference.p,
                least_percent=100 * math.expm1(difference.least),
                compared_at_tokens=depth,
            )
    return standings


def _differences(
    best: _Evaluations, others: Sequence[_Evaluations]
) -> dict[str, tuple[int, statistics.Difference | None]]:
    """The depth at which each trial can be compared with the best one, and the difference there."""
    depths = {other.trial_id: depth for other in others if (depth := _deepest(best, other)) is not None}
    compared = {}
    for depth in set(depths.values()):
        own = best.at(depth)
        assert own is not None
        # Trials that went deeper, too: the correction covers all that could have been chosen.
        reached = {other.trial_id: scores for other in others if (scores := other.at(depth)) is not None}
        same = {name: scores for name, scores in reached.items() if scores.documents == own.documents}
        nll = np.stack([own.nll, *(scores.nll for scores in same.values())], axis=1)
        _, *differences = statistics.compare(nll, own.tokens)
        for name, difference in zip(same, differences, strict=True):
            if depths.get(name) == depth:
                compared[name] = depth, difference
    return compared


class _Evaluations:
    """The document scores of a trial's evaluations, read on demand."""

    def __init__(self, directory: str, trial: Trial):
        self.directory, self.trial_id = directory, trial.trial_id  # the directory is the sweep's
        evaluations = [*trial.results, *trial.cooldowns]  # at a rung the cooldown is what trials are compared by
        self.places = {result["tokens"]: evaluated_in(trial.trial_id, result) for result in evaluations}
        self.best_place = trial.best_place(trial.results[-1]) if trial.results else None
        self._read: dict[Place, DocumentScores | None] = {}

    def at(self, tokens: int) -> DocumentScores | None:
        """The scores after so many training tokens; None without an evaluation then, or if its scores were not kept."""
        return self._of(self.places[tokens]) if tokens in self.places else None

    def intervals(self) -> dict[str, Any]:
        """The ends of the 95 % intervals of the best evaluation, by the names of a Standing."""
        scores = self._of(self.best_place) if self.best_place is not None else None
        found = document_scores.intervals(scores, "perplexity")
        return {name.removeprefix("perplexity_"): end for name, end in found.items()}

    def _of(self, place: Place) -> DocumentScores | None:
        if place not in self._read:
            training, step = place
            self._read[place] = document_scores.read(f"{self.directory}/{training}", step)
        return self._read[place]


def _deepest(one: _Evaluations, other: _Evaluations) -> int | None:
    """The training tokens of the deepest evaluation at which both have scores of the same documents."""
    for tokens in sorted(one.places.keys() & other.places.keys(), reverse=True):
        mine, its = one.at(tokens), other.at(tokens)
        if mine is not None and its is not None and mine.documents == its.documents:
            return tokens
    return None


def sentence(
    standings: Mapping[str, Standing | None], documents: int, unit: str = "document", *, is_weighted: bool = False
) -> str | None:
    """The standings in a sentence; None if the scores of single documents are unknown.

    `standings`: by trial id, the best trial first; `documents`: how many were scored; `unit`: what people call one of
    them; `is_weighted`: tune.metric has weights.
    """
    if is_weighted and len(standings) > 1:
        return "whether the best trial is better than the others is not tested with weights in tune.metric"
    others = {name: standing for name, standing in list(standings.items())[1:] if standing is not None}
    judged = {name: standing for name, standing in others.items() if standing.as_good_as_best is not None}
    if others and documents < statistics.FEWEST_DOCUMENTS:
        return f"{documents} {unit}s are too few to tell whether the best trial is better than the others"
    if not judged:
        return None
    ties = {name: standing for name, standing in judged.items() if standing.as_good_as_best}
    test = f"on these {documents:,} {unit}s, paired at equal tokens"
    if not ties:
        return f"no other trial is as good as the best {test} (p < 0.05)"
    names = ", ".join(
        f"{name.removeprefix('trial_')} at {standing.compared_at_tokens:,} tokens"
        if standing.compared_at_tokens is not None
        else name.removeprefix("trial_")
        for name, standing in ties.items()
    )
    least = max(standing.least_percent or 0.0 for standing in ties.values())
    return f"as good as the best {test} (p >= 0.05): {names}; differences below {least:.2g} % could not be detected"
