import io

import pytest
from rich.console import Console

from raylm import console
from raylm.results.training_progress import TrainingProgress


@pytest.fixture
def screen(monkeypatch):
    def make(terminal, encoding="utf-8"):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(console, "screen", Console(file=file, force_terminal=terminal, width=80))
        return file

    return make


def played():
    """A training of 400 tokens that was scored before it and after each 200."""
    shown = []
    view = TrainingProgress(lambda done, total, note="": shown.append((done, total, note)), 400, "perplexity")
    view.report({"tokens": 0, "perplexity": 520.123})
    for tokens, loss in ((100, 6.25), (200, 5.5)):
        view.show(tokens)
        view.report({"tokens": tokens, "loss": loss})
    view.report({"tokens": 200, "perplexity": 250.0})
    view.report({"tokens": 300, "loss": 4.0})
    view.report({"tokens": 400, "perplexity": 95.5})
    return shown


def test_curves_of_loss_and_score_on_a_terminal(screen, caplog):
    screen(terminal=True)
    with caplog.at_level("INFO", "raylm"):
        shown = played()
    assert shown[0] == (0, 400, "perplexity 520.1")
    assert shown[-1] == (400, 400, "loss 6.25 █▆▁ 4   perplexity 520.1 █▄▁ 95.5")
    assert caplog.messages == []


def test_a_line_for_each_evaluation_elsewhere(screen, caplog):
    screen(terminal=False)
    with caplog.at_level("INFO", "raylm"):
        played()
    assert caplog.messages == [
        "before training: perplexity 520.1",
        "200 tokens: training loss 5.5, perplexity 250",
        "400 tokens: training loss 4, perplexity 95.5",
    ]


def test_no_curve_where_the_terminal_has_no_blocks(screen):
    screen(terminal=True, encoding="ascii")
    assert played()[-1][2] == "loss 6.25 4   perplexity 520.1 95.5"


def test_a_curve_is_no_wider_than_it_may_be(screen):
    screen(terminal=True)
    assert console.sparkline(list(range(800)), 8) == "▁▂▃▄▅▆▇█"
    assert console.sparkline([3.0, 3.0, float("inf")], 8) == "▁▁"
    assert console.sparkline([3.0], 8) == ""
