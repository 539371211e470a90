"""Plan -> result: each task of raylm from start to finish, for the commands and the Python API.

stores      the token stores that a plan needs, opened if they exist, else prepared
lifecycle   a run or sweep from its start to its end: its directory and its run in MLflow
arithmetic  the arithmetic of a run or sweep, decided once where it is auto
training    one training: tokens, training, export, score
ranking     the trials of a sweep, ranked; the best one exported; what MLflow is told of both
extension   a sweep goes on with more trials
running_sweep    what other commands ask of a sweep
earlier     the trials of earlier sweeps, as observations of a new one
sweep       many trainings: tokens, trials, ranking, report
proposal    a text and this machine -> an experiment, for raylm init
evaluated_model    the model that is evaluated: a directory, a run's, a sweep's, the Hub's
evaluation  the score of a model on text, and on tasks
where       two compared runs -> where they differ: their models, scored again
"""
