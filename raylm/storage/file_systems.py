"""Paths on this machine, and URIs of any file system that pyarrow or fsspec reaches."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

S3_ATTEMPTS = 3
"""Of a request, as in AWS's own tools. Each fails after 3 s if the server does not answer: pyarrow's default, 31 of
them, takes 100 s for a read and 290 s for a write."""

OBJECT_STORES = ("s3", "gcs")
"""File systems on which an object appears only when it is complete."""


def is_remote(path: str) -> bool:
    return "://" in path


def absolute(path: str | Path) -> str:
    """A path or URI that means the same in any directory."""
    return str(path) if is_remote(str(path)) else os.path.abspath(path)


def file_system(uri: str) -> tuple[Any, str]:
    """(pyarrow file system, path inside it) of a URI; all files of a host or bucket share one client."""
    scheme, _, rest = uri.partition("://")
    host, _, inner = rest.partition("/")
    system, root = _file_system(f"{scheme}://{host}/")
    if root is None:
        return system, system.handler.fs._strip_protocol(uri)
    return system, f"{root.rstrip('/')}/{inner}".rstrip("/")


@lru_cache(maxsize=64)
def _file_system(root: str) -> tuple[Any, str | None]:
    """(pyarrow file system, its path) of scheme://host/; the path is None if fsspec provides it."""
    import pyarrow
    import pyarrow.fs

    try:
        system, path = pyarrow.fs.FileSystem.from_uri(root)
    except pyarrow.ArrowInvalid:
        import fsspec  # type: ignore[import-untyped]

        system, _ = fsspec.core.url_to_fs(root)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system)), None
    if system.type_name == "s3":
        _, (options,) = system.__reduce__()  # what the URI and the environment say; not all of it can stand in a URI
        options |= {
            "allow_delayed_open": True,  # a small file is one request, not three
            "retry_strategy": pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        }
        system = pyarrow.fs.S3FileSystem(**options)
    return system, path
