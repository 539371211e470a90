"""Which of several models is better, and whether the difference is real: paired by the documents all were scored on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylm import document_scores, statistics
from raylm.console import counted, format_estimate, format_p
from raylm.document_scores import DocumentScores


@dataclass(frozen=True)
class Scored:
    """A model, and the score of each document that it was scored on."""

    name: str
    scores: DocumentScores | None
    """None if they were not kept."""
    measure: str
    """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
    scored_in: str
    """The arithmetic, such as float32."""
    knows_all: bool = True
    """Whether its tokenizer can spell all of the text."""
    unit: str = "document"
    """What is scored by itself: a document, or a passage of one."""


@dataclass(frozen=True)
class Estimate:
    """A difference with its 95 % interval; above zero if the model is worse than the best one."""

    value: float
    low: float
    high: float
    least: float
    """The smallest difference that these documents could have shown."""

    def __str__(self) -> str:
        return format_estimate(self.value, self.low, self.high)


@dataclass(frozen=True)
class Difference:
    """Of a model to the best one of those that were scored on the same documents."""

    best: str | None
    """The name of the best model; None of a model that is compared with no other."""
    is_best: bool = False
    documents: int | None = None
    as_good_as_best: bool | None = None
    """Whether the documents show no difference to the best model; None if they are too few to tell or others."""
    nats_per_token: Estimate | None = None
    """None if the tokenizers differ, because nats are then of other tokens."""
    bits_per_byte: Estimate | None = None
    p: float | None = None
    """p-value of the difference, corrected for all pairs of these models; None of the best one."""
    not_compared: str | None = None
    """Why nothing can be said, if that is so."""
    unit: str = "document"

    def record(self) -> dict[str, Any]:
        """The difference for --json."""
        record: dict[str, Any] = {"to": None if self.is_best else self.best, "documents": self.documents}
        for name in ("nats_per_token", "bits_per_byte"):
            estimate: Estimate | None = getattr(self, name)
            ends = statistics.Interval(estimate.low, estimate.high) if estimate is not None else None
            record |= {name: estimate and estimate.value, **document_scores.ends(name, ends)}
            record[f"least_{name}"] = estimate and estimate.least
        return record | {"p": self.p, "as_good_as_best": self.as_good_as_best, "not_compared": self.not_compared}

    @property
    def verdict(self) -> str:
        """The difference in a word or two, or why there is none."""
        if self.not_compared is not None:
            return f"not compared: {self.not_compared}"
        if self.is_best:
            return "best"
        return "yes" if self.as_good_as_best else "no"


MORE_DOCUMENTS = "a larger corpus.validation_fraction, corpus.split_by=passage or other text gives more"


def differences(models: Sequence[Scored]) -> list[Difference]:
    """The difference of each model to the best one. Only scores of the same documents are compared: of several such
    groups of models, those of the largest; none if no two models share their documents.

    Models with other tokenizers are compared by bits per byte, the same text being scored.
    """
    if not models:
        return []
    groups: dict[Hashable, list[int]] = {}
    for number, model in enumerate(models):
        groups.setdefault(_compared_with(model) or number, []).append(number)
    group = max(groups.values(), key=len)
    found = [Difference(None, not_compared=_why_not(model, models[group[0]])) for model in models]
    if len(group) == 1:
        return found
    for number, difference in zip(group, _of_group([models[number] for number in group]), strict=True):
        found[number] = difference
    return found


def _compared_with(model: Scored) -> Hashable:
    """What two models must have in common; None if a model can be compared with none."""
    if model.scores is None:
        return None
    # A text of which some is unknown has as many bytes, but less to predict: only the same tokens compare.
    same_tokens = None if model.knows_all else _hash(model.scores.tokens)
    return model.measure, model.scored_in, model.scores.documents, _hash(model.scores.bytes), same_tokens


def _why_not(model: Scored, other: Scored) -> str:
    """Why a model cannot be compared with another one."""
    if model is other and model.scores is not None:
        return "no other was scored on the same documents"
    if model.scores is None:
        return "no scores of single documents are kept of it; raylm evaluate MODEL --documents FILE does"
    if other.scores is None:
        return f"no scores of single documents are kept of {other.name}"
    if model.measure != other.measure:
        return "a score of another kind"
    if model.scored_in != other.scored_in:
        return "scored in other arithmetic"
    if model.scores.documents != other.scores.documents:
        return "scored on other documents"
    if not np.array_equal(model.scores.bytes, other.scores.bytes):
        return "scored with another tokenizer.prefix, and so on other parts of the documents"
    return "another tokenizer, and some of the text is unknown to one of them"


def _of_group(models: Sequence[Scored]) -> list[Difference]:
    """The differences of models that were scored on the same documents."""
    scores = [model.scores for model in models if model.scores is not None]
    is_scored = scores[0].bytes > 0  # not the empty ones
    nll = np.stack([each.nll[is_scored] for each in scores], axis=1)
    best = int(nll.sum(axis=0).argmin())
    name, unit, documents, num_bytes = models[best].name, models[best].unit, len(nll), scores[best].bytes[is_scored]
    found = []
    for number, difference in enumerate(statistics.compare(nll, num_bytes, best=best)):
        own, tokens = nll[:, number] - nll[:, best], scores[best].tokens[is_scored]
        if number == best:
            few = _too_few(documents, unit) if documents < statistics.FEWEST_DOCUMENTS else None
            found.append(Difference(name, few is None, documents, None if few else True, not_compared=few))
        elif difference is None:
            found.append(Difference(name, documents=documents, not_compared=_too_few(documents, unit)))
        else:
            least = difference.least * num_bytes.sum()
            is_same_tokenizer = np.array_equal(scores[number].tokens[is_scored], tokens)
            found.append(
                Difference(
                    name,
                    documents=documents,
                    as_good_as_best=not difference.is_real,
                    nats_per_token=_estimate(own, tokens, least) if is_same_tokenizer else None,
                    bits_per_byte=_estimate(own / math.log(2), num_bytes, least / math.log(2)),
                    p=difference.p,
                    unit=unit,
                )
            )
    return found


def _too_few(documents: int, unit: str) -> str:
    count = f"{counted(documents, unit)} of at least {statistics.FEWEST_DOCUMENTS}"
    return f"too few {unit}s to tell: {count}; {MORE_DOCUMENTS}"


def _estimate(difference: np.ndarray, size: np.ndarray, least: float) -> Estimate:
    """Of summed differences to sizes of documents, in tokens or bytes; `least` is summed, too."""
    low, high = statistics.interval(difference, size)
    return Estimate(float(difference.sum() / size.sum()), low, high, float(least / size.sum()))


def _hash(values: np.ndarray) -> str:
    return hashlib.blake2b(np.asarray(values, np.float64).tobytes(), digest_size=8).hexdigest()


# For people -----------------------------------------------------------------------------------------------------------


def rows(found: Sequence[Difference]) -> dict[str, list[Any]]:
    """Label -> value of each model: by how much it is worse than the best one, and whether that is real."""
    labels = {"nats/token above best": "nats_per_token", "bits/byte above best": "bits_per_byte"}
    estimates = {
        label: [str(getattr(each, name)) if getattr(each, name) is not None else None for each in found]
        for label, name in labels.items()
    }
    compared = {label: values for label, values in estimates.items() if any(values)}
    if compared:
        compared["p"] = [None if each.p is None else format_p(each.p) for each in found]
    return {**compared, "as good as best": [each.verdict for each in found]}


def sentences(models: Sequence[Scored], found: Sequence[Difference]) -> list[str]:
    """The difference of each compared model to the best one, in a sentence."""
    return [
        sentence(model.name, difference)
        for model, difference in zip(models, found, strict=True)
        if difference.bits_per_byte is not None
    ]


def sentence(name: str, difference: Difference) -> str:
    """How a model that was compared differs from the best one."""
    bits, nats = difference.bits_per_byte, difference.nats_per_token
    assert bits is not None
    assert difference.p is not None
    of_bytes = f"{bits} bits/byte"
    amount = f"{nats} nats/token, {of_bytes}" if nats is not None else f"{of_bytes} (the tokenizers differ)"
    if bits.low == bits.high:
        return (
            f"{name} and {difference.best} give the same score to each of {difference.documents:,} {difference.unit}s"
        )
    test = f"{format_p(difference.p, 'p')}, paired by {difference.documents:,} {difference.unit}s"
    if not difference.as_good_as_best:
        return f"{difference.best} is better than {name}: {amount} less, {test}"
    least = f"{bits.least:.2g} bits/byte"
    if nats is not None:
        least = f"{nats.least:.2g} nats/token ({100 * math.expm1(nats.least):.2g} % of perplexity)"
    return f"{name} is as good as {difference.best}: {amount} more, {test}; less than {least} could not be detected"
