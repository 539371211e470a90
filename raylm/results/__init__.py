"""Runs and sweeps read back from their directories, and their presentation.

figures      the figures of a sweep
trial_table  the ranked table of a sweep's trials: rows, columns, cells
significance   which trials are as good as the best one
test_split     the best model's score on the test split, and whether the one on the validation split is too good
choices      the best trial of each optimizer, or of another setting that is chosen by name
repeats      which settings are better, by runs with other seeds
runs         a run or sweep, found by its directory or name
differences  which of several models is better, and whether that is real
where        in which parts of the text two models differ
sweep        a sweep's directory -> its experiment, trials, scores, best trial
live_table   the table of a sweep while it runs
training_progress   loss and perplexity of a training while it runs
tables       other tables for the terminal
compared_run   a run, trial, sweep, model or evaluation, with its scores, tokens and speed
compare      runs side by side, and whether their scores can be compared
several      sweeps side by side, and their trials ranked at equal tokens
html         the report of a sweep, or of several, as an HTML page
inspection   the data as a model will see it
coordinates  the sizes of activations by width, in the first steps: tables and a plot
"""
