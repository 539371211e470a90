"""MLflow: one run per training, one parent run per sweep with a child run per trial; or no MLflow at all.

Everything is written to a journal in the run's own directory first, and a thread uploads it to MLflow from there. A
training neither waits for MLflow nor fails with it. A Run is a directory, not a context: it is sent to the worker that
logs, and is finished by the process that started it, because a killed worker finishes nothing.

journal      append-only JSON lines of metrics, parameters, tags and artifacts, written before MLflow is called
system       system metrics of a worker's machine
models       a model's directory -> MLflow's logged models and its registry
comparison   the page of MLflow that compares the trials of a sweep
failures     the ways in which a call to MLflow fails
server       one MLflow: its client, its experiments, messages about its failures
upload       one journal -> its run in MLflow, without duplicates
uploader     the background thread that uploads journals to one MLflow
run          a run: what is logged to it, its trials, its status
command      what commands do: start runs, find them, wait for uploads, name the page to open
"""

from raylm.tracking.command import (
    check_uri,
    find_runs,
    how_to_open,
    newest,
    problem,
    problem_of,
    start,
    wait_for_upload,
    wait_until_open,
)
from raylm.tracking.comparison import LINK as COMPARISON
from raylm.tracking.failures import display_uri
from raylm.tracking.run import (
    COMMIT_TAG,
    COST,
    COSTS,
    MEANING,
    PARAMETERS_TAG,
    PASSES_TAG,
    TASKS,
    TOKENS_TAG,
    Run,
    Status,
)

__all__ = [
    "COMMIT_TAG",
    "COMPARISON",
    "COST",
    "COSTS",
    "MEANING",
    "PARAMETERS_TAG",
    "PASSES_TAG",
    "TASKS",
    "TOKENS_TAG",
    "Run",
    "Status",
    "check_uri",
    "display_uri",
    "find_runs",
    "how_to_open",
    "newest",
    "problem",
    "problem_of",
    "start",
    "wait_for_upload",
    "wait_until_open",
]
