"""corpus.paths -> the files behind them.

/data/books  notes.jsonl  *.txt.gz      local files, directories, globs
s3://bucket/dir  gs://…  hdfs://…       whatever pyarrow.fs reads; other schemes through fsspec where it is installed
/data/saved                             a directory of datasets' save_to_disk
hub://eli5_category?split=train[:5000]  a data set of the Hugging Face Hub; also &config= &revision= &streaming=true
python://stdlib  python://pandas        source code: the standard library's, or an installed package's
"""

from __future__ import annotations

import glob
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylm.errors import DataError
from raylm.storage import file_system

PYTHON = "python://"
HUB = "hub://"

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
NOT_TEXT = ("__pycache__", "site-packages", "dist-packages", "node_modules")
"""Directories that are not the user's text, wherever they lie below one that is."""


class File(NamedTuple):
    path: str
    size: int
    """Bytes on disk; 0 where a data set does not say."""
    version: str
    """Another one when the content changes: time of modification in ns, or a data set's revision."""


@dataclass(frozen=True)
class Source:
    """The files behind one entry of corpus.paths or corpus.validation_paths."""

    name: str
    files: tuple[File, ...]
    validation: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def find(key: str, path: str, validation: bool = False) -> Source:
    """The files of one entry, sorted; DataError naming the setting `key` if there is none."""
    if path.startswith(PYTHON):
        found = [_local(file) for file in _python_files(key, path)]
    elif path.startswith(HUB):
        found = [_data_set(key, path)]
    elif "://" in path:
        found = list(_remote_files(key, path))
    elif os.path.isdir(path) and is_saved(path):
        found = [_saved(key, path)]
    elif os.path.isdir(path):
        found = [_local(file) for file in _walk(path)]
    elif os.path.isfile(path):
        found = [_local(path)]
    else:
        found = [_local(file) for file in glob.glob(path, recursive=True) if os.path.isfile(file)]
    if not found:
        what = "no files in it" if os.path.isdir(path) else "no such file, directory or glob"
        raise DataError(f"{key}: {path}: {what}", key)
    return Source(path, tuple(sorted(found)), validation)


def format_of(path: str, source: str) -> tuple[str, str | None]:
    """(format, compression) of a file of a source, by their names."""
    if path.startswith(HUB):
        return "hub", None
    if source.startswith(PYTHON):
        return "python", None
    stem, suffix = os.path.splitext(path)
    compression = COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = os.path.splitext(stem)[1]
    elif "://" not in path and os.path.isdir(path):
        return "saved", None
    return FORMATS.get(suffix.lower(), "text"), compression


# Local ---------------------------------------------------------------------------------------------------------------


def _local(path: str) -> File:
    status = os.stat(path)
    return File(path, status.st_size, str(status.st_mtime_ns))


def _walk(directory: str) -> Iterator[str]:
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if name not in NOT_TEXT and not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in files if not name.startswith("."))


def _python_files(key: str, path: str) -> list[str]:
    name = path.removeprefix(PYTHON)
    if name == "stdlib":
        return [file for file in _walk(sysconfig.get_path("stdlib")) if file.endswith(".py")]
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module that was put together by hand has no spec
        spec = None
    if spec is None:
        raise DataError(
            f"{key}: {path}: no package {name!r} is installed here, by the name it is imported by; "
            f"{PYTHON}stdlib is always there",
            key,
        )
    if not spec.submodule_search_locations:
        return [spec.origin] if spec.origin and spec.origin.endswith(".py") else []
    return [file for place in spec.submodule_search_locations for file in _walk(place) if file.endswith(".py")]


# Remote --------------------------------------------------------------------------------------------------------------


def _remote_files(key: str, uri: str) -> Iterator[File]:
    from pyarrow.fs import FileSelector, FileType

    try:
        system, path = file_system(uri)
        info = system.get_file_info(path)
        if info.type == FileType.File:
            found = [info]
        elif info.type == FileType.Directory:
            found = system.get_file_info(FileSelector(path, recursive=True))
            found = [file for file in found if "/." not in file.path[len(path) :]]
        else:
            found = _remote_glob(system, path)
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{key}: {uri}: {str(error).splitlines()[0]}", key) from None
    behind = getattr(getattr(system, "handler", None), "fs", None)
    start = uri.rstrip("/").removesuffix(path)  # s3:// of s3://bucket/dir, whose path is bucket/dir
    for file in found:
        if file.type == FileType.File:
            name = behind.unstrip_protocol(file.path) if behind else start + file.path
            yield File(name, file.size, str(file.mtime_ns))


def _remote_glob(system: Any, pattern: str) -> list[Any]:
    import re

    from fsspec.utils import glob_translate  # type: ignore[import-untyped]
    from pyarrow.fs import FileSelector

    before = re.split(r"[*?\[]", pattern)[0]
    if before == pattern:
        return []
    matches = re.compile(glob_translate(pattern)).match
    everything = system.get_file_info(FileSelector(before.rpartition("/")[0], recursive=True, allow_not_found=True))
    return [file for file in everything if matches(file.path)]


# Data sets -----------------------------------------------------------------------------------------------------------


class DataSet(NamedTuple):
    """hub://ID?split=train[:5000]&config=…&revision=…&streaming=true"""

    name: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: str = "false"


def data_set(path: str) -> DataSet:
    """What a hub:// path asks for; ValueError if it asks for something else."""
    name, _, query = path.removeprefix(HUB).partition("?")
    settings = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
    unknown = set(settings) - set(DataSet._fields[1:])
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(DataSet._fields[1:])}")
    asked = DataSet(name, **settings)
    if asked.streaming == "true" and "[" in asked.split:
        raise ValueError("a stream has no slices; use corpus.max_documents to read a part of it")
    return asked


def load_data_set(path: str) -> Any:
    """The rows of a hub:// path: a datasets.Dataset, memory-mapped, or an IterableDataset."""
    import datasets

    datasets.disable_progress_bars()
    asked = data_set(path)
    return datasets.load_dataset(
        asked.name,
        asked.config,
        split=asked.split,
        revision=asked.revision,
        streaming=asked.streaming == "true",
    )


def _data_set(key: str, path: str) -> File:
    """Asks the Hub for the data set's revision and size; nothing is downloaded yet."""
    try:
        asked = data_set(path)
    except ValueError as error:
        raise DataError(f"{key}: {path}: {error}", key) from None
    import datasets
    import huggingface_hub

    if os.path.isdir(asked.name):  # data files on this machine; tasks run in directories of their own
        path = path.replace(asked.name, os.path.abspath(asked.name), 1)
    try:
        if not (os.path.isdir(asked.name) or huggingface_hub.constants.HF_HUB_OFFLINE):
            # A Hub that is out of reach is found out here at once; datasets tries for half a minute.
            huggingface_hub.dataset_info(asked.name, revision=asked.revision, timeout=10)
        builder = datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision)
    except Exception as error:  # of the Hub, the network, the data set's own card
        why = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"{key}: {path}: {why}; HF_HUB_OFFLINE=1 reads what was downloaded before", key) from None
    splits = builder.info.splits or {}
    base = asked.split.partition("[")[0]
    if splits and base not in splits and "+" not in base:
        raise DataError(f"{key}: {path}: no split {base!r}; splits: {', '.join(splits)}", key)
    size = splits[base].num_bytes if base in splits else 0
    # The cache directory is named after the data files with their revisions or times, the config and the builder.
    version = os.path.relpath(builder.cache_dir, datasets.config.HF_DATASETS_CACHE)
    return File(path, size or 0, version)


def is_saved(path: str) -> bool:
    """Whether a directory was written by datasets' save_to_disk."""
    return any(os.path.exists(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _saved(key: str, path: str) -> File:
    splits = os.path.join(path, "dataset_dict.json")
    if os.path.exists(splits):
        names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
        raise DataError(f"{key}: {path}: a saved data set of several splits; name one: {path}/{sorted(names)[0]}", key)
    files = [_local(os.path.join(path, name)) for name in sorted(os.listdir(path))]
    return File(path, sum(file.size for file in files), max(file.version for file in files))
