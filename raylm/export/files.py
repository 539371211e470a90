"""A trained model's directory -> the files of it that are published; places by their names alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.config import Experiment
from raylm.errors import StorageError
from raylm.redaction import redacted

Files = dict[str, Path | bytes]
"""Name in the published directory -> the file that is published, or its content."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip

WHOSE = ("storage", "cluster.address", "tracking.uri", "tracking.experiment")
"""Settings of the machine and not of the model: they are sent as their defaults."""
PLACE = re.compile(r"(^|[._])(paths?|file|dir|uri)$|(^|\.)(arguments|config)(\.|$)")
"""The keys of an experiment and of a model's configuration whose values are places, or may be: those of free mappings.
The others stay as they are: a keyword or a pattern may well start with a slash."""
SECRET = re.compile(r"(token|secret|password|key)$")
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def model_files(directory: Path) -> Files:
    """The model, generation config and tokenizer of a directory; StorageError if they are not whole."""
    try:
        names = [WEIGHTS]
        if (directory / INDEX).exists():
            names = [INDEX, *sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))]
        found = [name for name in CONFIGS if (directory / name).exists()]
        configs: dict[str, dict[str, Any]] = {name: dict(json.loads((directory / name).read_bytes())) for name in found}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StorageError(f"{directory} has a configuration that is damaged: {error}", str(directory)) from None
    files: Files = {}
    for name in names:
        path = directory / name
        if not path.exists() or Path(name).name != name:
            pickled = next(directory.glob("*.bin"), None)
            hint = f" ({pickled.name} is pickled, and loading a pickle runs code in it)" if pickled else ""
            raise StorageError(
                f"{directory} holds no {name}{hint}; save the model there with save_pretrained", where=str(path)
            )
        files[name] = path
    for name in TOKENIZER:
        if (directory / name).exists():
            files[name] = directory / name
    if not any(name in files for name in TOKENIZER):
        raise StorageError(
            f"{directory} holds no tokenizer, and a model is of no use without; save it there with save_pretrained",
            where=str(directory),
        )
    if any("auto_map" in settings for settings in configs.values()):  # a model with code of its own
        files |= {file.name: file for file in directory.glob("*.py")}
    for name, settings in configs.items():
        shown = named(settings)  # older versions of transformers wrote down where a model was loaded from
        files[name] = directory / name if shown == settings else (json.dumps(shown, indent=2) + "\n").encode()
    return files


def parameters(directory: Path, files: Files) -> int:
    """How many numbers the weights are, by their headers; StorageError naming the file that is torn."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in (directory / name for name in files if name.endswith(".safetensors")):
        try:
            with safe_open(path, framework="np") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise StorageError(f"{path} cannot be loaded: {error}", where=str(path)) from None
    return count


def published(experiment: Experiment) -> Experiment:
    """The experiment without what is its owner's own affair: places by their names, the machine's settings left out."""
    tree = named(experiment.model_dump())
    for key in WHOSE:
        *parents, last = key.split(".")
        owner = tree
        for part in parents:
            owner = owner[part]
        if owner[last] is not None:  # tracking.uri: null means no tracking
            del owner[last]
    arguments = tree["train"]["arguments"]  # hub_token
    tree["train"]["arguments"] = {
        key: value for key, value in arguments.items() if not (isinstance(value, str) and SECRET.search(key))
    }
    return Experiment.model_validate(tree)


def named(value: Any, key: str = "") -> Any:
    """A tree of settings with the places in it by their names, ./name; `key` is that of a place, else empty."""
    if isinstance(value, Mapping):
        return {name: named(inner, name if PLACE.search(name) else key) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(named(inner, key) for inner in value)
    if not isinstance(value, str):
        return value
    shown = name_of(value) if key else value
    return CREDENTIALS.sub("", redacted(value)) if shown == value else f"./{shown}"  # with ./ it is no Hub id


def name_of(place: str) -> str:
    """notes/**/*.md of /home/me/notes/**/*.md, books.jsonl of s3://bucket/books.jsonl; hub://… and Hub ids stay."""
    if re.match(r"python://|hub://\w", place) or not re.match(r"[/~]|\./|[\w+.:-]+://", place):
        return place
    if "://" in place:  # before an @ stand credentials, after a ? a signature
        path = place.rpartition("://")[2].split("?")[0].rpartition("@")[2]
    else:
        path = place
    parts = [part for part in path.split("/") if part not in ("", "~", ".")]
    glob = next((index for index, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return "/".join(parts[max(0, glob - 1) :]) or place
