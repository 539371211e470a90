"""Which trials are as good as the best: compared at equal tokens, on the same documents alone."""

import numpy as np
import pytest

from raylm import document_scores
from raylm.document_scores import DocumentScores
from raylm.results.significance import Standing, sentence, standings
from raylm.sweep import Trial

DOCUMENTS = 40


@pytest.fixture
def sweep(tmp_path):
    """Makes trials with document scores: name -> nats a token more than the best, and steps evaluated."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 400, DOCUMENTS)
    hardness = generator.gamma(8, 0.4, DOCUMENTS)

    def make(trials, documents="a"):
        made = []
        for name, (worse, steps) in trials.items():
            results = []
            for step in steps:
                own = generator.normal(0, 0.02, DOCUMENTS) + worse + 1 / step
                scores = DocumentScores(tokens * (hardness + own), tokens, 4 * tokens, documents)
                document_scores.write(str(tmp_path / name), step, scores)
                results.append({"step": step, "tokens": 100 * step, "best_step": step})
            made.append(Trial(name, {}, results))
        return str(tmp_path), made

    return make


def test_trials_that_differ_in_noise_alone_are_as_good_as_the_best(sweep):
    found = standings(*sweep({"best": (0, [1, 2, 4]), "twin": (0.001, [1, 2, 4]), "worse": (0.1, [1, 2, 4])}))
    assert [found[name].as_good_as_best for name in ("best", "twin", "worse")] == [True, True, False]
    assert found["twin"].p > 0.05 > found["worse"].p
    assert found["worse"].compared_at_tokens == 400
    assert 0 < found["worse"].least_percent < 100 * 0.1
    assert found["best"].low < found["best"].high
    assert 0 < found["best"].bits_per_byte_low < found["best"].bits_per_byte_high
    record = found["twin"].record("pseudo_perplexity")
    assert record["pseudo_perplexity_low"] == found["twin"].low
    assert record["bits_per_byte_low"] == found["twin"].bits_per_byte_low
    assert Standing.from_record(record, "pseudo_perplexity") == found["twin"]
    older = {name: value for name, value in record.items() if not name.startswith("bits_per_byte")}
    assert Standing.from_record(older, "pseudo_perplexity").bits_per_byte_low is None


def test_a_trial_that_was_stopped_early_is_compared_at_the_tokens_it_reached(sweep):
    """The best one was at 1/4 nats more there than at its end."""
    found = standings(*sweep({"best": (0, [1, 2, 4]), "stopped": (0, [1, 2])}))
    assert found["stopped"].compared_at_tokens == 200
    assert found["stopped"].as_good_as_best


def test_scores_of_other_documents_are_never_compared(sweep):
    directory, (best,) = sweep({"best": (0, [1])})
    _, (other,) = sweep({"other": (9, [1])}, documents="b")
    assert standings(directory, [best, other])["other"].as_good_as_best is None


def test_without_document_scores_nothing_is_said(tmp_path):
    trials = [Trial(name, {}, [{"step": 1, "tokens": 100, "best_step": 1}]) for name in ("one", "other")]
    found = standings(str(tmp_path), trials)
    assert found["other"] == Standing(None, None, None)
    assert sentence(found, DOCUMENTS) is None
    assert standings(str(tmp_path), []) == {}


def test_the_sentence_names_ties_and_what_could_not_be_told():
    best = Standing(1.0, 2.0, as_good_as_best=True)
    tie = Standing(1.0, 2.0, as_good_as_best=True, p=0.4, least_percent=1.234, compared_at_tokens=9)
    worse = Standing(1.0, 2.0, as_good_as_best=False, p=0.001, least_percent=2.0, compared_at_tokens=9)
    assert sentence({"trial_0": best, "trial_1": tie, "trial_2": worse, "trial_3": None}, 38) == (
        "as good as the best on these 38 documents, paired at equal tokens (p >= 0.05): 1 at 9 tokens; "
        "differences below 1.2 % could not be detected"
    )
    assert sentence({"trial_0": best, "trial_2": worse}, 38).startswith("no other trial is as good as the best")
    assert "on these 38 passages, paired" in sentence({"trial_0": best, "trial_1": tie}, 38, "passage")
    few = Standing(None, None, as_good_as_best=None)
    assert "4 documents are too few to tell" in sentence({"trial_0": few, "trial_1": few}, 4)
    assert "not tested with weights" in sentence({"trial_0": best, "trial_1": None}, 38, is_weighted=True)
