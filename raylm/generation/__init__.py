"""Prompts -> texts.

plan              what is asked for: model, settings, and prompts or the documents of a corpus; checked
settings          fields of GenerationConfig: what is given, else the model's own, else raylm's
text_generator    a model and prompts -> their texts, a batch at a time and beyond the model's context
documents         documents of a corpus -> their texts, by workers of Ray Data
output            texts -> a .jsonl or .parquet file
run               a plan -> the texts of its prompts, or the file with those of its documents
"""

from raylm.generation.output import output_file
from raylm.generation.plan import resolve
from raylm.generation.run import texts, write
from raylm.generation.settings import resolve_settings
from raylm.generation.text_generator import TextGenerator, load

__all__ = [
    "TextGenerator",
    "load",
    "output_file",
    "resolve",
    "resolve_settings",
    "texts",
    "write",
]
