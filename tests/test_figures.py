import math
import os
import subprocess
import sys
from io import BytesIO

import pytest
from PIL import Image

from raylm.results import figures
from raylm.results.figures import SweepData, plotly_figure, primitives
from raylm.results.figures import sweep as sweep_figures
from raylm.results.figures.data import BELOW, Setting, ticks
from raylm.sweep import Trial

RATE, SIZE = "train.learning_rate", "blocks.block_size"


def trial(number, settings, scores, status="completed", failure=None):
    """A trial with an evaluation each 100 tokens, of these perplexities."""
    results = [
        {
            "tokens": 100 * count,
            "perplexity": score,
            "bits_per_byte": score / 10,
            "best_perplexity": min(scores[:count]),
            "best_bits_per_byte": min(scores[:count]) / 10,
            "seconds": 2.0 * count,
        }
        for count, score in enumerate(scores, 1)
    ]
    return Trial(f"trial_{number:05}", settings, results, status, failure, 1)


TRIALS = [
    trial(0, {RATE: 1e-4, SIZE: 64}, [90.0, 80.0, 70.0, 60.0]),
    trial(1, {RATE: 1e-3, SIZE: 128}, [70.0, 50.0, 40.0, 30.0]),
    trial(2, {RATE: 1e-2, SIZE: 256}, [95.0], "stopped early"),
    trial(3, {RATE: 1e-2, SIZE: 64}, [99.0], "failed", "it diverged"),
    trial(4, {RATE: 1e-3, SIZE: 64}, [85.0, 75.0], "stopped early"),
]
SWEEP = SweepData(
    TRIALS,
    budget_tokens=400,
    losses={"trial_00001": [(50, 4.0), (100, 3.5)], "trial_00003": [(50, 5.0), (100, math.inf)]},
    samplers={RATE: "loguniform", SIZE: "choice"},
)


def test_a_curve_for_each_trial_and_the_best_over_the_others():
    figure = sweep_figures.score_curves(SWEEP)
    by_name = {line.name: line for line in figure.lines}
    assert len(by_name) == 5
    assert by_name["trial_00000"].points == [(100, 90.0), (200, 80.0), (300, 70.0), (400, 60.0)]
    assert figure.lines[-1].name == "trial_00001"
    assert (figure.y.log, figure.y.ticks) == (True, [(50.0, "50"), (100.0, "100")])
    assert [by_name[f"trial_{number:05}"].kind for number in range(5)] == [
        "completed",
        "best",
        "stopped early",
        "failed",
        "stopped early",
    ]
    assert by_name["trial_00004"].about == (
        "trial_00004: stopped early\n200 tokens\nperplexity 75.00\nlearning_rate 0.001\nblock_size 64"
    )


def test_a_failure_without_a_point_is_told_of():
    assert sweep_figures.score_curves(SWEEP).caption.endswith("A cross: the trial failed.")
    early = trial(5, {RATE: 1.0}, [], "failed", "it diverged")
    figure = sweep_figures.score_curves(SweepData([*TRIALS, early], 400))
    assert figure.caption.endswith("A cross: the trial failed. Failed before the first point: trial_00005.")


def test_losses_that_are_no_numbers_are_not_drawn():
    figure = sweep_figures.loss_curves(SWEEP)
    assert {line.name: line.points for line in figure.lines} == {
        "trial_00001": [(50, 4.0), (100, 3.5)],
        "trial_00003": [(50, 5.0)],
    }


def test_trials_compare_at_the_most_tokens_that_all_have_reached():
    assert SWEEP.equal_tokens == 100, "where the third was stopped; the one that failed does not count"
    assert [(trial.trial_id[-1], score) for trial, score in SWEEP.compared] == [
        ("1", 70.0), ("4", 85.0), ("0", 90.0), ("2", 95.0),
    ]  # fmt: skip
    assert SWEEP.about_equal_tokens == (
        "Scores at 100 training tokens, the deepest that 4 trials reached; left out: 1 that failed."
    )
    waiting = [trial(5, {RATE: 1e-3}, [], "running"), trial(6, {RATE: 1e-3}, [], "failed", "no memory")]
    assert SweepData([*TRIALS, *waiting], 400).about_equal_tokens.endswith(
        "left out: 2 that failed, 1 without a score there."
    )
    longer = [TRIALS[0], TRIALS[1], TRIALS[4]]
    assert SweepData(longer, 400).compared == [(TRIALS[1], 50.0), (TRIALS[4], 75.0), (TRIALS[0], 80.0)], "at 200 tokens"
    late = trial(7, {RATE: 1e-3}, [40.0])
    late.results[0]["tokens"] = 150
    other = SweepData([TRIALS[2], late], 400)
    assert (other.equal_tokens, len(other.compared)) == (100, 1)
    assert other.about_equal_tokens == (
        "Scores at 100 training tokens, the deepest that 1 trial reached; left out: 1 without a score there."
    )


def test_parallel_coordinates_by_hand():
    figure = sweep_figures.parallel_coordinates(SWEEP)
    assert figure.title == "Settings and perplexity at 100 training tokens"
    places = {line.name: [place for _, place in line.points] for line in figure.lines}
    assert list(places) == ["trial_00002", "trial_00000", "trial_00004", "trial_00001"], "the best over the others"
    assert places["trial_00001"] == [pytest.approx(0.5), 0.5, 0.0], "the rate by its logarithm; the best is lowest"
    assert places["trial_00002"] == [1.0, 1.0, 1.0]
    assert [name for _, name in figure.x.ticks] == ["learning_rate", "block_size", "perplexity"]
    assert {(x, text) for x, _, text in figure.texts} >= {(0, "0.0001"), (0, "0.001"), (1, "128"), (2, "70"), (2, "95")}
    shades = {line.name: line.shade for line in figure.lines}
    assert (shades["trial_00001"], shades["trial_00002"]) == (0.0, 1.0)
    assert figure.lines[-1].about.endswith("at 100 training tokens: perplexity 70.00")


def test_a_setting_that_a_trial_does_not_have():
    some = [TRIALS[0], trial(1, {SIZE: 64}, [50.0])]
    figure = sweep_figures.parallel_coordinates(SweepData(some, 400, samplers={RATE: "loguniform", SIZE: "choice"}))
    assert {line.name: line.points[0][1] for line in figure.lines} == {"trial_00000": 0.5, "trial_00001": BELOW}
    assert (0, BELOW, "not set") in figure.texts


def test_a_failure_leaves_the_others_their_room():
    far = trial(5, {RATE: 1e6, SIZE: 64}, [99.0], "failed", "it diverged")
    sweep = SweepData([*TRIALS, far], 400, samplers=SWEEP.samplers)
    assert sweep_figures.parallel_coordinates(sweep).lines == sweep_figures.parallel_coordinates(SWEEP).lines
    assert sweep_figures.heat_map(sweep, "unknown").cells == sweep_figures.heat_map(SWEEP, "unknown").cells


def test_the_heat_map_has_the_best_of_each_cell():
    figure = sweep_figures.heat_map(SWEEP, "unknown")
    assert figure.title == "Best perplexity by learning_rate and block_size at 100 training tokens"
    cells = {(cell.column, cell.row): cell for cell in figure.cells}
    assert [name for _, name in figure.y.ticks] == ["64", "128", "256"]
    assert figure.x.ticks[0] == (0, "0.0001 to 0.00025")
    assert {place: cell.text for place, cell in cells.items()} == {
        (0, 0): "90.00\n1 trial",
        (2, 1): "70.00\n1 trial",
        (4, 2): "95.00\n1 trial",
        (2, 0): "85.00\n1 trial",
    }
    assert (cells[2, 1].shade, cells[4, 2].shade) == (0.0, 1.0)
    two = SweepData([*TRIALS, trial(5, {RATE: 1.1e-3, SIZE: 128}, [20.0])], 400, samplers=SWEEP.samplers)
    assert "20.00\n2 trials" in [cell.text for cell in sweep_figures.heat_map(two, "unknown").cells]


def test_the_heat_map_is_of_the_settings_that_matter_most():
    keys = ("train.a", "train.b", "train.c")
    some = [trial(n, dict(zip(keys, (n, 2 * n, 3 * n), strict=True)), [9.0 - n]) for n in range(3)]
    figure = sweep_figures.heat_map(SweepData(some, 100), {"train.c": 0.7, "train.b": 0.2, "train.a": 0.1})
    assert (figure.x.title, figure.y.title) == ("c", "b")
    words = [trial(n, {"train.a": n, "train.lr_scheduler_type": name}, [1.0]) for n, name in enumerate(("x", "y"))]
    assert sweep_figures.heat_map(SweepData(words, 100), {}).reason == "fewer than two numbers are swept"


def test_what_early_stopping_saved():
    figure = sweep_figures.saved_tokens(SWEEP)
    assert figure.title == "Early stopping saved 500 of 2,000 tokens: 25%", "300 and 200; a failure saves nothing"
    assert [(bar.name[-1], bar.kind, bar.length, bar.note) for bar in figure.bars] == [
        ("1", "best", 400, ""),
        ("0", "completed", 400, ""),
        ("4", "stopped early", 200, ""),
        ("2", "stopped early", 100, ""),
        ("3", "failed", 100, "failed"),
    ]
    assert sweep_figures.saved_tokens(SweepData(TRIALS[:2], 400)).title == "No trial was stopped early"


def test_the_setting_that_decides_has_the_importance():
    some = [
        trial(n, {RATE: 10.0 ** -(n % 4), SIZE: (64, 128)[n // 4]}, [10.0 * (1 + n % 4) + 0.01 * (n // 4)])
        for n in range(8)
    ]
    shares = sweep_figures.importance(SweepData(some, 100, samplers={RATE: "loguniform", SIZE: "grid"}))
    assert list(shares) == [RATE, SIZE]
    assert shares[RATE] > 0.95
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("trials", "reason"),
    [
        (TRIALS[:4], "it takes 4 trials with a score, and there are 3"),
        ([trial(n, {RATE: 1e-3}, [5.0 + n]) for n in range(4)], "the trials do not differ"),
        ([trial(n, {RATE: 1e-3 * n}, [5.0]) for n in range(4)], "the trials do not differ"),
    ],
)
def test_why_there_is_no_importance(trials, reason):
    sweep = SweepData(trials, 400)
    assert sweep_figures.importance(sweep) == reason
    assert figures.build(sweep)[-1].reason == reason


def test_without_optuna_there_is_no_importance(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert sweep_figures.importance(SWEEP) == "it takes optuna, which is not installed: pip install 'raylm[optuna]'"


def test_a_sweep_that_has_just_begun_says_what_there_is_not():
    empty = figures.build(SweepData([], 400))
    assert [each.name for each in empty] == ["perplexity", "loss", "settings", "heat", "saved", "importance"]
    assert empty[0].reason == "no trial has been evaluated yet"
    running = [Trial(f"trial_{number:05}", {RATE: 1e-3 * number, SIZE: 64}, []) for number in range(2)]
    by_name = {each.name: each for each in figures.build(SweepData(running, 400))}
    assert [bar.length for bar in by_name["saved"].bars] == [0, 0]


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 0.19, False, [0.0, 0.05, 0.1, 0.15]),
        (61, 260, False, [100, 150, 200, 250]),
        (5e-4, 2e-2, True, [5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2]),
        (38.0, 480.0, True, [50, 100, 200]),
        (30.5, 34.0, True, [31, 32, 33, 34]),
        (31.2, 31.2, True, [31.2]),
        (1e-8, 1e-1, True, [1e-8, 1e-6, 1e-4, 1e-2]),
    ],
)
def test_ticks_are_a_few_round_numbers(low, high, log, expected):
    assert ticks(low, high, log) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "sampler", "places"),
    [
        ([256, 64, 128], "choice", {64: 0, 128: 0.5, 256: 1}),
        ([0.0, 0.2, 0.05], "uniform", {0.05: 0.25}),
        (["linear", "cosine", True], "choice", {True: 0, "cosine": 0.5, "linear": 1}),
        ([[1, 2], [3, 4]], "grid", {(3, 4): 1}),
        ([0.1, 0.1], "uniform", {0.1: 0.5}),
        ([8, 2, 4], None, {4: 0.5}),
        ([0.1, 0.4, 0.2], None, {0.2: 1 / 3}),
    ],
)
def test_where_values_stand_on_an_axis(values, sampler, places):
    setting = Setting.of("a", values, sampler)
    assert {value: setting.place(value) for value in places} == pytest.approx(places)


# Drawn ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def every():
    return {figure.name: figure for figure in figures.build(SWEEP)}


EACH = pytest.mark.parametrize("name", ["perplexity", "loss", "settings", "heat", "saved", "importance"])


@EACH
def test_plotly_knows_every_word_of_what_it_shall_draw(every, name):
    import plotly.graph_objects

    plotly.graph_objects.Figure(plotly_figure(every[name]))


@EACH
def test_a_picture_has_the_best_trial_in_its_colour(every, name):
    image = Image.open(BytesIO(figures.png(every[name]))).convert("RGB")
    assert image.width == 1170
    colour = {"heat": primitives.shade_colour(0), "importance": primitives.COLOURS["setting"]}.get(
        name, primitives.COLOURS["best"]
    )
    wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    assert {found: count for count, found in image.getcolors(2**24)}[wanted] > 700, "its name alone is 180"


def test_a_trial_that_failed_looks_so_on_the_page(every):
    traces = {trace["name"]: trace for trace in plotly_figure(every["perplexity"])["data"]}
    assert traces["trial_00003"]["line"]["dash"] == "dash"
    assert traces["trial_00003"]["marker"]["symbol"] == ["x"]
    assert traces["trial_00001"]["marker"]["size"] == [0, 0, 0, 5], "a dot at its end"
    assert [trace["name"] for trace in plotly_figure(every["perplexity"])["data"][5:]] == [
        "best trial",
        "completed",
        "stopped early",
        "failed",
    ]


def test_what_users_wrote_is_no_html_in_a_figure():
    settings = {"model.path": "<img src=x>", "train.a": 1}
    figure = sweep_figures.score_curves(SweepData([trial(0, settings, [5.0])], 100))
    assert "&lt;img src=x&gt;" in plotly_figure(figure)["data"][0]["text"]


def test_shades_get_lighter_from_the_best_to_the_worst():
    def luminance(colour):
        return sum(part * int(colour[at : at + 2], 16) for part, at in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))

    shades = [luminance(primitives.shade_colour(number / 20)) for number in range(21)]
    assert shades == sorted(shades)


def test_drawing_says_nothing_of_a_home_that_cannot_be_written(tmp_path):
    (tmp_path / "home").write_text("no directory")
    drawing = "from raylm.results.figures import png, primitives as p; png(p.Figure('a', 'A', '', p.Axis(), p.Axis()))"
    variables = {key: value for key, value in os.environ.items() if key not in ("MPLCONFIGDIR", "XDG_CONFIG_HOME")}
    home = {**variables, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path)}
    drawn = subprocess.run([sys.executable, "-c", drawing], env=home, capture_output=True, text=True, check=True)
    assert drawn.stdout + drawn.stderr == ""
