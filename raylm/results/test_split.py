"""The score of the best model on the test split, beside the one on the validation split, by which it was chosen.

    <run>/scores/test_step_N.json    the score of the run's model after step N
    <run>/scores/test_step_N.npz     the score of each of the documents, as document_scores keeps it

The best of several trials and checkpoints is partly the best because the validation documents suit it, so its score on
them is too good: the winner's curse. Nothing is chosen by the test documents.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raylm import document_scores, statistics, storage
from raylm.config import CorpusConfig
from raylm.console import counted, decimals_of_interval, format_estimate, label
from raylm.document_scores import DocumentScores
from raylm.perplexity import Score

if TYPE_CHECKING:
    from raylm.tokens import Split

SPLIT = "test"

LARGEST = 700
"""Nats of which the exponential is a float."""


class SplitScore(NamedTuple):
    """The score of a model on a split."""

    perplexity: float
    bits_per_byte: float
    scored_on: str
    """The scored part of the split, in words."""
    documents: DocumentScores | None
    """The scores of single documents; None if they were not kept."""

    @classmethod
    def of(cls, rows: np.ndarray, split: Split, scored_on: str) -> SplitScore:
        """From the rows of `perplexity.score_documents`."""
        score = Score.of(rows)
        return cls(score.perplexity, score.bits_per_byte, scored_on, DocumentScores.of(rows, split))


@dataclass(frozen=True)
class TestScore:
    """The score of the best model on the test split."""

    measure: str
    """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
    perplexity: float
    perplexity_low: float | None
    """The ends of the 95 % interval; None for fewer than six documents, or if their scores were not kept."""
    perplexity_high: float | None
    bits_per_byte: float
    documents: int
    tokens: int
    scored_on: str
    """The scored part of the test split, in words."""
    validation_perplexity: float
    """The score of the same model on the validation split."""
    validation_perplexity_low: float | None
    validation_perplexity_high: float | None
    validation_scored_on: str
    """The scored part of the validation split, in words."""
    difference_percent: float
    """How much higher perplexity is on the test split."""
    difference_percent_low: float | None
    """The lower end of the 95 % interval of that difference."""
    difference_percent_high: float | None
    unit: str
    """What people call a document: document or passage."""
    same_text: bool
    """Whether both splits were drawn from corpus.paths by hash, so that they are the same kind of text."""

    @classmethod
    def of(
        cls, test: SplitScore, validation: SplitScore, *, measure: str, num_tokens: int, corpus: CorpusConfig
    ) -> TestScore:
        """From the scores of a model on both splits; `num_tokens`: of the scored documents of the test split."""
        low = high = None
        if test.documents is not None and validation.documents is not None:
            texts = ((each.nll, each.tokens) for each in (validation.documents, test.documents))
            ends = statistics.other_documents(*itertools.chain(*texts))
            low, high = (100 * math.expm1(end) if abs(end) < LARGEST else None for end in ends)
        own, others = (document_scores.intervals(each.documents, "perplexity") for each in (test, validation))
        return cls(
            measure=measure,
            perplexity=test.perplexity,
            perplexity_low=own["perplexity_low"],
            perplexity_high=own["perplexity_high"],
            bits_per_byte=test.bits_per_byte,
            documents=len(test.documents or ()),
            tokens=num_tokens,
            scored_on=test.scored_on,
            validation_perplexity=validation.perplexity,
            validation_perplexity_low=others["perplexity_low"],
            validation_perplexity_high=others["perplexity_high"],
            validation_scored_on=validation.scored_on,
            difference_percent=100 * (test.perplexity / validation.perplexity - 1),
            difference_percent_low=low,
            difference_percent_high=high,
            unit="passage" if corpus.split_by == "passage" and not corpus.test_paths else "document",
            same_text=not corpus.test_paths and not corpus.validation_paths,
        )

    def record(self) -> dict[str, Any]:
        """The score for --json; the key of a score is its name."""
        left_out = ("measure", "unit", "same_text")
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}
        named = {name.replace("perplexity", self.measure): value for name, value in fields.items()}
        return {**named, "sentence": self.sentence}

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of a run in MLflow."""
        values = {
            f"test/{self.measure}": self.perplexity,
            f"test/{self.measure}_low": self.perplexity_low,
            f"test/{self.measure}_high": self.perplexity_high,
            "test/bits_per_byte": self.bits_per_byte,
        }
        return {name: value for name, value in values.items() if value is not None}

    @property
    def sentence(self) -> str:
        """Both scores, and whether the one on the validation split is too good."""
        size = f"{counted(self.documents, self.unit)}, {self.tokens:,} tokens"
        own = format_estimate(self.perplexity, self.perplexity_low, self.perplexity_high)
        low, high = self.validation_perplexity_low, self.validation_perplexity_high
        other = format_estimate(self.validation_perplexity, low, high)
        return (
            f"{label(self.measure)} {own} on {self.scored_on}, by which nothing was chosen ({size}), and {other} on "
            f"{self.validation_scored_on}: {self._comparison}"
        )

    @property
    def _comparison(self) -> str:
        low, high = self.difference_percent_low, self.difference_percent_high
        if self.documents < statistics.FEWEST_DOCUMENTS:
            return f"too few {self.unit}s to tell whether the latter is too good"
        if low is None or high is None:
            return "whether the latter is too good is unknown, because the scores of single documents were not kept"
        direction = "higher" if self.difference_percent > 0 else "lower"
        digits = max(0, decimals_of_interval(low, high)) if low < high else 2
        interval = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f} %"
        difference = f"{abs(self.difference_percent):.{digits}f} % {direction} ({interval})"
        if low <= 0 <= high:
            return f"{difference}, no more than other {self.unit}s alone would give"
        more = f"{difference}, more than other {self.unit}s alone would give"
        if not self.same_text:
            return f"{more}; they are different texts, of which one may be harder"
        if low > 0:
            return f"{more}: the latter is too good, because the model was chosen by it"
        return f"{more}: the latter is not too good, and its {self.unit}s are harder"


def read(directory: str, step: int) -> TestScore | None:
    """The score of a run's model after a step; None if it has not been scored."""
    content = storage.read(_path(directory, step))
    return TestScore(**json.loads(content)) if content else None


def write(directory: str, step: int, score: TestScore, documents: DocumentScores | None) -> None:
    """Keep a score, after those of its documents."""
    if documents is not None:
        document_scores.write(directory, step, documents, SPLIT)
    storage.write(_path(directory, step), (json.dumps(dataclasses.asdict(score), indent=1) + "\n").encode())


def _path(directory: str, step: int) -> str:
    return f"{directory}/scores/{SPLIT}_step_{step}.json"
