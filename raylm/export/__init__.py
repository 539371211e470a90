"""A checkpoint -> a plain Hugging Face directory with its model card, on disk or on the Hub.

Weights as safetensors, configuration, tokenizer, README.md (the card) and experiment.yaml. Only what
`model_files` lists is published, so no optimizer, random states or pickled files. On the Hub paths in the experiment
are reduced to names; `export` keeps them, and raylm.json, because the directory stays with its owner.

files         a trained model's directory -> the files that are published
model_card    the model card, and its metadata
directory     a checkpoint -> a plain Hugging Face directory: those files, the card, experiment.yaml, raylm.json
hub           a trained model and its card -> the Hugging Face Hub, as one commit
"""

from raylm.checkpoint.directory import EXPERIMENT
from raylm.export.directory import export
from raylm.export.files import Files, model_files, name_of, named, num_parameters, published
from raylm.export.model_card import build_card

__all__ = [
    "EXPERIMENT",
    "Files",
    "build_card",
    "export",
    "model_files",
    "name_of",
    "named",
    "num_parameters",
    "published",
]
