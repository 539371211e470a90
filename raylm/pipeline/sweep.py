"""Many trainings of one experiment with other settings, ranked by their score on the same tokens."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylm import (
    cleaning,
    cluster,
    console,
    estimate,
    model,
    runs,
    storage,
    summary,
    tokenizer,
    tokens,
    tracking,
    training,
)
from raylm import plan as plans
from raylm import sweep as sweeps
from raylm.config import Experiment, corners, dump, override
from raylm.errors import ConfigError, TrainingError
from raylm.perplexity import Score
from raylm.pipeline import arithmetic, earlier, extension, lifecycle, ranking, stores
from raylm.plan import Plan, Prepared
from raylm.results import html, live_table, repeats, significance, test_split, trial_table
from raylm.results.repeats import Repeats
from raylm.results.sweep import BestTrial, scored_on_with_size, scored_unit
from raylm.results.sweep import read as read_sweep
from raylm.results.test_split import TestScore
from raylm.results.trial_table import TrialRow
from raylm.sweep import RecordedScheduler, tuner
from raylm.sweep.asha import Asha
from raylm.sweep.space import Searcher
from raylm.sweep.start import Start
from raylm.training import callbacks, launch

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedConfig

    from raylm.budget import Budget
    from raylm.cluster import Resources
    from raylm.estimate import Estimate
    from raylm.runs import ActiveRun
    from raylm.tracking import Run

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep."""

    plan: Plan
    """The plan of the training that trials vary."""
    trials: int
    start: Start | None = None
    """What it starts from; None if that depends on tokens that are not prepared yet, or if the sweep is to start, which
    decides it."""

    @property
    def experiment(self) -> Experiment:
        return self.plan.experiment

    @property
    def repeats(self) -> tuple[int, int]:
        """The fewest and the most trials that repeat the best few settings, in addition to `trials`."""
        return sweeps.repeats.expected(self.experiment.tune.repeats, self.trials)

    @property
    def most_tokens(self) -> int | None:
        """Training tokens of all trials and their cooldowns, if none is stopped early; None if the budget is not known
        yet."""
        if self.plan.budget is None:
            return None
        if (of_ladder := sweeps.ladder.most_tokens(self.experiment, self.trials)) is not None:
            return of_ladder
        return (self.trials + self.repeats[1]) * self.plan.budget.tokens + self.most_cooldown_tokens

    @functools.cached_property
    def most_cooldown_tokens(self) -> int:
        """Training tokens of the cooldowns of all trials, if none is stopped early."""
        return self.trials * sum(self._asha.cooldown_tokens) if self._asha is not None else 0

    @functools.cached_property
    def _asha(self) -> Asha | None:
        if self.plan.budget is None:
            return None
        scheduler = sweeps.scheduler(self.experiment.tune, self.plan.budget, "best_perplexity")
        return scheduler if isinstance(scheduler, Asha) else None

    @functools.cached_property
    def estimate(self) -> Estimate:
        """The disk space and time that it will take; measured, if no finished sweep tells."""
        tokens_of_all = self.most_tokens
        if self.plan.budget is not None and self._asha is not None:
            tokens_of_all = self._asha.expected_tokens(self.trials, self.plan.budget.tokens)
            tokens_of_all += self.repeats[1] * self.plan.budget.tokens
        return estimate.sweep(self.plan, self.trials + self.repeats[1], tokens_of_all)

    def record(self) -> dict[str, Any]:
        """The plan for --json."""
        section = self.experiment.tune
        repeats = dict(zip(("fewest_trials", "most_trials"), self.repeats, strict=True))
        return {
            **self.plan.record(),
            "trials": self.trials,
            **({"repeats": repeats} if section.repeats > 1 else {}),
            "space": section.space,
            **({"suggested": self.start.points[0]} if self.start and section.points == "suggested" else {}),
            **({"prior_trials": len(self.start.observations)} if self.start and section.prior_sweeps else {}),
            "scheduler": section.scheduler.kind,
            "most_tokens": self.most_tokens,
            **self.estimate.record(),
        }


def resolve(experiment: Experiment, *, starts: bool = False) -> SweepPlan:
    """The plan of a sweep. Each value of its space is checked as far as possible without Ray.

    If the sweep `starts` now, Ray starts in the background meanwhile.
    """
    plan = plans.resolve(experiment, starts="tune" if starts else None)
    if plan.experiment.tune.ladder:
        vocab_size = plan.model_config.get_text_config().vocab_size
        of_ladder = sweeps.ladder.as_space(plan.experiment, vocab_size)
        largest = model.config_of(of_ladder, vocab_size)
        parameters = model.num_parameters(largest, masked=of_ladder.objective.is_masked)
        plan = dataclasses.replace(plan.with_training(of_ladder), model_config=largest, num_parameters=parameters)
    experiment = plan.experiment
    section = experiment.tune
    if not section.space:
        raise ConfigError(
            "tune.space is empty: nothing to sweep; say for example "
            "tune.space.train.learning_rate='{loguniform: [1e-4, 1e-2]}'",
            where="tune.space",
        )
    for key, sampler in section.space.items():
        for settings in corners(key, sampler):
            try:
                _check_value(experiment, plan.tokens.tokenizer.path, settings)
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
    start = None
    if not starts:  # else it is decided with the sweep, and only once
        earlier.check(experiment, plan.tokens.fingerprint)
        start = _start(experiment, plan.model_config, plan.budget, plan.prepared)
    counted = Start(section.points) if section.points != "suggested" else sweeps.suggested.placeholder(section.space)
    trials = sweeps.searcher(section, experiment.train.seed, counted).total
    if section.repeats > 1 and trials < sweeps.repeats.FEWEST_SETTINGS:
        raise ConfigError(
            f"tune.repeats={section.repeats}: the sweep has {trials} trial, and repeats compare the settings of at "
            f"least {sweeps.repeats.FEWEST_SETTINGS}; leave it out, or draw more with tune.num_samples",
            where="tune.repeats",
        )
    resources = cluster.planned_resources(experiment.cluster, trials=_most_at_a_time(experiment, trials))
    return SweepPlan(dataclasses.replace(plan, resources=resources), trials, start)


def _start(
    experiment: Experiment, model_config: PreTrainedConfig, budget: Budget | None, prepared: Prepared | None
) -> Start | None:
    """What a sweep starts from; None if that depends on tokens that are not prepared yet."""
    section = experiment.tune
    found = Start() if section.points == "suggested" else Start(section.points)
    if section.points == "suggested":
        if budget is None:
            return None
        found = sweeps.suggested.start(experiment, model_config, budget.tokens)
    if section.prior_sweeps:
        if prepared is None:
            return None
        observations, notes = earlier.observations(prepared)
        found = dataclasses.replace(found, observations=observations, notes=(*found.notes, *notes))
    return found


def _decide_start(prepared: Prepared, active: ActiveRun) -> None:
    """Decide what this sweep starts from beside the settings of tune.points, unless that is decided already."""
    experiment, section = prepared.experiment, prepared.experiment.tune
    if section.points != "suggested" and not section.prior_sweeps:
        return
    if sweeps.start.read(active.directory) is None:
        model_config = model.config_of(experiment, tokenizer=prepared.store.tokenizer)
        found = _start(experiment, model_config, prepared.budget, prepared)
        assert found is not None, "the tokens are prepared"
        found.write(active.directory)
        for note in found.notes:
            logger.info(note)


def _check_value(experiment: Experiment, tokenizer_path: str | None, settings: Mapping[str, Any]) -> None:
    """ConfigError if no trial can have these settings."""
    changed = override(experiment, settings)
    training.check_settings(changed.train)
    model.config_of(changed)
    path = settings.get("model.path")
    if tokenizer_path and path is not None and not tokenizer.same(tokenizer_path, path):
        raise ConfigError(f"its tokenizer is not that of {tokenizer_path}, and tokens are prepared once for a sweep")


def _most_at_a_time(experiment: Experiment, trials: int) -> int:
    """Most concurrent trials, without regard to the cluster."""
    return min(trials, experiment.tune.max_concurrent_trials or trials)


@dataclass(frozen=True, repr=False)
class SweepResult:
    """The result of a finished sweep."""

    sweep: str
    """The name of the sweep and of its directory."""
    mlflow_run_id: str | None
    """The parent of the trials' runs."""
    measure: str
    """What the score is called: perplexity, masked_perplexity or pseudo_perplexity."""
    tokens_reused: bool
    """Whether the token store existed before."""
    scored_on: str
    """The documents that rank the trials, in words."""
    scored_in: str
    """The arithmetic of the scores, such as float32."""
    prefix: str | None
    """The token in front of every document."""
    unknown_tokens: int
    """Unknown tokens in the validation split."""
    incomparable: str | None
    """Why the scores do not compare with others, if they do not."""
    best: BestTrial
    trials: list[TrialRow]
    """Every trial, the best first."""
    untrained: Mapping[str, float] | None = None
    """perplexity and bits_per_byte of the experiment's model before training, on the tokens that rank the trials."""
    significance: str | None = None
    """Which trials are as good as the best one on these documents, in a sentence; None if unknown."""
    test: TestScore | None = None
    """The score of the best model on the test split; None if the corpus has none."""
    repeats: Repeats | None = None
    """Which settings are better, by runs with other seeds; None without tune.repeats."""
    report: str | None = None
    """The path of the HTML report."""
    mlflow_path: str | None = None
    """The path of the page that compares the trials, below the address of MLflow."""

    @property
    def failures(self) -> list[str]:
        """Why each failed trial failed."""
        return [f"{row.trial_id} failed: {row.failure}" for row in self.trials if row.failure]

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each trial, the best first; each swept setting is a column of its dotted name."""
        import pandas

        rows = [{**row.record("perplexity"), **row.settings} for row in self.trials]
        return pandas.DataFrame([{key: value for key, value in row.items() if key != "settings"} for row in rows])

    def __repr__(self) -> str:
        trials = console.counted(len(self.trials), "trial")
        return f"SweepResult({self.sweep}: {trials}, best {self.measure} {self.best.perplexity:.4g})"

    def _repr_html_(self) -> str:
        return console.as_html(trial_table.RankedTable(self.trials, console.label(self.measure), self.untrained))

    def record(self) -> dict[str, Any]:
        """The result for --json; the key of a score is its name."""
        left_out = ("measure", "repeats", "report", "mlflow_path", "test")
        record = {key: value for key, value in vars(self).items() if key not in left_out}
        if self.repeats is not None:
            record["repeats"] = self.repeats.record(self.measure)
        record |= {"best": self.best.record(self.measure), "trials": [row.record(self.measure) for row in self.trials]}
        if self.untrained is not None:
            names = {"perplexity": self.measure}
            record["untrained"] = {names.get(key, key): value for key, value in self.untrained.items()}
        if self.test is not None:
            record["test"] = self.test.record()
        return {**record, "report": self.report} if self.report is not None else record


def run(plan: SweepPlan, resume: runs.Resume = "auto") -> SweepResult:
    """Run the trials that have not finished, rank all, export and score the best model, and write the report.

    Resumes the newest unfinished sweep of the experiment, else extends the newest finished one that has fewer trials,
    unless `resume` is never. If it has them all, this is its result. A trial that fails is a row with its reason;
    TrainingError if no trial has a score, ConfigError if no trial could use its settings. Interrupted or
    KeyboardInterrupt if the process is asked to stop; the same call then resumes.
    """
    fingerprint = plan.plan.tokens.fingerprint
    has_more = functools.partial(extension.has_more, plan.experiment)
    with lifecycle.started(plan.experiment, "tune", fingerprint, resume, has_more) as (active, parent):
        if active.state == "finished":
            trials = console.counted(plan.trials, "trial")
            logger.info(
                f"{active.directory}: the {trials} of these settings have finished. To extend it, give more with "
                "tune.num_samples; another sweep starts with --resume never"
            )
            return _finished(active, parent)
        return _run(plan, active, parent)


def _run(plan: SweepPlan, active: ActiveRun, parent: Run) -> SweepResult:
    experiment = plan.experiment
    if experiment.tune.prior_sweeps and sweeps.start.read(active.directory) is None:  # else it has their trials
        earlier.check(experiment, plan.plan.tokens.fingerprint)
    decided = active.decided.get("cluster.cpus_per_worker")
    at_a_time = _most_at_a_time(experiment, plan.trials)
    with cluster.connect(experiment.cluster, trials=at_a_time, decided=decided) as resources:
        stores.check_nodes(experiment)
        prepared, reused = plan.plan.prepared, True
        if prepared is None:
            store, reused = stores.prepare(plan.plan.tokens)
            prepared = plan.plan.with_store(store)
        for warning in prepared.warnings:
            logger.warning(warning)
        sets = stores.prepare_evaluation_sets(plan.plan, prepared.store)
        prepared = arithmetic.settled(prepared, active, resources)
        untrained = score_untrained(prepared, parent, active, resources)
        with_store = dataclasses.replace(plan.plan, prepared=prepared, budget=prepared.budget)
        estimate.say(dataclasses.replace(plan, plan=with_store).estimate)
        tracking.wait_until_open(parent)
        rows = run_trials(prepared, sets, parent, active, resources)
        best = ranking.export_best_trial(prepared, parent, resources, rows)
    if best is None:
        raise _no_result(active, rows)
    if plan.experiment.tune.keep == "best":
        rows = [row if row["trial_id"] == best["trial_id"] else {**row, "checkpoint": None} for row in rows]
    result = dataclasses.replace(_result(prepared, active, parent, rows, best, reused), untrained=untrained)
    active.end(result.record())
    if plan.experiment.tune.keep == "best":
        freed = cleaning.remove(cleaning.lost_checkpoints(active.directory))
        logger.info(f"tune.keep=best: {console.format_size(freed)} of checkpoints of trials that lost are removed")
    report = _report(active.directory, parent)
    return dataclasses.replace(result, report=report, mlflow_path=parent.path)


def score_untrained(
    prepared: Prepared, parent: Run, active: ActiveRun, resources: Resources
) -> dict[str, float] | None:
    """perplexity and bits_per_byte of the experiment's model before training, scored once for a sweep and logged to its
    run in MLflow at step 0; None if it is not finite. With model.path it is the score of every trial."""
    measure = prepared.experiment.measure
    history = parent.metric_history()
    names = {"perplexity": f"eval/{measure}", "bits_per_byte": "eval/bits_per_byte"}
    before = {name: dict(history.get(key, ())) for name, key in names.items()}
    if all(0 in values for values in before.values()):
        return {name: values[0] for name, values in before.items()}
    experiment = _settled(prepared, active, resources)
    with console.task("Scoring the model before training", "tokens") as advance:
        score = Score.of(launch.score_untrained(prepared.store, experiment, resources, advance))
    if not math.isfinite(score.perplexity):
        return None
    parent.log_metrics({f"eval/{what}": value for what, value in score.figures(measure).items()}, 0)
    return {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}


def _settled(prepared: Prepared, active: ActiveRun, resources: Resources) -> Experiment:
    """The experiment with what is auto decided."""
    decided = {"cluster.cpus_per_worker": resources.cpus_per_worker, "train.compile": "off"}
    return active.settled(prepared.experiment, decided)


def run_trials(
    prepared: Prepared, sets: dict[str, str], parent: Run, active: ActiveRun, resources: Resources
) -> list[dict[str, Any]]:
    """Run the trials that have not finished; return a row for each trial, the best first.

    `sets`: the token store of each evaluation set. Interrupted or KeyboardInterrupt if the process is asked to stop;
    trials then save a checkpoint to resume from. StorageUnavailable if storage failed.
    """

    def stopping() -> bool:
        return cluster.stop_signal() is not None or record.outage is not None

    store, planned = prepared.store, prepared.budget
    experiment = _settled(prepared, active, resources)
    record = sweeps.SweepRecord(active.directory)
    section, metric = experiment.tune, f"best_{experiment.tune.ranked_by}"
    _decide_start(prepared, active)
    extension.resume(record, prepared.experiment, active)
    measure = experiment.measure if section.ranked_by == "perplexity" else section.ranked_by
    swept = sweeps.keys(section.space)
    parameters = summary.parameters(experiment, store)
    parent.log_parameters({key: value for key, value in parameters.items() if key not in swept})
    summary.log_size(parent, experiment, store, planned)
    summary.log_data(parent, experiment, store)
    summary.log_comparison(parent, experiment, swept)
    parent.log_text(dump(experiment), "experiment.yaml")
    random.seed(experiment.train.seed)  # population-based training draws from it
    together = min(resources.most_runs, section.max_concurrent_trials or resources.most_runs)
    if lost := record.lost():
        names = ", ".join(lost)
        logger.info(f"{active.directory}: the sweep's record does not have {names}: their names are not used again")
    own = callbacks.load(experiment.train.callbacks)
    task = training.TrainTask(experiment, store.path, planned, parent, active.directory, sets=sets, callbacks=own)
    limits = sweeps.SweepStopper(section.stop, record, metric)

    def run_all(again: Callable[[], Searcher], scheduler: RecordedScheduler) -> None:
        """Run the unfinished trials of the record and those that the searcher draws."""
        searcher = again()
        trials = sweeps.TrialQueue(
            searcher,
            record,
            scheduler,
            # A population is compared as a whole, so its trials take turns.
            together=together if section.scheduler.kind != "pbt" else searcher.total,
            values=lambda trial: ranking.values(experiment, store, trial),
            stopping=stopping,
            again=again if record.repeated is None else None,
        )
        total = trials.total_samples
        stages = scheduler.asha.stages(total, planned.tokens) if scheduler.asha is not None else []
        repeats = sweeps.repeats.expected(section.repeats, total) if record.repeated is None else (0, 0)
        of_all = sweeps.ladder.most_tokens(experiment, total)
        try:
            with (
                live_table.show(planned.tokens, total, swept, measure, stages, repeats, of_all) as view,
                cluster.handle_signals(logger.info),
                cluster.progress_channel(lambda _: None, logger.info) as channel,
            ):
                watcher = tuner.Watcher(scheduler, parent, view.update, channel.stop, metric)
                with_channel = dataclasses.replace(task, channel=channel)

                def on_added() -> None:
                    view.total_trials = trials.total_samples
                    logger.info(f"Trials were added: {view.total_trials} in all")

                tuner.run(trials, with_channel, resources, limits, watcher, together=together, on_added=on_added)
                if record.outage is not None:
                    raise record.outage
                if stopping():
                    total = trials.total_samples
                    left = total - sum(trial.is_over for trial in record.trials.values())
                    how = f"stopped with {left} of {total} trials left"
                    raise cluster.interruption(active.directory, how)
        finally:
            limits.count()

    while True:
        if record.repeated is None:
            inner = sweeps.scheduler(section, planned, metric, active.directory)
            scheduler = sweeps.RecordedScheduler(inner, record, planned, stopping)
            run_all(functools.partial(extension.searcher, experiment, record), scheduler)
        if section.repeats > 1:
            if record.repeated is None and limits.stop_all():
                logger.info("tune.stop has ended the sweep before its repeats")
            elif record.repeated is None:
                repeats.choose(record, section.ranked_by)
            if record.repeated:
                sweeps.repeats.add(record, experiment.train, section.repeats)
                run_all(sweeps.repeats.NoSearcher, sweeps.repeats.scheduler(record, planned, stopping))
        if limits.stop_all() or not extension.extend_by_requests(record, experiment):
            break
    return ranking.ranked(record, experiment, store)


def _no_result(active: ActiveRun, rows: list[dict[str, Any]]) -> TrainingError | ConfigError:
    """The error that no trial has a score. It ends the sweep because the same settings would fail again."""
    reasons = "; ".join(sorted({row["failure"] for row in rows if row["failure"]}))
    problem = f"no trial of the sweep has a result: {reasons or 'it was stopped before'}"
    active.end({"error": problem})
    wrong = {trial.wrong_setting for trial in sweeps.read(active.directory).values()}
    if wrong and None not in wrong:
        return ConfigError(problem, where=min(map(str, wrong)))
    return TrainingError(problem, where=active.name)


def _result(
    prepared: Prepared, active: ActiveRun, parent: Run, rows: list[dict[str, Any]], best: dict[str, Any], reused: bool
) -> SweepResult:
    experiment, validation = prepared.experiment, prepared.store.validation
    return SweepResult(
        sweep=active.name,
        mlflow_run_id=parent.run_id,
        measure=experiment.measure,
        tokens_reused=reused,
        scored_on=scored_on_with_size(experiment, prepared.scored),
        scored_in=experiment.eval.precision,
        prefix=summary.prefix(experiment, prepared.store),
        unknown_tokens=validation.unknown_tokens,
        incomparable=tokens.incomparable(validation.unknown_tokens, validation.num_tokens),
        best=BestTrial(**{field.name: best[field.name] for field in dataclasses.fields(BestTrial)}),
        trials=[TrialRow.from_record(row) for row in rows],
        significance=significance.sentence(
            {row["trial_id"]: row["standing"] for row in rows},
            prepared.scored["scored_documents"],
            scored_unit(experiment),
            is_weighted=bool(experiment.tune.weights),
        ),
        test=best["test"],
        repeats=ranking.repeats_of(experiment, rows),
    )


def _finished(active: ActiveRun, parent: Run) -> SweepResult:
    """The result of a sweep that has finished, as it was written."""
    read = read_sweep(active.directory)
    record, rows, best = read.result, read.trials, read.best
    assert best is not None, f"{active.directory}: a sweep without a best trial ends with an error"
    named = {field.name: record[field.name] for field in dataclasses.fields(SweepResult) if field.name in record}
    untrained = record.get("untrained")
    steps = {row.trial_id: row.best_step or 0 for row in rows}
    has_report = "report.html" in storage.names(f"{active.directory}/report")
    return SweepResult(
        **{
            **named,
            "measure": read.measure,
            "best": best,
            "trials": rows,
            "untrained": untrained and {**untrained, "perplexity": untrained[read.measure]},
            "test": test_split.read(f"{active.directory}/{best.trial_id}", steps[best.trial_id]),
            "repeats": repeats.compare(rows, has_patience=read.experiment.train.patience is not None),
            "report": f"{active.directory}/report/report.html" if has_report else None,
            "mlflow_path": parent.path,
        }
    )


def _report(directory: str, parent: Run) -> str | None:
    """The report of a finished sweep. A failure is only a warning because the report can be made again."""
    try:
        with console.task("Drawing the report"):
            path = html.build(directory)
    except Exception as error:
        again = console.command("report", directory)
        logger.warning(f"the report could not be drawn ({error}); again: {again}")
        return None
    parent.log_file(path, "report/report.html")
    return path
