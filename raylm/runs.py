"""The directory of a run: its settings, its lock and its result; and which run a command starts or resumes.

<storage>/<name>/train-20261123-101500-3fa2/
    run.json        the settings and the token store that the run was started with
    experiment.yaml the experiment that it was started with, for the command that resumes it
    decided.json    the values that raylm chose for settings that are auto; a resumed run keeps them
    lock            held by the command that works on the run; the system frees it when the command dies. Remote storage
                    and file systems without flock have no locks: there users must run one command at a time
    checkpoints/    see checkpoint.CheckpointManager
    metrics.jsonl   see tracking
    run.log         the log of all commands that worked on the run
    model/          the best model, as a plain Hugging Face directory
    result.json     exists once the run has finished, failed, or was abandoned with --resume never; removed when a
                    finished sweep is extended

<storage>/<name>/ended/train-20261123-101500-3fa2
                    on remote storage an empty file for each run that has a result: one request lists all of them
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal

from raylm import storage
from raylm.checkpoint import CheckpointManager
from raylm.config import Experiment, dump, get, loads, override
from raylm.console import format_number
from raylm.errors import ConfigError, StorageError, StorageUnavailable
from raylm.redaction import redacted

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never", "must"]

MUTABLE_ON_RESUME = (
    "storage", "corpus", "tokenizer", "eval.batch_tokens", "eval.prompts", "eval.sample_tokens", "cluster", "tracking",
    "train.micro_batch_tokens", "train.save_every_tokens", "train.keep_checkpoints", "train.peak_flops",
    "tune.num_samples", "tune.repeats", "tune.stop", "tune.keep", "tune.max_concurrent_trials",
)  # fmt: skip
"""Settings that may change when a run resumes: they do not change its result, or the token store covers them."""


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""Errors of flock on file systems without locks: Lustre without -o flock, some of FUSE, NFS without a lock server."""


ENDED, RESULT, EXPERIMENT = "ended", "result.json", "experiment.yaml"

SPACE = "tune.space."

BUDGET = ("train.max_tokens", "train.num_epochs")
"""The settings that say how long a run trains; it has one of them, or none."""


RENAMED = {"tune.searcher": "tune.searcher.kind"}
"""Settings that an older raylm wrote under another key."""


ONCE = {"train.precision": "float32"}
"""Settings that are auto by default -> their default in an older raylm, whose runs resume with what they have."""


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


@dataclass(frozen=True)
class ActiveRun:
    """The run that this command trains."""

    name: str
    directory: str
    step: int | None
    """The step of the checkpoint that it resumes from; None for a new run, or one without a checkpoint."""
    lock: IO[str] | None
    abandoned: list[str] = field(default_factory=list)
    """Directories of stopped runs that this command does not resume; with --resume never no command will."""
    state: Literal["open", "extended", "finished"] = "open"
    """extended: a sweep that had finished and has more trials to run, or whose space has changed. finished: a finished
    sweep without more trials to run."""
    terms: dict[str, Any] = field(default_factory=dict)
    """The settings that must not change when a run resumes, as they are now."""

    @property
    def decided(self) -> dict[str, Any]:
        """Values chosen for settings that are auto when the run started: dotted key -> value."""
        return json.loads(storage.read(f"{self.directory}/decided.json") or b"{}")

    def kept(self, key: str) -> Any:
        """The value with which a resumed run keeps a setting that is auto: the one chosen when it started, or the one
        that it was started with. None of a new run."""
        started: dict[str, Any] = json.loads(storage.read(f"{self.directory}/run.json") or b"{}")
        before = started.get(key, ONCE.get(key))
        return self.decided.get(key) or (before if before != "auto" else None)

    def settled(self, experiment: Experiment, found: Mapping[str, Any]) -> Experiment:
        """The experiment with the values found for settings that are auto, which are saved for when the run resumes.

        A value that differs from the one that the run started with is logged.
        """
        values = {key: value for key, value in found.items() if get(experiment, key) == "auto"}
        before = self.decided
        for key in values.keys() & before.keys():
            if values[key] != before[key]:
                logger.info(
                    f"{key}={format_number(before[key])}, as when the run started, does not fit here: "
                    f"{format_number(values[key])} instead, and results may differ in their last bits"
                )
        if new := {key: value for key, value in values.items() if key not in before}:
            with storage.reached(self.directory):
                storage.write(f"{self.directory}/decided.json", (json.dumps({**before, **new}) + "\n").encode())
        return override(experiment, values)

    def reopen(self, experiment: Experiment) -> None:
        """Make these its settings, and have it no longer be finished, so that the same command resumes it."""
        with storage.reached(self.directory):
            _write_settings(self.directory, experiment, self.terms)
            place = self.directory.rpartition("/")[0]
            for file in (f"{place}/{ENDED}/{self.name}", f"{self.directory}/{RESULT}"):
                if storage.read(file) is not None:
                    storage.remove_file(file)

    def end(self, result: dict[str, Any]) -> None:
        """Write the result of the run; no command resumes it afterwards."""
        _end(self.directory, result)

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Also append raylm's log messages to run.log, with times and without passwords.

        On remote storage they are written at the end.
        """
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
    """The directory that holds the runs of an experiment."""
    return f"{experiment.storage.rstrip('/')}/{experiment.name}"


def new_name(verb: str) -> str:
    """A name that no other run has."""
    return f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def start_or_resume(
    experiment: Experiment,
    verb: str,
    store: str,
    resume: Resume,
    has_more: Callable[[str], bool] | None = None,
) -> ActiveRun:
    """The newest run that stopped before its end, to resume it; else a new one, or StorageError if `resume` is "must".

    "never" abandons all stopped runs and starts a new one. ConfigError if the newest stopped run that has a checkpoint
    or trials was started with other settings or on other tokens; the space of a sweep may change, but lose no key.

    `has_more`: whether these settings give a finished sweep in a directory more trials. The newest finished sweep of
    the same settings is then extended, else the newest that differs by its space; without more trials nothing starts.
    """
    place, terms = directory_of(experiment), _terms(experiment, verb, store)
    abandoned: dict[str, IO[str]] = {}
    newest_ended = finished = same = other_space = None
    ended = set(storage.names(f"{place}/{ENDED}")) if storage.is_remote(place) else set()
    for name in reversed([name for name in storage.names(place) if name.startswith(f"{verb}-")]):
        directory = f"{place}/{name}"
        if name in ended and newest_ended is not None:
            continue
        written = storage.read(f"{directory}/run.json")
        if written is None:
            continue
        if (result := storage.read(f"{directory}/{RESULT}")) is not None:
            newest_ended = newest_ended or directory
            if name not in ended:
                _note_end(directory)
            then, ended_with = json.loads(written), json.loads(result)
            if "error" not in ended_with:
                differing = _differing(then, terms)
                same = same or (None if differing else directory)
                other_space = other_space or (directory if _may_resume(then, terms) else None)
            if verb == "train" and finished is None and _trained_less(then, ended_with, terms):
                finished = directory
            continue
        lock = _locked(directory)
        if lock is None:  # another command works on it
            continue
        step = max(CheckpointManager(f"{directory}/checkpoints").complete(), default=None)
        trials = sum(name.startswith("trial_") for name in storage.names(directory))
        differences = _differences(json.loads(written), terms)
        if resume == "never" or (differences and step is None and not trials):
            abandoned[directory] = lock
            continue
        if differences and not _may_resume(json.loads(written), terms):
            reached = f"after {trials} trials had started" if trials else f"after step {step:,}"
            raise ConfigError(
                f"{directory} stopped {reached} and was started with other settings:\n  "
                + "\n  ".join(differences)
                + "\ngive the earlier values to resume it, or --resume never to start a new run",
                differences[0].split(":")[0],
            )
        for line in differences:
            logger.info(f"{directory}: {line}; its trials so far keep their settings")
        return ActiveRun(name, directory, step, lock, list(abandoned), "extended" if differences else "open", terms)
    if has_more is not None and resume != "never":
        known = same or other_space
        state: Literal["extended", "finished"] = "extended" if known and has_more(known) else "finished"
        if known and (state == "extended" or (same and resume == "auto")) and (lock := _locked(known)) is not None:
            return ActiveRun(known.rpartition("/")[2], known, None, lock, list(abandoned), state, terms)
    if resume == "must":
        raise StorageError(f"--resume must: no run in {place} stopped before its end", place)
    if verb == "train" and same is not None and resume == "auto":
        logger.info(f"{same} is a finished run of the same settings, and stays as it is. A new run starts.")
    elif finished is not None and resume == "auto":
        schedule, lora = experiment.train.lr_scheduler_type, experiment.model.lora
        is_adapter = lora is not None and lora.export == "adapter"  # which cannot be trained further
        further = shlex.quote(f"model.path={finished}/model")
        logger.info(
            f"{finished} is a finished run of the same settings with a smaller budget. It cannot resume: its learning "
            f"rate has followed its schedule ({schedule}) to the end. A new run starts"
            + ("" if is_adapter else f"; to train that run's model further instead, give {further}")
        )
    name = new_name(verb)
    directory = f"{place}/{name}"
    lock = _locked(directory)  # before run.json is written, or another command could resume it
    assert lock is not None, f"{directory}: no other command knows this name"
    _write_settings(directory, experiment, terms)
    if resume == "never":
        for each in abandoned:
            _end(each, {"error": f"given up: --resume never started {name}"})
    return ActiveRun(name, directory, None, lock, list(abandoned), terms=terms)


def _write_settings(directory: str, experiment: Experiment, terms: dict[str, Any]) -> None:
    storage.write(f"{directory}/{EXPERIMENT}", dump(experiment).encode())
    storage.write(f"{directory}/run.json", (json.dumps(terms, indent=1) + "\n").encode())


def _end(directory: str, result: dict[str, Any]) -> None:
    with storage.reached(directory):
        storage.write(f"{directory}/{RESULT}", (json.dumps(result, indent=1) + "\n").encode())
    _note_end(directory)


def _note_end(directory: str) -> None:
    """Mark a remote run as one that has a result, which spares later commands two requests each."""
    if storage.is_remote(directory):
        place, _, name = directory.rpartition("/")
        with contextlib.suppress(StorageError):  # the next command tries again
            storage.write(f"{place}/{ENDED}/{name}", b"")


def result_of(directory: str) -> dict[str, Any]:
    """What a run or sweep ended with, result.json; empty while it has not finished."""
    found: dict[str, Any] = json.loads(storage.read(f"{directory}/{RESULT}") or b"{}")
    return found


def started_with(directory: str) -> Experiment:
    """The experiment that a run or sweep was started with, or that a sweep was last extended with."""
    path = f"{directory}/{EXPERIMENT}"
    return loads((storage.read(path) or b"").decode(), path)


def flat_settings(experiment: Experiment) -> dict[str, Any]:
    """Every setting by its dotted key."""
    return dict(_flat(experiment.model_dump(mode="json")))


def _terms(experiment: Experiment, verb: str, store: str) -> dict[str, Any]:
    """The settings that must not change when a run resumes: dotted key -> value, without passwords."""
    flat = redacted(flat_settings(experiment))
    may_change: tuple[str, ...] = MUTABLE_ON_RESUME if verb == "tune" else (*MUTABLE_ON_RESUME, "tune")
    if verb == "tune" and experiment.tune.scheduler.kind == "asha":  # its rungs are in whole saves
        may_change = tuple(key for key in may_change if key != "train.save_every_tokens")
    kept = {
        key: value for key, value in flat.items() if not any(f"{key}.".startswith(f"{free}.") for free in may_change)
    }
    if experiment.tune.weights:  # they choose the best checkpoint of a training
        kept["tune.metric"] = dict(experiment.tune.weights)
    return {**kept, "tokenizer.prefix": experiment.tokenizer.prefix, "tokens": store}


def _trained_less(then: dict[str, Any], result: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a run has finished with a model, and differs from the requested one only by a smaller budget."""
    differences = _differing(then, now)
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


def _differing(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ: dotted key -> values then and now; one that an older raylm did not have had its
    default."""
    defaults = flat_settings(Experiment())
    then = {RENAMED.get(key, key): value for key, value in then.items()}
    then = {**{key: defaults[key] for key in now.keys() & defaults.keys()}, **then}
    then |= {key: "auto" for key in ONCE if now.get(key) == "auto" and then[key] == ONCE[key]}  # see ActiveRun.kept
    keys = [*now, *(key for key in then if key not in now)]
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs."""
    differing = _differing(then, now).items()
    return [f"{key}: {json.dumps(before)} then, {json.dumps(value)} now" for key, (before, value) in differing]


def _may_resume(then: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a sweep may resume with these settings: nothing differs but its space, and that has lost no key."""

    def swept(terms: dict[str, Any]) -> set[str]:
        return {key.rpartition(".")[0] for key in terms if key.startswith(SPACE)}

    return all(key.startswith(SPACE) for key in _differing(then, now)) and swept(then) <= swept(now)


def _locked(directory: str) -> IO[str] | None:
    """The lock of a run, held while it is open; None if another process holds it. Without locks, just an open file."""
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
    """Whether a command works on a run; False where there are no locks, as on remote storage."""
    if storage.is_remote(directory):
        return False
    try:
        with open(f"{directory}/lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False
