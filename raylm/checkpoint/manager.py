"""The checkpoints of a run: committed entirely or not at all, verified before use, older ones removed.

<run>/checkpoints/step_00000040/model.safetensors ...      what the ranks wrote, each its own files
                                manifest.json              written last: no manifest, no checkpoint

The manifest has the size and SHA-256 of every file. Ray's own callback lets a rank copy what another is still writing,
so that a half-written model.safetensors passes for a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from raylm import storage
from raylm.errors import StorageError
from raylm.storage import Stored

MANIFEST = "manifest.json"

STEP = re.compile(r"step_(\d{8,})")
"""The name of a checkpoint; a copy such as step_00000040.bak is not one."""


def cooldown_directory(trial: str, step: int) -> str:
    """The directory of the cooldown that begins at a checkpoint of a trial."""
    return f"{trial}/cooldowns/step_{step:08d}"


@dataclass(frozen=True)
class CheckpointManager:
    """The checkpoints in `directory`, local or remote, by step."""

    directory: str

    def path(self, step: int) -> str:
        return f"{self.directory}/step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a directory, in order."""
        return sorted(int(found[1]) for name in storage.names(self.directory) if (found := STEP.fullmatch(name)))

    def upload(self, step: int, local: Path) -> dict[str, Stored]:
        """Copy the files that one rank wrote; their sizes and checksums by name."""
        files = sorted(file for file in local.rglob("*") if file.is_file())
        names = [file.relative_to(local).as_posix() for file in files]
        return {
            name: storage.upload(file, f"{self.path(step)}/{name}") for name, file in zip(names, files, strict=True)
        }

    def commit(self, step: int, files: dict[str, Stored]) -> None:
        """Complete a checkpoint with its manifest, once all ranks have uploaded their files."""
        storage.write(f"{self.path(step)}/{MANIFEST}", _written(step, files))

    def replace(self, local: Path, step: int) -> None:
        """Replace all checkpoints by a copy of a local one."""
        for each in reversed(self.steps()):
            self.discard(each)
        files = self.upload(step, local)
        files.pop(MANIFEST, None)
        self.commit(step, files)

    def discard(self, step: int) -> None:
        """Remove a checkpoint, its manifest first, so that an interrupted removal leaves no checkpoint."""
        storage.remove_file(f"{self.path(step)}/{MANIFEST}")
        storage.remove(self.path(step))

    def damage(self, step: int) -> str | None:
        """The first damaged file of a checkpoint and how it differs; None if all are as they were written."""
        expected = self._manifest(step)
        if expected is None:
            exists = storage.read(f"{self.path(step)}/{MANIFEST}") is not None
            return f"{MANIFEST}: damaged" if exists else f"{MANIFEST}: missing, so it was never completed"
        for name, stored in expected.items():
            if difference := storage.damage(f"{self.path(step)}/{name}", stored):
                return f"{name}: {difference}"
        return None

    def _manifest(self, step: int) -> dict[str, Stored] | None:
        """The files of a checkpoint; None if its manifest is missing or damaged.

        It is read twice before that is said, because a single wrong answer of the storage would cost all steps since
        the checkpoint before.
        """
        for _ in range(2):
            content = storage.read(f"{self.path(step)}/{MANIFEST}")
            files = _read(step, content) if content is not None else None
            if files is not None:
                return files
        return None

    def newest(self) -> tuple[int | None, list[str]]:
        """The step of the newest undamaged checkpoint, if there is one, and the damage of newer ones.

        StorageError if all completed checkpoints are damaged.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step, damaged
            damaged.append(f"{self.path(step)}: {damage}")
        if self.complete():
            raise StorageError(
                "every checkpoint of the run is damaged:\n  "
                + "\n  ".join(damaged)
                + "\nrestore one, or start a new run with --resume never",
                self.directory,
            )
        return None, damaged

    def fetch(self, step: int, scratch: Path, but_for: Sequence[str] = ()) -> Path:
        """The local directory of a checkpoint: a remote one is copied to `scratch`, without the files that match
        `but_for`."""
        if not storage.is_remote(self.directory):
            return Path(self.path(step))
        target = scratch / f"from-step_{step:08d}"
        files = self._manifest(step)
        if files is None:
            raise StorageError(f"{self.path(step)}/{MANIFEST} cannot be read", self.path(step))
        for name, stored in files.items():
            if any(fnmatch(name, pattern) for pattern in but_for):
                continue
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            storage.download(f"{self.path(step)}/{name}", target / name)
            if difference := storage.damage(str(target / name), stored):
                raise StorageError(f"{self.path(step)}/{name}: its local copy is {difference}", self.path(step))
        return target

    def prune(self, keep: int, best: Iterable[int | None]) -> None:
        """Remove all checkpoints but the last `keep` completed ones and the `best`, and older ones never completed."""
        steps = self.steps()
        complete = self.complete()
        kept = {*complete[-keep:], *best}
        newest = max(complete, default=-1)
        for step in steps:
            if step not in kept and step < newest:  # a newer one is being written
                self.discard(step)

    def complete(self) -> list[int]:
        """The steps with a completed checkpoint, which may be damaged since."""
        return [step for step in self.steps() if MANIFEST in storage.names(self.path(step))]


def _written(step: int, files: dict[str, Stored]) -> bytes:
    entries = {name: stored._asdict() for name, stored in sorted(files.items())}
    return (json.dumps({"step": step, "files": entries}, indent=1) + "\n").encode()


def _read(step: int, content: bytes) -> dict[str, Stored] | None:
    """The files of a manifest; None if it is damaged or names a file outside of its directory."""
    try:
        files = {str(name): Stored(**entry) for name, entry in json.loads(content)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    outside = any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files)
    return files if files and not outside and _written(step, files) == content else None
