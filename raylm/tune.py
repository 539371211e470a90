"""python -m raylm.tune: a sweep. A trial is a training run with overrides, on the same tokens as every other."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import random
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylm import cli, console
from raylm.config import WHOLE_SPLIT, Experiment, corners, dump, override
from raylm.errors import ConfigError, Interrupted, StorageError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raylm.cluster import Resources
    from raylm.runs import ActiveRun
    from raylm.sweep import Trial
    from raylm.tokens import Store
    from raylm.tracking import Run, Status

logger = logging.getLogger(__name__)

Strict = Annotated[bool, typer.Option("--strict", help="Exit with 4 if any trial failed.")]


def tune(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    resume: cli.Resume = "auto",
    strict: Strict = False,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Sweep settings of an experiment and rank the trials by perplexity on the same validation tokens.

    Without --config: a small GPT-2 on the source code of Python's standard library.
    """
    from raylm import derived

    experiment = cli.experiment(config, settings, print_config, derived.training)
    checked = plan(experiment, begins=not dry_run)
    if dry_run:
        return checked
    from raylm import cluster, cost, page, runs, storage, summary, tracking, train
    from raylm.prepare import prepared

    storage.check(experiment.storage)
    derived.keep()
    begun = runs.start_or_resume(experiment, "tune", os.path.basename(checked.record["store"]), resume)
    for directory in begun.abandoned:
        _close(summary.start(experiment, directory, os.path.basename(directory), "tune"))
    parent = summary.start(experiment, begun.directory, begun.name, "tune")
    status: tracking.Status = "FAILED"
    try:
        decided = begun.decided.get("cluster.cpus_per_worker")
        trials = trials_at_a_time(experiment)
        with cluster.connect(experiment.cluster, trials=trials, decided=decided) as resources:
            train.check_nodes(experiment)
            store, reused = prepared(experiment, checked.record["store"])
            if not reused:  # else the plan has told
                train.warn(experiment, store)
            experiment = cost.with_eval_limit(experiment, store)
            rows = sweep(experiment, store, parent, begun, resources)
            best = finish(experiment, store, parent, resources, rows)
        scored_on = page.scored_on(experiment.eval, summary.scored(experiment, store))
        found = answer(experiment, begun, parent, store, rows, best, reused, scored_on)
        status = "FINISHED"
        return dataclasses.replace(found, exit_code=TrainingError.exit_code if strict and _failures(rows) else 0)
    except (KeyboardInterrupt, Interrupted):
        status = "KILLED"
        raise
    finally:
        _close(parent, status)
        tracking.settle(parent, logger.info)


def _close(parent: Run, status: Status = "KILLED") -> None:
    """End a sweep in MLflow, and what still runs of its trials."""
    with contextlib.suppress(StorageError):  # which has ended the sweep, too
        for child in parent.children().values():
            child.end_if_running("KILLED")
    parent.end(status)


def plan(experiment: Experiment, *, begins: bool = False) -> cli.CommandResult:
    """Check every value of the space as far as that can be done without Ray; what the sweep will do.

    If it begins then, Ray starts meanwhile.
    """
    from raylm import tables, train

    section = experiment.tune
    if not section.space:
        raise ConfigError(
            "tune.space is empty: nothing to sweep; say for example "
            "tune.space.train.learning_rate='{loguniform: [1e-4, 1e-2]}'",
            where="tune.space",
        )
    base = train.plan(
        experiment, begins="tune" if begins else None, trials_at_a_time=lambda: trials_at_a_time(experiment)
    )
    from raylm import model, tokenizer, training
    from raylm import sweep as sweeps

    own = tokenizer.choose(experiment.tokenizer, experiment.model).path
    for key, sampler in section.space.items():
        for settings in corners(key, sampler):
            changed = override(experiment, settings)
            try:
                training.check_settings(changed.train, has_updates=changed.model.lora is not None)
                model.config_of(changed)
                path = settings.get("model.path")
                if own and path is not None and not tokenizer.same(own, path):
                    raise ConfigError(f"its tokenizer is not that of {own}, and tokens are prepared once for a sweep")
            except ConfigError as error:
                value = settings.get(key, settings)
                raise ConfigError(f"tune.space.{key}: value {value}: {error.message}", f"tune.space.{key}") from None
    fewest, most = experiment.cluster.fewest_workers, experiment.cluster.most_workers
    if fewest != most:
        raise ConfigError(
            f"cluster.num_workers=[{fewest}, {most}]: a trial of a sweep has a fixed number of "
            "workers, so that all are alike; give one number",
            where="cluster.num_workers",
        )
    trials = sweeps.searcher(section, experiment.train.seed).total
    record = {
        **base.record,
        "trials": trials,
        "space": section.space,
        "scheduler": section.scheduler.kind,
        "most_tokens": trials * base.record["tokens"] if base.record["tokens"] else None,
    }
    lines = {
        "trials": trials,
        **{f"  {key}": sweeps.shown(sampler) for key, sampler in section.space.items()},
        "scheduler": section.scheduler.kind,
        "tokens of all trials": f"at most {record['most_tokens']:,}" if record["most_tokens"] else None,
    }
    return cli.CommandResult(record, f"{base.view}\n{tables.key_values(lines)}")


def trials_at_a_time(experiment: Experiment) -> int:
    """At most, whatever the cluster holds."""
    from raylm import sweep as sweeps

    trials = sweeps.searcher(experiment.tune, experiment.train.seed).total
    return min(trials, experiment.tune.max_concurrent_trials or trials)


def sweep(
    experiment: Experiment, store: Store, parent: Run, begun: ActiveRun, resources: Resources
) -> list[dict[str, Any]]:
    """Run the trials that are not over; a row for each, the best first.

    A trial that fails is a row with its reason, not an error. Interrupted or KeyboardInterrupt if the command was asked
    to stop: trials save a checkpoint then, and go on from it when the sweep does; StorageUnavailable if storage failed.
    """
    from raylm import budget, cluster, live, summary, training
    from raylm import sweep as sweeps
    from raylm.prepare import evaluation_sets
    from raylm.sweep import tuner

    def stopping() -> bool:
        return cluster.stop_signal() is not None or record.outage is not None

    experiment = begun.settled(experiment, {"cluster.cpus_per_worker": resources.cpus_per_worker})
    planned = budget.for_store(experiment, store)
    record = sweeps.SweepRecord(begun.directory)
    if record.trials:
        over = sum(trial.is_over for trial in record.trials.values())
        logger.info(f"{begun.directory}: going on with {over} trials over and {len(record.trials) - over} begun")
    section, metric = experiment.tune, f"best_{experiment.tune.metric}"
    measure = experiment.measure if section.metric == "perplexity" else section.metric
    swept = sweeps.keys(section.space)
    whole = summary.parameters(experiment, store, planned)
    parent.parameters({key: value for key, value in whole.items() if key not in swept})
    summary.log_data(parent, experiment, store)
    parent.text(dump(experiment), "experiment.yaml")
    random.seed(experiment.train.seed)  # by which a population draws
    scheduler = sweeps.RecordedScheduler(sweeps.scheduler(section, planned, metric), record, planned, stopping)
    together = min(resources.most_runs, section.max_concurrent_trials or resources.most_runs)
    points = sweeps.searcher(section, experiment.train.seed)
    trials = sweeps.TrialQueue(
        points,
        record,
        scheduler,
        # A population is compared as a whole: its trials take turns.
        together=together if section.scheduler.kind != "pbt" else points.total,
        values=lambda trial: values(experiment, store, trial),
        stopping=stopping,
    )
    if trials.unknown:
        unknown = ", ".join(trials.unknown)
        logger.info(f"{begun.directory}: the sweep's record knows nothing of {unknown}: their names are not used again")
    sets = evaluation_sets(experiment, store)
    job = training.TrainTask(experiment, store.path, planned, parent, begun.directory, sets=sets)
    limits = sweeps.SweepStopper(section.stop, record, metric)
    try:
        with (
            live.sweep(planned.tokens, trials.total_samples, swept, measure) as view,
            cluster.handle_signals(logger.info),
            cluster.progress_channel(lambda _: None, logger.info) as board,
        ):
            watcher = tuner.Watcher(scheduler, parent, view.update, board.stop, metric)
            tuner.run(trials, dataclasses.replace(job, board=board), resources, limits, watcher, together=together)
            if record.outage is not None:
                raise record.outage
            if stopping():
                left = trials.total_samples - sum(trial.is_over for trial in record.trials.values())
                how = f"stopped with {left} of {trials.total_samples} trials left"
                raise cluster.interruption(begun.directory, how)
    finally:
        limits.count()
    rows = [_row(trial) for trial in record.trials.values()]
    if section.against is not None:
        scored = [trial for trial in record.trials.values() if trial.results and trial.failure is None]
        weigh(rows, section.against, {trial.trial_id: values(experiment, store, trial) for trial in scored})
    return sorted(rows, key=lambda row: (row[section.metric] is None, row[section.metric] or 0))


def values(experiment: Experiment, store: Store, trial: Trial) -> list[float]:
    """What a searcher shall make small: the score, and what it is weighed against."""
    from raylm import model

    section = experiment.tune
    score = trial.results[-1][f"best_{section.metric}"]
    if section.against is None:
        return [score]
    if section.against == "seconds":
        return [score, trial.results[-1]["seconds"]]
    changed = override(experiment, {**trial.settings, "tune.space": {}})
    found = model.config_of(changed, model.num_ids(changed.model, store.tokenizer))
    return [score, model.num_parameters(found, masked=changed.objective.is_masked)]


def weigh(rows: list[dict[str, Any]], against: str, found: dict[str, list[float]]) -> None:
    """Tell of each trial what its score is weighed against, and whether it is on the Pareto front: nothing beats it."""
    for row in rows:
        own = found.get(row["trial_id"])
        row[against] = own[1] if own else None
        row["pareto"] = own is not None and not any(
            other != own and other[0] <= own[0] and other[1] <= own[1] for other in found.values()
        )


def finish(
    experiment: Experiment, store: Store, parent: Run, resources: Resources, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Export the best trial's model, score it as `raylm.evaluate` does and close every trial's run.

    The best row, with the exported model as its checkpoint; None if no trial has a result.
    """
    from raylm import budget, cost, export, summary
    from raylm.training import launch
    from raylm.perplexity import Score

    children = parent.children()
    for row in rows:
        child = children.get(row["trial_id"])
        if child is None:
            continue
        child.end_late("FAILED" if row["status"] == "failed" else "FINISHED")
        if row["perplexity"] is not None:
            summary.log_best(child, experiment, row)
        child.tags({"raylm.status": row["status"]})
        row["mlflow_run_id"] = child.run_id
    if not rows or rows[0]["perplexity"] is None:
        return None
    best = dict(rows[0])
    score = {name: best[name] for name in ("perplexity", "bits_per_byte")}
    scored_on = experiment.eval.scored_on
    planned = budget.for_store(experiment, store)
    if experiment.eval.max_tokens is not None and cost.whole_is_affordable(experiment, store, planned):
        scored_on = WHOLE_SPLIT
        with console.task("Scoring the best trial on the whole validation split", "tokens") as advance:
            scored = Score.of(launch.score(best["checkpoint"], store.validation, experiment, resources, advance))
        score = {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte}
    exported = export.export(best["checkpoint"], f"{parent.directory}/model", {**score, "scored_on": scored_on})
    best |= {**score, "checkpoint": exported, "scored_on": scored_on}
    summary.log_best(parent, experiment, best)
    parent.tags({"raylm.best_trial": best["trial_id"], "raylm.checkpoint": best["checkpoint"]})
    parent.model(best["checkpoint"], experiment.tracking, best["best_step"], logger.info)
    return best


def answer(
    experiment: Experiment,
    begun: ActiveRun,
    parent: Run,
    store: Store,
    rows: list[dict[str, Any]],
    best: dict[str, Any] | None,
    reused: bool,
    scored_on: str,
) -> cli.CommandResult:
    """The ranked table, and what to do next; if no trial has a result, TrainingError, or ConfigError where no trial
    could use its settings."""
    from raylm import summary, tables, tokens, tracking
    from raylm import sweep as sweeps

    measure = experiment.measure
    incomparable = tokens.incomparable(store.validation.unknown_tokens, store.validation.num_tokens)

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {measure if key == "perplexity" else key: value for key, value in row.items()}

    if best is None:
        reasons = "; ".join(sorted({row["failure"] for row in rows if row["failure"]}))
        problem = f"no trial of the sweep has a result: {reasons or 'it was stopped before'}"
        begun.end({"error": problem})  # the same settings would fail again
        wrong = {trial.wrong_setting for trial in sweeps.read(begun.directory).values()}
        if wrong and None not in wrong:
            raise ConfigError(problem, where=min(map(str, wrong)))
        raise TrainingError(problem, where=begun.name)
    record = {
        "sweep": begun.name,
        "mlflow_run_id": parent.run_id,
        "tokens_reused": reused,
        "scored_on": scored_on,
        "scored_in": experiment.eval.precision,
        "prefix": summary.prefix(experiment, store),
        "unknown_tokens": store.validation.unknown_tokens,
        "incomparable": incomparable,
        "best": named(
            {
                key: best[key]
                for key in ("trial_id", "checkpoint", "perplexity", "bits_per_byte", "scored_on", "settings")
            }
        ),
        "trials": [named(row) for row in rows],
    }
    begun.end(record)
    if (page := _page(begun.directory, parent)) is not None:
        record["report"] = page
    ranking = measure.replace("_", "-") if experiment.tune.metric == "perplexity" else "bits per byte"
    notes = [f"ranked by {ranking} on {scored_on}", *([incomparable] if incomparable else []), *_failures(rows)]
    tracking.settle(parent, logger.info)
    comparison = tracking.compare(parent)  # which links it from the sweep's own page, too
    facts = tables.key_values(
        {
            "best trial": best["trial_id"],
            measure.replace("_", "-"): best["perplexity"],
            "checkpoint": best["checkpoint"],
            "repeat it": f"{sys.executable} -m raylm.train --config {best['checkpoint']}/experiment.yaml",
            "try it": f"{sys.executable} -m raylm.generate {best['checkpoint']} --prompt '...'",
            "report": page,
            "compare trials": comparison
            if comparison and comparison.startswith("http")
            else tracking.how_to_look(experiment.tracking),
        }
    )
    return cli.CommandResult(record, (tables.trials(rows, measure.replace("_", "-")), "\n".join(notes), "", facts))


def _page(directory: str, parent: Run) -> str | None:
    """The report of a sweep that is over. It can be made again, so its failure is not the sweep's."""
    from raylm import page

    try:
        with console.task("Drawing the report"):
            found = page.build(directory)
    except Exception as error:
        logger.info(f"the report could not be drawn ({error}); again: {sys.executable} -m raylm.report {directory}")
        return None
    parent.file(found, "report/report.html")
    return found


def _row(trial: Trial) -> dict[str, Any]:
    last = trial.results[-1] if trial.results and trial.failure is None else {}
    return {
        "trial_id": trial.trial_id,
        "status": trial.status if trial.is_over else "stopped early",  # with the whole sweep
        "perplexity": last.get("best_perplexity"),
        "bits_per_byte": last.get("best_bits_per_byte"),
        "tokens": trial.tokens,
        "best_tokens": trial.best_tokens,
        "last_perplexity": last.get("perplexity"),
        "settings": trial.settings,
        "checkpoint": last.get("best_checkpoint"),
        "best_step": last.get("best_step", 0),
        "failure": trial.failure,
    }


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{row['trial_id']} failed: {row['failure']}" for row in rows if row["failure"]]


def main() -> None:
    cli.run(tune)


if __name__ == "__main__":
    from raylm.tune import main  # by its real name, so that Ray ships functions by reference

    main()
