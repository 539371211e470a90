"""The JSON schema of an experiment, with which editors check and complete a config file.

It accepts whatever raylm accepts, in all the ways to write it. What depends on several settings together, on the
machine or on a library (fields of TrainingArguments, names of optimizers) only raylm itself can check.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from raylm.config.experiment import Experiment
from raylm.config.sections import Section, section_of
from raylm.config.space import NOT_SWEPT, SAMPLERS

# Numbers that raylm's reader of YAML knows as such, and other readers take for text: 81_920 (all of YAML 1.2), 1e-3 (of
# YAML 1.1).
WHOLE_NUMBER = "^[-+]?[0-9]+(_[0-9]+)+$"
NUMBER = "^[-+]?[0-9]+((_[0-9]+)+([.][0-9]*)?|[.]?[0-9]*[eE][-+]?[0-9]+)$"

FREE = ("model.config", "train.arguments", "blocks.mixture")
"""Settings whose own keys may be swept; raylm does not know all of them."""

KEYWORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
KEYWORDS_OF_LISTS = {"minLength": "minItems", "maxLength": "maxItems"}
"""Limits behind a BeforeValidator: pydantic gives them its own names there, and those of a list the names for text."""


def json_schema() -> dict[str, Any]:
    """The JSON schema of an experiment, as plain dicts and lists."""
    schema = Experiment.model_json_schema(schema_generator=_Generator)
    schema["$defs"]["Number"] = _or_text({"type": "number"}, NUMBER, "must be a number")
    schema["$defs"]["TuneConfig"]["properties"]["space"] |= _space()
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **schema,
        "title": "raylm experiment",
        "description": "An experiment of raylm: `raylm tune --config FILE`.",
    }


class _Generator(GenerateJsonSchema):
    """Of every setting the type, the limits and the help, in the words of JSON schema."""

    def int_schema(self, schema: Any) -> dict[str, Any]:
        return _or_text(super().int_schema(schema), WHOLE_NUMBER, "must be a whole number")

    def float_schema(self, schema: Any) -> dict[str, Any]:
        return _or_text(super().float_schema(schema), NUMBER, "must be a number")

    def model_schema(self, schema: Any) -> dict[str, Any]:
        """Of a section: at most one of the settings that exclude each other has a value."""
        found = super().model_schema(schema)
        section: type[Section] = schema["cls"]
        given = {name: {"not": {"type": "null"}} for name in section.exclusive}
        return {**found, "not": {"properties": given, "required": list(given)}} if given else found

    def generate(self, schema: Any, mode: Any = "validation") -> dict[str, Any]:
        return typing.cast("dict[str, Any]", _tidy(super().generate(schema, mode)))


def _or_text(number: dict[str, Any], pattern: str, message: str) -> dict[str, Any]:
    # Limits are of numbers alone, the pattern of text alone. Editors show patternErrorMessage; others ignore it.
    return {**number, "type": [number["type"], "string"], "pattern": pattern, "patternErrorMessage": message}


def _tidy(value: Any) -> Any:
    """The schema with the keywords of JSON schema, each description as one line, and no titles made of names."""
    if isinstance(value, list):
        return [_tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    takes_list = any(kind.get("type") == "array" for kind in value.get("anyOf", ()))
    keywords = {**KEYWORDS, **(KEYWORDS_OF_LISTS if takes_list else {})}
    found = {keywords.get(key, key): _tidy(item) for key, item in value.items()}
    if isinstance(found.get("title"), str):
        del found["title"]
    if isinstance(found.get("description"), str):
        found["description"] = found["description"].replace("\n", " ")
    if "patternProperties" in found:  # the names of sources and sets
        found["additionalProperties"] = False
    return found


def _space() -> dict[str, Any]:
    """Of tune.space: a sampler for each setting that can be swept, and whole spaces to choose from."""
    spaces = {"type": "array", "minItems": 1, "items": {"type": "object"}}
    return {
        "properties": {key: _sampled(section, name) for key, section, name in _swept(Experiment)},
        "patternProperties": {
            f"^({'|'.join(map(re.escape, FREE))})[.]": _sampler({}),
            "^[^.]+$": {
                "type": "object",
                "properties": {"choice": spaces, "grid": spaces},
                "additionalProperties": False,
                "minProperties": 1,
                "maxProperties": 1,
            },
        },
        "additionalProperties": False,
    }


def _swept(section: type[BaseModel], key: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """(dotted key, its section, its name there) of each setting that can be swept."""
    for name in section.model_fields:
        if key or name not in NOT_SWEPT:
            dotted = f"{key}.{name}".lstrip(".")
            inner = section_of(section, name)
            if key:
                yield dotted, section, name
            if inner is not None:
                yield from _swept(inner, dotted)


def _sampled(section: type[BaseModel], name: str) -> dict[str, Any]:
    """The sampler of a setting, whose values are those of the setting, with the setting's help."""
    help_text = {"description": (section.model_fields[name].description or "").replace("\n", " ")}
    return {**_sampler({"$ref": f"#/$defs/{section.__name__}/properties/{name}"}), **help_text}


def _sampler(value: dict[str, Any]) -> dict[str, Any]:
    """A sampler, by its name: a list of values, or the two ends of a range (and a step)."""
    properties: dict[str, Any] = {}
    for name, arguments in SAMPLERS.items():
        properties[name] = {"description": arguments, "type": "array", "items": value, "minItems": 1}
        if name not in ("choice", "grid"):
            count = 3 if name == "quniform" else 2
            properties[name] |= {"items": {"$ref": "#/$defs/Number"}, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
