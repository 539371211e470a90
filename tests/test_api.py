"""raylm from Python: in this process with a Ray that is there already, in a script of its own, in a notebook."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from raylm import api, config
from raylm.errors import ConfigError, DataError, StorageError

NOTEBOOK = Path(__file__).parents[1] / "examples" / "folder_to_sweep.ipynb"


@pytest.fixture(scope="module")
def sections(tiny, tmp_path_factory):
    """A small experiment as a mapping of sections, with a storage of its own."""
    found = tiny(f"storage={tmp_path_factory.mktemp('runs')}").model_dump(mode="json", exclude_unset=True)
    return found | {"tracking": {"uri": None}}


def test_an_experiment_is_made_of_a_file_a_mapping_sections_and_dotted_settings(sections, tmp_path):
    file = tmp_path / "own.yaml"
    config.save(config.load(sections), file)
    expected = config.override(config.load(sections), {"train.seed": 5, "train.precision": "bfloat16"})
    for source in (file, str(file), sections):
        assert api.load(source, train={"seed": 5, "precision": "bfloat16"}) == expected
        assert api.load(source, **{"train.seed": 5, "train.precision": "bfloat16"}) == expected
    assert api.load(corpus={"paths": [tmp_path]}).corpus.paths == (str(tmp_path),)


def test_all_wrong_settings_are_named(sections):
    with pytest.raises(ConfigError) as error:
        api.load(sections, train={"seed": "x", "learning_rat": 1})
    first, second = error.value.message.splitlines()
    assert first == "argument: train.seed: must be a whole number, got 'x'"
    assert second.startswith("argument: train.learning_rat: unknown key, did you mean learning_rate?")


def test_train_and_evaluate_give_typed_results(ray_cluster, sections):
    experiment = api.load(sections)
    store = api.prepare(experiment)
    assert api.open_store(store.path).train.num_tokens == store.train.num_tokens > 1000
    first, second = (api.train(experiment, resume="never") for _ in range(2))
    assert (first.steps, first.tokens, first.measure) == (10, 2560, "perplexity")
    assert first.score == second.score
    score = api.evaluate(first.checkpoint)
    assert score.perplexity == pytest.approx(first.score, rel=1e-6)
    assert score.bits_per_byte == pytest.approx(first.bits_per_byte, rel=1e-6)
    assert "perplexity" in first._repr_html_()
    assert "bits/byte" in score._repr_html_()
    comparison = api.compare(Path(first.checkpoint).parent, second.checkpoint)
    assert comparison.warnings == []
    assert [each.as_good_as_best for each in comparison.differences] == [True, True]
    assert score.perplexity_interval.low < score.perplexity < score.perplexity_interval.high
    assert score.bits_per_byte_interval.low < score.bits_per_byte < score.bits_per_byte_interval.high
    assert (first.score_low, first.score_high) == pytest.approx(score.perplexity_interval, rel=1e-6)
    (text,) = api.generate(first.checkpoint, "the cat", seed=1, max_new_tokens=5)
    assert text.startswith("the cat")
    assert [text] == api.generate(first.checkpoint, ["the cat"], seed=1, max_new_tokens=5)
    shown = api.inspect(experiment)
    assert shown.record["store"] == store.path
    assert "sat" in shown._repr_html_()
    told = Path(first.checkpoint, "..", "run.log").read_text()
    assert "INFO raylm.console: Training …" in told


def test_tune_gives_a_ranked_table(ray_cluster, sections):
    space = {"train.learning_rate": {"grid": [1e-2, 2e-2]}}
    experiment = api.load(sections, tune={"space": space, "num_samples": 1, "scheduler": "none"})
    result = api.tune(experiment)
    table = result.to_pandas()
    assert table["perplexity"].is_monotonic_increasing
    assert {*table["train.learning_rate"]} == {1e-2, 2e-2}
    assert result.best.perplexity == table["perplexity"].iloc[0]
    assert result.best.settings["train.learning_rate"] == table["train.learning_rate"].iloc[0]
    again = api.open_sweep(Path(result.report).parents[1])
    assert again.best.trial_id == result.best.trial_id
    assert "00001" in result._repr_html_()


def test_errors_are_those_of_raylm(sections, tmp_path):
    with pytest.raises(DataError, match=r"corpus\.paths.*nowhere"):
        api.prepare(api.load(sections, **{"corpus.paths": "/nowhere/*.txt"}))
    with pytest.raises(ConfigError, match=r"^tune\.space is empty"):
        api.tune(api.load(sections, tune={"space": {}}))
    with pytest.raises(StorageError, match="is not a sweep"):
        api.open_sweep(tmp_path)


SCRIPT = """
import json, sys
from raylm import api

result = api.train(api.load(json.loads(sys.argv[1])))
print(result.score)
"""


def test_a_script_needs_no_guard_and_hears_nothing_it_did_not_ask_for(sections, tmp_path):
    """Its worker is another process, which does not run the script again."""
    (tmp_path / "script.py").write_text(SCRIPT)
    changed = {**sections, "storage": str(tmp_path / "runs")}
    command = [sys.executable, tmp_path / "script.py", json.dumps(changed)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert len(ended.stdout.split()) == 1


def test_messages_go_to_the_programs_own_logging(caplog, sections):
    with caplog.at_level(logging.INFO, "raylm"):
        logging.getLogger("raylm").propagate = True
        api.evaluate(api.train(api.load(sections)).checkpoint)
    assert "Training …" in caplog.messages


@pytest.mark.slow
def test_the_notebook_runs_from_a_folder_of_text_to_a_compared_sweep(tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("perplexity" in output["data"].get("text/html", "") for output in shown)
