"""A raylm command -> a job of a Ray cluster, by its dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from raylm import config, console
from raylm.cluster.address import Address, has_token, no_token, show_token
from raylm.errors import ConfigError, StorageError, first_line
from raylm.redaction import redacted

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

VERBS = ("prepare", "train", "tune", "evaluate", "generate", "inspect", "push", "sync", "report", "compare")
DASHBOARD = "http://127.0.0.1:8265"
ANSWER_SECONDS = 8.0
"""How long a dashboard may take to answer."""
START_SECONDS = 120
"""How long a cluster that answers may take until it accepts jobs."""
STOP_SECONDS = 60
"""How long a stopped job may take for its checkpoint; Ray's default is 3."""

TOKEN_SETTING = re.compile(r"\bhub_token\b")
"""The secret setting of TrainingArguments. raylm would refuse it only once the job runs."""


@dataclass(frozen=True)
class Submission:
    """A command that is ready to be submitted."""

    dashboard: Address
    entrypoint: str
    """The command line of the job."""
    directory: Path
    """The files that the arguments name: the job's working directory."""

    def record(self) -> dict[str, Any]:
        """The submission for --json."""
        files = sorted(os.listdir(self.directory))
        return {"address": self.dashboard.value, "entrypoint": self.entrypoint, "files": files}


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    client: JobSubmissionClient
    dashboard: Address
    id: str

    @property
    def stop_command(self) -> str:
        return f"ray job stop --address {self.dashboard.value} {self.id}"

    @property
    def logs_command(self) -> str:
        return f"ray job logs --follow --address {self.dashboard.value} {self.id}"

    def follow(self, show: Callable[[str], None]) -> tuple[str, int]:
        """Wait for the job; return its status and exit code. `show` is called with its output."""

        async def read() -> None:
            async for lines in self.client.tail_job_logs(self.id):
                show(lines)

        try:
            asyncio.run(read())
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.id} continues; to stop it: {self.stop_command}") from None
        info = self.client.get_job_info(self.id)
        return str(info.status), info.driver_exit_code if info.driver_exit_code is not None else 1


@contextlib.contextmanager
def pack(command: Sequence[str], address: str | None) -> Iterator[Submission]:
    """The submission of a command (verb and arguments), to the dashboard of `address` or of the environment.

    Its directory exists within the context.
    """
    verb, *arguments = command
    if verb not in VERBS:
        raise ConfigError(f"{verb}: not a command of raylm that can be submitted; these can: {', '.join(VERBS)}", verb)
    for argument in arguments:
        name = redacted(argument.partition("=")[0])
        _check_no_secret(name, argument.replace("=", " ", 1), "Ray shows a job's command line to anyone who asks")
    dashboard = find_dashboard(address)
    with tempfile.TemporaryDirectory(prefix="raylm-submit-") as directory:
        packed = copy_files(arguments, Path(directory))
        if verb in ("train", "tune"):
            copy_callbacks(arguments, Path(directory))
        yield Submission(dashboard, shlex.join(["python", "-m", f"raylm.{verb}", *packed]), Path(directory))


def submit(submission: Submission) -> Job:
    """The job of a submission, with this version of raylm."""
    import raylm

    client = connect_client(submission.dashboard)
    runtime_env = {
        "working_dir": str(submission.directory),
        "py_modules": [str(Path(raylm.__file__).parent)],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)},
    }
    deadline = time.monotonic() + START_SECONDS
    with console.waiting(f"Submitting to {submission.dashboard.value}"):
        while True:  # a cluster that has just started accepts no jobs for some seconds, on a busy machine for minutes
            try:
                job = client.submit_job(entrypoint=submission.entrypoint, runtime_env=runtime_env)
                return Job(client, submission.dashboard, job)
            except RuntimeError as error:
                problem = first_line(error)
                if "No available agent" not in problem or time.monotonic() > deadline:
                    raise StorageError(
                        f"{submission.dashboard}: the cluster takes no job: {problem}", submission.dashboard.setting
                    ) from error
            time.sleep(1)


def find_dashboard(given: str | None) -> Address:
    """The address for jobs; ConfigError if others could read or use what is meant for the user alone."""
    head = os.environ.get("RAY_ADDRESS", "")  # or a dashboard, as Ray's own tools take it
    named = (
        ("--address", given),
        ("RAY_API_SERVER_ADDRESS", os.environ.get("RAY_API_SERVER_ADDRESS")),
        ("RAY_ADDRESS", head if head.startswith("http") else None),
        ("--address", DASHBOARD),
    )
    dashboard = next(Address(value, setting) for setting, value in named if value)
    parts = urlsplit(dashboard.value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{dashboard}: must be the dashboard's, http://HOST:8265", dashboard.setting)
    if parts.scheme == "http" and not _is_loopback(parts.hostname) and not has_token():
        raise ConfigError(
            f"{dashboard}: anyone who reaches it could run anything there; have the cluster ask for a token "
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


def copy_files(arguments: Sequence[str], directory: Path) -> list[str]:
    """The arguments for a job with `directory` as its working directory: files they name are copied there."""
    packed = []
    for argument in arguments:
        path = Path(argument)
        if not path.exists() or argument.startswith("-"):
            packed.append(argument)
            continue
        if path.is_dir():
            raise ConfigError(
                f"{argument} is a directory of this machine, and only files are sent with a job; put it where the "
                "cluster can read it, and name that",
                argument,
            )
        if path.suffix in (".yaml", ".yml"):
            _check_no_secret(argument, path.read_text(encoding="utf-8", errors="replace"), "Ray keeps the file")
        target = directory / path.name
        if target.exists():
            raise ConfigError(f"{argument}: two files of this name cannot be sent; rename one", argument)
        shutil.copyfile(path, target)
        packed.append(path.name)
    return packed


def copy_callbacks(arguments: Sequence[str], directory: Path) -> None:
    """Copy the packages and modules of train.callbacks that are in the working directory; ConfigError as in
    config.load."""
    words = iter(arguments)
    file, settings = None, []
    for word in words:
        if word == "--config":
            file = next(words, None)
        elif word.startswith("--config="):
            file = word.removeprefix("--config=")
        elif "=" in word and not word.startswith("-"):
            settings.append(word)
    if file is not None and not Path(file).exists():  # the file is on the cluster, like its callbacks
        return
    for name in config.load(file, settings).train.callbacks:
        module = name.partition(":")[0].partition(".")[0]
        if Path(module).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(module, directory / module, ignore=ignored, dirs_exist_ok=True)
        elif Path(f"{module}.py").is_file():
            shutil.copyfile(f"{module}.py", directory / f"{module}.py")


def _check_no_secret(name: str, text: str, why: str) -> None:
    """ConfigError if an argument or a file of settings has a password or token in it."""
    secrets = [*TOKEN_SETTING.findall(text), *(redacted(word) for word in text.split() if redacted(word) != word)]
    if secrets:
        kept = secrets[0].strip("\"'[]{},")
        raise ConfigError(
            f"{name}: must come without the secret of {kept}, because {why}; give it in the environment of the nodes, "
            "as MLFLOW_TRACKING_PASSWORD or HF_TOKEN",
            name,
        )


def connect_client(dashboard: Address) -> JobSubmissionClient:
    """A client of a cluster that answers and accepts the token of this machine; else StorageError within seconds."""
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    def refused(problem: object) -> StorageError:
        return StorageError(f"{dashboard}: {first_line(problem)}", dashboard.setting)

    try:
        # Ray's client waits forever for a server that accepts connections and never answers.
        requests.get(f"{dashboard.value.rstrip('/')}/api/version", timeout=ANSWER_SECONDS, stream=True).close()
    except requests.Timeout as error:
        raise refused(f"no Ray cluster answers there within {ANSWER_SECONDS:g} s") from error
    except requests.RequestException as error:
        reason: BaseException = error  # the innermost error is the shortest
        while reason.__context__ is not None:
            reason = reason.__context__
        problem = reason if isinstance(reason, OSError) else "what listens on this port is something else"
        raise refused(f"no Ray cluster answers there: {problem}") from error
    # They log each packed file, and closed sockets.
    for chatty in ("ray", *(each.__module__ for each in JobSubmissionClient.__mro__ if each is not object)):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    show_token()
    try:
        return JobSubmissionClient(dashboard.value)
    except AuthenticationError as error:
        raise refused(no_token()) from error
    except (ConnectionError, RuntimeError, ValueError) as error:  # also from a server that is not a dashboard
        raise refused(f"no Ray cluster answers there: {error}") from error
