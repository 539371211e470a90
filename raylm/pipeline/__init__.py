"""Plan -> result: each task of raylm from start to finish, for the commands and the Python API.

stores      the token stores that a plan needs, opened if they exist, else prepared
training    one training: tokens, training, export, score
sweep       many trainings: tokens, trials, ranking, export, score, report
proposal    a text and this machine -> an experiment, for raylm init
evaluation  the score of a model on text
where       two compared runs -> where they differ: their models, scored again
"""
