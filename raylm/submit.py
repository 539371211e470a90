"""python -m raylm.submit VERB ...: a raylm command as a job of a Ray cluster."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from raylm import cli, console

logger = logging.getLogger(__name__)


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="VERB [ARGUMENTS]...", help="What to run there: tune --config sweep.yaml ...")
    ],
    address: Annotated[
        str | None,
        typer.Option(
            help="The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the job.")] = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Run a raylm command as a job of a Ray cluster, and follow it; its exit code is the command's.

    The files that the arguments name go along, and this version of raylm. Everything else is read and written where the
    cluster can reach it. Ctrl-C leaves the job running.
    """
    from raylm.cluster import submission

    with submission.pack(command, address) as packed:
        record = packed.record()
        if dry_run:
            return cli.CommandResult(record, console.key_values({**record, "files": " ".join(record["files"]) or None}))
        job = submission.submit(packed)
    record["job"] = job.id
    if detach:
        commands = {"job": job.id, "follow it": job.logs_command, "stop it": job.stop_command}
        return cli.CommandResult(record, console.key_values(commands))
    logger.info(f"{job.id}: submitted to {job.dashboard.value}; to stop it: {job.stop_command}")
    status, exit_code = job.follow(_print)
    record |= {"status": status, "exit_code": exit_code}
    view = f"{job.id}: {status.lower()}, exit code {exit_code}"
    return cli.CommandResult(record, view, exit_code=exit_code % 256)


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# Options that it does not know are the submitted command's.
submit.passes_on = True  # type: ignore[attr-defined]


def main() -> None:
    cli.run(submit)


if __name__ == "__main__":
    from raylm.submit import main  # by its real name, so that Ray ships functions by reference

    main()
