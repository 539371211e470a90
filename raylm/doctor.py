"""python -m raylm.doctor: what this machine and the cluster have, and what is missing or unsafe, on one screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raylm import cli
from raylm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from raylm.diagnosis import Finding

MARKS = {"good": "[green]✓[/]", "note": "[yellow]![/]", "bad": "[red]✗[/]"}


def doctor(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Mend what can be mended without asking: file permissions.")
    ] = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Look at this machine, the cluster, storage and MLflow of an experiment; exit code 2 if something is bad."""
    experiment = cli.experiment(config, settings)
    from raylm import diagnosis

    findings = diagnosis.findings(experiment, fix)
    num_bad = sum(finding.verdict == "bad" for finding in findings)
    record = {"findings": [finding._asdict() for finding in findings], "bad": num_bad}
    return cli.CommandResult(record, _table(findings), exit_code=ConfigError.exit_code if num_bad else 0)


def _table(findings: list[Finding]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        way_out = finding.way_out if finding.verdict != "good" else ""
        table.add_row(Text.from_markup(MARKS[finding.verdict]), finding.what, finding.found, Text(way_out, style="dim"))
    return table


def main() -> None:
    cli.run(doctor)


if __name__ == "__main__":
    from raylm.doctor import main  # by its real name, so that Ray ships functions by reference

    main()
