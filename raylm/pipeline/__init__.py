"""Plan -> result: each thing that raylm does from beginning to end, for the commands and for Python alike.

stores      the token stores that a plan needs: opened where they exist, else prepared
training    one training: tokens, training, export, score
sweep       many trainings: tokens, trials, ranking, export, score, report
proposal    a text and this machine -> an experiment, for raylm init
evaluation  the score of a model on text
"""
