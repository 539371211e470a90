"""The journal of a run: append-only files of JSON lines, written before anything is sent to MLflow.

    <run>/tracking.jsonl  {"run": {"id": ..., "name": ..., ...}}           once, when the run starts for the first time
                          {"status": "RUNNING", "time": ..., "uri": ...}   at each start; another status at each finish
                          {"parameters": {...}}   {"tags": {...}}   {"dataset": ..., "digest": ..., ...}
                          {"comparison": {...}}              what MLflow's comparison of a sweep's trials draws
                          {"text": ..., "name": ...}         a text artifact, with its whole content
                          {"file": SHA-256, "name": ...}     a file artifact, which has this name in the directory
                          {"model": ..., "name": ..., ...}   the directory of a model, for MLflow's logged models
          metrics.jsonl   {"step": 8, "time": 1763856000123, "metrics": {"train/loss": 3.25}}
                          {"rewind": 8}           the run resumes from step 8: the points after it no longer count
          mlflow.json     the run's id in MLflow, and how many bytes of the other two files are uploaded

The driver writes tracking.jsonl, rank 0 of the workers metrics.jsonl, and the process that uploads mlflow.json. Each
line is a single write. A line without its end does not count: a writer may be killed at any byte, and the next writer
starts on a new line.

Remote storage cannot append, so a thread rewrites the whole file there every few seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raylm import storage
from raylm.tracking import system

RUN_FILE, METRICS_FILE, OFFSETS_FILE = "tracking.jsonl", "metrics.jsonl", "mlflow.json"

REWRITE_SECONDS = 5.0
"""How long lines stay in memory before a file on remote storage is rewritten."""

MetricKey = tuple[str, int]
"""The name of a metric, and the step."""

MetricValue = tuple[float, int]
"""The value of a metric, and when it was first logged, in milliseconds since 1970."""


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


class JsonLines:
    """A file of JSON lines."""

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []
        self._rewrite_failed = False
        """Whether the last rewrite on remote storage failed."""
        self._remote_size = 0
        """Bytes that this process has written to remote storage; the file cannot be shorter."""
        self._file: int | None = None
        self._timer: threading.Timer | None = None

    def append(self, *records: Mapping[str, Any], durable: bool = False) -> None:
        """Add lines, which then outlive the process; with `durable`, or after `flush`, a power cut too.

        After an OSError the lines are kept and written by the next call.
        """
        with self._lock:
            self._unwritten += [json.dumps(record, allow_nan=False).encode() + b"\n" for record in records]
            if not storage.is_remote(self.path):
                self._write(durable)
            elif durable:
                self._rewrite()
            elif self._timer is None:
                self._timer = threading.Timer(REWRITE_SECONDS, self._rewrite_from_timer)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Make all lines durable."""
        self.append(durable=True)

    def flush_at_exit(self) -> None:
        """Write the remaining lines, unless remote storage has just failed, because another try may take a minute."""
        if not self._rewrite_failed:
            with contextlib.suppress(OSError):
                self.flush()

    def read(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The records from byte `start` on without torn ones, and the byte after the last."""
        if storage.is_remote(self.path):
            content = (storage.read(self.path) or b"")[start:]
        else:
            content = storage.retried(self.path, lambda: self._read(start))
        lines = content.split(b"\n")
        records = [_record(line) for line in lines]
        torn = len(lines[-1]) if records[-1] is None else 0  # it may be complete a moment later
        return [record for record in records if record is not None], start + len(content) - torn

    def _read(self, start: int) -> bytes:
        """The bytes of a local file from `start` on."""
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def size(self) -> int:
        """Bytes of the file, with those of a torn line."""
        return storage.size(self.path)

    def _write(self, durable: bool) -> None:
        try:
            while self._unwritten:
                # One system call a line: each may hand Python's lock to the upload thread for 5 ms.
                file, start = self._open()
                written = os.write(file, start + b"".join(self._unwritten)) - len(start)
                while self._unwritten and written >= len(self._unwritten[0]):
                    written -= len(self._unwritten.pop(0))
                if self._unwritten:  # the disk is full and has torn a line
                    self.close()
            if durable:
                os.fsync(self._open()[0])
        finally:
            if durable or self._unwritten:
                self.close()

    def _open(self) -> tuple[int, bytes]:
        """The file, and the line end that is missing if its last line is torn."""
        if self._file is not None:
            return self._file, b""
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        return self._file, b"" if size == 0 or os.pread(self._file, 1, size - 1) == b"\n" else b"\n"

    def close(self) -> None:
        """Close the file; the next write opens it again. On NFS other machines see only what was closed."""
        self._remote_size = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _rewrite(self) -> None:
        """Write the whole file on remote storage again, with the new lines."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unwritten:
            try:
                content = storage.read(self.path) or b""
                if len(content) < self._remote_size:
                    raise OSError(f"{len(content):,} of {self._remote_size:,} bytes are there")
                content += b"".join(self._unwritten)
                storage.write(self.path, content)
            except Exception as error:  # pyarrow, fsspec and the clouds raise their own errors
                self._rewrite_failed = True
                raise OSError(None, storage.reason(error)) from error
            self._unwritten, self._rewrite_failed, self._remote_size = [], False, len(content)

    def _rewrite_from_timer(self) -> None:
        with self._lock, storage.once(), contextlib.suppress(OSError):  # the lines are kept for the next try
            self._rewrite()


def _record(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None for a torn line, because no part of a JSON object is itself one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


@functools.cache
def json_lines(directory: str, name: str) -> JsonLines:
    """The file of a journal: a single object per process, so that unwritten lines are kept in one place."""
    lines = JsonLines(f"{directory}/{name}")
    if storage.is_remote(directory):
        atexit.register(lines.flush_at_exit)
    return lines


# tracking.jsonl ----------------------------------------------------------------------------------------------------


@dataclass
class RunState:
    """The content of tracking.jsonl, or of a part of it."""

    run: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    """First value of each parameter: MLflow does not change one."""
    tags: dict[str, str] = field(default_factory=dict)
    datasets: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """(name, digest) -> data set."""
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> text, file or model."""
    comparison: dict[str, Any] | None = None
    """What the comparison of a sweep's trials draws: score, history, settings."""
    status: str | None = None
    time: int = 0
    """When the status was set."""
    starts: int = 0
    uri: str | None = None
    """The MLflow of the last start, without a password."""

    def add(self, records: Iterable[Mapping[str, Any]]) -> RunState:
        """Apply more records, and return self."""
        for record in records:
            self.run = self.run or record.get("run", {})
            self.parameters = {**record.get("parameters", {}), **self.parameters}
            self.tags |= record.get("tags", {})
            self.comparison = record.get("comparison", self.comparison)
            if "dataset" in record:
                self.datasets.setdefault((record["dataset"], record["digest"]), dict(record))
            if "name" in record:
                self.artifacts[record["name"]] = dict(record)
            if "status" in record:
                self.status, self.time = record["status"], record["time"]
            if "uri" in record:
                self.starts, self.uri = self.starts + 1, record["uri"]
        return self


def run_state(directory: str) -> RunState:
    """The state of the run that has its journal in this directory; empty if there is no journal."""
    return RunState().add(json_lines(directory, RUN_FILE).read()[0])


def start(directory: str, uri: str | None, **run: Any) -> None:
    """Create the journal of a run, or mark its run as running again. OSError if the journal cannot be written."""
    if not storage.is_remote(directory):
        os.makedirs(directory, exist_ok=True)
    started = now()
    records: list[dict[str, Any]] = [{"status": "RUNNING", "time": started, "uri": uri}]
    if not run_state(directory).run:
        json_lines(directory, METRICS_FILE).close()  # it may still be open for a run that was removed since
        metric_writer.cache_clear()
        records.insert(0, {"run": {"id": uuid.uuid4().hex, "time": started, **run}})
    json_lines(directory, RUN_FILE).append(*records, durable=True)


@contextlib.contextmanager
def lock(directory: str) -> Iterator[bool]:
    """Whether no other process uploads this journal. The lock is held until the context or the process ends."""
    if storage.is_remote(directory):  # no locks there; upload.py says why that does no harm
        yield True
        return
    file = os.open(f"{directory}/{RUN_FILE}", os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError:  # a file system without locks
        yield True
    else:
        yield True
    finally:
        os.close(file)


# metrics.jsonl -----------------------------------------------------------------------------------------------------


def apply_metrics(records: Iterable[Mapping[str, Any]], points: dict[MetricKey, MetricValue]) -> None:
    """Apply records of metrics.jsonl to `points`: add points, and remove those that were rewound.

    The first value of a metric at a step stays.
    """
    for record in records:
        if "rewind" in record:
            for key in _to_rewind(points, record["rewind"]):
                del points[key]
        for name, value in record.get("metrics", {}).items():
            points.setdefault((name, record["step"]), (float(value), record["time"]))


def _to_rewind(points: Iterable[MetricKey], step: int) -> list[MetricKey]:
    """The points after a step that will be made again. System metrics, which would not be the same again, stay."""
    return [key for key in points if key[1] > step and not key[0].startswith(system.PREFIX)]


class MetricWriter:
    """The writer of metrics.jsonl, which knows what the file holds."""

    def __init__(self, directory: str):
        self._lines = json_lines(directory, METRICS_FILE)
        self._points: dict[MetricKey, MetricValue] = {}
        self._times: dict[MetricKey, int] = {}
        """Time of every point, also of those that were rewound."""
        self._end = 0
        self._read_new()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the points that the file does not have yet.

        A point that was rewound and is logged again keeps its old time, because MLflow identifies a point by name,
        step, value and time: if both are sent, it stores one.
        """
        by_time: dict[int, dict[str, float | str]] = {}
        for name, value in values.items():
            if (name, step) not in self._points:
                plain = float(value) if math.isfinite(value) else str(float(value))  # JSON has no infinity
                by_time.setdefault(self._times.get((name, step), now()), {})[name] = plain
        records = [{"step": step, "time": time, "metrics": metrics} for time, metrics in by_time.items()]
        self._apply(records)
        self._lines.append(*records)

    def rewind(self, step: int) -> None:
        """Remove the points after a step."""
        self._lines.flush()
        self._read_new()
        if _to_rewind(self._points, step):
            record = {"rewind": step}
            self._apply([record])
            self._lines.append(record, durable=True)

    def _read_new(self) -> None:
        records, self._end = self._lines.read(self._end)
        self._apply(records)

    def _apply(self, records: Sequence[Mapping[str, Any]]) -> None:
        apply_metrics(records, self._points)
        for record in records:
            for name in record.get("metrics", ()):
                self._times.setdefault((name, record["step"]), record["time"])


@functools.cache
def metric_writer(directory: str) -> MetricWriter:
    """The writer of this process for the run in a directory."""
    return MetricWriter(directory)


# mlflow.json -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UploadedOffsets:
    """How much of a journal is in an MLflow store or server. If the file is lost, MLflow is asked instead."""

    uri: str
    journal_id: str
    """The run's id in tracking.jsonl."""
    run_id: str | None = None
    """The run's id in MLflow."""
    experiment_id: str | None = None
    """The id of the run's experiment in MLflow."""
    entries: int = 0
    """Bytes of tracking.jsonl whose entries, except for artifacts, are uploaded."""
    artifacts: int = 0
    """Bytes of tracking.jsonl whose artifacts are uploaded, counted apart because the artifact store may fail alone."""
    metrics: int = 0
    """Bytes of metrics.jsonl that are uploaded."""


def uploaded_offsets(directory: str, uri: str) -> UploadedOffsets:
    """The recorded offsets of this journal in this MLflow; zeros if there are none."""
    new = UploadedOffsets(uri, run_state(directory).run.get("id", ""))
    try:
        recorded = UploadedOffsets(**json.loads(storage.read(f"{directory}/{OFFSETS_FILE}") or b""))
    except (ValueError, TypeError):
        return new
    return recorded if (recorded.uri, recorded.journal_id) == (new.uri, new.journal_id) else new


def write_uploaded_offsets(directory: str, offsets: UploadedOffsets) -> None:
    """Record the offsets of this journal."""
    storage.write(f"{directory}/{OFFSETS_FILE}", json.dumps(asdict(offsets)).encode())


def end_offsets(directory: str) -> dict[str, int]:
    """The offsets of a journal that is uploaded entirely."""
    run, metrics = (json_lines(directory, name).read()[1] for name in (RUN_FILE, METRICS_FILE))
    return {"entries": run, "artifacts": run, "metrics": metrics}


def sizes(directory: str) -> tuple[int, int]:
    """Bytes of metrics.jsonl and tracking.jsonl: a single request where the directory is remote."""
    if not storage.is_remote(directory):
        return json_lines(directory, METRICS_FILE).size(), json_lines(directory, RUN_FILE).size()
    by_name = storage.sizes(directory)
    return by_name.get(METRICS_FILE, 0), by_name.get(RUN_FILE, 0)


def has_grown(directory: str, offsets: UploadedOffsets) -> bool:
    """Whether the journal is longer than what is uploaded."""
    metrics, run = sizes(directory)
    return metrics > offsets.metrics or run > min(offsets.entries, offsets.artifacts)


def pending(directory: str, offsets: UploadedOffsets) -> int:
    """Number of entries not yet uploaded: metric points, parameters, tags, data sets, artifacts, views, status."""
    if not has_grown(directory, offsets):
        return 0
    points: dict[MetricKey, MetricValue] = {}
    apply_metrics(json_lines(directory, METRICS_FILE).read(offsets.metrics)[0], points)
    state = RunState().add(json_lines(directory, RUN_FILE).read(offsets.entries)[0])
    artifacts = RunState().add(json_lines(directory, RUN_FILE).read(offsets.artifacts)[0]).artifacts
    return (
        sum(math.isfinite(value) for value, _ in points.values())
        + len(state.parameters)
        + len(state.tags)
        + len(state.datasets)
        + (state.status is not None)
        + (state.comparison is not None)
        + len(artifacts)
    )
