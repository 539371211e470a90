"""MLflow: one run per training, one parent per sweep with a child per trial; or nothing at all.

Everything is written to a journal in the run's own directory first, and shipped to MLflow from there by a thread: a
training neither waits for MLflow nor fails with it. A Run is a directory, not a context: it travels to the worker that
logs, and is ended by the process that began it, since a killed worker ends nothing.

journal      what a run has to tell, on disk first: files of lines that only grow
system       how busy a worker's machine is
models       a model's directory -> MLflow's logged models and its registry
failures     what became of a call to MLflow: worth another try or not
shipment     one journal -> its run in MLflow; nothing twice
mlflow       one MLflow, and the thread that ships journals to it; nobody waits for it
run          a run, of which a command and its workers tell: parameters, points, artifacts, trials, its end
command      how a command begins runs, waits for MLflow at its end, finds runs, and says where to look
"""

from raylm.tracking.command import check, compare, how_to_look, problem, runs, settle, start
from raylm.tracking.failures import shown
from raylm.tracking.run import COMMIT, Run, Status

__all__ = ["COMMIT", "Run", "Status", "check", "compare", "how_to_look", "problem", "runs", "settle", "shown", "start"]
