"""The report of a sweep: <sweep>/report/report.html, a page that needs nothing else, and a PNG of each figure."""

from __future__ import annotations

import base64
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from raylm import config, console, storage, tables, tracking
from raylm import sweep as sweeps
from raylm.config import WHOLE_SPLIT, Experiment
from raylm.errors import ConfigError, StorageError
from raylm.redaction import redacted
from raylm.results import figures
from raylm.sweep.record import EVENTS, Trial
from raylm.tracking import journal

EXPERIMENT = "experiment.yaml"


# What a directory says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepResults:
    """A sweep, whatever its state."""

    directory: str
    experiment: Experiment
    facts: journal.RunState
    sweep: figures.SweepData
    seconds: float
    """How long commands have worked on it, but for one that still does."""
    result: dict[str, Any]
    """result.json; empty while the sweep is not over."""

    @property
    def measure(self) -> str:
        return measure(self.experiment)

    def scores(self, trial: Trial) -> dict[str, float | None]:
        """perplexity and bits_per_byte on the tokens by which trials are ranked; None of one that failed."""
        last = trial.results[-1] if self.sweep.score(trial) is not None else {}
        return {name: last.get(f"best_{name}") for name in ("perplexity", "bits_per_byte")}

    @property
    def best(self) -> dict[str, Any] | None:
        """The best trial: trial_id, perplexity, bits_per_byte, checkpoint, scored_on; None before any has a score.

        Once the sweep is over these are of the whole validation split, of a masked model if that was affordable.
        """
        if not self.sweep.scored:
            return None
        trial = self.sweep.ranked[0]
        found = {"trial_id": trial.trial_id, **self.scores(trial), "checkpoint": None}
        if "best" not in self.result:
            return {**found, "scored_on": self.ranked_on}
        final = self.result["best"]
        found |= {"perplexity": final[self.measure.replace("-", "_")], "bits_per_byte": final["bits_per_byte"]}
        return {**found, "checkpoint": final["checkpoint"], "scored_on": final.get("scored_on", WHOLE_SPLIT)}

    @property
    def ranked_on(self) -> str:
        """What text the scores of the trials are of."""
        return ranked_on(self.experiment, self.facts)

    def command(self, trial: Trial) -> str:
        """What trains with the same settings again."""
        settings = [shlex.quote(f"{key}={json.dumps(value)}") for key, value in trial.settings.items()]
        return " ".join(
            [sys.executable, "-m raylm.train --config", shlex.quote(f"{self.directory}/{EXPERIMENT}"), *settings]
        )


def measure(experiment: Experiment) -> str:
    """What a person calls the score."""
    return experiment.measure.replace("_", "-")


def ranked_on(experiment: Experiment, facts: journal.RunState) -> str:
    """What text a score during training is of."""
    return str(facts.parameters.get("scored_on") or experiment.eval.scored_on)


def scored_on(experiment: Experiment, parameters: Mapping[str, Any]) -> str:
    """What text a score during training is of, and how much that is, by the parameters of its run."""
    what = str(parameters.get("scored_on") or experiment.eval.scored_on)
    if "scored_documents" not in parameters:
        return what
    documents, tokens = (int(parameters[f"scored_{each}"]) for each in ("documents", "tokens"))
    of_passages = experiment.corpus.split_by == "passage" and not experiment.corpus.validation_paths
    unit = "passage" if of_passages else "document"
    return f"{what}: {documents:,} {unit}{'s' * (documents != 1)}, {tokens:,} tokens"


def is_sweep(directory: str) -> bool:
    return EVENTS in storage.names(directory)


def read(directory: str) -> SweepResults:
    """What is known of a sweep by its directory; StorageError if it is none."""
    if not is_sweep(directory):
        raise StorageError(f"{directory} is not a sweep: it has no {EVENTS}", directory)
    facts = journal.run_state(directory)
    known = experiment(directory, facts)
    record = sweeps.SweepRecord(directory)
    result = json.loads(storage.read(f"{directory}/result.json") or b"{}")
    trials = list(record.trials.values())
    if result:  # those that were still at it when the sweep was stopped
        trials = [trial if trial.is_over else replace(trial, status="stopped early") for trial in trials]
    metric = known.tune.metric
    sweep = figures.SweepData(
        trials,
        budget_tokens=max(
            [
                int(facts.parameters.get("tokens", 1)),
                *(trial.results[-1]["tokens"] for trial in trials if trial.results),
            ]
        ),
        losses={trial.trial_id: _losses(f"{directory}/{trial.trial_id}") for trial in trials},
        samplers=_samplers(known),
        metric=metric,
        measure=measure(known) if metric == "perplexity" else metric.replace("_", " "),
    )
    return SweepResults(directory, known, facts, sweep, record.seconds, result)


def experiment(directory: str, facts: journal.RunState) -> Experiment:
    """That of a run's or sweep's journal; StorageError if it was stopped before it had one."""
    kept = facts.artifacts.get(EXPERIMENT)
    if kept is None:
        raise StorageError(f"{directory} was stopped before it began: its journal has no experiment", directory)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, EXPERIMENT)
        file.write_text(kept["text"], encoding="utf-8")
        try:
            return config.load(file)
        except ConfigError as error:  # of another version of raylm
            raise ConfigError(error.message.replace(str(file), f"{directory}: its experiment"), error.where) from None


def _losses(directory: str) -> list[tuple[float, float]]:
    series = tracking.Run(directory).metric_history()
    tokens = dict(series.get("train/tokens", ()))
    return [(tokens[step], loss) for step, loss in series.get("train/loss", ()) if step in tokens]


def _samplers(experiment: Experiment) -> dict[str, str]:
    """Swept key -> the name of its sampler; not of keys that have another one in another inner space."""
    found: dict[str, set[str]] = {}
    for key, sampler in experiment.tune.space.items():
        for space in config.spaces(key, sampler) or [{key: sampler}]:
            for inner, value in space.items():
                found.setdefault(inner, set()).add(next(iter(value)) if config.is_sampler(value) else "choice")
    return {key: kinds.pop() for key, kinds in found.items() if len(kinds) == 1}


def rows(found: SweepResults) -> list[dict[str, Any]]:
    """A record for each trial, the best first; those that failed have their reason and no score."""
    weighed = ("parameters", "seconds", "pareto")  # of a sweep that is over, with tune.against
    told = {row["trial_id"]: row for row in found.result.get("trials", [])}
    return [
        {
            "trial_id": trial.trial_id,
            "status": trial.status,
            **found.scores(trial),
            **{key: value for key, value in told.get(trial.trial_id, {}).items() if key in weighed},
            "tokens": trial.tokens,
            "best_tokens": trial.best_tokens,
            "last_perplexity": trial.results[-1].get("perplexity") if trial.results else None,
            "settings": trial.settings,
            "failure": trial.failure,
            "repeat": found.command(trial),
        }
        for trial in found.sweep.ranked
    ]


# The page ------------------------------------------------------------------------------------------------------------


def build(directory: str) -> str:
    """Write the report of a sweep, whatever its state; the path of its page."""
    return write(read(directory))


def write(found: SweepResults) -> str:
    drawn = figures.build(found.sweep)
    images = {figure.name: figures.png(figure) for figure in drawn if isinstance(figure, figures.Figure)}
    path = f"{found.directory}/report/report.html"
    with storage.reached(found.directory):
        storage.write(f"{found.directory}/{EXPERIMENT}", found.facts.artifacts[EXPERIMENT]["text"].encode())
        for name, image in images.items():
            storage.write(f"{found.directory}/report/{name}.png", image)
        storage.write(path, page(found, drawn, images).encode(errors="backslashreplace"))
    return path


def page(found: SweepResults, drawn: Sequence[figures.Figure | figures.Omitted], images: Mapping[str, bytes]) -> str:
    script = figures.plotly_js()
    name = found.directory.rpartition("/")[2]
    parts = [
        f"<h1>{escape(found.experiment.name)}: {escape(name)}</h1>",
        f"<p>{escape(_state(found))}</p>",
        _answer(found),
        *[_section(figure, images, interactive=script is not None) for figure in drawn],
        "<h2>All trials</h2>",
        f"<p class=caption>Ranked by {scored_on(found.experiment, found.facts.parameters)}. "
        f"{FOLLOW if script else ''}</p>",
        _trials(found),
        f"<p class=caption>{OF_A_POPULATION}</p>" if found.experiment.tune.scheduler.kind == "pbt" else "",
        "<h2>The sweep</h2>",
        _facts(_about(found)),
    ]
    if script is None:
        parts.append("<p>Figures are still: plotly is not installed (pip install 'raylm[plotly]').</p>")
        scripts = ""
    else:
        interactive = {
            figure.name: figures.plotly_figure(figure) for figure in drawn if isinstance(figure, figures.Figure)
        }
        scripts = f"<script>{script}</script>\n<script>{SCRIPT.replace('FIGURES', _json(interactive))}</script>"
    return HTML.format(title=escape(name), style=STYLE, body="\n".join(parts), scripts=scripts)


def _state(found: SweepResults) -> str:
    trials = found.sweep.trials
    counts = {status: sum(trial.status == status for trial in trials) for status in STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    over = "" if found.result else " The sweep was not over when this was written."
    return (
        f"{len(trials)} trial{'s' if len(trials) > 1 else ''}: {told}.{over}"
        if trials
        else f"No trial has begun.{over}"
    )


def _answer(found: SweepResults) -> str:
    best = found.best
    if best is None:
        problem = found.result.get("error", "no trial has a score yet")
        return f"<div class=answer>{escape(problem)}</div>"
    trial = found.sweep.ranked[0]
    settings = {figures.short_name(key): value for key, value in trial.settings.items()}
    facts = {"best trial": trial.trial_id, **settings, "model": best["checkpoint"], "repeat it": found.command(trial)}
    return (
        f"<div class=answer><p><b>{best['perplexity']:.2f}</b> {found.measure} "
        f"({best['bits_per_byte']:.3f} bits per byte) of {best['scored_on']}</p>{_facts(facts)}</div>"
    )


def _section(figure: figures.Figure | figures.Omitted, images: Mapping[str, bytes], interactive: bool) -> str:
    heading = f"<h2>{escape(figure.title)}</h2>"
    if isinstance(figure, figures.Omitted):
        return f"{heading}<p class=caption>Not drawn: {escape(figure.reason)}.</p>"
    if interactive:
        shown = f"<div id={figure.name}></div>"
    else:
        data = base64.b64encode(images[figure.name]).decode()
        shown = f'<img alt="{escape(figure.title)}" src="data:image/png;base64,{data}">'
    return f"{heading}{shown}<p class=caption>{escape(figure.caption)}</p>"


def _trials(found: SweepResults) -> str:
    """The ranked table."""
    settings = found.sweep.settings
    ranked = rows(found)
    weighed = [name for name in ("parameters", "seconds") if ranked and name in ranked[0]]
    numbers = [found.measure, "bits/byte", *weighed, "tokens", *(setting.name for setting in settings.values())]
    headings = "".join(f"<th class=number>{escape(name)}</th>" for name in numbers)
    lines = [f"<tr><th></th><th>trial</th>{headings}<th>status</th><th>repeat it</th></tr>"]
    for rank, row in enumerate(ranked, 1):
        values = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("perplexity", "bits_per_byte")]
        values += ["-" if row[name] is None else f"{row[name]:,.0f}" for name in weighed]
        values += [f"{row['tokens']:,}", *(console.format_number(row["settings"].get(key, "-")) for key in settings)]
        failure = f"<br><small>{escape(row['failure'])}</small>" if row["failure"] else ""
        failure += "<br><small>on the Pareto front</small>" if row.get("pareto") else ""
        trial_id, command = escape(row["trial_id"]), escape(row["repeat"])
        status = escape("; ".join([row["status"], *tables.overfitting(row)]))
        lines.append(
            f'<tr data-trial="{trial_id}"><td class=number>{rank}</td><td>{trial_id}</td>'
            + "".join(f"<td class=number>{escape(value)}</td>" for value in values)
            + f"<td class=status>{status}{failure}</td>"
            + f"<td><details><summary>command</summary><code>{command}</code></details></td></tr>"
        )
    return "<table class=trials>" + "\n".join(lines) + "</table>"


def _about(found: SweepResults) -> dict[str, Any]:
    """What the numbers are of."""
    experiment, facts = found.experiment, found.facts
    section = experiment.tune
    fingerprint = facts.parameters.get("store")
    manifest = json.loads(storage.read(f"{experiment.storage}/tokens/{fingerprint}/manifest.json") or b"{}")
    tokens = {f"{split} tokens": manifest.get(split, {}).get("tokens") for split in ("train", "validation")}
    trained = sum(trial.tokens for trial in found.sweep.trials)
    return {
        "corpus": ", ".join(redacted(experiment.corpus.paths)),
        "token store": fingerprint,
        **tokens,
        "model": facts.parameters.get("model"),
        "budget of a trial": f"{found.sweep.budget_tokens:,} tokens",
        "trained in all": f"{trained:,} tokens",
        **{f"space: {key}": sweeps.shown(sampler) for key, sampler in section.space.items()},
        "searcher": section.searcher,
        "scheduler": section.scheduler.kind,
        "seed": experiment.train.seed,
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(facts.run.get("time", 0) / 1000)),
        "took": console.format_duration(found.seconds) if found.seconds else None,
        "git commit": {**facts.run.get("tags", {}), **facts.tags}.get(tracking.COMMIT_TAG),
        "directory": found.directory,
    }


def _facts(pairs: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><th>{escape(name)}</th><td>{'<code>' if name == 'repeat it' else ''}"
        f"{escape(console.format_number(value))}</td></tr>"
        for name, value in pairs.items()
        if value is not None
    ]
    return f"<table class=facts>{''.join(lines)}</table>"


def _json(value: Any) -> str:
    """For inside of a script, which `</script` would end."""
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
