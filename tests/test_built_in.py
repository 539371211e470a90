"""The built-in experiment, as `make demo` runs it: minutes, so `make test-all`."""

import json
import math
import subprocess
import sys

import pytest
from mlflow import MlflowClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def tune(cwd, *settings):
    command = [sys.executable, "-m", "raylm.tune", "--json", *settings]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=700)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_main_job_twice(tmp_path):
    first = tune(tmp_path)
    assert len(first["trials"]) >= 6
    scores = [trial["perplexity"] for trial in first["trials"]]
    assert scores[0] * 1.5 < scores[-1], "the best trial is clearly better than the worst"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert len(runs) == 1 + len(first["trials"])
    assert {run.info.status for run in runs} == {"FINISHED"}
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    (parent,) = [run for run in runs if run not in children]
    (of_trials,) = {frozenset(run.data.params) for run in children}
    assert of_trials - set(parent.data.params) == set(first["best"]["settings"])
    assert all(math.isfinite(value) for run in runs for value in run.data.metrics.values())
    second = tune(tmp_path, "tune.num_samples=1", "train.max_tokens=40_000")
    assert (first["tokens_reused"], second["tokens_reused"]) == (False, True)
