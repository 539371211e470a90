"""The report of a sweep: <sweep>/report/report.html, a page that needs no other file, and a PNG of each figure."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, get_args

from raylm import console, samples, storage, tokens, tracking
from raylm import sweep as sweeps
from raylm.redaction import redacted
from raylm.results import choices, figures, several, trial_table
from raylm.results.choices import Choice
from raylm.results.sweep import EXPERIMENT, SweepResults, read, repeat_command, scored_on_with_size, sources
from raylm.results.trial_table import TrialRow
from raylm.sweep.record import Status


def build(directory: str) -> str:
    """Write the report of a sweep in any state; return the path of its page."""
    return write(read(directory))


def write(results: SweepResults) -> str:
    """Write the report of a sweep that was read; return the path of its page."""
    built = figures.build(results.data)
    images = {figure.name: figures.png(figure) for figure in built if isinstance(figure, figures.Figure)}
    path = f"{results.directory}/report/report.html"
    with storage.reached(results.directory):
        storage.write(f"{results.directory}/{EXPERIMENT}", results.state.artifacts[EXPERIMENT]["text"].encode())
        for name, image in images.items():
            storage.write(f"{results.directory}/report/{name}.png", image)
        storage.write(path, page(results, built, images).encode(errors="backslashreplace"))
    return path


def write_several(compared: several.SeveralSweeps) -> str:
    """Write the report of several sweeps next to that of the first; return the path of its page."""
    directory = compared.sweeps[0].directory
    path = f"{directory}/report/compared.html"
    names = [escape(results.name) for results in compared.sweeps]
    answers = [compared.answer, *compared.sentences()]
    warnings = "".join(f"<p class=failure>{escape(warning)}</p>" for warning in compared.warnings)
    parts = [
        f"<h1>{' and '.join(names)}</h1>",
        f"<div class=answer>{''.join(f'<p>{escape(each)}</p>' for each in answers)}</div>{warnings}",
        "<h2>What changed</h2>",
        _table(["", *names], [[name, *map(_cell, values)] for name, values in compared.changes().items()]),
    ]
    if compared.trials:
        headings, rows = several.cells(compared)
        parts += [
            f"<h2>Trials at {compared.equal_tokens:,} training tokens</h2>",
            _table(headings, rows, slice(3, None)),
        ]
    body = HTML.format(title=" and ".join(names), style=STYLE, body="\n".join(parts), scripts="")
    with storage.reached(directory):
        storage.write(path, body.encode(errors="backslashreplace"))
    return path


def write_figure(figure: figures.Figure, directory: str, title: str, answers: Sequence[str]) -> tuple[str, str]:
    """Write a page of one figure and its PNG to a directory, under the figure's name; return the paths of both."""
    image, script = figures.png(figure), figures.plotly_js()
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<div class=answer>{''.join(f'<p>{escape(each)}</p>' for each in answers)}</div>",
        _section(figure, {figure.name: image}, interactive=script is not None),
    ]
    drawn = _json({figure.name: figures.plotly_figure(figure)})
    scripts = f"<script>{script}</script>\n<script>{SCRIPT.replace('FIGURES', drawn)}</script>" if script else ""
    body = HTML.format(title=escape(title), style=STYLE, body="\n".join(parts), scripts=scripts)
    page, picture = f"{directory}/{figure.name}.html", f"{directory}/{figure.name}.png"
    with storage.reached(directory):
        storage.write(picture, image)
        storage.write(page, body.encode(errors="backslashreplace"))
    return page, picture


def _cell(value: Any) -> str:
    return "-" if value is None else console.format_number(value)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: slice = slice(1, None)) -> str:
    """A table of text, some of whose columns are `numbers`."""
    are_numbers = range(len(headings))[numbers]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' * (at in are_numbers)}>{escape(cell)}</{tag}>" for at, cell in enumerate(cells)
        )

    lines = [line("th", headings), *(line("td", row) for row in rows)]
    return f"<div class=wide><table class=trials>{''.join(f'<tr>{each}</tr>' for each in lines)}</table></div>"


def page(results: SweepResults, built: Sequence[figures.Figure | figures.Omitted], images: Mapping[str, bytes]) -> str:
    """The page with these figures; `images`, name -> PNG, replace them if plotly is not installed."""
    script = figures.plotly_js()
    is_population = results.experiment.tune.scheduler.kind == "pbt"
    parts = [
        f"<h1>{escape(results.experiment.name)}: {escape(results.name)}</h1>",
        f"<p>{escape(_state(results))}</p>",
        _answer(results),
        *[_section(figure, images, interactive=script is not None) for figure in built],
        "<h2>All trials</h2>",
        f"<p class=caption>Ranked by {scored_on_with_size(results.experiment, results.state.parameters)}. "
        f"{FOLLOW if script else ''}</p>",
        _trials(results),
        f"<p class=caption>{OF_A_POPULATION}</p>" if is_population else "",
        *[_choice(results, each) for each in choices.of(results.trials)],
        _sources(results),
        _samples(results),
        _meaning(results),
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
    """The number of trials of each status, and whether the sweep has finished."""
    trials = results.data.trials
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    by_status = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    unfinished = "" if results.result else " The sweep had not finished when this was written."
    if not trials:
        return f"No trial has started.{unfinished}"
    return f"{len(trials)} trial{'s' if len(trials) > 1 else ''}: {by_status}.{unfinished}"


def _answer(results: SweepResults) -> str:
    """The best trial with its score and settings, or why no trial is best."""
    best = results.best
    if best is None:
        problem = results.result.get("error", "no trial has a score yet")
        return f"<div class=answer>{escape(problem)}</div>"
    trial = results.data.ranked[0]
    facts = {
        "best trial": trial.trial_id,
        **{figures.short_name(key): value for key, value in trial.settings.items()},
        "model": best.checkpoint,
        "repeat it": repeat_command(results.directory, trial),
    }
    return (
        f"<div class=answer><p><b>{best.perplexity:.2f}</b> {console.label(results.measure)} "
        f"({best.bits_per_byte:.3f} bits per byte) of {best.scored_on}</p>{_facts(facts)}"
        f"<p>{escape(results.result.get('significance') or '')}</p>{_about_settings(results)}"
        f"<p>{escape(results.result.get('test', {}).get('sentence', ''))}</p></div>"
    )


def _about_settings(results: SweepResults) -> str:
    """Which settings are better, and the table of those that were repeated; empty without tune.repeats."""
    found = results.result.get("repeats")
    if found is None:
        return ""
    score = console.label(results.measure)
    rows = []
    for each in found["settings"]:
        settings = ", ".join(f"{figures.short_name(key)} {_cell(value)}" for key, value in each["settings"].items())
        scores = [trial_table.format_score(each[f"{results.measure}{end}"]) for end in ("", "_low", "_high")]
        cells = [_cell(each["runs"]), *scores, _cell(each["nats_per_token"]), console.format_p(each["p"])]
        rows.append([trial_table.short_id(each["trial_id"]), settings, *cells])
    headings = ["trial", "its settings", "repeats", f"mean {score}", "95 % from", "to", "nats a token more", "p"]
    return f"<p>{escape(found['sentence'])}</p>{_table(headings, rows, slice(2, None))}"


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
    """The ranked table; below each trial its status, why it failed, and the command that repeats it."""
    rows = results.trials
    columns = trial_table.columns(rows, console.label(results.measure), results.data.swept)
    swept = set(results.data.swept)
    costs = {
        "best at": [row.best_tokens for row in rows],
        "seconds": [None if row.seconds is None else round(row.seconds) for row in rows],
        "parameters": [row.parameters for row in rows],
    }
    numbers = {name: column for name, column in columns.items() if column.justify == "right" and name != "rank"}
    cells = {column.heading: column.cells for name, column in numbers.items() if name not in swept}
    for heading, values in costs.items():
        if heading not in cells and any(value is not None for value in values):
            cells[heading] = ["-" if value is None else console.format_number(value) for value in values]
    cells |= {column.heading: column.cells for name, column in numbers.items() if name in swept}
    headings = "".join(f"<th class=number>{escape(heading)}</th>" for heading in cells)
    lines = [f"<tr><th></th><th>trial</th>{headings}</tr>"]
    for number, row in enumerate(rows):
        trial_id, rank, status = (escape(columns[name].cells[number]) for name in ("trial_id", "rank", "status"))
        figures_of_row = "".join(f"<td class=number>{escape(column[number])}</td>" for column in cells.values())
        status += ", on the Pareto front" * bool(row.pareto)
        status += f", repeats {row.repeat_of}" if row.repeat_of is not None else ""
        failure = f"<div class=failure>{escape(row.failure)}</div>" if row.failure else ""
        command = f"<details><summary>{status}; repeat it</summary><code>{escape(row.repeat or '')}</code></details>"
        lines += [
            f'<tr data-trial="{trial_id}"><td class=number>{rank}</td><td>{trial_id}</td>',
            f"{figures_of_row}</tr>",
            f'<tr class=more><td></td><td colspan="{len(cells) + 1}"><div>{failure}{command}</div></td></tr>',
        ]
    return f"<div class=wide><table class=trials>{''.join(lines)}</table></div>"


def _choice(results: SweepResults, choice: Choice) -> str:
    """The best trial of each value of a setting."""
    caption = f"The best trial of each {choice.name}, with its own best settings."
    return (
        f"<h2>{escape(choice.title)}</h2><p class=caption>{escape(caption)}</p>"
        f"{_table(*choice.cells(console.label(results.measure)), slice(1, -1))}"
        f"{''.join(f'<p>{escape(sentence)}</p>' for sentence in choice.sentences)}"
    )


def _meaning(results: SweepResults) -> str:
    """What the settings of each trial mean, and what it cost; empty if nothing is known of it."""
    rows = results.trials
    known = [name for name in MEANING_HEADINGS if any(getattr(row, name) is not None for row in rows)]
    if known in ([], ["seconds"]):
        return ""

    def cell(row: TrialRow, name: str) -> str:
        value = getattr(row, name)
        if value is None:
            return "-"
        if name == "training_flops":
            return f"{value:.3g}"
        if name == "mfu":
            return f"{value:.1%}"
        return console.format_size(value) if name == "peak_memory_bytes" else console.format_number(value)

    lines = [[trial_table.short_id(row.trial_id), *(cell(row, name) for name in known)] for row in rows]
    headings = ["trial", *(MEANING_HEADINGS[name] for name in known)]
    caption = " ".join(text for name, text in MEANING_CAPTIONS.items() if name in known)
    return (
        f"<h2>What the settings mean, and what the trials cost</h2><p class=caption>{escape(caption)}</p>"
        f"{_table(headings, lines)}"
    )


def _sources(results: SweepResults) -> str:
    """The score of each trial on each source and evaluation set; empty if there is one text without a name."""
    found = sources(results)
    if not found:
        return ""
    names = list(next(iter(found.values())))
    repeated = [name for name in names if any(parts[name][1] is not None for parts in found.values())]
    rows = [
        [
            trial_table.short_id(trial_id),
            *(trial_table.format_score(parts[name][0]) for name in names),
            *(parts[name][1] or "-" for name in repeated),
        ]
        for trial_id, parts in found.items()
    ]
    caption = f"{console.label(results.measure)} of the best evaluation of each trial, by source and evaluation set"
    if repeated:
        caption += "; and how often the training repeats each source of the mixture"
    headings = ["trial", *names, *(f"passes over {name}" for name in repeated)]
    return f"<h2>By source</h2><p class=caption>{escape(caption)}.</p>{_table(headings, rows)}"


def _samples(results: SweepResults) -> str:
    """The texts of eval.prompts in the last evaluation of each trial, the best trial first; empty without any."""
    rows = []
    for trial in results.data.ranked:
        found = samples.read(f"{results.directory}/{trial.trial_id}")
        last = [row for row in found if row["step"] == found[-1]["step"]]
        rows += [[trial_table.short_id(trial.trial_id), f"{row['tokens']:,}", row["text"]] for row in last]
    if not rows:
        return ""
    caption = "What each trial wrote after eval.prompts in its last evaluation, always the likeliest token."
    return f"<h2>Texts</h2><p class=caption>{caption}</p>{_table(['trial', 'tokens', 'text'], rows, slice(1, 2))}"


def _about(results: SweepResults) -> dict[str, Any]:
    """Model, data, searcher and scheduler of the sweep; None where unknown."""
    experiment, state = results.experiment, results.state
    section = experiment.tune
    fingerprint = state.parameters.get("store")
    manifest = json.loads(storage.read(f"{experiment.storage}/tokens/{fingerprint}/manifest.json") or b"{}")
    counts = {f"{split} tokens": manifest[split]["tokens"] for split in tokens.splits(manifest)}
    trained = sum(trial.tokens for trial in results.data.trials)
    return {
        "corpus": ", ".join(redacted(experiment.corpus.labels)),
        "token store": fingerprint,
        **counts,
        "model": state.parameters.get("model"),
        "budget of a trial": f"{results.data.budget_tokens:,} tokens",
        "trained in total": f"{trained:,} tokens",
        **{f"space: {key}": sweeps.shown(sampler) for key, sampler in section.space.items()},
        "searcher": section.searcher.label,
        "scheduler": section.scheduler.kind,
        "seed": experiment.train.seed,
        "data seed": experiment.train.data_seed,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(state.run.get("time", 0) / 1000)),
        "took": console.format_duration(results.seconds) if results.seconds else None,
        "git commit": {**state.run.get("tags", {}), **state.tags}.get(tracking.COMMIT_TAG),
        "directory": results.directory,
        **tracking.how_to_open(state.uri, tracking.Run(results.directory, state.uri).path, "compare in MLflow"),
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
    """JSON that is safe inside a script element, which `</script` would end."""
    return json.dumps(value).replace("<", "\\u003c")


FOLLOW = "A click on a row, a line or a bar follows that trial through the figures."
MEANING_HEADINGS = {
    "tokens_per_parameter": "tokens/parameter",
    "tokens_per_parameter_without_embeddings": "without embeddings",
    "weight_decay_timescale": "weight-decay timescale",
    "training_flops": "training FLOPs",
    "seconds": "seconds",
    "evaluation_seconds": "of evaluations",
    "saving_seconds": "of saving",
    "peak_memory_bytes": "peak memory",
    "mfu": "MFU",
}
MEANING_CAPTIONS = {
    "tokens_per_parameter": "Tokens per parameter: of the budget, for each parameter of the model, and for each "
    "outside of embeddings and output head.",
    "weight_decay_timescale": "Weight-decay timescale: batch / (learning rate x weight decay x budget), the fraction "
    "of the run over which weights average their updates; far above 1 weight decay does nothing.",
    "training_flops": "Training FLOPs: of the budget, 6 for each token and parameter, and those of attention.",
    "peak_memory_bytes": "Peak memory: on a GPU of tensors, else of the process.",
    "mfu": "MFU: the training FLOPs of the steps, as a part of those that the workers' devices could have done "
    "meanwhile, by the data sheet of a GPU or by the speed at which a CPU's cores multiply matrices.",
}
OF_A_POPULATION = (
    "The settings of a population change during training. The commands train with the last settings from the start, "
    "which is not the same."
)
STATUSES = get_args(Status)

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
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1240px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .3em; }
.answer { background: #f3f6f9; border-left: 5px solid #D55E00; padding: .6em 1.2em 1em; }
.answer b { font-size: 2.4em; }
.caption, small { color: #555; } img { max-width: 100%; }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; vertical-align: top; }
.facts th { padding-right: 1.5em; white-space: nowrap; } .facts td { overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
.trials { font-size: .93em; font-variant-numeric: tabular-nums; }
.trials td, .trials th { padding: .25em .5em; vertical-align: top; white-space: nowrap; }
.trials th { border-bottom: 1px solid #999; } .trials .number { text-align: right; }
.trials .more td { padding-top: 0; border-bottom: 1px solid #ddd; white-space: normal; }
.trials .more div { position: sticky; left: 0; max-width: 68em; overflow-wrap: anywhere; }
.trials summary { color: #555; font-size: .9em; cursor: pointer; } .failure { color: #a00; }
code { user-select: all; font-size: .92em; overflow-wrap: anywhere; }
.chosen { background: #fdeee2; }
"""

SCRIPT = """
const figures = FIGURES, boxes = [];
let chosen = null;
function choose(trial) {  // a second click on a trial shows all again
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
