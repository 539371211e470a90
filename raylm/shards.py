"""Sharded states on disk, in the format of torch.distributed.checkpoint: written and read by all ranks, or merged.

    weights/.metadata        which part of which tensor is where; written by rank 0
            __0_0.distcp     the shards of rank 0, __1_0.distcp those of rank 1, ...
    adapter/, optimizer/     the same, of an adapter and of the optimizer's states

Each rank writes its own shards. It may read with another number of ranks: then it reads the parts of the shards that
its own consist of. Nothing that is read can run code: both the metadata and the objects in it are pickled by torch, and
only the classes that these formats consist of are unpickled.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from raylm import scratch, storage
from raylm.errors import RaylmError, StorageError, first_line

WEIGHTS, ADAPTER, OPTIMIZER = "weights", "adapter", "optimizer"
"""The states of a checkpoint by directory: the model's weights as they are exported, the adapter of model.lora, and
the optimizer's."""

METADATA = ".metadata"
FILES = "*.distcp"
"""The names of the files with shards."""

MERGED = {WEIGHTS: "model{suffix}.safetensors", ADAPTER: "lora{suffix}.safetensors"}
"""State -> the names of the files that it is merged into."""

MAX_FILE_SIZE = "50GB"
"""Of a file of weights, as transformers has it in save_pretrained."""

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
"""The names of the dtypes in safetensors, in the order in which it sorts them, from the last to the first."""

OF_METADATA = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}
"""Module -> what the metadata may have of it."""


def is_sharded(directory: str | os.PathLike) -> bool:
    """Whether the weights in a local checkpoint are sharded."""
    return Path(directory, WEIGHTS, METADATA).exists()


def write(state: Mapping[str, Any], directory: Path) -> None:
    """Write this rank's shards of a state to a local directory of its own. All ranks call it, and all of them raise the
    first error of any. Together their files are a checkpoint; rank 0 has its metadata."""
    with _quietly(), _errors_of_ranks():
        dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(directory), no_dist=not distributed.is_initialized())


def read(state: dict[str, Any], directory: str) -> None:
    """Read a state in place: into its tensors, and its other values by name. A rank reads its own shards alone, from a
    local or a remote directory. All ranks call it, and all of them raise the first error of any."""
    _load(state, _Reader(directory), no_dist=not distributed.is_initialized())


def _load(state: dict[str, Any], reader: _Reader, *, no_dist: bool) -> None:
    with _quietly(), _errors_of_ranks():
        dcp.load(state, storage_reader=reader, planner=_Planner(), no_dist=no_dist)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, torch does not warn that a process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


@contextlib.contextmanager
def _errors_of_ranks() -> Iterator[None]:
    """Inside, the first error of any rank is raised as it is, not as a BaseException with all their tracebacks."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise first from None


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Read a value that is no tensor, once it is known that nothing in it runs code."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class _Reader(dcp.FileSystemReader):
    """Reads a directory, local or remote: of its files only the parts that are needed."""

    def __init__(self, directory: str):
        super().__init__(directory)
        if storage.is_remote(directory):
            self.fs, self.path = _RemoteFiles(), directory

    @cached_property
    def metadata(self) -> Metadata:
        path = f"{self.path}/{METADATA}"
        content = storage.read(path)
        try:
            if content is None:
                raise FileNotFoundError(path)
            return _MetadataUnpickler(io.BytesIO(content)).load()
        except Exception as error:  # unpickling raises many kinds
            raise StorageError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}", path) from None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self.metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        if isinstance(file, str):
            return io.BytesIO(storage.read_part(file, sinfo.offset, sinfo.length))
        return super()._slice_file(file, sinfo)


class _RemoteFiles(FileSystem):
    """Files that are not opened before a part of one is read, which then can be tried again."""

    @contextlib.contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        yield path

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}/{suffix}"


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in OF_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it has {module}.{name}, which metadata does not consist of")
        return super().find_class(module, name)


# Merging -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def merged(directory: str | os.PathLike) -> Iterator[Path]:
    """The directory of a model; if its weights are sharded, a temporary one with links to its files, and the shards
    merged into files of safetensors. Not more than one tensor is in memory at a time."""
    if not is_sharded(directory):
        yield Path(directory)
        return
    with scratch.directory("merged") as place:
        for file in Path(directory).absolute().iterdir():
            if file.is_file():
                Path(place, file.name).symlink_to(file)
        try:
            for state, pattern in MERGED.items():
                if Path(directory, state, METADATA).exists():
                    _merge(_Reader(f"{directory}/{state}"), Path(place), pattern)
        except OSError as error:
            raise StorageError(
                f"{directory}: its shards cannot be merged in {place}: {error.strerror or error}; if there is no room, "
                "name another directory in TMPDIR",
                str(directory),
            ) from error
        except RaylmError:
            raise
        except Exception as error:  # torch raises many kinds for a damaged file
            raise StorageError(f"{directory} cannot be loaded: {first_line(error)}", str(directory)) from error
        yield Path(place)


def _merge(reader: _Reader, directory: Path, pattern: str) -> None:
    """Write the files that save_pretrained writes of the same tensors, and their index if there are several."""
    entries = reader.metadata.state_dict_metadata
    empty = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=MAX_FILE_SIZE)
    for file, names in split.filename_to_tensors.items():
        _write_safetensors(reader, {name: empty[name] for name in names}, directory / file)
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": sum(tensor.numel() for tensor in empty.values()), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        name = f"{pattern.format(suffix='')}.index.json"
        (directory / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_safetensors(reader: _Reader, tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write the bytes of safetensors.torch.save_file, which takes all of the tensors at once. `tensors` are empty."""
    dtypes = list(DTYPES)
    names = sorted(tensors, key=lambda name: (-dtypes.index(tensors[name].dtype), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    packed = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    packed += b" " * (-len(packed) % 8)
    with file.open("wb") as stream:
        stream.write(len(packed).to_bytes(8, "little") + packed)
        for name in names:
            whole = torch.empty_like(tensors[name], device="cpu")
            _load({name: whole}, reader, no_dist=True)
            stream.write(whole.reshape(-1).view(torch.uint8).numpy())
