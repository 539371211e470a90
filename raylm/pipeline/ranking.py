"""The trials of a sweep, ranked; the best one exported; what MLflow is told of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raylm import console, model, summary, tracking
from raylm.config import Experiment, of_trial
from raylm.pipeline.training import export_best
from raylm.results import choices, repeats, significance, tables
from raylm.results.repeats import RepeatedSettings, Repeats
from raylm.results.sweep import measured, repeat_command
from raylm.results.trial_table import TrialRow
from raylm.sweep.record import by_rank

if TYPE_CHECKING:
    from raylm.cluster import Resources
    from raylm.plan import Prepared
    from raylm.sweep import SweepRecord, Trial
    from raylm.tokens import Store
    from raylm.tracking import Run


def ranked(record: SweepRecord, experiment: Experiment, store: Store) -> list[dict[str, Any]]:
    """A row for each trial, the best first, with its standing; with tune.against also whether it is on the Pareto
    front."""
    section, directory = experiment.tune, record.directory
    trials = by_rank(record.trials.values(), section.ranked_by)
    rows = [_row(directory, trial) for trial in trials]
    if section.against is not None:
        evaluated = [trial for trial in trials if trial.results and trial.failure is None]
        mark_pareto(rows, section.against, {trial.trial_id: values(experiment, store, trial) for trial in evaluated})
    scored = [trial for trial in trials if trial.score(section.ranked_by) is not None]
    standings = significance.standings(directory, scored) if not section.weights else {}
    return [{**row, "standing": standings.get(row["trial_id"])} for row in rows]


def _row(directory: str, trial: Trial) -> dict[str, Any]:
    last = trial.results[-1] if trial.results and trial.failure is None else {}
    return {
        "trial_id": trial.trial_id,
        "status": trial.status if trial.is_over else "stopped early",  # with the whole sweep
        "perplexity": last.get("best_perplexity"),
        "bits_per_byte": last.get("best_bits_per_byte"),
        "weighted_nll": last.get("best_weighted_nll"),
        "tokens": trial.tokens,
        "best_tokens": trial.best_tokens,
        "last_perplexity": trial.last_perplexity if last else None,
        "cooldown_tokens": trial.cooldown_tokens,
        "settings": trial.settings,
        "checkpoint": last.get("best_checkpoint"),
        "failure": trial.failure,
        "repeat": repeat_command(directory, trial),
        **measured(directory, trial),
        **({"repeat_of": trial.repeat_of, "seeds": trial.seeds} if trial.repeat_of is not None else {}),
    }


def values(experiment: Experiment, store: Store, trial: Trial) -> list[float]:
    """The values that a searcher minimizes: the score, and tune.against."""
    section = experiment.tune
    score = trial.results[-1][f"best_{section.ranked_by}"]
    if section.against is None:
        return [score]
    if section.against == "seconds":
        return [score, trial.results[-1]["seconds"]]
    changed = of_trial(experiment, trial.settings)
    model_config = model.config_of(changed, tokenizer=store.tokenizer)
    return [score, model.num_parameters(model_config, masked=changed.objective.is_masked)]


def mark_pareto(rows: list[dict[str, Any]], against: str, objectives: dict[str, list[float]]) -> None:
    """Add to each row its value of tune.against, and whether it is on the Pareto front."""
    for row in rows:
        own = objectives.get(row["trial_id"])
        row[against] = own[1] if own else None
        row["pareto"] = own is not None and not any(
            other != own and other[0] <= own[0] and other[1] <= own[1] for other in objectives.values()
        )


def export_best_trial(
    prepared: Prepared, parent: Run, resources: Resources, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Export the best trial's model, score it as `raylm evaluate` does and end every trial's run in MLflow.

    Returns the best row, with the exported model as its checkpoint; None if no trial has a score.
    """
    experiment = prepared.experiment
    compared = repeats_of(experiment, rows)
    of_settings = {each.trial_id: each for each in compared.settings} if compared is not None else {}
    children = parent.trials()
    for row in rows:
        child = children.get(row["trial_id"])
        if child is None:
            continue
        child.finish_late("FAILED" if row["status"] == "failed" else "FINISHED")
        repeated = of_settings.get(row["trial_id"])
        tags = {**standing_tags(row["standing"], experiment.measure), **settings_tags(repeated, experiment.measure)}
        child.set_tags({"raylm.status": row["status"], **tags})
        row["mlflow_run_id"] = child.run_id
    if not rows or rows[0]["perplexity"] is None:
        return None
    exported = export_best(prepared, rows[0]["checkpoint"], rows[0], parent.directory, resources)
    about = {"checkpoint": exported.directory, "scored_on": exported.scored_on, "test": exported.test}
    best = {**rows[0], **exported.score, **about}
    summary.log_best(parent, experiment, best)
    if exported.test is not None:
        for run in (parent, parent.trial(best["trial_id"])):
            summary.log_test(run, exported.test.metrics)
    parent.set_tags({"raylm.checkpoint": best["checkpoint"], **best_tags(best, children)})
    sentences = [exported.test.sentence] if exported.test is not None else []
    sentences += [compared.sentence] if compared is not None else []
    parent.describe(description(rows, best, console.label(experiment.measure), *sentences))
    parent.log_model(best["checkpoint"], experiment.tracking, best["best_step"])
    return best


def standing_tags(standing: significance.Standing | None, measure: str) -> dict[str, Any]:
    """The interval of a trial's score, and whether it is as good as the best one. They are tags because they may change
    when the sweep resumes."""
    record = standing.record(measure) if standing is not None else {}
    return {f"raylm.{name}": value for name, value in record.items() if value is not None}


def settings_tags(repeated: RepeatedSettings | None, measure: str) -> dict[str, Any]:
    """How good the settings of a trial are by their repeats, for the run of that trial in MLflow."""
    record = repeated.record(measure) if repeated is not None else {}
    shown = {name: value for name, value in record.items() if name not in ("trial_id", "settings")}
    return {f"raylm.settings.{name}": value for name, value in shown.items() if value is not None}


def repeats_of(experiment: Experiment, rows: list[dict[str, Any]]) -> Repeats | None:
    """Which settings are better, by their runs with other seeds; None if none were repeated."""
    found = [TrialRow.from_record(row) for row in rows]
    return repeats.compare(found, has_patience=experiment.train.patience is not None)


def best_tags(best: Mapping[str, Any], children: Mapping[str, Run]) -> dict[str, Any]:
    """The best trial, its score and each of its settings. They are tags because a resumed sweep may find a better trial
    and MLflow never changes a parameter."""
    tags = {"trial": best["trial_id"], "perplexity": best["perplexity"], **best["settings"]}
    size = children[best["trial_id"]].tags().get(tracking.PARAMETERS_TAG) if best["trial_id"] in children else None
    return {f"raylm.best.{key}": value for key, value in {**tags, "model_parameters": size}.items()}


def description(rows: list[dict[str, Any]], best: Mapping[str, Any], score: str, *sentences: str) -> str:
    """The Markdown of a sweep's page in MLflow: a link to the comparison, then the best trial, then sentences, then the
    best trial of each optimizer and the like, then the ranked trials, because MLflow shows the first lines."""
    settings = ", ".join(f"`{key}={console.format_number(value)}`" for key, value in best["settings"].items())
    found = [TrialRow.from_record(row) for row in rows]
    by_choice = [tables.choice_markdown(choice, score) for choice in choices.of(found)]
    ranked = tables.ranked_markdown(found, score)
    best_of = f"**Best: {best['trial_id']}, {score} {best['perplexity']:.2f}** of {best['scored_on']}, with {settings}"
    return "\n\n".join([f"[Compare the trials]({tracking.COMPARISON})", best_of, *sentences, *by_choice, ranked]) + "\n"
