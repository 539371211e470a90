"""From small to large: the law that the trials of sweeps follow, and what it says of a training not yet run.

law           L(N, D) = E + A N^-alpha + B D^-beta: fit, intervals, the best size for a given compute
observations  size, training tokens and score of every training of a sweep that came to the end of its schedule
settings      power laws of the best learning rate and batch
prediction    score, settings, cost and command of a larger training
result        all of these together, for the screen and --json
figure        score against compute
"""
