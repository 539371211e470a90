"""The checkpoints of a run: written whole or not at all, verified before use, the older ones removed.

<run>/checkpoints/step_00000040/model.safetensors ...      what the ranks wrote, each its own files
                                manifest.json              written last: no manifest, no checkpoint

The manifest has the size and SHA-256 of every file. With Ray's own callback ranks copy what another is still writing,
and a model.safetensors of half its size passes for a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from raylm import storage
from raylm.errors import StorageError
from raylm.storage import Stored

MANIFEST = "manifest.json"

STEP = re.compile(r"step_(\d{8,})")
"""The name of a checkpoint; a copy of one beside it, as step_00000040.bak, is somebody else's."""


@dataclass(frozen=True)
class CheckpointManager:
    """The checkpoints below `directory`, local or remote, by the step after which they were written."""

    directory: str

    def path(self, step: int) -> str:
        return f"{self.directory}/step_{step:08d}"

    def steps(self) -> list[int]:
        """The steps of which anything is there, in order."""
        return sorted(int(found[1]) for name in storage.names(self.directory) if (found := STEP.fullmatch(name)))

    def upload(self, step: int, local: Path) -> dict[str, Stored]:
        """Copy the files that one rank wrote; by name, what they are known by."""
        files = sorted(file for file in local.rglob("*") if file.is_file())
        names = [file.relative_to(local).as_posix() for file in files]
        return {
            name: storage.upload(file, f"{self.path(step)}/{name}") for name, file in zip(names, files, strict=True)
        }

    def commit(self, step: int, files: dict[str, Stored]) -> None:
        """Make a checkpoint of the files that all ranks have uploaded."""
        storage.write(f"{self.path(step)}/{MANIFEST}", _written(step, files))

    def replace(self, local: Path, step: int) -> None:
        """Have a checkpoint that lies elsewhere on this machine as the only one."""
        for each in reversed(self.steps()):
            self.discard(each)
        files = self.upload(step, local)
        files.pop(MANIFEST, None)
        self.commit(step, files)

    def discard(self, step: int) -> None:
        """Remove a checkpoint; first its manifest, so that what is left of it if this is cut off is not one."""
        storage.remove_file(f"{self.path(step)}/{MANIFEST}")
        storage.remove(self.path(step))

    def fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint, by file; None if it is what was written."""
        expected = self._manifest(step)
        if expected is None:
            is_there = storage.read(f"{self.path(step)}/{MANIFEST}") is not None
            return f"{MANIFEST}: damaged" if is_there else f"{MANIFEST}: missing, so it was never completed"
        for name, stored in expected.items():
            found = storage.fault(f"{self.path(step)}/{name}", stored)
            if found is not None:
                return f"{name}: {found}"
        return None

    def _manifest(self, step: int) -> dict[str, Stored] | None:
        """The files of a checkpoint; None if its manifest is missing or damaged, which is looked at twice: a storage
        that says once that it is not there would cost the steps since the checkpoint before."""
        for _ in range(2):
            content = storage.read(f"{self.path(step)}/{MANIFEST}")
            files = _read(step, content) if content is not None else None
            if files is not None:
                return files
        return None

    def newest(self) -> tuple[int | None, list[str]]:
        """The step of the newest checkpoint that is whole, None if there is none; and of newer ones, what is wrong.

        StorageError if there are completed checkpoints and not one of them is whole.
        """
        faults: list[str] = []
        for step in reversed(self.steps()):
            found = self.fault(step)
            if found is None:
                return step, faults
            faults.append(f"{self.path(step)}: {found}")
        if self.complete():
            raise StorageError(
                "no checkpoint of the run is whole:\n  "
                + "\n  ".join(faults)
                + "\nmend them, or begin anew with --resume never",
                self.directory,
            )
        return None, faults

    def fetch(self, step: int, scratch: Path) -> Path:
        """The checkpoint's directory on this machine: itself, or a copy below `scratch` of a remote one."""
        if not storage.is_remote(self.directory):
            return Path(self.path(step))
        target = scratch / f"from-step_{step:08d}"
        files = self._manifest(step)
        if files is None:
            raise StorageError(f"{self.path(step)}/{MANIFEST} cannot be read", self.path(step))
        for name, stored in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            storage.download(f"{self.path(step)}/{name}", target / name)
            if found := storage.fault(str(target / name), stored):
                raise StorageError(f"{self.path(step)}/{name}: its copy on this machine is {found}", self.path(step))
        return target

    def prune(self, keep: int, best: Iterable[int | None]) -> None:
        """Remove all but the last `keep` completed ones and those of the steps `best`; and what was never completed."""
        steps = self.steps()
        complete = self.complete()
        kept = {*complete[-keep:], *best}
        newest = max(complete, default=-1)
        for step in steps:
            if step not in kept and step < newest:  # a newer one is being written
                self.discard(step)

    def complete(self) -> list[int]:
        """The steps whose checkpoint was written to its end, damaged since or not."""
        return [step for step in self.steps() if MANIFEST in storage.names(self.path(step))]


def _written(step: int, files: dict[str, Stored]) -> bytes:
    entries = {name: stored._asdict() for name, stored in sorted(files.items())}
    return (json.dumps({"step": step, "files": entries}, indent=1) + "\n").encode()


def _read(step: int, content: bytes) -> dict[str, Stored] | None:
    """The files of a manifest; None if it is not as it was written, or names a file outside of its directory."""
    try:
        files = {str(name): Stored(**entry) for name, entry in json.loads(content)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    outside = any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in files)
    return files if files and not outside and _written(step, files) == content else None
