"""All rows of docs/performance.md: `make bench`, half an hour on 2 cores that do nothing else.

Runs the benchmarks one after another and prints one table: what raylm takes, what stands beside it, and the ratio of
the two in each turn, its median, lowest and highest. Then puts the tables, with machine and date, between the markers
of docs/performance.md; the text around them is written by people. `--rows reading "training step"` runs the rows whose
names start so, and leaves the file as it is.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import start
import turns

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


class Row(NamedTuple):
    """A row of the table: two of the things that a benchmark measures in turn."""

    name: str
    subject: str
    beside: str
    measure: Callable[[], dict[str, Any]]
    """{unit, found: name -> a value for each turn}"""
    goal: str
    is_met: Callable[[float, float], bool]
    """Of the median ratio, and of the subject's median."""


def benchmark(*command: str) -> dict[str, Any]:
    """What a benchmark prints as its last line."""
    script, *arguments = command
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def first_step(workers: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return {"unit": "s", "found": start.first_step(Path(directory), workers, 3)}


once = functools.cache(benchmark)  # two rows of one benchmark
BARE, FUSED, TWICE = "bare loop + environment", "bare loop + fused AdamW", "bare loop x 2 processes"
ONE_WORKER = ("training.py", "--steps", "40", "--rows", f"{BARE},{FUSED},raylm,Trainer")
TWO_WORKERS = ("training.py", "--steps", "40", "--rows", f"{TWICE},raylm x 2 workers")
STEP = ("step.py",)
TOKENS = ("tokens.py", "--copies", "4")
SWEEP = ("sweep.py", "--trials", "4", "--rows", "plain,raylm", "--repeat", "2")


def more(goal: float) -> tuple[str, Callable[[float, float], bool]]:
    return f"at least {goal:g}", lambda ratio, _: ratio >= goal


def less(goal: float) -> tuple[str, Callable[[float, float], bool]]:
    return f"at most {goal:g}", lambda ratio, _: ratio <= goal


def million(goal: float) -> tuple[str, Callable[[float, float], bool]]:
    return f"{goal:g} Mtokens/s", lambda _, value: value >= goal


ROWS = [
    Row("training step, one worker", "raylm", BARE, lambda: once(*ONE_WORKER), *more(0.98)),
    Row("training step, optimizer alike", "raylm", FUSED, lambda: once(*ONE_WORKER), *more(0.98)),
    Row("training step, Trainer", "raylm", "Trainer", lambda: once(*ONE_WORKER), *more(1)),
    Row("training step, step by step", "raylm", "bare", lambda: once(*STEP), *more(0.98)),
    Row("two workers of one core", "raylm x 2 workers", TWICE, lambda: once(*TWO_WORKERS), *more(0.95)),
    Row("command to first step", "raylm", "script", lambda: first_step(1), *less(1.15)),
    Row("the same, two workers", "raylm", "script", lambda: first_step(2), *less(1.5)),
    *(
        Row(
            f"reading, block {size}",
            "raylm",
            "datasets",
            functools.partial(once, "reading.py", "--blocks", str(size)),
            *million(5),
        )
        for size in (32, 64, 256)
    ),
    Row("a mixture, block 256", "mixture", "raylm", lambda: once("reading.py", "--blocks", "256"), *more(0.8)),
    Row("prepare, Hugging Face's encoder", "slow", "plain", lambda: once(*TOKENS), *more(2)),
    Row("prepare, fastokens", "fast", "plain", lambda: once(*TOKENS), *more(2)),
    Row("sweep of 4 trials", "raylm", "plain", lambda: once(*SWEEP), *less(0.4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], help="by how their names start")
    args = parser.parse_args()
    began, conditions, lines = time.monotonic(), machine(), []
    for row in ROWS:
        if row.name.startswith(tuple(args.rows)):
            lines.append(line(row, row.measure()))
            print(lines[-1], flush=True)
    table = "\n".join([*HEAD, *lines])
    measured = f"{conditions} All rows took {(time.monotonic() - began) / 60:.0f} minutes."
    print(f"\n{measured}\n\n{table}")
    if args.rows == [""]:
        text = replaced(PAGE.read_text(encoding="utf-8"), "table", f"{measured}\n\n{table}")
        PAGE.write_text(replaced(text, "step", operators(once(*STEP)["operators"])), encoding="utf-8")


HEAD = [
    "| | raylm | beside it | | ratio | lowest to highest | goal | |",
    "|---|--:|---|--:|--:|--:|---|---|",
]


def line(row: Row, measured: dict[str, Any]) -> str:
    found, unit = measured["found"], measured["unit"]
    each = turns.ratios(found, row.subject, row.beside)
    ratio, ours, other = (statistics.median(values) for values in (each, found[row.subject], found[row.beside]))
    is_met = "met" if row.is_met(ratio, ours) else "not met"
    return (
        f"| {row.name} | {shown(ours)} {unit} | {row.beside} | {shown(other)} | {ratio:.2f} | "
        f"{min(each):.2f} to {max(each):.2f} of {len(each)} | {row.goal} | {is_met} |"
    )


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def operators(rows: list[list[Any]]) -> str:
    """The operators of a step, as a table."""
    head = ["| operator, own time of a step | bare loop | raylm | difference |", "|---|--:|--:|--:|"]
    return "\n".join(
        [*head, *(f"| `{name}` | {bare:.1f} ms | {ours:.1f} ms | {more:+.1f} ms |" for name, bare, ours, more in rows)]
    )


def machine() -> str:
    """The machine and the day, in two sentences; what else it does shows in its load."""
    import torch

    names = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    name = next(iter(re.findall(r"model name\s*: (.*)", names)), platform.processor())
    cores = len(os.sched_getaffinity(0))
    versions = ", ".join(f"{each} {metadata.version(each)}" for each in ("torch", "transformers", "ray", "tokenizers"))
    return (
        f"{datetime.date.today()}, {cores} cores of {name} ({torch.backends.cpu.get_cpu_capability()}), load "
        f"{os.getloadavg()[0]:.1f} at the start, Python {platform.python_version()}, {versions}."
    )


def replaced(page: str, marker: str, text: str) -> str:
    """The page with other text between the markers of this name."""
    before, _, rest = page.partition(f"<!-- {marker}: written by make bench -->\n")
    _, end, after = rest.partition(f"<!-- end of {marker} -->")
    assert end, f"{PAGE} has no markers of {marker}"
    return f"{before}<!-- {marker}: written by make bench -->\n\n{text}\n\n{end}{after}"


if __name__ == "__main__":
    main()
