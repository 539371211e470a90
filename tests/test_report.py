"""The report of a sweep whose record and journals were written by hand: nothing is trained."""

import fcntl
import json
import re
import shlex
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from raylm import config, document_scores, samples, tracking
from raylm.document_scores import DocumentScores
from raylm.errors import ConfigError, StorageError
from raylm.report import report
from raylm.results import figures, html, trial_table
from raylm.results import sweep as sweeps
from raylm.sweep import SweepRecord

RATE, SIZE, OPTIMIZER = "train.learning_rate", "blocks.block_size", "train.optimizer"
BUDGET = 1024
EVIL = "</script><script>alert(1)</script> & <img src=http://evil.example/x.png>"
"""In what a user or a failure says."""


def result(tokens, perplexity):
    scores = {"perplexity": perplexity, "bits_per_byte": perplexity / 16}
    best = {f"best_{name}": score for name, score in scores.items()}
    return {"step": tokens // 256, "tokens": tokens, **scores, **best, "best_step": 1, "seconds": tokens / 512}


def write_sweep(storage, name, *settings, trials, result_json=None, store="f00d"):
    """A sweep's directory. Each trial: its settings, (tokens, perplexity) of its evaluations, how it ended, why."""
    directory = f"{storage}/words/{name}"
    experiment = config.load(
        config.BUILT_IN,
        [f"storage={storage}", "name=words", "tracking.uri=null", f"train.max_tokens={BUDGET}",
         "train.batch_tokens=256", *settings],
    )  # fmt: skip
    parent = tracking.start(experiment.tracking, experiment="words", name=name, tags={}, directory=directory)
    parent.log_parameters({"store": store})
    parent.set_tags({tracking.TOKENS_TAG: BUDGET})
    parent.log_text(config.dump(experiment), "experiment.yaml")
    record = SweepRecord(directory)
    for number, (swept, evaluations, status, failure) in enumerate(trials):
        trial_id = f"trial_{number:05}"
        record.add(trial_id, swept)
        record.start(trial_id)
        child = parent.start_trial(trial_id)
        child.set_tags({tracking.PARAMETERS_TAG: 70_000})
        for tokens, perplexity in evaluations:
            record.result(trial_id, result(tokens, perplexity))
            child.log_metrics({"train/loss": 3.0, "train/tokens": tokens}, tokens // 256)
        if status != "running":
            record.finish(trial_id, status, failure, dropped=status == "stopped early")
    record.spend(75)
    if result_json is not None:
        (Path(directory) / "result.json").write_text(json.dumps(result_json))
    return directory


def test_the_texts_of_the_last_evaluations(tmp_path):
    directory = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials=TRIALS)
    assert "<h2>Texts</h2>" not in Path(html.build(directory)).read_text()
    for step, text in ((1, "first"), (2, EVIL)):
        samples.write(f"{directory}/trial_00000", step, [{"tokens": 256 * step, "prompt": "p", "text": text}])
    page = Path(html.build(directory)).read_text()
    assert "<td class=number>512</td><td>" + escape(EVIL) in page
    assert "first</td>" not in page


def keep(directory, step, nats_per_token, documents=range(20)):
    """Keep the scores of an evaluation, which is this much worse on every document but for some noise."""
    generator = np.random.default_rng(7)
    tokens, hardness = generator.integers(50, 90, len(documents)), generator.gamma(8, 0.4, len(documents))
    noise = np.random.default_rng(step if isinstance(step, int) else 9).normal(0, 0.01, len(documents))
    rows = np.stack(
        [tokens * (hardness + noise + nats_per_token), tokens, 4 * tokens, *np.zeros((2, len(tokens)))], axis=1
    )
    document_scores.write(directory, step, DocumentScores.of_ids(rows, documents))


TRIALS = [
    ({RATE: 1e-3, SIZE: 64}, [(256, 60.0), (512, 48.0), (1024, 32.0)], "completed", None),
    ({RATE: 1e-2, SIZE: 128}, [(256, 80.0)], "stopped early", None),
    ({RATE: 2e-2, SIZE: 64}, [], "failed", f"training diverged {EVIL}"),
    ({RATE: 2e-3, SIZE: 256}, [(256, 70.0), (512, 50.0)], "running", None),
]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """runs/ with two sweeps: aaaa, which goes on, and bbbb, which is over."""
    storage = tmp_path_factory.mktemp("report") / "runs"
    (storage / "tokens" / "f00d").mkdir(parents=True)
    splits = {"train": {"tokens": 9000}, "validation": {"tokens": 77}}
    (storage / "tokens" / "f00d" / "manifest.json").write_text(json.dumps(splits))
    write_sweep(storage, "tune-20260101-000000-aaaa", f"corpus.paths=['{EVIL}']", trials=TRIALS)
    best = {"trial_id": "trial_00000", "perplexity": 31.5, "bits_per_byte": 1.97, "checkpoint": "/there/model"}
    weighed = [{"trial_id": f"trial_{number:05d}", "parameters": 70_000, "pareto": not number} for number in range(9)]
    over = {"best": best, "trials": weighed}
    write_sweep(storage, "tune-20260102-000000-bbbb", "eval.max_tokens=64", trials=TRIALS, result_json=over)
    return storage


class Page(HTMLParser):
    """What a browser makes of a page: its text without scripts, what it would load, its scripts, its images."""

    def __init__(self, text):
        super().__init__()
        self.words, self.loaded, self.ids, self.scripts, self.images = [], [], [], [], []
        self.inside = None
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        given = dict(attrs)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        self.ids += [given["id"]] if "id" in given else []
        self.images += [given["src"]] if tag == "img" else []

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style":
            self.words.append(data)


def shown(directory):
    """The page of a sweep, without the pictures beside it."""
    results = sweeps.read(directory)
    return Page(html.page(results, figures.build(results.data), {}))


@pytest.fixture(scope="module")
def running(storage):
    return Page(Path(html.build(f"{storage}/words/tune-20260101-000000-aaaa")).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def over(storage):
    return shown(f"{storage}/words/tune-20260102-000000-bbbb")


def test_a_page_opens_without_a_network(running, over):
    for built in (running, over):
        assert built.loaded == []
        assert len(built.scripts) == 2, "plotly and what it draws"
    style = html.STYLE + html.HTML
    assert "http" not in style
    assert "@import" not in style


def test_the_answer_stands_at_the_top(over):
    top = over.text[: over.text.index("Validation perplexity")]
    assert "4 trials: 1 completed, 2 stopped early, 1 failed." in top, "one was stopped with the sweep"
    assert "31.50 perplexity (1.970 bits per byte) of the whole validation split" in top
    assert "Ranked by the first 64 validation tokens." in over.text
    assert "best trial trial_00000 learning_rate 0.001 block_size 64 model /there/model repeat it" in top


def test_a_trial_runs_only_while_a_command_works_on_the_sweep(storage, running):
    directory = f"{storage}/words/tune-20260101-000000-aaaa"
    with open(f"{directory}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "4 trials: 1 running, 1 completed" in shown(directory).text
    assert "4 trials: 1 interrupted, 1 completed" in shown(directory).text


def test_a_sweep_that_goes_on_says_so(running):
    assert "1 interrupted, 1 completed, 1 stopped early, 1 failed. The sweep had not finished" in running.text
    assert "32.00 perplexity (2.000 bits per byte) of the whole validation split" in running.text


def test_what_trials_were_weighed_against_is_in_the_table(over, running):
    assert "trial_00000 32.00 2.00 70,000 1,024 256 2 0.001 64 completed, on the Pareto front" in over.text
    assert over.text.count("on the Pareto front") == 1
    assert "Pareto" not in running.text


def test_scores_of_a_part_of_the_split_are_called_so(storage):
    running = {"trials": TRIALS[3:], "result_json": None}
    directory = write_sweep(storage, "tune-20260103-000000-cccc", "eval.max_tokens=64", **running)
    assert "of the first 64 validation tokens" in shown(directory).text


def test_every_row_has_the_command_that_repeats_it(storage, running):
    directory = f"{storage}/words/tune-20260101-000000-aaaa"
    rows = sweeps.read(directory).trials
    assert [row.trial_id[-1] for row in rows] == ["0", "3", "1", "2"], "the best first, failures last"
    for row in rows:
        assert row.repeat in running.text
        _, *verb, file, rate, size = shlex.split(row.repeat)
        assert verb == ["-m", "raylm.train", "--config"]
        again = config.load(file, [rate, size])
        assert {key: config.get(again, key) for key in (RATE, SIZE)} == row.settings
        assert again.train.max_tokens == BUDGET


def test_a_row_says_what_its_trial_cost(running):
    headings = "trial perplexity bits/byte tokens best at seconds parameters learning_rate block_size"
    assert headings in running.text
    assert "1 trial_00000 32.00 2.00 1,024 256 2 70,000 0.001 64 completed; repeat it" in running.text


def test_what_settings_mean_and_what_trials_cost(tmp_path):
    directory = write_sweep(tmp_path, "tune-20260110-000000-0000", trials=[TRIALS[0], TRIALS[3]])
    assert "What the settings mean" not in shown(directory).text, "of a sweep of an older version"
    child = tracking.Run(f"{directory}/trial_00000")
    child.log_parameters(
        {"tokens_per_parameter": "0.01463", "weight_decay_timescale": "25", "training_flops": "4.1e+08"}
    )
    child.log_metrics({"cost/evaluation_seconds": 0.5, "cost/peak_memory_bytes": 3e8}, 2)
    child.log_metrics({"cost/evaluation_seconds": 0.75, "cost/peak_memory_bytes": 4e8, "cost/mfu": 0.4123}, 4)
    assert (
        "trial tokens/parameter weight-decay timescale training FLOPs seconds of evaluations peak memory MFU "
        "00000 0.01463 25 4.1e+08 2 0.75 400.0 MB 41.2% 00001 - - - 1 - - -"
    ) in shown(directory).text
    best = sweeps.read(directory).trials[0].record("perplexity")
    assert (best["training_flops"], best["saving_seconds"], best["peak_memory_bytes"]) == (4.1e8, None, 4e8)
    assert best["mfu"] == 0.4123


def test_the_best_trial_of_each_optimizer(tmp_path):
    trials = [
        ({OPTIMIZER: optimizer, RATE: rate}, [(256, 60.0), (1024, perplexity)], "completed", None)
        for optimizer, rate, perplexity in [("adamw", 1e-3, 40.0), ("muon", 1e-3, 44.0), ("muon", 1e-2, 38.0)]
    ]
    tie = {"as_good_as_best": True, "p": 0.4, "least_percent": 9.0, "compared_at_tokens": 1024}
    result = {"trials": [{"trial_id": "trial_00000", **tie}]}
    page = shown(write_sweep(tmp_path, "tune-20260111-000000-0000", trials=trials, result_json=result))
    assert (
        "By optimizer The best trial of each optimizer, with its own best settings. "
        "optimizer trials best trial perplexity bits/byte tokens its other settings "
        "muon 2 00002 38.00 2.38 1,024 learning_rate 0.01 adamw 1 00000 40.00 2.50 1,024 learning_rate 0.001 "
        "adamw is as good as muon, each at its best settings (p = 0.4, paired by document at 1,024 tokens)"
    ) in page.text


def test_what_people_wrote_is_shown_and_nothing_else(running):
    assert running.text.count(EVIL) == 2, "in the facts and in the row of the trial that failed"
    assert running.images == []
    assert "trial_00002 - - 0 - - 70,000 0.02 64 training diverged" in running.text


def test_a_setting_with_html_in_it_ends_no_script(storage):
    trials = [({"model.path": EVIL}, [(256, 60.0)], "completed", None)]
    built = shown(write_sweep(storage, "tune-20260109-000000-0000", trials=trials))
    assert (len(built.scripts), built.images) == (2, [])
    assert "alert(1)" in built.scripts[1]
    assert f"70,000 {EVIL} completed" in built.text


def test_every_figure_of_the_script_has_its_place(running):
    figures = json.loads(re.search(r"const figures = (\{.*\}), boxes", running.scripts[1])[1])
    assert list(figures) == ["perplexity", "loss", "settings", "heat", "saved"]
    assert running.ids == list(figures)
    assert "Not drawn: it takes 4 trials with a score, and there are 3." in running.text


def test_the_facts_of_the_sweep(running):
    facts = running.text[running.text.rindex("The sweep") :]
    for fact in (
        "token store f00d train tokens 9,000 validation tokens 77",
        "budget of a trial 1,024 tokens trained in total 1,792 tokens",
        "space: train.learning_rate loguniform(0.0005, 0.02)",
        "scheduler asha seed 0",
        "took 1 min 15 s",
    ):
        assert fact in facts


def test_without_plotly_the_pictures_are_in_the_page(storage, monkeypatch):
    monkeypatch.setattr(figures, "plotly_js", lambda: None)
    built = Page(Path(html.build(f"{storage}/words/tune-20260101-000000-aaaa")).read_text(encoding="utf-8"))
    assert len(built.images) == 5
    assert {image[:22] for image in built.images} == {"data:image/png;base64,"}
    assert built.scripts == []
    assert "pip install 'raylm[plotly]'" in built.text


def test_a_sweep_without_a_result_says_why(storage):
    broken = [(TRIALS[2][0], [], "failed", "no memory")]
    directory = write_sweep(storage, "tune-20260104-000000-dddd", trials=broken, result_json={"error": "none is left"})
    built = shown(directory)
    assert "1 trial: 1 failed. none is left" in built.text
    empty = shown(write_sweep(storage, "tune-20260105-000000-eeee", trials=[]))
    assert (
        "No trial has started. The sweep had not finished when this was written. no trial has a score yet" in empty.text
    )


def test_settings_of_one_space_out_of_several(storage):
    space = "{choice: [{train.learning_rate: {loguniform: [1e-4, 1e-2]}}, {train.weight_decay: 0.1}]}"
    both = [
        ({RATE: 1e-3}, [(256, 60.0)], "completed", None),
        ({"train.weight_decay": 0.1}, [(256, 50.0)], "completed", None),
    ]
    directory = write_sweep(storage, "tune-20260106-000000-ffff", f"tune.space={{either: {space}}}", trials=both)
    results = sweeps.read(directory)
    assert results.data.samplers == {RATE: "loguniform", "train.weight_decay": "choice"}
    table = trial_table.columns(results.trials, "perplexity")
    assert (table["train.weight_decay"].cells, table[RATE].cells) == (["0.1", "-"], ["-", "0.001"])
    assert "1 trial_00001 50.00 3.12 256 256 0 70,000 - 0.1 completed" in shown(directory).text


def test_bits_per_byte_where_these_rank_the_trials(storage):
    directory = write_sweep(storage, "tune-20260107-000000-0000", "tune.metric=bits_per_byte", trials=TRIALS)
    assert "Validation bits per byte against training tokens" in shown(directory).text


# The verb ------------------------------------------------------------------------------------------------------------


def test_the_report_of_a_sweep_by_its_name(storage, monkeypatch):
    monkeypatch.chdir(storage.parent)
    answer = report(["tune-20260102-000000-bbbb"])
    place = f"{storage}/words/tune-20260102-000000-bbbb/report"
    assert answer.record["report"] == f"{place}/report.html"
    names = ("heat", "loss", "perplexity", "saved", "settings")
    assert answer.record["pictures"] == [f"{place}/{name}.png" for name in names]
    assert [trial["perplexity"] for trial in answer.record["trials"]] == [32.0, 50.0, 80.0, None], "on the same tokens"
    assert (answer.record["best"]["perplexity"], answer.record["best"]["checkpoint"]) == (31.5, "/there/model")
    assert f"trial_00002 failed: training diverged {EVIL}" in answer.view
    assert report([f"{storage}/words/tune-20260102-000000-bbbb"]).record == answer.record
    json.dumps(answer.record, allow_nan=False)


def test_what_is_no_sweep_is_refused_with_what_there_is(storage, monkeypatch):
    monkeypatch.chdir(storage.parent)
    with pytest.raises(
        StorageError,
        match=r"nix is no directory, no name under runs/\*/ here, and no experiment there; in runs there are",
    ):
        report(["nix"])
    with pytest.raises(StorageError, match=r"runs/words is not a sweep; in .*words there are .*, tune-20260101"):
        report(["runs/words"])
    with pytest.raises(StorageError, match=r"trial_00000 is not a sweep; did you mean .*/tune-20260101-000000-aaaa\?"):
        report(["runs/words/tune-20260101-000000-aaaa/trial_00000"])
    (storage / "trained" / "train-20260101-000000-aaaa").mkdir(parents=True)
    for given in ("trained", "runs/trained"):
        with pytest.raises(StorageError, match=f"{given} is not a sweep; in .*trained there are no sweeps; raylm tune"):
            report([given])
    (storage / "copy" / "tune-20260101-000000-aaaa").mkdir(parents=True)
    with pytest.raises(StorageError, match="is the name of runs/copy/.* and of runs/words/.*; give the directory"):
        report(["tune-20260101-000000-aaaa"])
    monkeypatch.chdir(storage / "tokens")
    with pytest.raises(StorageError, match="in runs there are no runs"):
        report(["nix"])


def test_a_sweep_that_was_stopped_before_its_first_trial_says_how_it_goes_on(tmp_path):
    directory = tmp_path / "words" / "tune-20260101-000000-aaaa"
    directory.mkdir(parents=True)
    (directory / "tracking.jsonl").touch()
    with pytest.raises(
        StorageError, match=r"tune-20260101-000000-aaaa has no trials yet: .* the command that began it"
    ):
        report([str(directory)])


def test_a_sweep_of_another_version_is_named(storage):
    directory = write_sweep(storage, "tune-20260108-000000-0000", trials=[])
    journal = Path(directory) / "tracking.jsonl"
    journal.write_text(journal.read_text().replace("max_tokens: 1024", "most_tokens: 1024"))
    with pytest.raises(ConfigError, match=r"tune-20260108-000000-0000: its experiment.*train.most_tokens: unknown key"):
        sweeps.read(directory)


def test_a_row_of_the_report_says_when_its_trial_was_best(storage):
    directory = write_sweep(
        storage, "tune-20260101-000000-cccc", trials=[({RATE: 1e-3}, [(256, 20.0)], "completed", None)]
    )
    SweepRecord(directory).result("trial_00000", {**result(1024, 90.0), "best_perplexity": 20.0, "best_step": 1})
    (row,) = sweeps.read(directory).trials
    assert (row.best_tokens, row.last_perplexity, row.tokens) == (256, 90.0, 1024)
    assert "completed; overfitted: 20 at 256 tokens, 90 at the end" in Path(html.build(directory)).read_text()


def test_a_sweep_is_found_by_the_name_of_its_experiment(storage, monkeypatch):
    monkeypatch.chdir(storage.parent)
    newest = write_sweep(storage.parent / "runs", "tune-20270101-000000-aaaa", trials=TRIALS)
    (storage / "words" / "train-20280101-000000-aaaa").mkdir()
    (storage.parent / "words").mkdir()  # the text of the experiment that is named after it
    assert report(["words"]).record["sweep"] == Path(newest).name


# Several sweeps ------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """(settings of the second, its store) -> the record of two sweeps' report, of which the second has other trials."""

    def make(*settings, store="f00d", counts=(5, 900, 0), tokenizer="one"):
        first = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials=TRIALS)
        others = [
            ({RATE: 3e-3, "train.weight_decay": 0.1}, [(256, 55.0), (512, 20.0)], "completed", None),
            ({RATE: 4e-3, "train.weight_decay": 0.2}, [(512, 30.0)], "completed", None),
        ]
        second = write_sweep(tmp_path, "tune-20260102-000000-bbbb", *settings, trials=others, store=store)
        for fingerprint, split, kind in (("f00d", (5, 900, 0), "one"), (store, counts, tokenizer)):
            names = ("documents", "bytes", "unknown_tokens")
            manifest = {
                "validation": {**dict(zip(names, split, strict=True)), "shards": [{"checksum": kind}]},
                "tokenizer": {"files": {"t": kind}},
            }
            (tmp_path / "tokens" / fingerprint).mkdir(parents=True, exist_ok=True)
            (tmp_path / "tokens" / fingerprint / "manifest.json").write_text(json.dumps(manifest))
        return report([first, second])

    return make


def test_trials_of_two_sweeps_are_ranked_at_equal_tokens(two):
    record = two("model.config.n_layer=3").record
    assert record["settings"] == {"model.config.n_layer": [2, 3]}
    assert (record["measure"], record["equal_tokens"], record["warnings"]) == ("perplexity", 256, [])
    ranked = [(trial["sweep"][-4:], trial["trial_id"][-1], trial["perplexity"]) for trial in record["trials"]]
    assert ranked == [("bbbb", "0", 55.0), ("aaaa", "0", 60.0), ("aaaa", "3", 70.0), ("aaaa", "1", 80.0)]
    assert record["best"] == record["trials"][0]
    page = Page(Path(record["report"]).read_text(encoding="utf-8"))
    assert "trial_00000 of tune-20260102-000000-bbbb is best: perplexity 55.00 at 256 training tokens" in page.text
    assert "the deepest that 4 trials reached; left out: 2 without a score there" in page.text
    assert "model.config.n_layer 2 3" in page.text
    assert "1 tune-20260102-000000-bbbb trial_00000 55.00 512 0.003 64 0.1" in page.text
    json.dumps(record, allow_nan=False)


def test_whether_the_best_sweep_is_really_better_is_told(tmp_path):
    """At equal tokens, which are those of step 1; the better score that bbbb has later does not count."""
    directories = [
        write_sweep(tmp_path, f"tune-2026010{number}-000000-{name}", trials=TRIALS)
        for number, name in ((1, "aaaa"), (2, "bbbb"))
    ]
    told = report(directories)
    assert told.record["trials"][1]["difference"]["not_compared"].startswith("no ")
    assert any("whether that is real cannot be told: no " in str(each) for each in told.view)
    for directory, worse in zip(directories, (0.0, 0.1), strict=True):
        for trial, more in (("trial_00000", 0.0), ("trial_00001", 0.3), ("trial_00003", 0.0)):
            keep(f"{directory}/{trial}", 1, worse + more)
    told = report(directories)
    best, *others = told.record["trials"]
    assert best["difference"]["as_good_as_best"]
    assert {other["difference"]["to"] for other in others} == {"trial_00000 of tune-20260101-000000-aaaa"}
    sentence = "trial_00000 of tune-20260101-000000-aaaa is better than trial_00000 of tune-20260102-000000-bbbb: "
    assert any(str(each).startswith(sentence) for each in told.view)
    page = Page(Path(told.record["report"]).read_text(encoding="utf-8"))
    assert sentence in page.text
    assert "perplexity as good as best tokens" in page.text
    assert "1 tune-20260101-000000-aaaa trial_00000 60.00 best 1,024" in page.text
    assert "no" in page.text.split("trial_00001 80.00 ")[1][:3]
    json.dumps(told.record, allow_nan=False)


def test_sweeps_with_other_tokenizers_are_ranked_by_bits_per_byte(two):
    record = two(store="beef", tokenizer="two").record
    assert record["measure"] == "bits_per_byte"
    assert record["warnings"] == [
        "the tokenizers differ, so that perplexities are of other tokens: compare bits per byte"
    ]
    assert [trial["bits_per_byte"] for trial in record["trials"]] == [55 / 16, 60 / 16, 70 / 16, 80 / 16]


@pytest.mark.parametrize(
    ("settings", "store"),
    [
        ([], {"store": "cafe", "counts": (6, 1000, 0)}),
        ([], {"store": "dead", "counts": (5, 900, 3), "tokenizer": "two"}),
        (["eval.max_tokens=64"], {}),
        (["eval.precision=bfloat16"], {}),
    ],
)
def test_sweeps_whose_scores_do_not_compare_have_no_best_trial(two, settings, store):
    answer = two(*settings, **store)
    assert (answer.record["measure"], answer.record["best"], answer.record["trials"]) == (None, None, [])
    assert len(answer.record["warnings"]) == 1
    assert "\nno trial of one sweep can be compared with one of another" in answer.view


def test_a_sweep_without_a_score_is_left_out_of_several(tmp_path):
    one = write_sweep(tmp_path, "tune-20260101-000000-aaaa", trials=TRIALS)
    empty = write_sweep(tmp_path, "tune-20260102-000000-bbbb", trials=[])
    with pytest.raises(ConfigError, match="tune-20260102-000000-bbbb has no trial with a score yet; leave it out"):
        report([one, empty])
