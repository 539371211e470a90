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
from raylm.lora import CHECKPOINT_ADAPTER
from raylm.redaction import SECRET, redacted

Files = dict[str, Path | bytes]
"""Name in the published directory -> the file that is published, or its content."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = CHECKPOINT_ADAPTER
ADAPTER = "adapter"
"""The directory in that of a merged model which has its adapter, with model.lora.export=both."""
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


def model_files(directory: Path, export: str | None = None) -> Files:
    """The model, generation config and tokenizer of a directory; StorageError if one is missing or damaged.

    `export` is model.lora.export of the model's experiment, if it has one. A directory of an adapter alone has no other
    files, one without an adapter only those of a merged model.
    """
    adapter = _adapter(directory)
    if (directory / ADAPTER_CONFIG) in adapter.values() or (adapter and export == "adapter"):
        return adapter | _described(directory, adapter=True)
    files = _weights(directory) | _described(directory)
    if adapter and export == "both":
        inner = adapter | _described(directory, adapter=True)
        files |= {f"{ADAPTER}/{name}": content for name, content in inner.items()}
    return files


def is_adapter(files: Files) -> bool:
    """Whether the published files are those of an adapter alone."""
    return ADAPTER_CONFIG in files


def _adapter(directory: Path) -> dict[str, Path]:
    """The weights and the configuration of the adapter of an exported adapter, a checkpoint or a merged model; empty if
    there is none."""
    own = {name: directory / name for name in CHECKPOINT_ADAPTER}
    places = [
        *([own] if not (directory / "config.json").exists() else []),
        {name: directory / stored for name, stored in CHECKPOINT_ADAPTER.items()},
        {name: directory / ADAPTER / name for name in CHECKPOINT_ADAPTER},
    ]
    return next((files for files in places if all(path.exists() for path in files.values())), {})


def _weights(directory: Path) -> Files:
    """The files of the weights, with their index if there are several."""
    names = [WEIGHTS]
    if (directory / INDEX).exists():
        try:
            names = [INDEX, *sorted(set(json.loads((directory / INDEX).read_bytes())["weight_map"].values()))]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _damaged(directory, error) from None
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
    return files


def _described(directory: Path, *, adapter: bool = False) -> Files:
    """The tokenizer and the configurations, for an adapter without that of the model: its base model has it."""
    try:
        configs: dict[str, dict[str, Any]] = {
            name: dict(json.loads((directory / name).read_bytes()))
            for name in CONFIGS
            if (directory / name).exists() and not (adapter and name == "config.json")
        }
    except (ValueError, TypeError) as error:
        raise _damaged(directory, error) from None
    files: Files = {name: directory / name for name in TOKENIZER if (directory / name).exists()}
    if not files:
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


def _damaged(directory: Path, error: Exception) -> StorageError:
    return StorageError(f"{directory} has a configuration that is damaged: {error}", str(directory))


def num_parameters(files: Files) -> int:
    """The number of parameters, from the headers of the weights; StorageError naming a damaged file. Those of an
    adapter beside a merged model are not counted."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for name, path in files.items():
        if not name.endswith(".safetensors") or "/" in name or isinstance(path, bytes):
            continue
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
