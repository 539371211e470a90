"""YAML and command line -> experiment; experiment -> YAML.

The layers, each over the one before: defaults of the sections < environment < file < section.key=value. Without a file
the built-in experiment takes its place, unless a setting names the user's own text. All faults of a file and a command
line are reported at once.
"""

from __future__ import annotations

import copy
import io
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.scalarint import ScalarInt

from raylm import DEFAULT_STORAGE
from raylm.config.experiment import Experiment
from raylm.config.sections import Section, TrackingConfig, section_of
from raylm.config.setting_errors import config_error, exclusive_faults, faults_of, show
from raylm.config.space import corners, entry_fault, gaussian_process_fault, prior_fault, sampler_fault
from raylm.errors import ConfigError, first_line
from raylm.redaction import redacted

BUILT_IN = Path(__file__).parents[1] / "tiny.yaml"  # configs/tiny.yaml itself

MOST_NODES = 100_000  # a file of aliases of aliases ("billion laughs") unfolds to more

DRAWING: dict[str, Any] = {"tune.space": {}, "tune.points": [], "tune.prior": {}, "tune.prior_sweeps": []}
"""The settings that say how the settings of trials are drawn, as they are in a trial."""

SCHEMA_COMMENT = """\
# yaml-language-server: $schema=raylm.schema.json
# An editor checks and completes this file once that one is beside it: raylm tune --print-schema > raylm.schema.json
"""

Tree = dict[str, Any]
Part = typing.TypeVar("Part", bound=Section)


ENVIRONMENT = {"tracking.uri": "MLFLOW_TRACKING_URI", "tracking.experiment": "MLFLOW_EXPERIMENT_NAME"}
"""Variables that users of MLflow have set already. `cluster` reads RAY_ADDRESS, which belongs to a machine and not to
an experiment."""


def load(
    source: str | os.PathLike | Mapping[str, Any] | None = None, settings: Iterable[str] | Mapping[str, Any] = ()
) -> Experiment:
    """The checked experiment of a YAML file or mapping, with `settings` on top: section.key=value, or dotted keys.

    Without a file it is the built-in example, unless the settings name text (corpus.paths). Then nothing of the example
    applies, and train.batch_tokens, unless given, is derived later and need not fit the other settings yet.
    `model_fields_set` of a section holds the settings that were given. Local paths become absolute, because Ray's
    workers run in other directories.
    """
    is_typed = not isinstance(settings, Mapping)
    layer = dict(settings) if isinstance(settings, Mapping) else dict(map(parse_setting, settings))
    sizes_follow_text = source is None and _names_text(layer)
    if source is None and not sizes_follow_text:
        source = BUILT_IN
    tree: Tree = {}
    places: dict[str, str] = {}
    if isinstance(source, Mapping):
        tree = copy.deepcopy(dict(source))
    elif source is not None:
        tree, places = _read(Path(source))
    places |= dict.fromkeys(layer, "command line:" if is_typed else "argument:")
    return _checked(tree, places, layer, sizes_follow_text=sizes_follow_text)


def loads(text: str, name: str) -> Experiment:
    """The checked experiment of YAML text; errors call the text `name`."""
    tree, places = _parse(text, name)
    return _checked(tree, places, {}, sizes_follow_text=False)


def _checked(tree: Tree, places: dict[str, str], layer: Tree, *, sizes_follow_text: bool) -> Experiment:
    for key, variable in ENVIRONMENT.items():
        if os.environ.get(variable) and not _is_given(tree, key):
            _put(tree, {key: os.environ[variable]})
            places.setdefault(key, f"{variable}:")
    _put(tree, layer)
    experiment = _validate(tree, places, sizes_follow_text=sizes_follow_text)
    faults = [
        (f"tune.space.{key}", text)
        for key, sampler in experiment.tune.space.items()
        for text in _space_faults(experiment, key, sampler)
    ]
    if experiment.tune.searcher.sampler == "gp" and (fault := gaussian_process_fault(experiment.tune.space)):
        faults.append(("tune.searcher.sampler", fault))
    if not faults:  # of samplers
        faults = _prior_faults(experiment)
    for point in experiment.tune.points if experiment.tune.points != "suggested" else ():
        try:
            override(experiment, point)
        except ConfigError as error:
            faults.append(("tune.points", f"{show(point)}: {error.message}"))
    if faults:
        raise config_error(faults, places)
    return _absolute(experiment)


def _names_text(layer: Mapping[str, Any]) -> bool:
    """Whether one of these settings names text: corpus.paths, those of held-out text, or a whole section with them."""
    tree: Tree = {}
    _put(tree, {key: value for key, value in layer.items() if key.partition(".")[0] == "corpus"})
    section = tree.get("corpus")
    return isinstance(section, dict) and bool({"paths", "validation_paths", "test_paths"} & section.keys())


def from_environment(experiment: Experiment) -> dict[str, str]:
    """Dotted key -> environment variable, for the settings that have the variable's value."""
    return {
        key: variable
        for key, variable in ENVIRONMENT.items()
        if (value := os.environ.get(variable)) and get(experiment, key) in (value, _absolute_uri(value))
    }


def load_part(part: type[Part], settings: Iterable[str]) -> Part:
    """A part of an experiment from `section.key=value` settings, for commands that need only some sections."""
    layer = dict(parse_setting(setting) for setting in settings)
    tree: Tree = {}
    _put(tree, layer)
    try:
        return part.model_validate(tree)
    except ValidationError as error:
        faults = faults_of(error)
    raise config_error(faults, dict.fromkeys(layer, "command line:"))


def override(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """A copy with the dotted settings replaced, checked as a whole."""
    tree = experiment.model_dump(exclude_unset=True)  # unset fields stay unset
    _put(tree, settings)
    return _validate(tree, {}, sizes_follow_text=experiment.sizes_follow_text)


def of_trial(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment of a sweep's trial: with its settings, and without those that say how settings are drawn."""
    return override(experiment, {**settings, **DRAWING})


def get(experiment: Experiment, key: str) -> Any:
    """The value behind a dotted key."""
    value: Any = experiment
    for part in _parts(key):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part)
    return value


def dump(experiment: Experiment, *, comments: bool = False) -> str:
    """The whole experiment as YAML that loads again; with `comments`, each setting's description above it.

    With comments it is a file for people to start from: it tells editors where its schema is, and the default storage
    and MLflow stay relative paths, which work elsewhere, too. Passwords in addresses are removed, because the text is
    printed, saved beside checkpoints and sent to MLflow.
    """
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 120
    yaml.representer.ignore_aliases = lambda data: True
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    text.write(SCHEMA_COMMENT if comments else "")
    yaml.dump(_commented(_portable(experiment)) if comments else experiment.model_dump(mode="json"), text)
    return redacted(text.getvalue())


def _portable(experiment: Experiment) -> Experiment:
    """A copy with the default places as they are written in the sections, instead of as absolute paths."""
    tracking = experiment.tracking
    if experiment.storage == os.path.abspath(DEFAULT_STORAGE):
        experiment = experiment.model_copy(update={"storage": DEFAULT_STORAGE})
    if tracking.uri == _absolute_uri(TrackingConfig().uri):
        tracking = tracking.model_copy(update={"uri": TrackingConfig().uri})
    return experiment.model_copy(update={"tracking": tracking})


def outline(settings: Mapping[str, Any], reasons: Mapping[str, str], head: str) -> str:
    """A YAML file of only these settings, with a comment at its top and one above each setting that has a reason.

    `settings` and `reasons` have dotted keys.
    """
    tree: dict[str, Any] = {}
    _put(tree, settings)
    yaml = YAML()
    yaml.width = 120
    text = io.StringIO()
    yaml.dump(_outlined(tree, reasons), text)
    return redacted(f"# {head}\n\n{text.getvalue()}")


def settings_of(text: str) -> dict[str, Any]:
    """The settings of a config file by dotted keys, as `outline` takes them; not checked."""
    tree = YAML(typ="safe", pure=True).load(text)
    return {
        f"{section}.{name}" if isinstance(values, dict) else section: value
        for section, values in tree.items()
        for name, value in (values.items() if isinstance(values, dict) else [(section, values)])
    }


def save(experiment: Experiment, path: str | os.PathLike) -> None:
    Path(path).write_text(dump(experiment), encoding="utf-8")


# YAML --------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Tree, dict[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', None) or error}", where=str(path)) from None
    return _parse(text, str(path))


def _parse(text: str, name: str) -> tuple[Tree, dict[str, str]]:
    """The tree of YAML text, and the place of each dotted key: {"train.seed": "file.yaml:4:3"}."""
    try:
        places = _places(YAML(typ="safe", pure=True).compose(text), name)
        tree = YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        problem = first_line(error.problem)
        raise ConfigError(f"{name}:{mark.line + 1}:{mark.column + 1} {problem}", where=name) from None
    except YAMLError as error:
        raise ConfigError(f"{name}: {first_line(error)}", where=name) from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply; is an alias inside of its own anchor?", name) from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}:1:1 an experiment is made of sections (key: value), got {show(tree)}", name)
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
    """(dotted key, value) of `section.key=value`, with the value parsed as YAML.

    The value of a setting that takes text stays as typed, even if YAML reads it otherwise: {question}, [SEP], 007. Only
    null and quotes around the whole value mean what they do in YAML, as does [a, b] if the setting takes several texts.
    """
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        is_file = os.path.exists(os.path.expanduser(setting))
        way_out = f"--config {setting}" if setting.endswith((".yaml", ".yml")) else f"corpus.paths={setting}"
        hint = f"; did you mean {way_out}?" if is_file else ""
        raise ConfigError(f"{setting!r} is not a setting; write section.key=value{hint}", where=setting)
    takes = _kinds(key)
    takes_text = bool({str, tuple} & takes)
    is_text_alone = takes_text and not {tuple, dict} & takes
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError) as error:  # ValueError: it looks like a date but is none
        missing = "" if is_text_alone else _unclosed(text)
        if missing and not (takes_text and os.path.exists(os.path.expanduser(text))):
            way_out = f"; text that starts with a bracket needs quotes of its own, {key}='\"…\"'" if takes_text else ""
            raise ConfigError(f"{setting}: {missing} is missing at its end{way_out}", where=key) from None
        if takes_text:
            return key, text
        problem = first_line(getattr(error, "problem", error))
        raise ConfigError(f"{setting}: the value is not YAML: {problem}", where=key) from None
    is_quoted = isinstance(value, str) and text.lstrip()[:1] in ("'", '"')
    is_null = value is None and (text.strip() if text else takes != {str})
    has_shape = (isinstance(value, list) and tuple in takes) or (isinstance(value, dict) and dict in takes)
    return key, value if not takes_text or is_quoted or is_null or has_shape else text


def _unclosed(text: str) -> str:
    """The closing brackets that are missing at the end of a list or mapping: "]" for "[a, b"; "" if none are."""
    if text.lstrip()[:1] not in ("[", "{"):
        return ""
    awaited: list[str] = []
    for bracket in re.findall(r"[][{}]", re.sub(r"'[^']*'|\"[^\"]*\"", "", text)):
        if bracket in "[{":
            awaited.append("]" if bracket == "[" else "}")
        elif awaited and awaited[-1] == bracket:
            awaited.pop()
    return "".join(reversed(awaited))


def _kinds(key: str) -> set[type]:
    """Those of the types str, tuple (of texts), dict and NoneType that a setting takes."""
    *parents, last = _parts(key)
    section: Any = Experiment
    for part in parents:
        section = section_of(section, part)
    if parents in (["eval", "paths"], ["corpus", "paths"]):
        return {str, tuple}
    if section is None or last not in section.model_fields:
        return set()
    annotation = section.model_fields[last].annotation
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(annotation) if is_union else (annotation,)
    found: set[Any] = set()
    for member in members:
        plain = typing.get_args(member)[0] if typing.get_origin(member) is Annotated else member
        if plain == tuple[str, ...]:
            found.add(tuple)
        elif plain in (str, type(None)) or typing.get_origin(plain) is dict:
            found.add(typing.get_origin(plain) or plain)
    return found


def _parts(key: str) -> list[str]:
    # Their own keys may have dots.
    for section, field in (
        ("tune", "space"),
        ("tune", "prior"),
        ("eval", "paths"),
        ("corpus", "paths"),
        ("blocks", "mixture"),
    ):
        if key.startswith(f"{section}.{field}."):
            return [section, field, key.removeprefix(f"{section}.{field}.")]
    return key.split(".")


def _put(root: Tree, layer: Mapping[str, Any]) -> None:
    """Set one layer's dotted keys in a tree, and clear the settings that they exclude, unless this layer has those."""
    for key, value in layer.items():
        *parents, last = _parts(key)
        tree = root
        section: Any = Experiment
        for part in parents:
            if not isinstance(tree.get(part), dict):
                tree[part] = {}
            tree = tree[part]
            section = section_of(section, part)
        exclusive = section.exclusive if section else ()
        if last in exclusive and value is not None:
            for other in exclusive:
                if ".".join([*parents, other]) not in layer:
                    tree.pop(other, None)
        tree[last] = value


def _is_given(tree: Tree, key: str) -> bool:
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


# Checks ------------------------------------------------------------------------------------------------------------


def _validate(tree: Tree, places: Mapping[str, str], *, sizes_follow_text: bool) -> Experiment:
    try:
        return Experiment.model_validate(tree, context={"sizes_follow_text": sizes_follow_text})
    except ValidationError as error:
        faults = faults_of(error)
    raise config_error(faults + [fault for fault in _early_faults(tree) if fault not in faults], places)


def _early_faults(tree: Tree) -> Iterator[tuple[str, str]]:
    """Faults that pydantic checks only in an otherwise valid section, so that they are reported with the others."""
    yield from exclusive_faults(tree, Experiment)
    tune = tree.get("tune")
    space = tune.get("space") if isinstance(tune, dict) else None
    for key, sampler in space.items() if isinstance(space, dict) else ():
        if isinstance(sampler, dict) and (text := sampler_fault(key, sampler)):
            yield f"tune.space.{key}", text


def _space_faults(experiment: Experiment, key: str, sampler: dict[str, Any]) -> list[str]:
    """The faults of one entry of tune.space, found by applying its possible values to the experiment."""
    if fault := entry_fault(key, sampler):
        return [fault]
    faults: dict[str, str] = {}  # fault -> the first value that has it: an unknown key is one fault, not one per value
    for settings in corners(key, sampler):
        try:
            override(experiment, settings)
        except ConfigError as error:
            shown = f"value {show(settings[key])}" if key in settings else show(settings)
            for line in error.message.split("\n"):
                faults.setdefault(line, f"{shown}: {line}")
    return list(faults.values())


def _prior_faults(experiment: Experiment) -> list[tuple[str, str]]:
    section = experiment.tune
    faults = []
    for key, value in section.prior.items():
        fault = prior_fault(key, section.space[key], value)
        try:
            override(experiment, {key: value} if fault is None else {})
        except ConfigError as error:
            fault = error.message
        faults += [(f"tune.prior.{key}", fault)] if fault is not None else []
    return faults


# Paths and comments ------------------------------------------------------------------------------------------------


def _absolute(experiment: Experiment) -> Experiment:
    """Make local paths absolute; URIs, python:// sources and Hub ids stay as they are."""

    def local_or_id(path: str | None) -> str | None:
        return _local(path) if path and (path[0] in "./~" or os.path.exists(path)) else path

    found = {
        "storage": _local(experiment.storage),
        "corpus.paths": absolute(experiment.corpus.paths),
        "corpus.validation_paths": absolute(experiment.corpus.validation_paths),
        "corpus.test_paths": absolute(experiment.corpus.test_paths),
        "eval.paths": absolute(experiment.eval.paths),
        "tokenizer.path": local_or_id(experiment.tokenizer.path),
        "model.path": local_or_id(experiment.model.path),
        "tracking.uri": _absolute_uri(experiment.tracking.uri),
    }
    return override(experiment, {key: value for key, value in found.items() if value})


def absolute(paths: tuple[str, ...] | Mapping[str, tuple[str, ...]]) -> Any:
    """The same paths, named or not, with local ones absolute; URIs stay as they are."""
    if isinstance(paths, Mapping):
        return {name: absolute(some) for name, some in paths.items()}
    return tuple(map(_local, paths))


def _local(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _absolute_uri(uri: str | None) -> str | None:
    """The URI of an MLflow store, with an absolute path if it is a SQLite file."""
    if uri and uri.startswith("sqlite:///") and uri != "sqlite:///:memory:":
        return f"sqlite:///{os.path.abspath(os.path.expanduser(uri.removeprefix('sqlite:///')))}"
    return uri


def _outlined(tree: Mapping[str, Any], reasons: Mapping[str, str], key: str = "") -> CommentedMap:
    """A tree of settings with its comments, short values on one line, and a blank line before each section."""
    found = CommentedMap()
    for name, value in tree.items():
        dotted = f"{key}.{name}" if key else name
        is_section = not key and isinstance(value, dict)
        found[name] = _outlined(value, reasons, name) if is_section else _on_one_line(value)
        lines = textwrap.wrap(reasons.get(dotted, ""), 110)
        if is_section and found[name]:
            found.yaml_set_comment_before_after_key(name, before="\n")
        if lines:
            found.yaml_set_comment_before_after_key(name, before="\n".join(lines), indent=2 * bool(key))
    return found


def _on_one_line(value: Any) -> Any:
    """A mapping or list as `{a: 1}` or `[1, 2]`, unless it is long or holds mappings; a large number as 81_920."""
    if isinstance(value, dict):
        found = CommentedMap((name, _on_one_line(inner)) for name, inner in value.items())
        if len(str(value)) <= 100 and not any(isinstance(inner, dict) for inner in value.values()):
            found.fa.set_flow_style()
        return found
    if isinstance(value, (list, tuple)):
        items = CommentedSeq(_on_one_line(item) for item in value)
        items.fa.set_flow_style()
        return items
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return ScalarInt(value, underscore=[3, False, False])
    return value


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
