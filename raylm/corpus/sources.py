"""corpus.paths -> the files behind them.

/data/books  notes.jsonl  {a,b}/**/*.gz  local files, directories, globs
s3://bucket/dir  gs://…  hdfs://…       read by pyarrow.fs; other schemes by fsspec, if it is installed
/data/saved                             a directory of datasets' save_to_disk
hub://eli5_category?split=train[:5000]  a data set of the Hugging Face Hub; also &config= &revision= &streaming=true
python://stdlib  python://pandas        source code: the standard library's, or an installed package's
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from raylm import hub
from raylm.config import SplitName
from raylm.errors import ConfigError, DataError, first_line
from raylm.redaction import redacted
from raylm.storage import file_system

PYTHON = "python://"
HUB = "hub://"

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
NOT_TEXT = ("__pycache__", "site-packages", "dist-packages", "node_modules")
"""Directories, at any depth, that are not the user's text."""

OF_RUNS = re.compile(
    r"/(?:[a-z]+-\d{8}-\d{6}-[0-9a-f]{4}|tokens/[0-9a-f]{16}|mlruns|mlartifacts)/"
    r"|/decided/[^/]+-[0-9a-f]{16}\.(?:json|yaml)$|/mlflow\.db[^/]*$"
)
"""Runs, token stores, decisions and MLflow's files, which are in the directory that a command was called in."""

BINARY = frozenset(
    ".7z .avi .bin .bmp .class .db .dll .doc .docx .dylib .eot .epub .exe .flac .gif .gguf .h5 .heic .ico .jar .jpeg "
    ".jpg .m4a .mkv .mov .mp3 .mp4 .mpeg .npy .npz .o .odp .ods .odt .ogg .onnx .otf .pdf .pickle .pkl .png .ppt .pptx "
    ".pt .pth .pyc .rar .rtf .safetensors .so .sqlite .sqlite3 .tar .tgz .tif .tiff .ttf .wav .webm .webp .whl .wmv "
    ".woff .woff2 .xls .xlsx .zip".split()
)
"""Suffixes of files that hold no plain text, even if they start like text, as some .pdf and .pkl do."""

UNFINISHED = frozenset(".aria2 .crdownload .download .incomplete .lock .part .partial .swp .temp .tmp".split())
"""Suffixes of files that a download or an editor has not finished, and of lock files."""


class File(NamedTuple):
    path: str
    size: int
    """Bytes on disk; 0 if a data set does not state them."""
    version: str
    """Changes when the content does: time of modification in ns, or a data set's revision."""


@dataclass(frozen=True)
class Source:
    """The files behind one path of corpus.paths, corpus.validation_paths or corpus.test_paths."""

    path: str
    files: tuple[File, ...]
    split: SplitName = "train"
    """By the setting that has the entry. Documents of corpus.paths may fall on any split, by their hash."""
    is_found: bool = False
    """Whether a directory or glob gave the files, rather than their own names."""
    name: str | None = None
    """The name that corpus.paths gives it."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Kind -> number of its files that are not read."""

    @property
    def label(self) -> str:
        """Its name, or its path without one."""
        return self.name or self.path

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)


def find(key: str, path: str, split: SplitName = "train", name: str | None = None) -> Source:
    """The files of one path, sorted; DataError naming the setting `key` if there are none.

    Files of a directory or glob whose names show that they are not text are left out and counted.
    """
    if redacted(path) != path:
        raise ConfigError(
            f"{key}: {redacted(path)}: must come without the password that is in it, because it is written to many "
            "places; give it in the environment, as AWS_SECRET_ACCESS_KEY for s3://",
            key,
        )
    left_out: Counter[str] = Counter()
    is_found = False
    if path.startswith(PYTHON):
        found = [_local(file) for file in _python_files(key, path)]
    elif path.startswith(HUB):
        found = [_data_set(key, path)]
    elif "://" in path:
        found, is_found = _remote_files(key, path, left_out)
    elif os.path.isdir(path) and is_saved(path):
        found = [_saved(key, path)]
    elif os.path.isfile(path):
        found = [_local(path)]
    else:
        is_found = True
        paths = _walk(path, left_out) if os.path.isdir(path) else _glob(path, left_out)
        found = list(_regular(paths, left_out))
    if is_found:
        start = len(re.split(r"[*?\[{]", path)[0].rstrip("/"))
        found = list(_text_by_name(found, start, left_out))
    left_out = +left_out
    if not found and not left_out:
        what = "no files in it" if os.path.isdir(path) else "no such file, directory or glob"
        raise DataError(f"{key}: {path}: {what}", key)
    return Source(path, tuple(sorted(found)), split, is_found, name, left_out)


def _text_by_name(found: list[File], start: int, left_out: Counter[str]) -> Iterator[File]:
    """Files without those that are not text by their names. The path they were found in has `start` characters."""
    for file in found:
        if OF_RUNS.search(file.path, start):
            left_out["of runs and tracking"] += 1
        elif os.path.splitext(file.path)[1].lower() in BINARY | UNFINISHED:
            left_out[suffix(file.path)] += 1
        else:
            yield file


def suffix(path: str) -> str:
    """The kind of a file by its name: .png, .tar.gz."""
    stem, last = os.path.splitext(os.path.basename(path))
    before = os.path.splitext(stem)[1] if last.lower() in COMPRESSIONS else ""
    return (before + last).lower() or "without a suffix"


# Local ---------------------------------------------------------------------------------------------------------------


def _local(path: str) -> File:
    status = os.stat(path)
    return File(path, status.st_size, str(status.st_mtime_ns))


def _regular(paths: Iterator[str], left_out: Counter[str]) -> Iterator[File]:
    for path in paths:
        try:
            is_regular = stat.S_ISREG(os.stat(path).st_mode)  # reading a pipe would block
        except OSError:
            left_out["links to nothing"] += 1
            continue
        if is_regular:
            yield _local(path)
        else:
            left_out["no regular files"] += 1


def _walk(directory: str, left_out: Counter[str]) -> Iterator[str]:
    """The files below a directory, also through links; each directory once, even if several links lead to it."""
    visited = set()

    def unreadable(error: OSError) -> None:
        left_out["directories that cannot be read"] += 1

    for parent, directories, files in os.walk(directory, followlinks=True, onerror=unreadable):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            left_out["links to directories that are read already"] += 1
            directories.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        left_out["hidden directories"] += sum(map(_is_hidden, directories))
        left_out["hidden files"] += sum(map(_is_hidden, files))
        directories[:] = [name for name in directories if name not in NOT_TEXT and not _is_hidden(name)]
        directories.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))  # links last
        yield from (os.path.join(parent, name) for name in files if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _glob(pattern: str, left_out: Counter[str]) -> Iterator[str]:
    """The paths that match, with ** for any directories and {a,b} for either."""
    for each in _alternatives(pattern):
        before, recursive, _ = each.partition("**")
        if os.path.isdir(each):
            yield from _walk(each, left_out)
        elif recursive:  # Python's own glob follows circular links forever
            from fsspec.utils import glob_translate  # type: ignore[import-untyped]

            matches = re.compile(glob_translate(each)).match
            for top in glob.glob(os.path.dirname(before) or "."):
                yield from (path for path in _walk(top, left_out) if matches(path.removeprefix("./")))
        else:
            yield from (path for path in glob.glob(each) if os.path.lexists(path) and not os.path.isdir(path))


def _alternatives(pattern: str) -> list[str]:
    """a{b,c} expanded as in a shell: ab, ac."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    chosen = (pattern[: match.start()] + each + pattern[match.end() :] for each in match[1].split(","))
    return list(dict.fromkeys(path for each in chosen for path in _alternatives(each)))


def _python_files(key: str, path: str) -> list[str]:
    name = path.removeprefix(PYTHON)
    if name == "stdlib":
        return [file for file in _walk(sysconfig.get_path("stdlib"), Counter()) if file.endswith(".py")]
    try:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
    except ValueError:  # a module made by hand has no spec
        spec = None
    if spec is None:
        raise DataError(
            f"{key}: {path}: no package {name!r} is installed here, by the name it is imported by; "
            f"{PYTHON}stdlib is always there",
            key,
        )
    if not spec.submodule_search_locations:
        return [spec.origin] if spec.origin and spec.origin.endswith(".py") else []
    places = spec.submodule_search_locations
    return [file for place in places for file in _walk(place, Counter()) if file.endswith(".py")]


# Remote --------------------------------------------------------------------------------------------------------------


def _remote_files(key: str, uri: str, left_out: Counter[str]) -> tuple[list[File], bool]:
    """The files of a URI, and whether they were found in a directory or by a glob."""
    from pyarrow.fs import FileSelector, FileType

    try:
        system, path = file_system(uri)
        info = system.get_file_info(path)
        if info.type == FileType.File:
            found = [info]
        elif info.type == FileType.Directory:
            found = system.get_file_info(FileSelector(path, recursive=True))
            hidden = {file.path for file in found if "/." in file.path[len(path) :] and file.type == FileType.File}
            left_out["hidden files"] += len(hidden)
            found = [file for file in found if file.path not in hidden]
        else:
            found = [file for each in _alternatives(path) for file in _remote_glob(system, each)]
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{key}: {uri}: {first_line(error)}", key) from None
    behind = getattr(getattr(system, "handler", None), "fs", None)
    start = uri.rstrip("/").removesuffix(path)  # s3:// of s3://bucket/dir, whose path is bucket/dir
    files = [file for file in found if file.type == FileType.File]
    names = [behind.unstrip_protocol(file.path) if behind else start + file.path for file in files]
    listed = [File(name, file.size, str(file.mtime_ns)) for name, file in zip(names, files, strict=True)]
    return listed, info.type != FileType.File


def _remote_glob(system: Any, pattern: str) -> list[Any]:
    from fsspec.utils import glob_translate
    from pyarrow.fs import FileSelector, FileType

    before = re.split(r"[*?\[]", pattern)[0]
    if before == pattern:
        info = system.get_file_info(pattern)
        return (
            system.get_file_info(FileSelector(pattern, recursive=True)) if info.type == FileType.Directory else [info]
        )
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
    """The parsed hub:// path; ValueError if it cannot be parsed."""
    name, _, query = path.removeprefix(HUB).partition("?")
    settings = dict(pair.partition("=")[::2] for pair in query.split("&") if pair)
    unknown = set(settings) - set(DataSet._fields[1:])
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(DataSet._fields[1:])}")
    asked = DataSet(name, **settings)
    if asked.streaming == "true" and "[" in asked.split:
        raise ValueError("a stream has no slices; use corpus.max_documents to read a part of it")
    return asked


def load_data_set(file: File) -> Any:
    """The rows of a hub:// path: a datasets.Dataset, memory-mapped, or an IterableDataset.

    Every node loads the commit that was the newest when the files were listed.
    """
    import datasets

    datasets.disable_progress_bars()
    asked = data_set(file.path)
    commit = os.path.basename(file.version)
    if not os.path.isdir(asked.name) and re.fullmatch("[0-9a-f]{40}", commit):
        asked = asked._replace(revision=commit)
    return datasets.load_dataset(
        asked.name,
        asked.config,
        split=asked.split,
        revision=asked.revision,
        streaming=asked.streaming == "true",
    )


def _data_set(key: str, path: str) -> File:
    """The data set's revision and size, from the Hub; nothing is downloaded yet."""
    try:
        asked = data_set(path)
    except ValueError as error:
        raise DataError(f"{key}: {path}: {error}", key) from None
    import datasets

    if os.path.isdir(asked.name):  # data files on this machine; tasks run in directories of their own
        path = path.replace(asked.name, os.path.abspath(asked.name), 1)
    silent = None if os.path.isdir(asked.name) else hub.out_of_reach()
    try:
        builder = datasets.load_dataset_builder(asked.name, asked.config, revision=asked.revision)
    except Exception as error:  # of the Hub, the network, the data set's own card
        why = f"it is not in this machine's cache of the Hugging Face Hub, {silent}" if silent else first_line(error)
        raise DataError(f"{key}: {path}: {why}", key) from None
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
