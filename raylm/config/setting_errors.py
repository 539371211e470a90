"""Faults of an experiment, as (dotted key, what is wrong and what is accepted), and the one error that lists them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from raylm.config.experiment import Experiment
from raylm.config.names import meant_by, settings_named
from raylm.config.sections import Section, section_of
from raylm.errors import ConfigError, did_you_mean


def config_error(faults: list[tuple[str, str]], places: Mapping[str, str]) -> ConfigError:
    """An error with one line per fault and its place. `places`: dotted key -> where it is written."""
    return ConfigError("\n".join(_placed(key, text, places) for key, text in faults), where=faults[0][0])


def _placed(key: str, text: str, places: Mapping[str, str]) -> str:
    """`file.yaml:4:3 train.seed: text`, with the place of the nearest key that is written anywhere."""
    parts = key.split(".")
    inside = [written for written in places if written.startswith(f"{key}.")]
    named = [word for word in text.split() if "." in word]  # the keys with which a default conflicts
    around = [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
    place = next((places[near] for near in (key, *inside, *named, *around) if near in places), "")
    return f"{place} {key}: {text}".strip()


def faults_of(error: ValidationError) -> list[tuple[str, str]]:
    """The faults that pydantic has found."""
    return [_fault(details) for details in error.errors(include_url=False)]


def _fault(details: Any) -> tuple[str, str]:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    key = ".".join(str(part) for part in details["loc"])
    if kind == "exclusive":
        return _exclusive_fault(key, context["names"])
    if kind == "value_error" and not key:  # Experiment's own checks: "dotted.key must ..."
        key, _, text = str(context["error"]).partition(" ")
        return key, text
    if kind == "value_error":
        return key, str(context["error"])
    if kind == "dict_type" and key.startswith("tune.space."):
        return key, (
            f"must be a sampler, got {show(value)}; {{choice: [a, b]}} draws one of these values, "
            "{uniform: [low, high]} or {loguniform: [low, high]} any between"
        )
    if kind == "extra_forbidden":
        return key, _unknown(key)
    accepted = {
        "int_type": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "string_type": "text",
        "bool_type": "true or false",
        "dict_type": "a mapping (key: value)",
        "model_type": "a section (key: value)",
        "tuple_type": "text or a list of texts",
        "greater_than_equal": f"at least {context.get('ge')}",
        "greater_than": f"more than {context.get('gt')}",
        "less_than": f"less than {context.get('lt')}",
        "less_than_equal": f"at most {context.get('le')}",
        "literal_error": f"one of {context.get('expected')}".replace("False", "false"),
    }.get(kind)
    if accepted is None:
        return key, f"{details['msg']}, got {show(value)}"
    return key, f"must be {accepted}, got {show(value)}"


def _unknown(key: str) -> str:
    *parents, last = key.split(".")
    section: Any = Experiment
    for part in parents:
        section = section_of(section, part)
    if section is None:
        return "unknown key"
    known = list(section.model_fields)
    owner = f"section {'.'.join(parents)}" if parents else "an experiment"
    return f"unknown key{_guess(key, last, known)} {owner} takes: {', '.join(known)}"


def _guess(key: str, last: str, known: list[str]) -> str:
    """What an unknown key was to be: the setting for what another tool calls so, or a near one, here or elsewhere."""
    theirs = meant_by(key) or ""
    if theirs.startswith("nothing: "):
        return f"; raylm has no such setting: {theirs.removeprefix('nothing: ')};"
    if " " in theirs:
        return f"; use {theirs};"
    guess = f"did you mean {theirs}?" if theirs else did_you_mean(last, known)
    guess = guess or "".join(f"did you mean {named}?" for named in settings_named(last)[:1])
    return f", {guess}" if guess else ";"


def exclusive_faults(tree: Any, section: type[Section], key: str = "") -> Iterator[tuple[str, str]]:
    """The faults of settings that exclude each other. `key` is the place of the tree in the experiment."""
    if not isinstance(tree, dict):
        return
    if names := section.conflict(tree):
        yield _exclusive_fault(key, names)
    for name, value in tree.items():
        if inner := section_of(section, name):
            yield from exclusive_faults(value, inner, f"{key}.{name}".lstrip("."))


def _exclusive_fault(key: str, names: Sequence[str]) -> tuple[str, str]:
    *others, last = names
    return f"{key}.{last}", f"excludes {' and '.join(others)}; give one of them"


def show(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # as YAML writes it
    return text if len(text) <= 60 else text[:57] + "..."
