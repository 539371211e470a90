import json
import re
import subprocess
import sys

import pytest

from raylm import config, ls, runs, storage
from raylm.checkpoint import CheckpointManager
from raylm.errors import StorageError
from raylm.results import runs as listing
from raylm.sweep.record import SweepRecord


@pytest.fixture
def experiment(tmp_path):
    return config.load(None, [f"storage={tmp_path}/runs", "name=words"])


def begin(experiment, verb="train", resume="never"):
    return runs.start_or_resume(experiment, verb, "abc", resume)


def test_the_state_of_each_run_and_what_resumes_it(experiment, tmp_path):
    finished = begin(experiment)
    finished.end({"perplexity": 12.5, "tokens": 4096})
    failed = begin(experiment)
    failed.end({"error": "no memory"})
    stopped = begin(experiment)
    CheckpointManager(f"{stopped.directory}/checkpoints").commit(40, {})
    stopped.lock.close()
    sweep = begin(experiment, "tune")
    record = SweepRecord(sweep.directory)
    record.add("trial_00000", {})
    record.result("trial_00000", {"step": 1, "tokens": 256, "perplexity": 30.0, "best_perplexity": 29.0})
    found = {run.directory: run for run in listing.listed(experiment.storage)}
    facts = {name: (run.kind, run.state, run.score, run.tokens, run.error) for name, run in found.items()}
    assert facts == {
        finished.directory: ("train", "finished", 12.5, 4096, None),
        failed.directory: ("train", "failed", None, 0, "no memory"),
        stopped.directory: ("train", "interrupted", None, 0, None),
        sweep.directory: ("tune", "running", 29.0, 256, None),
    }
    (resumed,) = [run for run in found.values() if run.resume]
    file = re.search(r"-m raylm.train --config (\S+)$", resumed.resume)[1]
    again = runs.start_or_resume(config.load(file), "train", "abc", "must")
    assert (again.directory, again.step) == (stopped.directory, 40)
    assert listing.listed(f"{tmp_path}/runs/words") == listing.listed(f"{tmp_path}/runs")


@pytest.mark.parametrize("verb", [("ls",), ("clean", "--dry-run"), ("report",), ("compare",)], ids=" ".join)
def test_commands_that_read_a_storage_import_no_library_that_trains(experiment, verb):
    sweep = begin(experiment, "tune")
    SweepRecord(sweep.directory).add("trial_00000", {})
    place = sweep.directory if verb[0] in ("report", "compare") else experiment.storage
    command = [sys.executable, "-X", "importtime", "-m", "raylm", *verb, place]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "raylm.results.runs" in imported
    assert imported & {"torch", "ray", "mlflow", "transformers", "datasets"} == set(), "they take seconds"


def test_looking_at_a_lock_leaves_it_as_it_is(experiment):
    active = begin(experiment)
    assert runs.is_locked(active.directory)
    active.lock.close()
    assert not runs.is_locked(active.directory)
    assert runs.start_or_resume(experiment, "train", "abc", "must").directory == active.directory


def test_a_place_is_a_directory_or_the_name_of_an_experiment(experiment, tmp_path, monkeypatch):
    active = begin(experiment)
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["words"], [f"{tmp_path}/runs"], [active.directory]):
        answer = ls.ls([*arguments, f"storage={tmp_path}/runs"])
        assert [run["name"] for run in answer.record["runs"]] == [active.name]
        json.dumps(answer.record)
    assert ls.ls([]).record["runs"][0]["name"] == active.name, "runs here, as of all commands"
    with pytest.raises(StorageError, match="letters is neither a directory nor an experiment in"):
        ls.ls(["letters"])


def test_the_size_of_a_run_is_that_of_all_its_files(tmp_path):
    storage.write(f"{tmp_path}/a", b"12345")
    storage.write(f"{tmp_path}/b/c", b"123")
    (tmp_path / "b" / "broken").symlink_to("nowhere")
    assert listing.num_bytes(str(tmp_path)) == 8 + len("nowhere")
