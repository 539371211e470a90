"""The best trial of each optimizer, of ranked rows made by hand."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from raylm.results import choices, tables
from raylm.results.significance import Standing
from raylm.results.trial_table import TrialRow

OPTIMIZER, RATE = "train.optimizer", "train.learning_rate"


def row(number, optimizer, rate, perplexity, standing=None, **others):
    settings = {OPTIMIZER: optimizer, RATE: rate}
    scores = (None, None) if perplexity is None else (perplexity, perplexity / 16)
    return TrialRow(f"trial_{number:05d}", "completed", *scores, 2048, settings, standing=standing, **others)


WORSE = Standing(20.0, 40.0, False, p=0.002, least_percent=2.5, compared_at_tokens=1024)
TIE = replace(WORSE, as_good_as_best=True, p=0.31)

ROWS = [
    row(3, "muon", 2e-2, 24.0, Standing(20.0, 30.0, True)),
    row(0, "muon", 1e-2, 26.5, TIE),
    row(2, "adamw", 5e-3, 32.0, WORSE),
    row(1, "adamw", 1e-2, 40.0, WORSE),
    row(4, "adamw", 5e-3, 33.0, WORSE, repeat_of="trial_00002"),
]


def test_each_optimizer_is_at_its_best_settings():
    (found,) = choices.of(ROWS)
    assert found.title == "By optimizer"
    assert found.cells("perplexity") == (
        ["optimizer", "trials", "best trial", "perplexity", "bits/byte", "tokens", "its other settings"],
        [
            ["muon", "2", "00003", "24.00", "1.50", "2,048", "learning_rate 0.02"],
            ["adamw", "2", "00002", "32.00", "2.00", "2,048", "learning_rate 0.005"],
        ],
    )
    assert found.sentences == [
        "muon is better than adamw, each at its best settings (p = 0.002, paired by document at 1,024 tokens)"
    ]


@pytest.mark.parametrize(
    ("standing", "told"),
    [
        (TIE, ["adamw is as good as muon, each at its best settings (p = 0.31, paired by document at 1,024 tokens); "
               "differences below 2.5 % could not be detected"]),
        (Standing(None, None, None), ["whether muon is better than adamw is unknown: too few documents tell"]),
        (None, []),
    ],
)  # fmt: skip
def test_what_is_told_of_the_difference(standing, told):
    (found,) = choices.of([ROWS[0], row(2, "adamw", 5e-3, 32.0, standing)])
    assert found.sentences == told


def test_an_optimizer_whose_trials_all_failed():
    (found,) = choices.of([*ROWS[:2], row(5, "sgd", 1e3, None), row(6, "sgd", 1e4, None)])
    assert found.cells("perplexity")[1][1] == ["sgd", "2", "00005", "-", "-", "2,048", "learning_rate 1,000"]
    assert found.sentences == ["sgd: 2 trials, none with a score"]


def test_numbers_are_ranges_and_no_choices():
    assert choices.of([]) == []
    assert choices.of([row(0, "sgd", 1e3, None), row(1, "muon", 1e3, None)]) == [], "no trial has a score"
    assert choices.of([each for each in ROWS if each.settings[OPTIMIZER] == "muon"]) == [], "there is one alone"
    mixed = [replace(each, settings={RATE: rate}) for each, rate in zip(ROWS, ["auto", 1, 2, 3, 4], strict=True)]
    assert choices.of(mixed) == []


def test_a_setting_of_one_space_out_of_several_is_that_of_the_trials_that_have_it():
    bare = replace(row(7, "", 1e-3, 50.0), settings={RATE: 1e-3})
    (found,) = choices.of([*ROWS, bare])
    assert [each.trials for each in found.values] == [2, 2]


def test_the_table_in_a_terminal_and_in_mlflow():
    (found,) = choices.of(ROWS)
    console = Console(file=io.StringIO(), width=80)
    console.print(*tables.choice(found, "perplexity"))
    screen = console.file.getvalue()
    assert "adamw           2       00002       32.00" in screen
    assert max(map(len, screen.splitlines())) <= 80
    markdown = tables.choice_markdown(found, "perplexity")
    assert "| adamw | 2 | 00002 | 32.00 | 2.00 | 2,048 | learning_rate 0.005 |" in markdown
    assert markdown.startswith("**By optimizer**\n\n| optimizer | trials |")
    assert "muon is better than adamw" in markdown
