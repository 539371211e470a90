"""python -m raylm.submit VERB ...: a raylm command as a job of a Ray cluster."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from raylm import cli, console
from raylm.errors import ConfigError, StorageError
from raylm.redaction import redacted

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from raylm.cluster import Address

logger = logging.getLogger(__name__)

VERBS = ("prepare", "train", "tune", "evaluate", "generate", "inspect", "push", "sync", "report", "compare")
DASHBOARD = "http://127.0.0.1:8265"
ANSWER_SECONDS = 8.0
"""How long a dashboard may take to answer."""
START_SECONDS = 60
"""How long a cluster that answers may take until it takes jobs."""
STOP_SECONDS = 60
"""How long a job that is stopped may take for its checkpoint; Ray's own default is 3."""


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="VERB [ARGUMENTS]...", help="What to run there: tune --config sweep.yaml ...")
    ],
    address: Annotated[
        str | None,
        typer.Option(help=f"The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or {DASHBOARD}."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Run a raylm command as a job of a Ray cluster, and follow it; its exit code is the command's.

    The files that the arguments name go along, and this version of raylm. Everything else is read and written where the
    cluster can reach it. Ctrl-C leaves the job running.
    """
    verb, *arguments = command
    if verb not in VERBS:
        raise ConfigError(f"{verb}: not a command of raylm that can be submitted; these can: {', '.join(VERBS)}", verb)
    for argument in arguments:
        if redacted(argument) != argument:
            raise ConfigError(
                f"{redacted(argument)}: must come without the password that is in it, since Ray shows a job's command "
                "line to whoever asks; give it in the environment of the nodes, as MLFLOW_TRACKING_PASSWORD",
                argument.partition("=")[0],
            )
    dashboard = _dashboard(address)
    where = dashboard.value
    with tempfile.TemporaryDirectory(prefix="raylm-submit-") as directory:
        packed = _packed(arguments, Path(directory))
        entrypoint = shlex.join(["python", "-m", f"raylm.{verb}", *packed])
        record: dict[str, Any] = {"address": where, "entrypoint": entrypoint, "files": sorted(os.listdir(directory))}
        if dry_run:
            return cli.CommandResult(record, console.key_values({**record, "files": " ".join(record["files"]) or None}))
        client = _client(dashboard)
        job = _submitted(
            client,
            dashboard,
            entrypoint=entrypoint,
            runtime_env={
                "working_dir": directory,
                "py_modules": [str(Path(__file__).parent)],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
            },
        )
    record["job"] = job
    stop = f"ray job stop --address {where} {job}"
    if detach:
        facts = {"job": job, "follow it": f"ray job logs --follow --address {where} {job}", "stop it": stop}
        return cli.CommandResult(record, console.key_values(facts))
    logger.info(f"{job}: submitted to {where}; to stop it: {stop}")
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{job} goes on; to stop it: {stop}") from None
    info = client.get_job_info(job)
    exit_code = info.driver_exit_code if info.driver_exit_code is not None else 1
    record |= {"status": str(info.status), "exit_code": exit_code}
    return cli.CommandResult(
        record, f"{job}: {str(info.status).lower()}, exit code {exit_code}", exit_code=exit_code % 256
    )


def _dashboard(given: str | None) -> Address:
    """Where the cluster takes jobs; ConfigError if others could listen to, or use, what is meant for the user alone."""
    from raylm import cluster

    head = os.environ.get("RAY_ADDRESS", "")  # or a dashboard, as Ray's own tools take it
    named = (
        ("--address", given),
        ("RAY_API_SERVER_ADDRESS", os.environ.get("RAY_API_SERVER_ADDRESS")),
        ("RAY_ADDRESS", head if head.startswith("http") else None),
        ("--address", DASHBOARD),
    )
    dashboard = next(cluster.Address(value, setting) for setting, value in named if value)
    parts = urlsplit(dashboard.value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{dashboard}: must be the dashboard's, http://HOST:8265", dashboard.setting)
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not cluster.has_token():
        raise ConfigError(
            f"{dashboard}: whoever reaches it could run anything there; have the cluster ask for a token "
            "(RAY_AUTH_MODE=token, `ray get-auth-token --generate`), or reach it through a tunnel: "
            "ssh -L 8265:127.0.0.1:8265 HOST",
            dashboard.setting,
        )
    return dashboard


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _packed(arguments: list[str], directory: Path) -> list[str]:
    """The arguments as they are said there: files of this machine are copied into a directory, and named from it."""
    packed = []
    for argument in arguments:
        path = Path(argument)
        if not path.exists() or argument.startswith("-"):
            packed.append(argument)
            continue
        if path.is_dir():
            raise ConfigError(
                f"{argument} is a directory of this machine, and only files go along; put it where the cluster can "
                "read it, and name that",
                argument,
            )
        if path.suffix in (".yaml", ".yml"):
            _check_experiment(argument, path)
        target = directory / path.name
        if target.exists():
            raise ConfigError(f"{argument}: two files of this name cannot go along; rename one", argument)
        shutil.copyfile(path, target)
        packed.append(path.name)
    return packed


def _check_experiment(argument: str, path: Path) -> None:
    """ConfigError if a file of settings has a password in it: Ray keeps what goes along with a job."""
    for word in path.read_text(encoding="utf-8", errors="replace").split():
        if redacted(word) != word:
            address = redacted(word).strip("\"'[]{},")
            raise ConfigError(
                f"{argument}: must come without the password that is in {address}, since Ray keeps the file; give it "
                "in the environment of the nodes, as MLFLOW_TRACKING_PASSWORD",
                argument,
            )


def _client(dashboard: Address) -> JobSubmissionClient:
    """Of a cluster that answers, and takes the token that is here; StorageError within some seconds of another."""
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    from raylm import cluster

    def refused(problem: object) -> StorageError:
        return StorageError(f"{dashboard}: {str(problem).strip().splitlines()[0]}", dashboard.setting)

    try:
        # Ray's client waits for ever for one that takes connections and says nothing.
        requests.get(f"{dashboard.value.rstrip('/')}/api/version", timeout=ANSWER_SECONDS, stream=True).close()
    except requests.Timeout as error:
        raise refused(f"no Ray cluster answers there within {ANSWER_SECONDS:g} s") from error
    except requests.RequestException as error:
        reason: BaseException = error  # the innermost says it in a few words
        while reason.__context__ is not None:
            reason = reason.__context__
        problem = reason if isinstance(reason, OSError) else "what listens on this port is something else"
        raise refused(f"no Ray cluster answers there: {problem}") from error
    for chatty in ("ray", JobSubmissionClient.__module__):  # they tell of all that is packed, and of a closed socket
        logging.getLogger(chatty).setLevel(logging.ERROR)
    cluster.show_token()
    try:
        return JobSubmissionClient(dashboard.value)
    except AuthenticationError as error:
        raise refused(cluster.no_token()) from error
    except (ConnectionError, RuntimeError, ValueError) as error:  # of a server that is no dashboard, too
        raise refused(f"no Ray cluster answers there: {error}") from error


def _submitted(client: JobSubmissionClient, dashboard: Address, **job: Any) -> str:
    """The job's id. A cluster that has just begun takes none for some seconds."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            problem = str(error).strip().split("\n")[0]
            if "No available agent" not in problem or time.monotonic() > deadline:
                raise StorageError(f"{dashboard}: the cluster takes no job: {problem}", dashboard.setting) from error
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()


# Options that it does not know are the submitted command's.
submit.passes_on = True  # type: ignore[attr-defined]


def main() -> None:
    cli.run(submit)


if __name__ == "__main__":
    from raylm.submit import main  # by its real name, so that Ray ships functions by reference

    main()
