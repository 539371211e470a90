"""The errors a user can cause and fix, and what a command ends with that was asked to stop.

    RaylmError
        ConfigError           exit 2    a setting, a file of settings or the command line
        DataError             exit 3    the corpus, the tokenizer or the token store
        TrainingError         exit 4    the training itself
            Diverged                    loss, gradient or perplexity is no number any more
            OutOfMemory                 a step did not fit; with smaller micro-batches it may
            WorkerFailed                a worker died, or failed of something that may be gone at the next attempt
        StorageError          exit 5    storage or a checkpoint
            StorageUnavailable          storage failed, and did so again when it was tried again; later it may be well
                StorageFull             there is no room left in it
    Interrupted               exit 75   stopped from outside; the same command resumes

Every message names the setting or file as the user wrote it, the value, and the way out.
"""

import difflib
from collections.abc import Iterable, Sequence


class _Message:
    """A message for the user, and where it points: a dotted key, a file, a checkpoint."""

    args: tuple

    def __init__(self, message: str, where: str | None = None):
        super().__init__(message, where)  # type: ignore[call-arg]  # both in args: it unpickles in another process

    @property
    def message(self) -> str:
        return self.args[0]

    @property
    def where(self) -> str | None:
        return self.args[1]

    def __str__(self) -> str:
        return self.message


class RaylmError(_Message, Exception):
    exit_code = 1


class ConfigError(RaylmError):
    exit_code = 2


class DataError(RaylmError):
    exit_code = 3


class TrainingError(RaylmError):
    exit_code = 4


class Diverged(TrainingError):
    pass


class OutOfMemory(TrainingError):
    pass


class WorkerFailed(TrainingError):
    pass


class StorageError(RaylmError):
    exit_code = 5


class StorageUnavailable(StorageError):
    pass


class StorageFull(StorageUnavailable):
    pass


class Interrupted(_Message, BaseException):
    """As KeyboardInterrupt: it comes at any moment, and no `except Exception` of any library takes it for its own."""

    exit_code = 75


def first_line(problem: object) -> str:
    """The first line of what an exception says; the name of its class if it says nothing."""
    return str(problem).strip().split("\n")[0] or type(problem).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean X?` with the known name that is most like this one; empty if none is."""
    return "".join(f"did you mean {near}?" for near in difflib.get_close_matches(name, list(known), n=1))


def first_of(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first names and the number of the others: a, b, c and 4 more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{separator.join(names[:most])}{more}"
