"""Prompts -> texts.

writer       a model and prompts -> their texts, side by side and beyond the model's context
sampling     GenerationConfig: what is given, over what the model says, over raylm's own; checked
documents    what a model says to every document of a corpus, by workers
output       texts -> a .jsonl or .parquet file
"""

from raylm.generation.documents import GeneratedText, generate_texts
from raylm.generation.output import output_file
from raylm.generation.sampling import settings, taken
from raylm.generation.writer import TextGenerator, identity, load

__all__ = ["GeneratedText", "TextGenerator", "generate_texts", "identity", "load", "output_file", "settings", "taken"]
