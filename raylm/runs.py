"""A run's directory: what it was begun with, who works on it, whether it is over; and which one a command goes on with.

<storage>/<name>/train-20261123-101500-3fa2/
    run.json        the settings and the token store it was begun with
    experiment.yaml the experiment it was begun with, for the command that resumes it
    decided.json    what raylm found for settings that are auto, for as long as the run goes on
    lock            held by the command that works on it; the system lets go of it when that dies. Remote storage and
                    file systems without flock have none: there one command at a time is up to whoever starts them
    checkpoints/    see checkpoint.CheckpointManager
    metrics.jsonl   see tracking
    run.log         what commands said while they worked on it
    model/          the best model, as a plain Hugging Face directory
    result.json     when it is over: it ended, or was given up with --resume never

<storage>/<name>/ended/train-20261123-101500-3fa2
                    on remote storage an empty file for each run that is over, so that one request tells of all of them
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import logging
import os
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from raylm import storage
from raylm.checkpoint import CheckpointManager
from raylm.config import Experiment, dump, get, override
from raylm.errors import ConfigError, StorageError, StorageUnavailable
from raylm.redaction import redacted

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never", "must"]

MUTABLE_ON_RESUME = (
    "storage", "corpus", "tokenizer", "eval.batch_tokens", "cluster", "tracking", "train.micro_batch_tokens",
    "train.save_every_tokens", "train.keep_checkpoints", "tune.num_samples", "tune.stop", "tune.keep",
    "tune.max_concurrent_trials",
)  # fmt: skip
"""Settings that may change while a run goes on: they change nothing about it, or are known by the tokens."""


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What flock says where there are no locks: Lustre without -o flock, some of FUSE, NFS without a lock server."""


ENDED = "ended"

BUDGET = ("train.max_tokens", "train.num_epochs")
"""How long a run trains, of which it has one or none."""


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@dataclass(frozen=True)
class ActiveRun:
    """A run that this command works on."""

    name: str
    directory: str
    step: int | None
    """The step of the checkpoint that it goes on from; None for a new run, or one that has none."""
    lock: IO[str] | None
    abandoned: list[str] = field(default_factory=list)
    """Directories of runs that nobody works on and that are not gone on with: given up for good by --resume never."""

    @property
    def decided(self) -> dict[str, Any]:
        """What settings that are auto were found to be when the run started: dotted key -> value."""
        return json.loads(storage.read(f"{self.directory}/decided.json") or b"{}")

    def settled(self, experiment: Experiment, found: Mapping[str, Any]) -> Experiment:
        """The experiment with what was found for settings that are auto, which is kept for when the run resumes.

        Told where it has to be another value than the one that the run started with.
        """
        values = {key: value for key, value in found.items() if get(experiment, key) == "auto"}
        before = self.decided
        for key in values.keys() & before.keys():
            if values[key] != before[key]:
                logger.info(
                    f"{key}={before[key]:g}, as when the run started, does not fit here: {values[key]:g} instead, and "
                    "results may differ in their last bits"
                )
        if new := {key: value for key, value in values.items() if key not in before}:
            with storage.reached(self.directory):
                storage.write(f"{self.directory}/decided.json", (json.dumps({**before, **new}) + "\n").encode())
        return override(experiment, values)

    def end(self, result: dict[str, Any]) -> None:
        """Nobody goes on with this run any more."""
        _end(self.directory, result)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Also write what raylm's loggers say to run.log, with times and without passwords; on remote storage at the
        end. A run that is resumed adds to it."""
        path = f"{self.directory}/run.log"
        is_remote = storage.is_remote(path)
        text = io.StringIO()
        stream = text if is_remote else open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
        handler = logging.StreamHandler(stream)
        handler.setFormatter(_Redacting("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log = logging.getLogger("raylm")
        log.addHandler(handler)
        try:
            yield
        except BaseException as error:
            what = str(error) or type(error).__name__
            handler.handle(logging.LogRecord("raylm", logging.ERROR, __file__, 0, what, None, None))
            raise
        finally:
            log.removeHandler(handler)
            if is_remote:
                with contextlib.suppress(StorageError):
                    storage.write(path, (storage.read(path) or b"") + text.getvalue().encode(errors="backslashreplace"))
            stream.close()


def directory_of(experiment: Experiment) -> str:
    """Where the runs of an experiment lie."""
    return f"{experiment.storage.rstrip('/')}/{experiment.name}"


def new_name(verb: str) -> str:
    """A name that no other run has."""
    return f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def start_or_resume(experiment: Experiment, verb: str, store: str, resume: Resume) -> ActiveRun:
    """The newest run that stopped before its end and can be gone on with; else, unless it `must`, a new one.

    `never` gives up all that have stopped. ConfigError if the newest was begun with other settings or on other tokens
    than these.
    """
    place, terms = directory_of(experiment), _terms(experiment, verb, store)
    abandoned: dict[str, IO[str]] = {}
    newest_ended = finished = None
    ended = set(storage.names(f"{place}/{ENDED}")) if storage.is_remote(place) else set()
    for name in reversed([name for name in storage.names(place) if name.startswith(f"{verb}-")]):
        directory = f"{place}/{name}"
        if name in ended and newest_ended is not None:
            continue
        written = storage.read(f"{directory}/run.json")
        if written is None:
            continue
        if (result := storage.read(f"{directory}/result.json")) is not None:
            newest_ended = newest_ended or directory
            if name not in ended:
                _note_end(directory)
            if verb == "train" and finished is None and _trained_less(json.loads(written), json.loads(result), terms):
                finished = directory
            continue
        lock = _locked(directory)
        if lock is None:  # somebody works on it
            continue
        step = max(CheckpointManager(f"{directory}/checkpoints").complete(), default=None)
        trials = sum(name.startswith("trial_") for name in storage.names(directory))
        differences = _differences(json.loads(written), terms)
        if resume == "never" or (differences and step is None and not trials):
            abandoned[directory] = lock
            continue
        if differences:
            reached = f"with {trials} trials begun" if trials else f"after step {step:,}"
            raise ConfigError(
                f"{directory} stopped {reached} and was begun with other settings:\n  "
                + "\n  ".join(differences)
                + "\ngive these back to go on with it, or --resume never to begin a new run",
                differences[0].split(":")[0],
            )
        return ActiveRun(name, directory, step, lock, list(abandoned))
    if resume == "must":
        raise StorageError(f"--resume must: no run in {place} stopped before its end", place)
    if finished is not None and resume == "auto":
        schedule = experiment.train.lr_scheduler_type
        logger.info(
            f"{finished} is a finished run of the same settings with a smaller budget. It cannot go on: its learning "
            f"rate has followed its schedule ({schedule}) to the end. A new run begins; to train that run's model "
            f"further instead, give {shlex.quote(f'model.path={finished}/model')}"
        )
    name = new_name(verb)
    directory = f"{place}/{name}"
    lock = _locked(directory)  # before it is a run, or another command could take it first
    assert lock is not None, f"{directory}: nobody else knows of it"
    storage.write(f"{directory}/experiment.yaml", dump(experiment).encode())
    storage.write(f"{directory}/run.json", (json.dumps(terms, indent=1) + "\n").encode())
    if resume == "never":
        for each in abandoned:
            _end(each, {"error": f"given up: --resume never began {name}"})
    return ActiveRun(name, directory, None, lock, list(abandoned))


def _end(directory: str, result: dict[str, Any]) -> None:
    with storage.reached(directory):
        storage.write(f"{directory}/result.json", (json.dumps(result, indent=1) + "\n").encode())
    _note_end(directory)


def _note_end(directory: str) -> None:
    """Spare every later command the two requests that tell whether this run is over."""
    if storage.is_remote(directory):
        place, _, name = directory.rpartition("/")
        with contextlib.suppress(StorageError):  # the next command tries again
            storage.write(f"{place}/{ENDED}/{name}", b"")


def settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return dict(_flat(experiment.model_dump(mode="json")))


def _terms(experiment: Experiment, verb: str, store: str) -> dict[str, Any]:
    """What has to stay for a run to be the same run: dotted key -> value, without passwords."""
    flat = redacted(settings(experiment))
    may_change: tuple[str, ...] = MUTABLE_ON_RESUME if verb == "tune" else (*MUTABLE_ON_RESUME, "tune")
    if verb == "tune" and experiment.tune.scheduler.kind == "asha":  # its rungs lie in whole saves
        may_change = tuple(key for key in may_change if key != "train.save_every_tokens")
    kept = {
        key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{free}.") for free in may_change)
    }
    return {**kept, "tokenizer.prefix": experiment.tokenizer.prefix, "tokens": store}


def _trained_less(then: dict[str, Any], result: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a run that is over has a model, and differs from the one that is asked for by a smaller budget alone."""
    differences = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if "error" in result or not differences or not {*differences} <= {*BUDGET}:
        return False
    asked = next((key for key in BUDGET if now.get(key) is not None), None)
    return asked is None or then.get(asked) is None or then[asked] < now[asked]


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    keys = [*now, *(key for key in then if key not in now)]
    return [
        f"{key}: {json.dumps(then.get(key))} then, {json.dumps(now.get(key))} now"
        for key in keys
        if then.get(key) != now.get(key)
    ]


def _locked(directory: str) -> IO[str] | None:
    """The lock, held for as long as it is open; None if another process has it. A file alone where there are none."""
    if storage.is_remote(directory):
        return open(os.devnull)
    os.makedirs(directory, exist_ok=True)
    lock = storage.retried(directory, lambda: open(f"{directory}/lock", "w"))  # noqa: SIM115 - held with the run
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            lock.close()
            return None
        if error.errno not in NO_LOCKS:
            raise StorageUnavailable(f"{directory}/lock cannot be locked: {error.strerror}", directory) from error
    return lock


def is_locked(directory: str) -> bool:
    """Whether a command works on a run. False where there are no locks, as on remote storage."""
    if storage.is_remote(directory):
        return False
    try:
        with open(f"{directory}/lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False
