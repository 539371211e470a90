"""Prompts -> texts.

settings          fields of GenerationConfig: what is given, else the model's own, else raylm's; checked
text_generator    a model and prompts -> their texts, a batch at a time and beyond the model's context
documents         documents of a corpus -> their texts, by workers of Ray Data
output            texts -> a .jsonl or .parquet file
"""

from raylm.generation.documents import GeneratedText, generate_texts
from raylm.generation.output import output_file
from raylm.generation.settings import SETTINGS, resolve_settings
from raylm.generation.text_generator import TextGenerator, load

__all__ = ["SETTINGS", "GeneratedText", "TextGenerator", "generate_texts", "load", "output_file", "resolve_settings"]
