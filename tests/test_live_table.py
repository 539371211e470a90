import io
import logging

import pytest
from rich.console import Console

from raylm import console
from raylm.results import live_table

RATE, SIZE = "train.learning_rate", "blocks.block_size"


@pytest.fixture
def clock(monkeypatch):
    """Its time is what it is set to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(live_table.time, "monotonic", lambda: Clock.now)
    return Clock


@pytest.fixture
def screen(monkeypatch):
    """terminal or not -> what is written, and the console of the commands writes there."""

    def make(terminal):
        file = io.StringIO()
        made = Console(file=file, force_terminal=terminal, width=78, height=30, highlight=False, emoji=False)
        monkeypatch.setattr(console, "screen", made)
        return file

    return make


def rows(view):
    """The cells of the table, as they stand on a screen of 78 columns."""
    made = Console(width=78, file=io.StringIO())
    made.print(view.table())
    return [line.split() for line in made.file.getvalue().splitlines()]


def test_the_table_has_those_that_run_and_then_the_best(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(1000, 20, [RATE, SIZE], "perplexity")
    for number in range(14):
        view.update(f"trial_{number:05}", settings={RATE: 10.0 ** -(number % 4), SIZE: 64})
        if number != 5:
            view.update(f"trial_{number:05}", tokens=500, perplexity=50.0 - number)
            view.update(f"trial_{number:05}", status="failed" if number == 13 else "stopped early")
    shown = rows(view)[1:]  # above: the rest of the line about all trials
    assert shown[1] == ["tokens", "learning", "block", "time"]
    assert shown[2] == ["trial", "status", "of", "1,000", "perplexity", "rate", "size", "left"]
    assert shown[3] == ["00005", "running", "0", "-", "0.1", "64"]
    assert shown[4] == ["00012", "stopped", "early", "500", "38.00", "1", "64"]
    assert [line[0] for line in shown[3:15]] == ["00005", *(f"{n:05}" for n in (12, 11, 10, 9, 8, 7, 6, 4, 3, 2, 1))]
    assert shown[15] == ["…", "2", "more"]


def test_a_setting_that_a_trial_does_not_have(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(1000, 1, [RATE, SIZE], "pseudo_perplexity")
    view.update("trial_00000", settings={SIZE: "[/b]"}, perplexity=float("inf"))
    assert rows(view)[-1] == ["00000", "running", "0", "-", "-", "[/b]"]


def test_the_time_that_is_left(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(1000, 4, [], "perplexity")
    assert view.seconds_left() is None
    view.update("trial_00000", tokens=0)
    view.update("trial_00001", tokens=600)  # in an earlier process
    clock.now += 10
    view.update("trial_00000", tokens=100)
    view.update("trial_00001", tokens=700)
    assert view.seconds_left() == 160, "900 + 300 of these and 2 x 1,000 of those to come, 20 a second"
    clock.now += 10
    assert view.seconds_left() == 150, "it runs down between two evaluations"
    view.update("trial_00001", status="stopped early")
    assert view.seconds_left() == pytest.approx((600 + 2 * 700) / 20), "others are expected to stop as early"
    assert view.summary() == (
        "1 running, 1 stopped early, 2 not started; 800 of at most 4,000 tokens; about 1 min 40 s left"
    )


def test_repeats_that_follow_are_announced():
    view = live_table.LiveTable(1000, 4, [], "perplexity", repeats=(6, 9))
    assert view.summary() == "4 not started; 0 of at most 4,000 tokens; then 6 to 9 repeats"


def test_promoted_trials_are_part_of_the_time_left(clock, screen):
    """Four trials train on 100 tokens, two of them on 200 and one on 400: 800 tokens in all, 10 a second."""
    screen(terminal=True)
    view = live_table.LiveTable(400, 4, [], "perplexity", [(100, 4), (200, 2), (400, 1)])
    left = []
    for name, tokens in (("a", 100), ("b", 100), ("c", 100), ("a", 200), ("d", 100), ("b", 200), ("a", 400)):
        trial = view.trials.get(name)
        view.update(name, status="running", tokens=trial.tokens if trial else 0)
        clock.now += (tokens - view.trials[name].tokens) / 10
        view.update(name, tokens=tokens, perplexity=1e4 / tokens)
        left.append(view.seconds_left())
        if (name, tokens) == ("d", 100):
            assert view.summary() == (
                "1 running, 3 paused at 100 to 200 tokens; 500 of at most 1,600 tokens; best perplexity 50.00; about "
                "30 s left"
            )
        view.update(name, status="paused" if tokens < 400 else "completed")
    assert left == [70, 60, 50, 40, 30, 20, 0]
    assert view.summary() == (
        "3 paused at 100 to 200 tokens, 1 completed; 800 of at most 1,600 tokens; best perplexity 25.00"
    )


def test_the_last_trial_alone_takes_its_own_time(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(400, 2, [], "perplexity", [(100, 2), (400, 1)])
    view.update("a", tokens=0)
    view.update("b", tokens=0)
    clock.now += 10
    view.update("a", tokens=100)
    view.update("b", tokens=100, status="paused")
    assert view.seconds_left() == 30, "300 tokens, 10 a second, though both trained 20 a second"


def test_each_trial_has_its_own_time_left(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(1000, 2, [], "perplexity")
    view.update("trial_00000", tokens=0)
    clock.now += 10
    view.update("trial_00000", tokens=100)
    clock.now += 5
    assert rows(view)[-1] == ["00000", "running", "100", "-", "1", "min", "25", "s"]


def test_elsewhere_than_on_a_terminal_a_line_for_each_end_and_one_now_and_then(clock, screen):
    written = screen(terminal=False)
    with live_table.show(1000, 2, [RATE]) as view:
        view.update("trial_00000", settings={RATE: 1e-3})
        clock.now += 4
        view.update("trial_00000", tokens=500, perplexity=40.0)
        clock.now += 2
        view.update("trial_00000", tokens=600)
        view.update("trial_00000", tokens=700)
        view.update("trial_00000", status="stopped early")
        view.update("trial_00001", status="failed", failure="known since the sweep went on")
        view.update("trial_00002", tokens=0)
        view.update("trial_00002", status="failed", failure="no memory [red]")
        clock.now += 994
    assert written.getvalue().splitlines() == [
        "1 running, 1 not started; 600 of at most 2,000 tokens; best perplexity 40.00; about 14 s left",
        "trial_00000: stopped early, 700 tokens, perplexity 40.00",
        "trial_00002: failed, 0 tokens: no memory [red]",
        "Sweep: 16 min 40 s",
    ]


def test_lines_become_rarer_in_a_long_sweep(clock, screen):
    written = screen(terminal=False)
    view = live_table.LiveTable(10**6, 2, [], "perplexity")
    for second in range(3600):
        clock.now = 1000.0 + second
        view.update("trial_00000", tokens=second)
    lines = written.getvalue().splitlines()
    assert 70 < len(lines) < 90, "one each 5 s would be 720"


def test_on_a_terminal_lines_stand_above_the_table_which_goes_in_the_end(screen):
    written = screen(terminal=True)
    with live_table.show(1000, 2, [RATE]) as view:
        view.update("trial_00000", settings={RATE: 1e-3}, tokens=10)
        logging.getLogger("raylm").info("a line")
    text = written.getvalue()
    assert "1 running, 1 not started" in text
    assert text.index("a line") < text.rindex("1 not started"), "the table is drawn again below"
    assert "\x1b[2K" in text.rsplit("1 not started", 1)[1], "and erased"
    assert text.endswith("Sweep: 0 s\n")


def test_after_an_error_the_table_stays(screen):
    def interrupted():
        with live_table.show(1000, 2, [RATE]) as view:
            view.update("trial_00000", settings={RATE: 1e-3}, tokens=10)
            raise KeyboardInterrupt

    written = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    last = written.getvalue().rsplit("1 not started", 1)[1]
    assert "00000" in last
    assert "\x1b[2K" not in last, "nothing of it is erased"


def test_trials_of_a_ladder_have_budgets_of_their_own(clock, screen):
    screen(terminal=False)
    view = live_table.LiveTable(4000, 4, [], "perplexity", tokens_of_all=10_000)
    view.update("trial_00000", tokens=0, settings={"train.max_tokens": 1000})
    clock.now += 10
    view.update("trial_00000", tokens=500)
    assert "500 of at most 10,000 tokens" in view.summary()
    assert view.seconds_left() == pytest.approx(190), "9,500 tokens, 50 of them a second"
    assert rows(view)[-1][-2:] == ["10", "s"], "this trial has 500 left"
