"""Train language models on your own text with Ray, Hugging Face and MLflow as one tool."""

__version__ = "0.1.0"

DEFAULT_STORAGE = "runs"
"""The directory of runs if no setting says otherwise; also where a run is searched for by its name."""
