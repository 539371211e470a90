"""Intervals and tests hold what they say, on documents that are drawn from a known distribution."""

import itertools

import numpy as np
import pytest
import scipy.stats

from raylm import statistics
from raylm.statistics import compare, compare_runs, interval, mean_interval, other_documents


def drawn(count, columns=1, *, gap=0.0, seed=0):
    """(nll, tokens) of documents of skewed lengths; each column is worse than the one before by `gap` nats a token."""
    generator = np.random.default_rng([count, columns, seed])
    tokens = np.maximum(5, generator.lognormal(5, 1, count)).round()
    hardness = generator.gamma(8, 0.45, count)  # nats a token, the same for all models
    own = generator.normal(0, 0.05, (columns, count)) + gap * np.arange(columns)[:, None]
    return (tokens * (hardness + own)).T, tokens


@pytest.mark.parametrize("count", [10, 30, 100])
def test_the_interval_covers_the_truth_in_95_percent_of_draws(count):
    truth = 8 * 0.45  # lengths and hardness are independent
    found = [interval(nll[:, 0], tokens) for nll, tokens in (drawn(count, seed=seed) for seed in range(1000))]
    covered = np.mean([low <= truth <= high for low, high in found])
    assert 0.93 <= covered <= 0.97


def test_the_interval_of_equally_long_documents_is_students():
    nll = np.random.default_rng(0).normal(300, 20, 12)
    low, high = interval(nll, np.full(12, 100))
    expected = scipy.stats.t.interval(0.95, 11, nll.mean() / 100, scipy.stats.sem(nll) / 100)
    assert (low + high) / 2 == pytest.approx(np.mean(expected))
    assert high - low == pytest.approx((expected[1] - expected[0]) * np.sqrt(12 / 11))  # the jackknife's n - 1


def test_documents_without_tokens_tell_nothing():
    nll, tokens = drawn(6)
    padded = [np.concatenate([values, np.zeros(4)]) for values in (nll[:, 0], tokens)]
    assert interval(*padded) == pytest.approx(interval(nll[:, 0], tokens))
    assert interval(padded[0][1:], padded[1][1:]) == (-np.inf, np.inf)


def test_perplexity_and_bits_per_byte_have_the_ends_of_the_interval():
    nll, tokens = drawn(20)
    low, high = interval(nll[:, 0], tokens)
    assert statistics.of_perplexity(nll[:, 0], tokens) == pytest.approx((np.exp(low), np.exp(high)))
    low, high = interval(nll[:, 0], 4 * tokens)
    assert statistics.of_bits_per_byte(nll[:, 0], 4 * tokens) == pytest.approx((low / np.log(2), high / np.log(2)))
    assert statistics.of_perplexity(nll[:5, 0], tokens[:5]) is None
    assert statistics.of_bits_per_byte(nll[:5, 0], tokens[:5]) is None
    assert statistics.of_perplexity(1000 * nll[:, 0], tokens) is None, "beyond the range of a float"


@pytest.mark.parametrize(("count", "others"), [(6, 6), (10, 100), (30, 30), (100, 30)])
def test_the_interval_of_a_difference_on_other_documents_covers_none_in_95_percent_of_draws(count, others):
    covered = 0
    for seed in range(1000):
        (nll, tokens), (nll_of_others, of_others) = drawn(count, seed=2 * seed), drawn(others, seed=2 * seed + 1)
        low, high = other_documents(nll[:, 0], tokens, nll_of_others[:, 0], of_others)
        covered += low <= 0 <= high
    assert 0.93 <= covered / 1000 <= (0.985 if count == 6 else 0.97)


def test_a_difference_on_other_documents_is_welchs():
    generator = np.random.default_rng(0)
    one, other = generator.normal(300, 20, 12), generator.normal(310, 60, 40)
    low, high = other_documents(one, np.full(12, 100), other, np.full(40, 100))
    expected = scipy.stats.ttest_ind(other / 100, one / 100, equal_var=False).confidence_interval(0.95)
    assert (low + high) / 2 == pytest.approx((other.mean() - one.mean()) / 100)
    assert (low, high) == pytest.approx(tuple(expected), abs=0.02), "but for the jackknife's n - 1"
    few = other_documents(one[:5], np.full(5, 100), other, np.full(40, 100))
    assert few == (-np.inf, np.inf)


@pytest.mark.parametrize(("count", "columns"), [(8, 2), (30, 2), (30, 8)])
def test_equally_good_models_are_called_different_in_at_most_5_percent_of_draws(count, columns, monkeypatch):
    """The best on these documents against each other one. Two models are the plain paired test: about 5 %."""
    monkeypatch.setattr(statistics, "MOST_FLIPS", 1000)
    wrong = 0
    for seed in range(400):
        nll, tokens = drawn(count, columns, seed=seed)
        found = compare(nll, tokens, best=int(nll.sum(axis=0).argmin()), seed=seed)
        wrong += any(difference.is_real for difference in found if difference is not None)
    assert wrong / 400 <= 0.05 + 0.022, "two standard errors of 400 draws"
    if columns == 2:
        assert wrong / 400 >= 0.04 - 0.02


def test_a_difference_that_is_there_is_found():
    nll, tokens = drawn(60, 3, gap=0.1)
    best, second, third = compare(nll, tokens)
    assert best is None
    assert second.is_real
    assert third.is_real
    assert second.nats_per_token == pytest.approx(0.1, abs=0.05)
    assert second.interval.low < 0.1 < second.interval.high
    assert second.least < 0.1 < third.nats_per_token
    assert compare(nll[:, [0, 0]], tokens)[1].p == 1, "the same model twice"


def test_few_documents_are_tested_exactly():
    nll, tokens = drawn(7, 2, gap=0.02, seed=3)
    difference = nll[:, 1] - nll[:, 0]
    sums = [abs(np.dot(signs, difference)) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean([value >= abs(difference.sum()) * (1 - 1e-12) for value in sums])
    assert compare(nll, tokens)[1].p == pytest.approx(expected)
    library = scipy.stats.permutation_test((difference,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert compare(nll, tokens)[1].p == pytest.approx(library.pvalue)


def test_five_documents_are_too_few_to_tell():
    nll, tokens = drawn(5, 2, gap=9.0)
    assert compare(nll, tokens) == [None, None]
    assert interval(nll[:, 0], tokens) == (-np.inf, np.inf)


def test_the_order_of_documents_and_models_does_not_matter():
    nll, tokens = drawn(12, 3, gap=0.01)
    order = np.random.default_rng(0).permutation(12)
    one, other = compare(nll, tokens), compare(nll[order], tokens[order])
    assert [each.p for each in one[1:]] == pytest.approx([each.p for each in other[1:]])
    turned = compare(nll[:, ::-1], tokens, best=2)
    assert turned[0].p == pytest.approx(one[2].p)
    assert turned[0].nats_per_token == pytest.approx(one[2].nats_per_token)


# Settings ------------------------------------------------------------------------------------------------------------


def runs_of(seeds, columns, *, seed=0, gap=0.0, spread=0.05, shared=0.8):
    """nll per token of runs: a row for each seed, which the settings share in part; the last ones vary threefold."""
    generator = np.random.default_rng([seeds, columns, seed])
    common, own = generator.normal(0, 1, (seeds, 1)), generator.normal(0, 1, (seeds, columns))
    noise = spread * (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
    noise[:, -1] *= 3
    return 3.6 + noise + gap * np.arange(columns)


@pytest.mark.parametrize("shared", [0.0, 0.8])
@pytest.mark.parametrize(("seeds", "columns"), [(2, 2), (3, 2), (3, 3), (5, 3)])
def test_equally_good_settings_are_called_different_in_at_most_5_percent_of_draws(seeds, columns, shared):
    """Whatever part of a score the seed decides, and though one of the settings varies more than the others."""
    wrong = 0
    for seed in range(1000):
        nll = runs_of(seeds, columns, seed=seed, shared=shared)
        found = compare_runs(nll, best=int(nll.mean(axis=0).argmin()))
        wrong += any(difference.is_real for difference in found if difference is not None)
    assert wrong / 1000 <= 0.05 + 0.014, "two standard errors of 1,000 draws"


def test_the_difference_of_settings_is_students_over_the_seeds():
    nll = runs_of(5, 2, gap=0.3)
    difference = compare_runs(nll)[1]
    library = scipy.stats.ttest_rel(nll[:, 1], nll[:, 0])
    assert difference.p == pytest.approx(library.pvalue)
    assert difference.interval == pytest.approx(library.confidence_interval(0.95))
    assert difference.nats_per_token == pytest.approx(nll[:, 1].mean() - nll[:, 0].mean())
    turned = compare_runs(nll, best=1)[0]
    assert turned.nats_per_token == pytest.approx(-difference.nats_per_token)
    assert mean_interval(nll[:, 0]) == pytest.approx(scipy.stats.ttest_1samp(nll[:, 0], 0).confidence_interval(0.95))


def test_a_difference_of_settings_that_is_there_is_found_and_corrected_for_all_pairs():
    nll = runs_of(4, 3, gap=0.5, spread=0.02)
    best, second, third = compare_runs(nll)
    assert best is None
    assert second.is_real
    assert third.is_real
    alone = [scipy.stats.ttest_rel(nll[:, one], nll[:, other]).pvalue for one, other in [(0, 1), (0, 2), (1, 2)]]
    assert min(second.p, third.p) >= 3 * min(alone) * (1 - 1e-9)
    assert second.least < second.nats_per_token


def test_runs_of_one_settings_differ_by_their_documents_but_not_by_their_seeds():
    """Why the unit is the run: its documents share its seed."""
    wrong = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        nll, tokens = drawn(100, 2, seed=seed)
        nll += tokens[:, None] * generator.normal(0, 0.05, 2)
        wrong += compare(nll, tokens)[1].is_real
    assert wrong > 50


def test_seeds_without_both_scores_are_left_out():
    nll = runs_of(4, 3, gap=0.5)
    nll[1, 1] = nll[1:, 2] = np.nan
    _, second, third = compare_runs(nll)
    whole = nll[[0, 2, 3]]
    assert second.p == pytest.approx(scipy.stats.ttest_rel(whole[:, 1], whole[:, 0]).pvalue), "the only pair"
    assert third is None
    assert mean_interval(nll[:1, 0]) == (-np.inf, np.inf)


def test_settings_with_the_same_runs_do_not_differ():
    nll = runs_of(3, 1).repeat(2, axis=1)
    assert compare_runs(nll)[1].p == 1
    assert compare_runs(nll + np.array([0.0, 0.5]))[1].p < 1e-9
