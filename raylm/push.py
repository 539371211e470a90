"""python -m raylm.push MODEL REPO_ID: a trained model, with a card that says what it is, to the Hugging Face Hub.

What is sent is what export/ lists: weights, configuration, tokenizer, README.md (the card) and experiment.yaml. What it
does not list stays: optimizer, random states, whatever is pickled, where things lay.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raylm import cli, console
from raylm.config import dump
from raylm.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from raylm.export import Files

logger = logging.getLogger(__name__)


def push(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    repo_id: Annotated[str, typer.Argument(help="Where it goes on the Hub: NAMESPACE/NAME, or NAME for your own.")],
    private: Annotated[bool, typer.Option("--private", help="Only you and those you let in see it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the folder only; send nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Keep what is sent in this new or empty directory.")
    ] = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Send a model, its tokenizer and a model card to the Hugging Face Hub, as one commit.

    The token is that of HF_TOKEN or of hf auth login.

    To edit the card first: write it with --dry-run --out DIR, edit DIR/README.md, and push DIR.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    from raylm import checkpoint, export

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"REPO_ID {repo_id!r}: {error}", where="REPO_ID") from None
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new or an empty directory", where="--out")
    directory = checkpoint.locate(model)
    files = export.model_files(directory)
    num_parameters = export.parameters(directory, files)
    experiment = checkpoint.read_experiment(directory)
    if experiment is not None:
        experiment = export.published(experiment)
        files[export.EXPERIMENT] = dump(experiment).encode()
    if left := sorted({path.name for path in directory.iterdir()} - {*files, export.CARD}):
        logger.info(f"not sent: {', '.join(left)}")
    hub = connect(None if dry_run else token(repo_id))
    if dry_run:
        repo, url = repo_id, f"{hub.endpoint}/{repo_id}"
        out = out or Path(tempfile.mkdtemp(prefix="raylm-push-"))
    else:
        repo, url = create(hub, repo_id, private)
    files[export.CARD] = export.build(directory, repo, experiment, num_parameters)
    if out is not None:
        write(files, out)
    if not dry_run:
        send(hub, repo, files)
    record = {"repo": repo, "url": url, "files": sorted(files), "dry_run": dry_run}
    if out is not None:
        record["folder"] = str(out.resolve())
    sizes = {name: f"{size(content):,} bytes" for name, content in sorted(files.items())}
    where = {"folder": record.get("folder"), "would go to" if dry_run else "sent to": url}
    return cli.CommandResult(record, console.key_values({**where, **sizes}))


def size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def write(files: Files, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                shutil.copyfile(content, folder / name)
    except OSError as error:
        raise StorageError(f"--out {folder}: {error.strerror or error}", where="--out") from None


# The Hub -------------------------------------------------------------------------------------------------------------

REFUSALS = {
    401: "the Hub does not know the token; run hf auth login again, or set HF_TOKEN to one that is valid",
    403: "the token may not write there; use one with write access",
    404: "there is no such repository or namespace, or the token does not see it",
}


def token(repo: str) -> str:
    """The user's own, from the environment or the Hub's login; it is asked for nowhere else."""
    from huggingface_hub import get_token

    with _failures(repo, None):
        found = get_token()
    if found is None:
        raise ConfigError("no token for the Hub; run hf auth login, or set HF_TOKEN in the environment", "HF_TOKEN")
    return found


def connect(token: str | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token or False)


def create(hub: HfApi, repo_id: str, private: bool) -> tuple[str, str]:
    """The full name and the address of the repository, which may be there already."""
    with _failures(repo_id, hub):
        created = hub.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not hub.repo_info(created.repo_id).private
    if public:
        raise ConfigError(
            f"{created.repo_id} is there already and is public, which --private does not change; make it private at "
            f"{created.url}/settings, or push without --private",
            where="--private",
        )
    return created.repo_id, created.url


def send(hub: HfApi, repo: str, files: Files) -> None:
    """One commit: the repository holds the whole model or, if that fails, what it held before."""
    from huggingface_hub import CommitOperationAdd

    for name, content in files.items():
        if not name.endswith(".safetensors"):
            text = content if isinstance(content, bytes) else content.read_bytes()
            if str(hub.token).encode() in text:
                raise ConfigError(f"{name} has your Hub token in it; take it out first", where=name)
    total = sum(size(content) for content in files.values())
    logger.info(f"sending {len(files)} files, {total / 1e6:.1f} MB, to {repo} …")
    with _failures(repo, hub):
        operations = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in sorted(files.items())
        ]
        hub.create_commit(repo, operations, commit_message="Model, tokenizer and card, by raylm push")


@contextlib.contextmanager
def _failures(repo: str, hub: HfApi | None) -> Iterator[None]:
    """What the Hub refuses, and a Hub out of reach, as StorageError: it names the repository and never the token."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:  # of huggingface_hub, its HTTP client or its upload library: no common class
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(cause)
        refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if refusal is not None:
            status, why = refusal.response.status_code, refusal.server_message or "no reason given"
            said = f"{REFUSALS.get(status, 'the Hub refused it')} ({status}: {why})"
        else:
            said = f"cannot be sent: {error or type(error).__name__}"
        if hub is not None and hub.token:
            said = said.replace(str(hub.token), "***")  # a server may tell what it was sent
        raise StorageError(f"{repo}: {' '.join(said.split())[:500]}", where=repo) from None


def main() -> None:
    cli.run(push)


if __name__ == "__main__":
    from raylm.push import main  # by its real name, so that Ray ships functions by reference

    main()
