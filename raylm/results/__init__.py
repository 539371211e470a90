"""Runs and sweeps read back from their directories, and what is shown of them.

figures     the figures of a sweep
"""
