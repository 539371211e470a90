"""What a run has to tell, on disk before anybody else hears of it. Files of JSON lines that only ever grow:

    <run>/tracking.jsonl  {"run": {"id": ..., "name": ..., ...}}              what it is
                          {"status": "RUNNING", "time": ..., "uri": ...}   again whenever it goes on
                          {"parameters": {...}}   {"tags": {...}}   {"dataset": ..., "digest": ..., ...}
                          {"text": ..., "name": ...}      an artifact, whole in the line
                          {"file": SHA-256, "name": ...}  one that lies under this name in the directory
                          {"model": ..., "name": ..., ...}   a model's directory, to be logged as MLflow's models are
          metrics.jsonl   {"step": 8, "time": 1763856000123, "metrics": {"train/loss": 3.25}}
                          {"rewind": 8}           the run goes on from step 8: the points after it are taken back
          mlflow.json     the run's id in MLflow, and how many bytes of the other two it has

The driver writes tracking.jsonl, rank 0 of the workers metrics.jsonl, whoever ships mlflow.json. A line is one write,
and one without its end is none: a writer may be killed at any byte, and the next one begins a line of its own.

On remote storage, which knows no appending, a thread writes the whole files again every few seconds.
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

RUN, METRICS, NOTE = "tracking.jsonl", "metrics.jsonl", "mlflow.json"

UPLOAD_SECONDS = 5.0
"""How long lines wait in memory for a remote storage."""

Place = tuple[str, int]
"""The name of a metric, and the step."""

Point = tuple[float, int]
"""The value of a metric, and when it was first told, in milliseconds since 1970."""


def now() -> int:
    return int(time.time() * 1000)


class JsonLines:
    """A file of JSON lines."""

    def __init__(self, path: str):
        self.path = path
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._is_refused = False
        """Whether the remote storage did not take them the last time."""
        self._stored = 0
        """Bytes that the remote storage has, as far as is known: never fewer."""
        self._file: int | None = None
        self._timer: threading.Timer | None = None

    def append(self, *records: Mapping[str, Any], durable: bool = False) -> None:
        """Add lines, which outlive the process then; with `durable`, or on `flush`, a power cut too.

        After an OSError they wait for the next call.
        """
        with self._lock:
            self._waiting += [json.dumps(record, allow_nan=False).encode() + b"\n" for record in records]
            if not storage.is_remote(self.path):
                self._write(durable)
            elif durable:
                self._upload()
            elif self._timer is None:
                self._timer = threading.Timer(UPLOAD_SECONDS, self._upload_later)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        self.append(durable=True)

    def farewell(self) -> None:
        """What still waits when the process ends, unless the remote storage has just failed: it may take a minute."""
        if not self._is_refused:
            with contextlib.suppress(OSError):
                self.flush()

    def read(self, start: int = 0) -> tuple[list[dict[str, Any]], int]:
        """The records from byte `start` on but torn ones, and the byte after the last."""
        if storage.is_remote(self.path):
            content = (storage.read(self.path) or b"")[start:]
        else:
            content = storage.retried(self.path, lambda: self._read(start))
        lines = content.split(b"\n")
        found = [_record(line) for line in lines]
        torn = len(lines[-1]) if found[-1] is None else 0  # it may be whole a moment later
        return [record for record in found if record is not None], start + len(content) - torn

    def _read(self, start: int) -> bytes:
        """Of a file on this machine, what comes after so many bytes."""
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read()
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def size(self) -> int:
        """Bytes, a torn line's too."""
        return storage.size(self.path)

    def _write(self, durable: bool) -> None:
        try:
            while self._waiting:
                # One system call a line: in each the thread that ships may get Python's lock, for 5 ms.
                file, begin = self._open()
                written = os.write(file, begin + b"".join(self._waiting)) - len(begin)
                while self._waiting and written >= len(self._waiting[0]):
                    written -= len(self._waiting.pop(0))
                if self._waiting:  # a disk that fills up tears a line
                    self.close()
            if durable:
                os.fsync(self._open()[0])
        finally:
            if durable or self._waiting:
                self.close()

    def _open(self) -> tuple[int, bytes]:
        """The file, and what ends the line that it ends with if that is torn."""
        if self._file is not None:
            return self._file, b""
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._file).st_size
        return self._file, b"" if size == 0 or os.pread(self._file, 1, size - 1) == b"\n" else b"\n"

    def close(self) -> None:
        """To look again before the next line what is there. On NFS others see what is closed."""
        self._stored = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _upload(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waiting:
            try:
                content = storage.read(self.path) or b""
                if len(content) < self._stored:
                    raise OSError(f"{len(content):,} of {self._stored:,} bytes are there")
                content += b"".join(self._waiting)
                storage.write(self.path, content)
            except Exception as error:  # pyarrow's, fsspec's and the cloud's own errors
                self._is_refused = True
                raise OSError(None, storage.reason(error)) from error
            self._waiting, self._is_refused, self._stored = [], False, len(content)

    def _upload_later(self) -> None:
        with self._lock, storage.once(), contextlib.suppress(OSError):  # they go on waiting
            self._upload()


def _record(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None of a torn one, since no part of an object is a whole one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


@functools.cache
def log(directory: str, name: str) -> JsonLines:
    """The file of a journal: one object a process, so that its lines wait in one place."""
    found = JsonLines(f"{directory}/{name}")
    if storage.is_remote(directory):
        atexit.register(found.farewell)
    return found


# tracking.jsonl ----------------------------------------------------------------------------------------------------


@dataclass
class RunState:
    """What tracking.jsonl, or a part of it, says."""

    run: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    """As they were first given: MLflow takes no other."""
    tags: dict[str, str] = field(default_factory=dict)
    datasets: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    """By name and digest."""
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Texts, files and models, by name."""
    status: str | None = None
    time: int = 0
    """When it got its status."""
    starts: int = 0
    uri: str | None = None
    """The MLflow of the last start, without a password."""

    def add(self, records: Iterable[Mapping[str, Any]]) -> RunState:
        for record in records:
            self.run = self.run or record.get("run", {})
            self.parameters = {**record.get("parameters", {}), **self.parameters}
            self.tags |= record.get("tags", {})
            if "dataset" in record:
                self.datasets.setdefault((record["dataset"], record["digest"]), dict(record))
            if "name" in record:
                self.artifacts[record["name"]] = dict(record)
            if "status" in record:
                self.status, self.time = record["status"], record["time"]
            if "uri" in record:
                self.starts, self.uri = self.starts + 1, record["uri"]
        return self


def facts(directory: str) -> RunState:
    return RunState().add(log(directory, RUN).read()[0])


def begin(directory: str, uri: str | None, **about: Any) -> None:
    """Make a journal, or let the run whose journal it is go on. OSError if that cannot be."""
    if not storage.is_remote(directory):
        os.makedirs(directory, exist_ok=True)
    began = now()
    records: list[dict[str, Any]] = [{"status": "RUNNING", "time": began, "uri": uri}]
    if not facts(directory).run:
        log(directory, METRICS).close()  # of a run that was removed
        metrics.cache_clear()
        records.insert(0, {"run": {"id": uuid.uuid4().hex, "time": began, **about}})
    log(directory, RUN).append(*records, durable=True)


@contextlib.contextmanager
def lock(directory: str) -> Iterator[bool]:
    """Whether this is the only one to ship the journal, for as long as the context and the process last."""
    if storage.is_remote(directory):  # no locks there, see shipment.py why that does no harm
        yield True
        return
    file = os.open(f"{directory}/{RUN}", os.O_RDWR)
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


def apply(records: Iterable[Mapping[str, Any]], points: dict[Place, Point]) -> None:
    """Add the points of a part of metrics.jsonl, take back those it takes back. Of two at one place the first stays."""
    for record in records:
        if "rewind" in record:
            for place in [place for place in points if place[1] > record["rewind"]]:
                del points[place]
        for key, value in record.get("metrics", {}).items():
            points.setdefault((key, record["step"]), (float(value), record["time"]))


class MetricHistory:
    """metrics.jsonl as the process knows it that writes there."""

    def __init__(self, directory: str):
        self.log = log(directory, METRICS)
        self._points: dict[Place, Point] = {}
        self._times: dict[Place, int] = {}
        """Of all points, those that were taken back too."""
        self._end = 0
        self._follow()

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Write the points that are not there yet.

        One that was taken back and is made again gets its old time, since MLflow knows a point by name, step, value
        and time: should both be sent, it stores one.
        """
        lines: dict[int, dict[str, float | str]] = {}
        for key, value in values.items():
            if (key, step) not in self._points:
                plain = float(value) if math.isfinite(value) else str(float(value))  # JSON has no infinity
                lines.setdefault(self._times.get((key, step), now()), {})[key] = plain
        records = [{"step": step, "time": time, "metrics": told} for time, told in lines.items()]
        self._apply(records)
        self.log.append(*records)

    def rewind(self, step: int) -> None:
        """Take back the points after a step."""
        self.log.flush()
        self._follow()
        if any(place[1] > step for place in self._points):
            record = {"rewind": step}
            self._apply([record])
            self.log.append(record, durable=True)

    def _follow(self) -> None:
        """Learn what is new in the file."""
        records, self._end = self.log.read(self._end)
        self._apply(records)

    def _apply(self, records: Sequence[Mapping[str, Any]]) -> None:
        apply(records, self._points)
        for record in records:
            for key in record.get("metrics", ()):
                self._times.setdefault((key, record["step"]), record["time"])


@functools.cache
def metrics(directory: str) -> MetricHistory:
    return MetricHistory(directory)


# mlflow.json -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UploadedOffsets:
    """How much of a journal an MLflow store or server has. To lose it costs a few questions to the server."""

    uri: str
    journal: str
    """The id in tracking.jsonl."""
    run_id: str | None = None
    facts: int = 0
    """Bytes of tracking.jsonl, but the artifacts."""
    artifacts: int = 0
    """Bytes of tracking.jsonl, for the artifacts: their store may fail by itself."""
    metrics: int = 0
    """Bytes of metrics.jsonl."""


def note(directory: str, uri: str) -> UploadedOffsets:
    """What was noted of this journal and this server."""
    new = UploadedOffsets(uri, facts(directory).run.get("id", ""))
    try:
        found = UploadedOffsets(**json.loads(storage.read(f"{directory}/{NOTE}") or b""))
    except (ValueError, TypeError):
        return new
    return found if (found.uri, found.journal) == (new.uri, new.journal) else new


def write_note(directory: str, note: UploadedOffsets) -> None:
    storage.write(f"{directory}/{NOTE}", json.dumps(asdict(note)).encode())


def end_offsets(directory: str) -> dict[str, int]:
    """A note's bytes as they are when MLflow has everything."""
    run, points = (log(directory, name).read()[1] for name in (RUN, METRICS))
    return {"facts": run, "artifacts": run, "metrics": points}


def sizes(directory: str) -> tuple[int, int]:
    """Bytes of metrics.jsonl and tracking.jsonl: one request, where the directory is remote."""
    if not storage.is_remote(directory):
        return log(directory, METRICS).size(), log(directory, RUN).size()
    found = storage.sizes(directory)
    return found.get(METRICS, 0), found.get(RUN, 0)


def has_grown(directory: str, note: UploadedOffsets) -> bool:
    """Whether there may be something that MLflow has not."""
    metrics, run = sizes(directory)
    return metrics > note.metrics or run > min(note.facts, note.artifacts)


def pending(directory: str, note: UploadedOffsets) -> int:
    """How many entries MLflow has not: metric points, parameters, tags, datasets, artifacts, changes of status."""
    if not has_grown(directory, note):
        return 0
    points: dict[Place, Point] = {}
    apply(log(directory, METRICS).read(note.metrics)[0], points)
    told = RunState().add(log(directory, RUN).read(note.facts)[0])
    artifacts = RunState().add(log(directory, RUN).read(note.artifacts)[0]).artifacts
    return (
        sum(math.isfinite(value) for value, _ in points.values())
        + len(told.parameters)
        + len(told.tags)
        + len(told.datasets)
        + (told.status is not None)
        + len(artifacts)
    )
