"""YAML and command line -> experiment; experiment -> YAML.

The layers, each over the one before: defaults of the sections < file < section.key=value. Without a file the built-in
experiment stands in its place. All faults of a file and a command line are told at once.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from raylm.config.sections import Experiment, Section
from raylm.errors import ConfigError

BUILT_IN = Path(__file__).parents[1] / "tiny.yaml"  # configs/tiny.yaml itself

MOST_NODES = 100_000  # a file of aliases of aliases ("billion laughs") unfolds to more

SAMPLERS = {
    "uniform": "[low, high]",
    "loguniform": "[low, high]",
    "quniform": "[low, high, step]",
    "randint": "[low, high), whole numbers",
    "lograndint": "[low, high), whole numbers",
    "choice": "[a, b, ...], drawn",
    "grid": "[a, b, ...], all of them",
}

NOT_SWEPT = ("name", "storage", "corpus", "tokenizer", "cluster", "eval", "tracking", "tune")

Tree = dict[str, Any]
Part = typing.TypeVar("Part", bound=Section)


def load(path: str | os.PathLike | None = None, settings: Iterable[str] = ()) -> Experiment:
    """The checked experiment of a YAML file (default: the built-in one) with `section.key=value` settings on top.

    Local paths are absolute afterwards, since Ray's workers run in directories of their own.
    """
    tree, lines = _read(Path(path) if path is not None else BUILT_IN)
    layer = dict(parse_setting(setting) for setting in settings)
    _put(tree, layer)
    places = lines | dict.fromkeys(layer, "command line:")
    experiment = _validate(tree, places)
    faults = [
        (f"tune.space.{key}", text)
        for key, sampler in experiment.tune.space.items()
        for text in _space_faults(experiment, key, sampler)
    ]
    for point in experiment.tune.points:
        try:
            override(experiment, point)
        except ConfigError as error:
            faults.append(("tune.points", f"{_show(point)}: {error.message}"))
    if faults:
        raise _error(faults, places)
    return _absolute(experiment)


def load_part(part: type[Part], settings: Iterable[str]) -> Part:
    """Some sections of an experiment alone, of `section.key=value` settings: for commands that need no more of it."""
    layer = dict(parse_setting(setting) for setting in settings)
    tree: Tree = {}
    _put(tree, layer)
    try:
        return part.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(details) for details in error.errors(include_url=False)]
    raise _error(faults, dict.fromkeys(layer, "command line:"))


def override(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """A copy with the dotted settings replaced, checked as a whole."""
    tree = experiment.model_dump()
    _put(tree, settings)
    return _validate(tree, {})


def get(experiment: Experiment, key: str) -> Any:
    """The value behind a dotted key."""
    value: Any = experiment
    for part in _parts(key):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def dump(experiment: Experiment, *, comments: bool = False) -> str:
    """The whole experiment as YAML, loadable again; with each setting's description as a comment on request.

    Without the passwords of URIs: this is printed, kept beside checkpoints and sent to MLflow.
    """
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.representer.ignore_aliases = lambda data: True
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml.dump(_commented(experiment) if comments else experiment.model_dump(mode="json"), text)
    return re.sub(r"(://[^/@:\s]*):[^/@\s]*@", r"\1@", text.getvalue())


def save(experiment: Experiment, path: str | os.PathLike) -> None:
    Path(path).write_text(dump(experiment), encoding="utf-8")


# YAML --------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Tree, dict[str, str]]:
    """The file's tree, and where each dotted key stands: {"train.seed": "file.yaml:4:3"}."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', None) or error}", where=str(path)) from None
    try:
        places = _places(YAML(typ="safe", pure=True).compose(text), str(path))
        tree = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        problem = str(error.problem).split("\n")[0]
        raise ConfigError(f"{path}:{mark.line + 1}:{mark.column + 1} {problem}", where=str(path)) from None
    except YAMLError as error:
        problem = str(error).split("\n")[0]
        raise ConfigError(f"{path}: {problem}", where=str(path)) from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; is an alias inside of its own anchor?", str(path)) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1:1 an experiment is made of sections (key: value), got {_show(tree)}", str(path))
    return tree, places


def _places(root: Node | None, name: str) -> dict[str, str]:
    places: dict[str, str] = {}
    visited = 0

    def walk(node: Node | None, prefix: str) -> None:
        nonlocal visited
        visited += 1
        if visited > MOST_NODES:
            raise YAMLError(f"more than {MOST_NODES} values; are there aliases of aliases?")
        if isinstance(node, MappingNode):
            for key, value in node.value:
                dotted = f"{prefix}{key.value}"
                places[dotted] = f"{name}:{key.start_mark.line + 1}:{key.start_mark.column + 1}"
                walk(value, f"{dotted}.")
        elif isinstance(node, SequenceNode):
            for item in node.value:
                walk(item, prefix)

    walk(root, "")
    return places


# Command line and overrides ----------------------------------------------------------------------------------------


def parse_setting(setting: str) -> tuple[str, Any]:
    """(dotted key, value) of `section.key=value`, the value as YAML has it."""
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{setting!r} is not a setting; write section.key=value", where=setting)
    try:
        return key.strip(), YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        problem = str(getattr(error, "problem", error)).split("\n")[0]
        raise ConfigError(f"{setting}: the value is not YAML: {problem}", where=key) from None


def _parts(key: str) -> list[str]:
    for section, field in (("tune", "space"), ("eval", "paths")):  # whose own keys may have dots
        if key.startswith(f"{section}.{field}."):
            return [section, field, key.removeprefix(f"{section}.{field}.")]
    return key.split(".")


def _put(root: Tree, layer: Mapping[str, Any]) -> None:
    """Set one layer's dotted keys in a tree. What they exclude is cleared, unless this layer gave it too."""
    for key, value in layer.items():
        *parents, last = _parts(key)
        tree = root
        section: Any = Experiment
        for part in parents:
            if not isinstance(tree.get(part), dict):
                tree[part] = {}
            tree = tree[part]
            section = _section_of(section, part)
        exclusive = section.exclusive if section else ()
        if last in exclusive and value is not None:
            for other in exclusive:
                if ".".join([*parents, other]) not in layer:
                    tree.pop(other, None)
        tree[last] = value


def _section_of(section: type[BaseModel] | None, name: str) -> Any:
    """The section class that a field of a section holds, or None."""
    field = section.model_fields.get(name) if section else None
    kinds = (field.annotation, *typing.get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


# Faults ------------------------------------------------------------------------------------------------------------


def _validate(tree: Tree, places: Mapping[str, str]) -> Experiment:
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(details) for details in error.errors(include_url=False)]
    raise _error(faults + [fault for fault in _early_faults(tree) if fault not in faults], places)


def _error(faults: list[tuple[str, str]], places: Mapping[str, str]) -> ConfigError:
    return ConfigError("\n".join(_placed(key, text, places) for key, text in faults), where=faults[0][0])


def _early_faults(tree: Tree) -> Iterator[tuple[str, str]]:
    """The faults that are looked for only in a sound section, told already when something in it is not sound."""
    yield from _exclusive_faults(tree, Experiment)
    tune = tree.get("tune")
    space = tune.get("space") if isinstance(tune, dict) else None
    for key, sampler in space.items() if isinstance(space, dict) else ():
        if isinstance(sampler, dict) and (text := _sampler_fault(key, sampler)):
            yield f"tune.space.{key}", text


def _exclusive_faults(tree: Any, section: type[Section], key: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(tree, dict):
        return
    if names := section.conflict(tree):
        yield _exclusive_fault(key, names)
    for name, value in tree.items():
        if inner := _section_of(section, name):
            yield from _exclusive_faults(value, inner, f"{key}.{name}".lstrip("."))


def _exclusive_fault(key: str, names: Sequence[str]) -> tuple[str, str]:
    *others, last = names
    return f"{key}.{last}", f"excludes {' and '.join(others)}; give one of them"


def _placed(key: str, text: str, places: Mapping[str, str]) -> str:
    """`file.yaml:4:3 train.seed: text`, with the place of the nearest key that was written down."""
    parts = key.split(".")
    inside = [written for written in places if written.startswith(f"{key}.")]
    told = [word for word in text.split() if "." in word]  # the keys that a default does not go together with
    around = [".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1)]
    place = next((places[near] for near in (key, *inside, *told, *around) if near in places), "")
    return f"{place} {key}: {text}".strip()


def _fault(details: Any) -> tuple[str, str]:
    """(dotted key, what is wrong and what is accepted) for one of pydantic's errors."""
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    key = ".".join(str(part) for part in details["loc"])
    if kind == "exclusive":
        return _exclusive_fault(key, context["names"])
    if kind == "value_error" and not key:  # Experiment's own checks: "dotted.key must ..."
        key, _, text = str(context["error"]).partition(" ")
        return key, text
    if kind == "value_error":
        return key, str(context["error"])
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
        "literal_error": f"one of {context.get('expected')}",
        "string_pattern_mismatch": f"text like {context.get('pattern')}",
    }.get(kind)
    if accepted is None:
        return key, f"{details['msg']}, got {_show(value)}"
    return key, f"must be {accepted}, got {_show(value)}"


def _unknown(key: str) -> str:
    *parents, last = key.split(".")
    section: Any = Experiment
    for part in parents:
        section = _section_of(section, part)
    if section is None:
        return "unknown key"
    known = list(section.model_fields)
    near = difflib.get_close_matches(last, known, n=1)
    everywhere = [
        f"{name}.{setting}"
        for name in Experiment.model_fields
        if (inner := _section_of(Experiment, name))
        for setting in inner.model_fields
    ]
    elsewhere = [full for full in everywhere if full.split(".")[1] == last]
    guess = f", did you mean {near[0]}?" if near else f", did you mean {elsewhere[0]}?" if elsewhere else ""
    owner = f"section {'.'.join(parents)}" if parents else "an experiment"
    return f"unknown key{guess or ';'} {owner} takes: {', '.join(known)}"


def _show(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # as YAML says it
    return text if len(text) <= 60 else text[:57] + "..."


def _space_faults(experiment: Experiment, key: str, sampler: dict[str, Any]) -> list[str]:
    """What is wrong with one entry of tune.space; every value it can give is tried on the experiment."""
    if fault := _entry_fault(key, sampler):
        return [fault]
    faults: dict[str, str] = {}  # fault -> the first value that has it: an unknown key is one fault, not one a value
    for settings in corners(key, sampler):
        try:
            override(experiment, settings)
        except ConfigError as error:
            shown = f"value {_show(settings[key])}" if key in settings else _show(settings)
            for line in error.message.split("\n"):
                faults.setdefault(line, f"{shown}: {line}")
    return list(faults.values())


def _entry_fault(key: str, sampler: dict[str, Any]) -> str | None:
    """What is wrong with one entry of tune.space whatever the experiment."""
    inner_spaces = spaces(key, sampler)
    if inner_spaces is None:
        return _sampler_fault(key, sampler)
    for number, space in enumerate(inner_spaces, 1):
        for inner, value in space.items():
            if "." not in str(inner):
                return f"space {number}: {inner} must be a dotted key; spaces in spaces are not taken"
            if is_sampler(value) and "grid" in value:
                return f"space {number}: {inner} must be drawn, got a grid; make it a choice"
            if fault := _sampler_fault(inner, value if is_sampler(value) else {"choice": [value]}):
                return f"space {number}: {inner} {fault}"
    return None


def spaces(key: str, sampler: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The spaces that an entry of tune.space chooses from; None if it is a setting's. Such an entry has no dot."""
    values = next(iter(sampler.values()), None) if {*sampler} <= {"choice", "grid"} else None
    chosen = "." not in str(key) and isinstance(values, list) and all(isinstance(value, dict) for value in values)
    return values if chosen else None


def is_sampler(value: Any) -> bool:
    """Whether a value in a space is drawn, rather than one that is set."""
    return isinstance(value, dict) and len(value) == 1 and {*value} <= {*SAMPLERS}


def _sampler_fault(key: str, sampler: dict[str, Any]) -> str | None:
    """What is wrong with a sampler of a setting."""
    section = str(key).split(".")[0]
    if section in NOT_SWEPT:
        return f"{section} is one for a whole sweep; sweep model, blocks, objective or train settings"
    known = ", ".join(f"{name} {arguments}" for name, arguments in SAMPLERS.items())
    if len(sampler) != 1:
        return f"takes one sampler, got {_show(sampler)}; samplers: {known}"
    ((name, values),) = sampler.items()
    if name not in SAMPLERS:
        near = difflib.get_close_matches(str(name), SAMPLERS, n=1)
        return f"unknown sampler {name}{f', did you mean {near[0]}?' if near else ';'} samplers: {known}"
    if not isinstance(values, list) or not values:
        return f"{name} takes {SAMPLERS[name]}, got {_show(values)}"
    if name in ("choice", "grid"):
        return None
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    count = 3 if name == "quniform" else 2
    if not numbers or len(values) != count or values[0] >= values[1]:
        return f"{name} takes {SAMPLERS[name]} with low < high, got {_show(values)}"
    if name.startswith("log") and values[0] <= 0:
        return f"{name} needs low > 0, got {values[0]}"
    return None


def corners(key: str, sampler: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that stand for all that an entry of tune.space can give: each choice, or both ends of a range."""
    inner_spaces = spaces(key, sampler)
    if inner_spaces is not None:
        found = []
        for space in inner_spaces:
            each = {inner: _ends(value) if is_sampler(value) else [value] for inner, value in space.items()}
            first = {inner: ends[0] for inner, ends in each.items()}
            found += [first, *({**first, inner: end} for inner, ends in each.items() for end in ends[1:])]
        return found
    return [{key: value} for value in _ends(sampler)]


def _ends(sampler: Mapping[str, Any]) -> list[Any]:
    ((name, values),) = sampler.items()
    if name in ("choice", "grid"):
        return list(values)
    return [values[0], values[1] - 1 if name.endswith("randint") else values[1]]


# Paths and comments ------------------------------------------------------------------------------------------------


def _absolute(experiment: Experiment) -> Experiment:
    """Local paths made absolute; URIs, python:// sources and Hub ids as they are."""

    def local(path: str) -> str:
        return path if "://" in path else os.path.abspath(os.path.expanduser(path))

    def local_or_id(path: str | None) -> str | None:
        return local(path) if path and (path[0] in "./~" or os.path.exists(path)) else path

    given = experiment.eval.paths
    uri = experiment.tracking.uri
    if uri and uri.startswith("sqlite:///") and uri != "sqlite:///:memory:":
        uri = "sqlite:///" + local(uri.removeprefix("sqlite:///"))
    return override(
        experiment,
        {
            "storage": local(experiment.storage),
            "corpus.paths": [local(path) for path in experiment.corpus.paths],
            "corpus.validation_paths": [local(path) for path in experiment.corpus.validation_paths],
            "eval.paths": {name: [local(path) for path in paths] for name, paths in given.items()}
            if isinstance(given, Mapping)
            else [local(path) for path in given],
            "tokenizer.path": local_or_id(experiment.tokenizer.path),
            "model.path": local_or_id(experiment.model.path),
            "tracking.uri": uri,
        },
    )


def _commented(section: BaseModel, depth: int = 0) -> CommentedMap:
    """The section's values with the description of each field above it."""
    tree = CommentedMap()
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        tree[name] = _commented(value, depth + 1) if isinstance(value, BaseModel) else plain[name]
        if field.description:
            tree.yaml_set_comment_before_after_key(name, before=field.description, indent=2 * depth)
    return tree
