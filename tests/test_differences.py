"""Models paired by the documents that all were scored on; never compared by others."""

import io

import numpy as np
import pytest
from rich.console import Console

from raylm.console import format_p
from raylm.document_scores import DocumentScores
from raylm.results.differences import Scored, differences, rows, sentences
from raylm.results.tables import side_by_side

COUNT = 40
TOKENS = np.random.default_rng(0).integers(20, 400, COUNT)
HARDNESS = np.random.default_rng(1).gamma(8, 0.4, COUNT)


def scored(name, worse=0.0, *, documents="a", tokens=TOKENS, count=COUNT, kept=True, **others):
    """A model that is worse than others by so many nats a token."""
    noise = np.random.default_rng(list(name.encode())).normal(0, 0.02, COUNT)
    nll = TOKENS * (HARDNESS + noise + worse)
    num_bytes = others.pop("num_bytes", 4 * TOKENS)
    scores = DocumentScores(nll[:count], tokens[:count], num_bytes[:count], documents)
    return Scored(name, scores if kept else None, **{"measure": "perplexity", "scored_in": "float32"} | others)


def test_each_model_is_compared_with_the_best():
    models = [scored("worse", 0.1), scored("best"), scored("twin", 0.001)]
    worse, best, twin = differences(models)
    assert (worse.best, best.best, twin.best) == ("best",) * 3
    assert [each.as_good_as_best for each in (worse, best, twin)] == [False, True, True]
    assert worse.nats_per_token.low < 0.1 < worse.nats_per_token.high
    assert worse.bits_per_byte.value == pytest.approx(worse.nats_per_token.value / 4 / np.log(2))
    assert worse.bits_per_byte.least == pytest.approx(worse.nats_per_token.least / 4 / np.log(2))
    assert worse.p < 0.001 < 0.05 < twin.p
    assert worse.documents == COUNT
    told = sentences(models, [worse, best, twin])
    assert len(told) == 2
    assert told[0].startswith(
        f"best is better than worse: {worse.nats_per_token} nats/token, {worse.bits_per_byte} bits"
    )
    assert told[0].endswith("p = 0.0001, paired by 40 documents")
    assert told[1].startswith("twin is as good as best: ")
    assert "% of perplexity) could not be detected" in told[1]
    passages = [scored("best", unit="passage"), scored("worse", 0.1, unit="passage")]
    assert sentences(passages, differences(passages))[0].endswith("paired by 40 passages")
    record = worse.record()
    assert (record["to"], record["p"], record["as_good_as_best"], record["not_compared"]) == (
        "best",
        worse.p,
        False,
        None,
    )
    assert record["nats_per_token_low"] == worse.nats_per_token.low
    assert best.record()["to"] is best.record()["nats_per_token"] is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"documents": "b"}, "scored on other documents"),
        ({"measure": "masked_perplexity"}, "a score of another kind"),
        ({"scored_in": "bfloat16"}, "scored in other arithmetic"),
        ({"num_bytes": 4 * TOKENS - 1}, "scored with another tokenizer.prefix, and so on other parts of the documents"),
        (
            {"knows_all": False, "tokens": TOKENS - 1},
            "another tokenizer, and some of the text is unknown to one of them",
        ),
        ({"kept": False}, "no scores of single documents are kept of it; raylm evaluate MODEL --documents FILE does"),
    ],
)
def test_other_scores_get_a_reason_and_never_a_number(other, reason):
    models = [scored("odd", -1, **other), scored("one"), scored("other", 0.1)]
    odd, one, worse = differences(models)
    assert odd.not_compared == reason
    assert odd.nats_per_token is odd.bits_per_byte is odd.p is odd.as_good_as_best is None
    assert (one.is_best, worse.as_good_as_best) == (True, False), "the others are compared"
    assert rows([odd, one, worse])["p"] == [None, None, "0.0001"]
    first, second = differences(models[:2])
    assert {first.as_good_as_best, second.as_good_as_best} == {None}
    assert list(rows([first, second])) == ["as good as best"], "no number"
    assert sentences(models[:2], [first, second]) == []


def test_models_with_other_tokenizers_are_compared_by_bits_per_byte():
    """Twice as many tokens of the same text, which say the same in nats."""
    models = [scored("one"), scored("bytes", 0.1, tokens=2 * TOKENS), scored("worse", 0.2)]
    _, other, worse = found = differences(models)
    assert other.nats_per_token is None
    assert other.bits_per_byte.low < 0.1 / 4 / np.log(2) < other.bits_per_byte.high
    assert other.as_good_as_best is False
    assert worse.nats_per_token is not None
    assert "bits/byte (the tokenizers differ) less" in sentences(models, found)[0]
    same = [scored("one", knows_all=False), scored("other", 0.1, knows_all=False)]
    assert differences(same)[1].nats_per_token is not None, "one tokenizer, to which the same text is unknown"


def test_few_documents_are_told_in_words():
    models = [scored("one", count=5), scored("other", 9, count=5)]
    found = differences(models)
    assert [each.not_compared for each in found] == [
        "too few documents to tell: 5 documents of at least 6; a larger corpus.validation_fraction, "
        "corpus.split_by=passage or other text gives more"
    ] * 2
    assert list(rows(found)) == ["as good as best"]
    passages = differences([scored("one", count=5, unit="passage"), scored("other", 9, count=5, unit="passage")])
    assert passages[0].not_compared.startswith("too few passages to tell: 5 passages of at least 6")
    six = differences([scored("one", count=6), scored("other", 9, count=6)])
    assert six[1].as_good_as_best is False


def test_the_same_model_twice_is_as_good():
    models = [scored("one"), scored("one")]
    found = differences(models)
    assert found[1].p == 1
    assert found[1].as_good_as_best
    assert sentences(models, found) == ["one and one give the same score to each of 40 documents"]


def test_the_table_fits_80_columns():
    models = [scored("train-20261129-175502-9d32"), scored("train-20261129-175636-98a8", 0.1)]
    screen = Console(width=80, record=True, file=io.StringIO())
    screen.print(side_by_side([each.name for each in models], rows(differences(models))))
    text = screen.export_text()
    assert all("[" in line for line in text.splitlines() if line.startswith(("nats", "bits"))), (
        "an interval in one line"
    )


def test_a_p_value_has_the_digits_that_it_has():
    assert [format_p(p) for p in (0.41234, 0.0512, 0.0487, 0.000123)] == ["0.41", "0.051", "0.049", "0.0001"]
