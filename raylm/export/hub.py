"""A trained model and its card -> the Hugging Face Hub, as one commit."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import checkpoint, console, shards
from raylm.checkpoint.directory import EXPERIMENT
from raylm.config import dump
from raylm.errors import ConfigError, StorageError
from raylm.export.files import ADAPTER, ADAPTER_CONFIG, Files, model_files, named, num_parameters, published
from raylm.export.model_card import CARD, build_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

REFUSALS = {
    401: "the Hub does not know the token; run hf auth login again, or set HF_TOKEN to one that is valid",
    403: "the token may not write there; use one with write access",
    404: "there is no such repository or namespace, or the token does not see it",
}
"""HTTP status -> what is wrong, and what to do."""


@dataclass(frozen=True)
class PushResult:
    """The files that were sent to the Hub, or with `dry_run` would be sent."""

    repo: str
    url: str
    files: dict[str, int]
    """Name -> size in bytes."""
    dry_run: bool
    folder: str | None
    """The directory that keeps a copy of the files."""

    def record(self) -> dict[str, Any]:
        """The result for --json."""
        record = {"repo": self.repo, "url": self.url, "files": list(self.files), "dry_run": self.dry_run}
        return record if self.folder is None else {**record, "folder": self.folder}


def push(
    model: str, repo_id: str, *, private: bool = False, dry_run: bool = False, out: Path | None = None
) -> PushResult:
    """Send a model, its tokenizer and its card to a repository, which is created if it does not exist.

    `dry_run` sends nothing and writes the files to a directory, `out` or a temporary one. Only what `model_files` lists
    is sent, so no optimizer, random states, pickled files or local paths.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"REPO_ID {repo_id!r}: {error}", where="REPO_ID") from None
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already; give a new or an empty directory", where="--out")
    with shards.merged(checkpoint.locate(model)) as directory:
        return _push(directory, repo_id, private, dry_run, out)


def _push(directory: Path, repo_id: str, private: bool, dry_run: bool, out: Path | None) -> PushResult:
    from huggingface_hub import HfApi

    experiment = checkpoint.read_experiment(directory)
    lora = experiment.model.lora if experiment else None
    files = model_files(directory, lora.export if lora else None)
    for name in (ADAPTER_CONFIG, f"{ADAPTER}/{ADAPTER_CONFIG}"):
        if name in files:
            files[name] = _adapter_config(files[name])
    num_parameters(files)  # before anything is sent, because it reads the weights' headers
    if experiment is not None:
        experiment = published(experiment)
        files[EXPERIMENT] = dump(experiment).encode()
    if others := sorted({path.name for path in directory.iterdir()} - {*files, CARD}):
        logger.info(f"not sent: {', '.join(others)}")
    api = HfApi(token=False if dry_run else _token(repo_id))
    repo, url = (repo_id, f"{api.endpoint}/{repo_id}") if dry_run else _create(api, repo_id, private)
    files[CARD] = build_card(directory, repo, experiment, files)
    if dry_run and out is None:
        out = Path(tempfile.mkdtemp(prefix="raylm-push-"))
    if out is not None:
        _write(files, out)
    if not dry_run:
        _commit(api, repo, files)
    sizes = {name: _size(content) for name, content in sorted(files.items())}
    return PushResult(repo, url, sizes, dry_run, None if out is None else str(out.resolve()))


def _adapter_config(file: Path | bytes) -> bytes:
    """The configuration of an adapter with the path of its base model reduced to a name, which others cannot load."""
    settings = json.loads(file if isinstance(file, bytes) else file.read_bytes())
    shown = named(settings)
    base = settings.get("base_model_name_or_path")
    if shown.get("base_model_name_or_path") != base:
        logger.warning(
            f"the adapter's base model is {base}, which only this machine has; for others export it with "
            "model.lora.export=merged, or train it with the base model's Hub id as model.path"
        )
    return (json.dumps(shown, indent=2) + "\n").encode()


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _write(files: Files, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
    except OSError as error:
        raise StorageError(f"--out {folder}: {error.strerror or error}", where="--out") from None


def _token(repo: str) -> str:
    """The user's own token, from the environment or the Hub's login."""
    from huggingface_hub import get_token

    with _failures(repo, None):
        token = get_token()
    if token is None:
        raise ConfigError("no token for the Hub; run hf auth login, or set HF_TOKEN in the environment", "HF_TOKEN")
    return token


def _create(api: HfApi, repo_id: str, private: bool) -> tuple[str, str]:
    """The full name and the address of the repository, which is created if it does not exist."""
    with _failures(repo_id, api):
        created = api.create_repo(repo_id, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(created.repo_id).private
    if is_public:
        raise ConfigError(
            f"{created.repo_id} exists already and is public, which --private does not change; make it private at "
            f"{created.url}/settings, or push without --private",
            where="--private",
        )
    return created.repo_id, created.url


def _commit(api: HfApi, repo: str, files: Files) -> None:
    """Send all files in one commit, so that the repository is unchanged on failure."""
    from huggingface_hub import CommitOperationAdd

    for name, content in files.items():
        if not name.endswith(".safetensors"):
            text = content if isinstance(content, bytes) else content.read_bytes()
            if str(api.token).encode() in text:
                raise ConfigError(f"{name} has your Hub token in it; take it out first", where=name)
    total = sum(map(_size, files.values()))
    logger.info(f"Sending {console.counted(len(files), 'file')}, {console.format_size(total)}, to {repo} …")
    with _failures(repo, api):
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(files.items())
        ]
        api.create_commit(repo, operations, commit_message="Model, tokenizer and card, by raylm push")


@contextlib.contextmanager
def _failures(repo: str, api: HfApi | None) -> Iterator[None]:
    """Raise errors of the Hub and the connection as StorageError with the repository's name and without the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # huggingface_hub, its HTTP client and its upload library have no common class
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if refusal is not None:
            status, reason = refusal.response.status_code, refusal.server_message or "no reason given"
            problem = f"{REFUSALS.get(status, 'the Hub refused it')} ({status}: {reason})"
        else:
            problem = f"cannot be sent: {error or type(error).__name__}"
        if api is not None and api.token:
            problem = problem.replace(str(api.token), "***")  # a server may echo the token
        raise StorageError(f"{repo}: {' '.join(problem.split())[:500]}", where=repo) from None
