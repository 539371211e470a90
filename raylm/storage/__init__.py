"""Files under `storage`, on this machine or on any file system that pyarrow reaches.

A path is a local one or a URI: s3://bucket/runs, gs://…, hdfs://…, and what fsspec knows if it is installed.
Credentials, and the address of a server other than Amazon's, come from the environment: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL.

A failed access is retried and is then a StorageUnavailable. A read that fails says nothing about the file: damaged is
only one that is missing, or has another size or checksum than what was written.

file_systems   paths and URIs -> file systems of pyarrow and fsspec
retries        a failed access is tried again; how long it may take
files          read, write, list, upload and download files; the atomic write
checks         whether a storage can be used: before anything starts, and on every node
"""

from raylm.storage.checks import check, check_stays, is_waiting, look, mark, unusable
from raylm.storage.file_systems import absolute, file_system, is_remote
from raylm.storage.files import (
    Stored,
    damage,
    download,
    here,
    names,
    read,
    read_part,
    reading,
    remove,
    remove_file,
    share,
    size,
    sizes,
    upload,
    write,
)
from raylm.storage.retries import once, reached, reason, retried

__all__ = [
    "Stored",
    "absolute",
    "check",
    "check_stays",
    "damage",
    "download",
    "file_system",
    "here",
    "is_remote",
    "is_waiting",
    "look",
    "mark",
    "names",
    "once",
    "reached",
    "read",
    "read_part",
    "reading",
    "reason",
    "remove",
    "remove_file",
    "retried",
    "share",
    "size",
    "sizes",
    "unusable",
    "upload",
    "write",
]
