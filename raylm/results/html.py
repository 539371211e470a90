"""The report of a sweep: <sweep>/report/report.html, a page that needs no other file, and a PNG of each figure."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from raylm import console, storage, tracking
from raylm import sweep as sweeps
from raylm.redaction import redacted
from raylm.results import figures, trial_table
from raylm.results.sweep import EXPERIMENT, SweepResults, read, scored_on


def build(directory: str) -> str:
    """Write the report of a sweep, whatever its state; the path of its page."""
    return write(read(directory))


def write(results: SweepResults) -> str:
    """Write the report of a sweep that was read; the path of its page."""
    built = figures.build(results.data)
    images = {figure.name: figures.png(figure) for figure in built if isinstance(figure, figures.Figure)}
    path = f"{results.directory}/report/report.html"
    with storage.reached(results.directory):
        storage.write(f"{results.directory}/{EXPERIMENT}", results.state.artifacts[EXPERIMENT]["text"].encode())
        for name, image in images.items():
            storage.write(f"{results.directory}/report/{name}.png", image)
        storage.write(path, page(results, built, images).encode(errors="backslashreplace"))
    return path


def page(results: SweepResults, built: Sequence[figures.Figure | figures.Omitted], images: Mapping[str, bytes]) -> str:
    """The page with these figures; `images`, name -> PNG, stand in for them where plotly is not installed."""
    script = figures.plotly_js()
    is_population = results.experiment.tune.scheduler.kind == "pbt"
    parts = [
        f"<h1>{escape(results.experiment.name)}: {escape(results.name)}</h1>",
        f"<p>{escape(_state(results))}</p>",
        _answer(results),
        *[_section(figure, images, interactive=script is not None) for figure in built],
        "<h2>All trials</h2>",
        f"<p class=caption>Ranked by {scored_on(results.experiment, results.state.parameters)}. "
        f"{FOLLOW if script else ''}</p>",
        _trials(results),
        f"<p class=caption>{OF_A_POPULATION}</p>" if is_population else "",
        "<h2>The sweep</h2>",
        _facts(_about(results)),
    ]
    if script is None:
        parts.append("<p>Figures are still: plotly is not installed (pip install 'raylm[plotly]').</p>")
        scripts = ""
    else:
        drawn = {figure.name: figures.plotly_figure(figure) for figure in built if isinstance(figure, figures.Figure)}
        scripts = f"<script>{script}</script>\n<script>{SCRIPT.replace('FIGURES', _json(drawn))}</script>"
    return HTML.format(title=escape(results.name), style=STYLE, body="\n".join(parts), scripts=scripts)


def _state(results: SweepResults) -> str:
    """How many trials there are of each status, and whether more are to come."""
    trials = results.data.trials
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    by_status = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    unfinished = "" if results.result else " The sweep was not over when this was written."
    if not trials:
        return f"No trial has begun.{unfinished}"
    return f"{len(trials)} trial{'s' if len(trials) > 1 else ''}: {by_status}.{unfinished}"


def _answer(results: SweepResults) -> str:
    """The best trial with its score and settings, or why there is none."""
    best = results.best
    if best is None:
        problem = results.result.get("error", "no trial has a score yet")
        return f"<div class=answer>{escape(problem)}</div>"
    trial = results.data.ranked[0]
    facts = {
        "best trial": trial.trial_id,
        **{figures.short_name(key): value for key, value in trial.settings.items()},
        "model": best.checkpoint,
        "repeat it": results.command(trial),
    }
    return (
        f"<div class=answer><p><b>{best.perplexity:.2f}</b> {console.label(results.measure)} "
        f"({best.bits_per_byte:.3f} bits per byte) of {best.scored_on}</p>{_facts(facts)}</div>"
    )


def _section(figure: figures.Figure | figures.Omitted, images: Mapping[str, bytes], interactive: bool) -> str:
    heading = f"<h2>{escape(figure.title)}</h2>"
    if isinstance(figure, figures.Omitted):
        return f"{heading}<p class=caption>Not drawn: {escape(figure.reason)}.</p>"
    if interactive:
        image = f"<div id={figure.name}></div>"
    else:
        data = base64.b64encode(images[figure.name]).decode()
        image = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    return f"{heading}{image}<p class=caption>{escape(figure.caption)}</p>"


def _trials(results: SweepResults) -> str:
    """The ranked table, with the reason of each failure and the command that repeats each trial."""
    rows = results.trials
    columns = trial_table.columns(rows, console.label(results.measure), results.data.swept)
    numbers = [column for name, column in columns.items() if column.justify == "right" and name != "rank"]
    headings = "".join(f"<th class=number>{escape(column.heading)}</th>" for column in numbers)
    lines = [f"<tr><th></th><th>trial</th>{headings}<th>status</th><th>repeat it</th></tr>"]
    for number, row in enumerate(rows):
        trial_id, rank, status = (escape(columns[name].cells[number]) for name in ("trial_id", "rank", "status"))
        notes = [escape(row.failure)] if row.failure else []
        notes += ["on the Pareto front"] if row.pareto else []
        lines.append(
            f'<tr data-trial="{trial_id}"><td class=number>{rank}</td><td>{trial_id}</td>'
            + "".join(f"<td class=number>{escape(column.cells[number])}</td>" for column in numbers)
            + f"<td class=status>{status}{''.join(f'<br><small>{note}</small>' for note in notes)}</td>"
            + f"<td><details><summary>command</summary><code>{escape(row.repeat or '')}</code></details></td></tr>"
        )
    return "<table class=trials>" + "\n".join(lines) + "</table>"


def _about(results: SweepResults) -> dict[str, Any]:
    """What the sweep trained, on which data, with which searcher and scheduler; None where that is not known."""
    experiment, state = results.experiment, results.state
    section = experiment.tune
    fingerprint = state.parameters.get("store")
    manifest = json.loads(storage.read(f"{experiment.storage}/tokens/{fingerprint}/manifest.json") or b"{}")
    tokens = {f"{split} tokens": manifest.get(split, {}).get("tokens") for split in ("train", "validation")}
    trained = sum(trial.tokens for trial in results.data.trials)
    return {
        "corpus": ", ".join(redacted(experiment.corpus.paths)),
        "token store": fingerprint,
        **tokens,
        "model": state.parameters.get("model"),
        "budget of a trial": f"{results.data.budget_tokens:,} tokens",
        "trained in all": f"{trained:,} tokens",
        **{f"space: {key}": sweeps.shown(sampler) for key, sampler in section.space.items()},
        "searcher": section.searcher,
        "scheduler": section.scheduler.kind,
        "seed": experiment.train.seed,
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(state.run.get("time", 0) / 1000)),
        "took": console.format_duration(results.seconds) if results.seconds else None,
        "git commit": {**state.run.get("tags", {}), **state.tags}.get(tracking.COMMIT_TAG),
        "directory": results.directory,
    }


def _facts(pairs: Mapping[str, Any]) -> str:
    """A table of names and values; pairs whose value is None are left out."""
    lines = [
        f"<tr><th>{escape(name)}</th><td>{'<code>' if name == 'repeat it' else ''}"
        f"{escape(console.format_number(value))}</td></tr>"
        for name, value in pairs.items()
        if value is not None
    ]
    return f"<table class=facts>{''.join(lines)}</table>"


def _json(value: Any) -> str:
    """JSON that can stand inside a script, which `</script` would end."""
    return json.dumps(value).replace("<", "\\u003c")


FOLLOW = "A click on a row, a line or a bar follows that trial through the figures."
OF_A_POPULATION = (
    "The settings of a population change while it is trained. The commands train with the last ones all along, which "
    "is not the same."
)
STATUSES = ("running", "completed", "stopped early", "failed")

HTML = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head>
<body>
{body}
{scripts}
</body>
</html>
"""

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .3em; }
.answer { background: #f3f6f9; border-left: 5px solid #D55E00; padding: .6em 1.2em 1em; }
.answer b { font-size: 2.4em; }
.caption, small { color: #555; } img { max-width: 100%; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; vertical-align: top; }
.facts th { padding-right: 1.5em; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.trials { font-size: .93em; display: block; overflow-x: auto; }
.trials td, .trials th { padding: .25em .7em; vertical-align: top; border-bottom: 1px solid #ddd; }
.trials .number { text-align: right; } .trials .status { overflow-wrap: anywhere; min-width: 14em; }
.trials details { min-width: 9em; } .trials details[open] { min-width: 24em; }
code { user-select: all; font-size: .92em; overflow-wrap: anywhere; }
.chosen { background: #fdeee2; }
"""

SCRIPT = """
const figures = FIGURES, boxes = [];
let chosen = null;
function choose(trial) {  // the same one again: all
  chosen = trial === chosen ? null : trial;
  for (const box of boxes) {
    const lines = [...box.data.keys()].filter(index => box.data[index].meta === "trial");
    const opacity = lines.map(index => chosen === null || box.data[index].name === chosen ? 1 : 0.12);
    if (lines.length) Plotly.restyle(box, {opacity}, lines);
  }
  for (const row of document.querySelectorAll("tr[data-trial]"))
    row.classList.toggle("chosen", row.dataset.trial === chosen);
}
for (const [name, figure] of Object.entries(figures)) {
  const box = document.getElementById(name);
  boxes.push(box);
  Plotly.newPlot(box, figure.data, figure.layout, {
    responsive: true, displaylogo: false, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  });
  box.on("plotly_click", event => {
    const {data, y} = event.points[0];
    if (data.meta) choose(data.meta === "trial" ? data.name : y);
  });
}
for (const row of document.querySelectorAll("tr[data-trial]"))
  row.addEventListener("click", event => event.target.closest("details") || choose(row.dataset.trial));
"""
