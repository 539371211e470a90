"""How sure a score is: intervals of perplexities and tests of differences, from the documents they were scored on.

Documents are what varies: a score is one of many that other documents of the same kind would have given (Miller 2024,
arXiv:2411.00640). The score of some documents is a ratio, summed nll / summed tokens, both of which vary.
Trials of a sweep are scored on the same documents, so their difference is taken document by document: what makes a
document hard is the same for both, and drops out.

All arrays have a row for each document; results depend on the documents and the seed alone. A document is what the
split splits, a passage with corpus.split_by: passage. Passages of one document resemble each other and yet count one by
one: the hash that holds them out draws them at random, so the interval is that of other passages of the same documents.
Copies of one text count as one document (document_scores.DocumentScores).

Only where settings are compared, by several runs each (`compare_runs`), the runs are what varies, and a row is a seed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""The probability that an interval holds the true value. Differences count as real at p < 1 - LEVEL."""

MOST_FLIPS = 10_000
"""Ways to flip the signs of the documents that a test tries at most: a p of 0.05 is then known to 0.004."""

FEWEST_DOCUMENTS = 6
"""With five documents no test of signs gives a p below 0.06."""

CHUNK = 4_000_000
"""Flips of documents that are held at a time: 32 MB."""


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The score of a model minus that of the best one, on the same documents; above zero if the model is worse."""

    nats_per_token: float
    interval: Interval
    """The 95 % interval of nats_per_token."""
    p: float
    """Probability of so large a difference if the models were equally good: two-sided, corrected as `compare` says."""
    least: float
    """The smallest difference in nats a token that these documents could have shown to be real."""

    @property
    def is_real(self) -> bool:
        return self.p < 1 - LEVEL


def interval(nll: np.ndarray, tokens: np.ndarray) -> Interval:
    """The interval of sum(nll) / sum(tokens), in nats a token, from the spread over documents.

    Infinite for fewer than FEWEST_DOCUMENTS documents with tokens: too few to tell.

    The standard error of the ratio is that of the jackknife, each document's residual enlarged by what leaving it out
    moves the ratio (MacKinnon & White 1985's HC3). The quantile is Student's t of Kish's effective number of documents,
    sum(tokens)^2 / sum(tokens^2): a few long documents among many short ones tell little more than those few. On 4,000
    draws each of 6 to 300 documents, with lengths from equal to log-normal (sigma 1.5), it covers the truth in 93.8 to
    97.4 % of cases. Bootstraps cover less: the percentile interval 88.9 % with 10 documents and 92.7 % with 100, a
    studentized one 92.3 and 92.9 %.
    """
    if np.count_nonzero(tokens) < FEWEST_DOCUMENTS:
        return Interval(-np.inf, np.inf)
    return _around(*_ratio(nll, tokens))


def other_documents(nll: np.ndarray, tokens: np.ndarray, other_nll: np.ndarray, other_tokens: np.ndarray) -> Interval:
    """The interval of a model's score on other documents minus that on these, in nats a token.

    It holds the difference of the two scores, if neither had a part in the choice of the model, in 95 % of cases: two
    independent samples of unequal spread, by Welch's approximation. On 4,000 draws each of 6 to 300 documents it
    covers the truth in 94.3 to 97.2 % of cases. Infinite if either has fewer than FEWEST_DOCUMENTS documents.
    """
    if min(np.count_nonzero(tokens), np.count_nonzero(other_tokens)) < FEWEST_DOCUMENTS:
        return Interval(-np.inf, np.inf)
    one, other = _ratio(nll, tokens), _ratio(other_nll, other_tokens)
    variances = np.array([one.error**2, other.error**2])
    spread = (variances**2 / [one.freedom, other.freedom]).sum()
    freedom = variances.sum() ** 2 / spread if spread else 1.0
    return _around(other.value - one.value, float(np.sqrt(variances.sum())), freedom)


def of_perplexity(nll: np.ndarray, tokens: np.ndarray) -> Interval | None:
    """The interval of exp(sum(nll) / sum(tokens)); None if it has no finite end."""
    low, high = interval(nll, tokens)
    return Interval(math.exp(low), math.exp(high)) if high < 700 else None


def of_bits_per_byte(nll: np.ndarray, num_bytes: np.ndarray) -> Interval | None:
    """The interval of sum(nll) / sum(num_bytes) in bits; None if it has no finite end."""
    low, high = interval(nll, num_bytes)
    return Interval(low / math.log(2), high / math.log(2)) if math.isfinite(high) else None


def compare(nll: np.ndarray, tokens: np.ndarray, *, best: int = 0, seed: int = 0) -> list[Difference | None]:
    """The difference of each column of nll from the column `best`, and whether it is real.

    A test of signs over documents: if two models were equally good, each document's difference could as well have had
    the other sign. If `best` was chosen because it is best on these documents, its differences are larger than those of
    a model chosen beforehand. So each is compared with the largest difference between any two columns under the same
    flips (a max-statistic, which holds the family-wise error: that of calling any difference real that is none).

    None for the column `best` itself, and for all if there are fewer than FEWEST_DOCUMENTS documents: too few to tell.
    All ways to flip are tried if there are at most MOST_FLIPS, else as many at random.
    """
    count, columns = nll.shape
    if count < FEWEST_DOCUMENTS:
        return [None] * columns
    total = tokens.sum()
    largest = _largest_of_flips(nll, seed)
    threshold = float(np.quantile(largest, LEVEL))
    difference = nll - nll[:, [best]]
    norm = np.sqrt((difference**2).sum(axis=0))
    found: list[Difference | None] = []
    for column in range(columns):
        if column == best:
            found.append(None)
            continue
        seen = abs(difference[:, column].sum()) / norm[column] if norm[column] else 0.0
        reached = int((largest >= seen * (1 - 1e-12)).sum())
        is_exact = len(largest) == 2 ** (count - 1)
        p = reached / len(largest) if is_exact else (reached + 1) / (len(largest) + 1)
        mean = float(difference[:, column].sum() / total)
        found.append(
            Difference(mean, interval(difference[:, column], tokens), p, float(threshold * norm[column] / total))
        )
    return found


def mean_interval(scores: np.ndarray) -> Interval:
    """Student's interval of the mean of runs that differ in their seeds; infinite for fewer than two runs."""
    if len(scores) < 2:
        return Interval(-np.inf, np.inf)
    return _around(*_mean(scores))


def compare_runs(nll: np.ndarray, *, best: int = 0) -> list[Difference | None]:
    """Each column of nll, settings, against the column `best`: whether they are better, apart from which model is.

    A row of nll is a seed, with the nll per token of each settings' run with it; NaN where a run has no score. The unit
    is the run: its documents are averaged, because those of a run share its seed, and a test over documents calls two
    runs of the same settings different. The documents are the same for all, so what is told holds for them.

    Settings are compared seed by seed, by Student's t over the differences: runs of one seed see the same order of
    examples, from the same weights if they have the same shape, so most of what a seed does drops out (scores of two
    learning rates over 6 seeds of a small model: correlation 0.89). Unlike Welch's test this holds for any variances,
    as when one learning rate is close to divergence, and any correlation: on 300 draws each of 2 to 5 seeds and 2 or 3
    settings, its family-wise error was 3 to 6.7 % (Welch's, 0 to 7.3 %), and at a correlation of 0.6 it found as much
    as Welch's. p-values are corrected for all pairs by Holm's method, which holds whichever column was found best.

    None for the column `best` itself, and where fewer than two seeds have both scores.
    """
    columns = nll.shape[1]
    differences = {}
    for one, other in itertools.combinations(range(columns), 2):
        found = nll[:, other] - nll[:, one]
        differences[one, other] = found[np.isfinite(found)]
    tested = {pair: _p_of_mean(found) for pair, found in differences.items() if len(found) > 1}
    corrected, largest = {}, 0.0
    for place, pair in enumerate(sorted(tested, key=tested.__getitem__)):
        largest = corrected[pair] = max(largest, min(1.0, tested[pair] * (len(tested) - place)))
    results: list[Difference | None] = []
    for column in range(columns):
        pair = min(best, column), max(best, column)
        if pair not in corrected:
            results.append(None)
            continue
        found = differences[pair] if best < column else -differences[pair]
        mean = _mean(found)
        least = _quantile(mean.freedom, 1 - (1 - LEVEL) / 2 / len(tested)) * mean.error
        results.append(Difference(mean.value, _around(*mean), corrected[pair], least))
    return results


class _Estimate(NamedTuple):
    value: float
    error: float
    """Standard error."""
    freedom: float
    """Degrees of freedom."""


def _ratio(nll: np.ndarray, tokens: np.ndarray) -> _Estimate:
    """sum(nll) / sum(tokens), with what `interval` says of its error."""
    total = tokens.sum()
    ratio = nll.sum() / total
    residual = (nll - ratio * tokens) / (1 - tokens / total)
    effective = total**2 / (tokens.astype(float) ** 2).sum()
    return _Estimate(ratio, np.sqrt((residual**2).sum()) / total, max(1.0, effective - 1))


def _around(value: float, error: float, freedom: float) -> Interval:
    half = _quantile(freedom, (1 + LEVEL) / 2) * error
    return Interval(float(value - half), float(value + half))


def _quantile(freedom: float, probability: float) -> float:
    """The quantile of Student's t distribution."""
    from scipy.special import stdtrit  # scipy.special takes 0.2 s to import, scipy.stats more

    return float(stdtrit(freedom, probability))


def _mean(values: np.ndarray) -> _Estimate:
    """The mean of independent values, with Student's error."""
    return _Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values) - 1)


def _p_of_mean(differences: np.ndarray) -> float:
    """Two-sided p-value of Student's test that their mean is zero."""
    from scipy.special import stdtr

    mean = _mean(differences)
    if not mean.error:
        return 1.0 if mean.value == 0 else 0.0
    return float(2 * stdtr(mean.freedom, -abs(mean.value / mean.error)))


def _largest_of_flips(nll: np.ndarray, seed: int) -> np.ndarray:
    """For each way to flip the signs of the documents, the largest studentized difference between any two columns."""
    count, columns = nll.shape
    centred = nll - nll.mean(axis=1, keepdims=True)
    products = centred.T @ centred
    squares = np.diag(products)
    norm = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0))
    one, other = np.triu_indices(columns, 1)
    norms = norm[one, other]
    norms[norms <= 1e-12 * norms.max(initial=0.0)] = np.inf  # the same model twice
    is_exact = 2 ** (count - 1) <= MOST_FLIPS
    largest = np.empty(2 ** (count - 1) if is_exact else MOST_FLIPS)
    generator = np.random.default_rng(seed)
    for rows in _chunks(len(largest), max(count, len(one))):
        if is_exact:  # the first document keeps its sign: all flipped is none flipped
            numbers = np.arange(rows.start, rows.stop)[:, None]
            signs = np.concatenate([np.zeros_like(numbers), numbers >> np.arange(count - 1) & 1], axis=1)
        else:
            signs = generator.integers(0, 2, size=(rows.stop - rows.start, count), dtype=np.int8)
        sums = (1.0 - 2.0 * signs) @ centred
        largest[rows] = (np.abs(sums[:, one] - sums[:, other]) / norms).max(axis=1, initial=0.0)
    return largest


def _chunks(rows: int, columns: int) -> list[slice]:
    """Slices of so many rows of so many columns that are CHUNK numbers each."""
    size = max(1, CHUNK // columns)
    return [slice(start, min(rows, start + size)) for start in range(0, rows, size)]
