import io
import math

import pytest
from rich.console import Console

from raylm.results.trial_table import RankedTable, TrialRow, columns, narrow_headings, overfitting
from raylm.tracking import COSTS, MEANING

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


def test_what_settings_mean_is_shown_where_it_helps_to_choose():
    """In other sweeps it is the same for all, or follows from the learning rate alone."""

    def shown(*settings):
        settings = dict.fromkeys(settings, 1)
        rows = [
            TrialRow(
                "a", "completed", 2.0, 1.0, 8, settings, tokens_per_parameter=per, weight_decay_timescale=timescale
            )
            for per, timescale in ((20.4, 0.25), (10.0, None))
        ]
        found = columns(rows, "perplexity")
        return {name: found[name].cells for name in MEANING if name in found}

    assert shown(RATE, "blocks.block_size") == {}
    assert shown("model.path") == shown("train.max_tokens") == {"tokens_per_parameter": ["20.4", "10"]}
    assert shown(RATE, "train.weight_decay") == {"weight_decay_timescale": ["0.25", "-"]}


def test_a_score_that_is_not_finite_is_a_dash():
    (row,) = [TrialRow("trial_00000", "running", math.inf, math.nan, 8, {})]
    assert [columns([row], "perplexity")[name].cells for name in ("perplexity", "bits_per_byte")] == [["-"], ["-"]]


@pytest.mark.parametrize(("rows", "styles"), [(ROWS, ["bold", None]), (ROWS[1:], [None]), ([], [])])
def test_the_best_trial_is_bold_if_it_has_a_score(rows, styles):
    assert [row.style for row in RankedTable(rows, "perplexity").tables(80)[0].rows] == styles


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
    assert row.weighed == {"seconds": 7}
    others = {"repeat": None, "parameters": None, "checkpoint": "/there", "best_step": 1, "mlflow_run_id": None}
    unknown = dict.fromkeys((*MEANING, *COSTS))
    assert row.record("perplexity") == {**record, **others, **unknown}
    assert list(row.record("pseudo_perplexity"))[2] == "pseudo_perplexity"


def test_a_training_that_was_best_long_before_its_end_is_called_overfitted():
    assert overfitting(846.1, 1_057_006.2, 81_920) == ("overfitted: 846.1 at 81,920 tokens, 1,057,006 at the end")
    assert overfitting(846.1, 850.0, 81_920) is None
    assert overfitting(None, 1_057_006.2, 81_920) is None


SWEPT = {RATE: 0.00051234, "train.warmup_steps": 0.12345, "blocks.block_size": 512, "model.config.n_layer": 12}


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_nothing_is_cut_off_however_narrow_the_terminal(width):
    """The numbers of a row are what a person copies: an id "trial_…" or a rate "0.0005…" is of no use."""
    rows = [
        TrialRow(f"trial_{number:05}", "stopped early", 1_057_006.2 / 10**number, 12.5, 16_777_216, SWEPT)
        for number in range(4)
    ]
    written = io.StringIO()
    Console(file=written, width=width).print(RankedTable(rows, "masked-perplexity"))
    text = written.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for shown in ("00003", "1,057,006", "105,701", "10,570", "12.50", "16,777,216", "0.0005123", "0.1235", "512"):
        assert shown in text
    assert text.count("stopped early") == 4, "not folded"
    assert text.count("00003") == (1 if width >= 100 else 2)


def test_the_last_row_is_the_score_before_training():
    table = RankedTable(ROWS, "perplexity", {"perplexity": 5120.4, "bits_per_byte": 6.5}).tables(120)[0]
    assert [str(list(column.cells)[-1]) for column in table.columns] == [
        "", "", "5,120", "6.50", "", "0", "untrained", "", "", ""
    ]  # fmt: skip
    assert [row.style for row in table.rows] == ["bold", None, None]


def test_an_overfitted_trial_is_told_below_the_table():
    written = io.StringIO()
    Console(file=written, width=80).print(RankedTable(ROWS, "perplexity"))
    assert written.getvalue().splitlines()[-1] == "trial_00001 overfitted: 32 at 256 tokens, 90 at the end"


def test_headings_that_end_with_the_same_name_are_whole():
    swept = {"model.config.hidden_size": 64, "blocks.hidden_size": 1}
    headings = narrow_headings(columns([TrialRow("trial_00000", "running", None, None, 0, swept)], "perplexity"))
    assert headings["model.config.hidden_size"] == "config\nhidden\nsize"
    assert (headings["blocks.hidden_size"], headings["bits_per_byte"]) == ("hidden\nsize", "bits/\nbyte")
