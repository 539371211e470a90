import math

import pytest

from raylm.results.trial_table import TrialRow, columns, overfitting, rich_table

RATE = "train.learning_rate"

ROWS = [
    TrialRow("trial_00001", "completed", 32.0, 2.0, 1024, {RATE: 1e-3}, 256, 90.0, weighed={"parameters": 70_000}),
    TrialRow("trial_00000", "failed", None, None, 0, {"blocks.block_size": 64}, weighed={"parameters": None}),
]


def test_the_columns_by_hand():
    table = columns(ROWS, "masked-perplexity")
    assert {name: (column.heading, *column.cells) for name, column in table.items()} == {
        "rank": ("", "1", "2"),
        "trial_id": ("trial", "trial_00001", "trial_00000"),
        "perplexity": ("masked-perplexity", "32.00", "-"),
        "bits_per_byte": ("bits/byte", "2.00", "-"),
        "parameters": ("parameters", "70,000", "-"),
        "tokens": ("tokens", "1,024", "0"),
        "status": ("status", "completed; overfitted: 32 at 256 tokens, 90 at the end", "failed"),
        "pareto": ("pareto front", "", ""),
        RATE: ("learning_rate", "0.001", "-"),
        "blocks.block_size": ("block_size", "-", "64"),
    }


def test_settings_stand_in_the_order_that_is_asked_for():
    assert list(columns(ROWS, "perplexity", ["blocks.block_size", RATE]))[-2:] == ["blocks.block_size", RATE]
    assert list(columns([], "perplexity"))[-1] == "status"


def test_a_score_that_is_not_finite_is_a_dash():
    (row,) = [TrialRow("trial_00000", "running", math.inf, math.nan, 8, {})]
    assert [columns([row], "perplexity")[name].cells for name in ("perplexity", "bits_per_byte")] == [["-"], ["-"]]


@pytest.mark.parametrize(("rows", "styles"), [(ROWS, ["bold", None]), (ROWS[1:], [None]), ([], [])])
def test_the_best_trial_is_bold_if_it_has_a_score(rows, styles):
    assert [row.style for row in rich_table(rows, "perplexity").rows] == styles


def test_a_row_is_read_from_the_record_of_a_result_and_written_under_the_name_of_its_score():
    record = {
        "trial_id": "trial_00000",
        "status": "completed",
        "perplexity": 32.0,
        "bits_per_byte": 2.0,
        "seconds": 7,
        "pareto": True,
        "tokens": 1024,
        "best_tokens": 256,
        "last_perplexity": 33.0,
        "settings": {RATE: 1e-3},
        "failure": None,
    }
    row = TrialRow.from_record({**record, "checkpoint": "/there", "best_step": 1})
    assert row.record("perplexity") == {**record, "repeat": None}
    assert list(row.record("pseudo_perplexity"))[2] == "pseudo_perplexity"


def test_a_training_that_was_best_long_before_its_end_is_called_overfitted():
    assert overfitting(846.1, 1_057_006.2, 81_920) == ("overfitted: 846.1 at 81,920 tokens, 1,057,006 at the end")
    assert overfitting(846.1, 850.0, 81_920) is None
    assert overfitting(None, 1_057_006.2, 81_920) is None
