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
    shown = rows(view)
    assert shown[1] == ["tokens", "learning", "block", "time"]
    assert shown[2] == ["trial", "status", "of", "1,000", "perplexity", "rate", "size", "left"]
    assert shown[3] == ["00005", "running", "0", "-", "0.1", "64"]
    assert shown[4] == ["00012", "stopped", "early", "500", "38.00", "1", "64"]
    assert [line[0] for line in shown[3:15]] == ["00005", *(f"{n:05}" for n in (12, 11, 10, 9, 8, 7, 6, 4, 3, 2, 1))]
    assert shown[15] == ["…", "2", "more"]


def test_a_setting_that_a_trial_does_not_have(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(1000, None, [RATE, SIZE], "pseudo_perplexity")
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
    view.update("trial_00001", status="stopped early")
    assert view.seconds_left() == pytest.approx((600 + 2 * 700) / 10), "others are expected to stop as early"
    assert view.summary() == "1 of 4 trials over, 800 tokens, about 3 min 20 s left"


def test_trials_that_wait_are_not_over_and_few_of_them_go_on(clock, screen):
    screen(terminal=True)
    view = live_table.LiveTable(1000, 4, [], "perplexity")
    view.update("trial_00000", tokens=0)
    clock.now += 10
    view.update("trial_00000", status="waiting", tokens=100, perplexity=9.0)
    view.update("trial_00001", tokens=0)
    assert view.summary() == "0 of 4 trials over, 1 waiting, 100 tokens, about 30 s left"
    clock.now += 90
    view.update("trial_00000", status="running")
    clock.now += 10
    view.update("trial_00000", tokens=200)
    assert rows(view)[-2] == ["00000", "running", "200", "9.00", "1", "min", "20", "s"], "at its speed while it runs"


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
        "0 of 2 trials over, 600 tokens, about 14 s left",
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
    assert "0 of 2 trials over" in text
    assert text.index("a line") < text.rindex("trials over"), "the table is drawn again below"
    assert "\x1b[2K" in text.rsplit("trials over", 1)[1], "and erased"
    assert text.endswith("Sweep: 0 s\n")


def test_after_an_error_the_table_stays(screen):
    def interrupted():
        with live_table.show(1000, 2, [RATE]) as view:
            view.update("trial_00000", settings={RATE: 1e-3}, tokens=10)
            raise KeyboardInterrupt

    written = screen(terminal=True)
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    last = written.getvalue().rsplit("trials over", 1)[1]
    assert "00000" in last
    assert "\x1b[2K" not in last, "nothing of it is erased"
