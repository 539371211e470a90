"""Train language models on your own text with Ray, Hugging Face and MLflow as one tool."""

__version__ = "0.1.0"
