"""A trained model's directory -> its published files, with paths in them reduced to names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylm.config import Experiment
from raylm.errors import StorageError
from raylm.redaction import SECRET, redacted

Files = dict[str, Path | bytes]
"""Name in the published directory -> the file that is published, or its content."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip

MACHINE_SETTINGS = ("storage", "cluster.address", "tracking.uri", "tracking.experiment")
"""Settings of the machine, not of the model, which are published with their defaults."""
PLACE = re.compile(r"(^|[._])(paths?|file|dir|uri)$|(^|\.)(arguments|config)(\.|$)")
"""The keys of an experiment and of a model's configuration whose values are or may be paths. Other values stay,
because a keyword or a pattern may start with a slash."""
CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")


def model_files(directory: Path) -> Files:
    """The model, generation config and tokenizer of a directory; StorageError if one is missing or damaged."""
    try:
        names = [WEIGHTS]
        if (directory / INDEX).exists():
            names = [INDEX, *sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))]
        configs: dict[str, dict[str, Any]] = {
            name: dict(json.loads((directory / name).read_bytes())) for name in CONFIGS if (directory / name).exists()
        }
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
            f"{directory} holds no tokenizer, and a model is of no use without one; save it there with save_pretrained",
            where=str(directory),
        )
    if any("auto_map" in settings for settings in configs.values()):  # a model with its own code
        files |= {file.name: file for file in directory.glob("*.py")}
    for name, settings in configs.items():
        shown = named(settings)  # older versions of transformers saved the path a model was loaded from
        files[name] = directory / name if shown == settings else (json.dumps(shown, indent=2) + "\n").encode()
    return files


def num_parameters(directory: Path, files: Files) -> int:
    """The number of parameters, from the headers of the weights; StorageError naming a damaged file."""
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
    """The experiment without private data: paths reduced to names, no settings of the machine, no secrets."""
    tree = named(experiment.model_dump())
    for key in MACHINE_SETTINGS:
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
    """A tree of settings with paths reduced to names, ./name. `key` is the key of a path, else empty."""
    if isinstance(value, Mapping):
        return {name: named(inner, name if PLACE.search(name) else key) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(named(inner, key) for inner in value)
    if not isinstance(value, str):
        return value
    shown = name_of(value) if key else value
    return CREDENTIALS.sub("", redacted(value)) if shown == value else f"./{shown}"  # ./ tells it from a Hub id


def name_of(place: str) -> str:
    """The name of a path: notes/**/*.md for /home/me/notes/**/*.md, books.jsonl for s3://bucket/books.jsonl. hub://…
    and Hub ids stay."""
    if re.match(r"python://|hub://\w", place) or not re.match(r"[/~]|\./|[\w+.:-]+://", place):
        return place
    if "://" in place:  # credentials precede an @, a signature follows a ?
        path = place.rpartition("://")[2].split("?")[0].rpartition("@")[2]
    else:
        path = place
    parts = [part for part in path.split("/") if part not in ("", "~", ".")]
    glob = next((index for index, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return "/".join(parts[max(0, glob - 1) :]) or place
