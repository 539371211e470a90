"""What a published model directory holds, and the model card in it.

A plain Hugging Face directory: weights as safetensors, configuration, tokenizer, README.md (the card) and
experiment.yaml. What is not listed here stays behind: optimizer, random states, whatever is pickled. On the Hub the
experiment has its places by their names; `export` leaves it as it is, with raylm.json, since it stays on this machine.

files        a trained model's directory -> the files of it that are published; places by their names alone
text         the model card
directory    a checkpoint -> a plain Hugging Face directory with its card, whole or not at all
"""

from raylm.checkpoint.directory import EXPERIMENT
from raylm.export.directory import export
from raylm.export.files import Files, model_files, name_of, named, parameters, published
from raylm.export.model_card import CARD, HERE, SETTINGS, build

__all__ = [
    "CARD",
    "EXPERIMENT",
    "HERE",
    "SETTINGS",
    "Files",
    "build",
    "export",
    "model_files",
    "name_of",
    "named",
    "parameters",
    "published",
]
