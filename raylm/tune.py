"""python -m raylm.tune: a sweep. A trial is a training run with overrides, on the same tokens as every other.

With one worker a trial, the trial's own process is the worker (Ray Train's local mode) and is used again for the next
trial: 1.1 s of overhead a trial against 12.6 s with a worker group, which is for trials of several workers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from raylm import cli
from raylm.config import Experiment, corners, dump, override
from raylm.errors import ConfigError, OutOfMemory, RaylmError, TrainingError

if TYPE_CHECKING:
    from raylm.budget import Budget
    from raylm.cluster import Resources
    from raylm.config import SchedulerConfig
    from raylm.loop import Job
    from raylm.tokens import Store
    from raylm.tracking import Run


def tune(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.Answer:
    """Sweep settings of an experiment and rank the trials by perplexity on the same validation tokens.

    Without --config: a small GPT-2 on the source code of Python's standard library.
    """
    experiment = cli.experiment(config, settings, print_config)
    checked = plan(experiment)
    if dry_run:
        return checked
    from raylm import cluster, objective, runs, storage, tracking
    from raylm.prepare import prepared

    storage.check(experiment.storage)
    name = runs.named("tune")
    with cluster.connect(experiment.cluster) as resources:
        store, reused = prepared(experiment)
        if not reused:  # else the plan has told
            objective.warn_of_absent(experiment.objective, store)
        parent = tracking.start(
            experiment.tracking,
            experiment=experiment.name,
            name=name,
            tags={"raylm.verb": "tune"},
            directory=f"{runs.directory_of(experiment)}/{name}",
        )
        status: tracking.Status = "FAILED"
        try:
            parent.text(dump(experiment), "experiment.yaml")
            rows = sweep(experiment, store, parent, resources, name=name)
            best = finish(experiment, store, parent, resources, rows)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            for child in parent.children().values():  # those of trials that were cut off
                child.end_if_running("KILLED")
            parent.end(status)
            tracking.settle(parent, cli.say)
    return answer(experiment, name, parent, rows, best, reused)


def plan(experiment: Experiment) -> cli.Answer:
    """Check every value of the space as far as that can be done before Ray starts; what the sweep will do."""
    from raylm import tables, train

    section = experiment.tune
    if not section.space:
        raise ConfigError(
            "tune.space is empty: nothing to sweep; say for example "
            "tune.space.train.learning_rate='{loguniform: [1e-4, 1e-2]}'",
            where="tune.space",
        )
    base = train.plan(experiment)
    from raylm import loop, model, tokenizer

    own = tokenizer.chosen(experiment.tokenizer, experiment.model).path
    for key, sampler in section.space.items():
        for value in corners(sampler):
            changed = override(experiment, {key: value})
            try:
                loop.check(changed.train)
                model.configuration(
                    changed.model,
                    vocab_size=0,
                    block_size=changed.blocks.block_size,
                    masked=changed.objective.kind == "masked",
                )
                if own and key == "model.path" and not tokenizer.same(own, value):
                    raise ConfigError(f"its tokenizer is not that of {own}, and tokens are prepared once for a sweep")
            except ConfigError as error:
                raise ConfigError(f"tune.space.{key}: value {value}: {error.message}", f"tune.space.{key}") from None
    trials = section.num_samples * math.prod(len(v["grid"]) for v in section.space.values() if "grid" in v)
    record = {
        **base.record,
        "trials": trials,
        "space": section.space,
        "scheduler": section.scheduler.kind,
        "most_tokens": trials * base.record["tokens"] if base.record["tokens"] else None,
    }
    lines = {
        "trials": trials,
        **{f"  {key}": _shown(sampler) for key, sampler in section.space.items()},
        "scheduler": section.scheduler.kind,
        "tokens of all trials": f"at most {record['most_tokens']:,}" if record["most_tokens"] else None,
    }
    return cli.Answer(record, f"{base.view}\n{tables.facts(lines)}")


def sweep(
    experiment: Experiment, store: Store, parent: Run, resources: Resources, *, name: str
) -> list[dict[str, Any]]:
    """Run the trials; a row for each, the best first. A trial that fails is a row with its reason, not an error."""
    from ray import tune as ray_tune

    from raylm import loop, runs, train
    from raylm.prepare import evaluation_sets

    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer console output of Tune talks even at verbose=0
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end a sweep at Ctrl-C as if it were complete
    budget = train.budget_of(experiment, store)
    sets = evaluation_sets(experiment, store)
    swept = {key: _shown(sampler) for key, sampler in experiment.tune.space.items()}
    parent.parameters({**train.parameters(experiment, store, budget), **swept})
    template = loop.Job(experiment, store.path, budget, parent, f"{runs.directory_of(experiment)}/{name}", sets=sets)
    together = resources.most_runs
    if experiment.tune.max_concurrent_trials is not None:
        together = min(together, experiment.tune.max_concurrent_trials)
    metric = f"best_{experiment.tune.metric}"
    with cli.task(f"Sweep, {together} trial{'s' if together > 1 else ''} at a time", "tokens") as advance:
        watcher = _watcher(advance, budget.tokens, metric)
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(
                ray_tune.with_parameters(trial, template=template, resources=resources), trial_resources(resources)
            ),
            param_space=samplers(experiment.tune.space),
            tune_config=ray_tune.TuneConfig(
                metric=metric,
                mode="min",
                num_samples=experiment.tune.num_samples,
                search_alg=ray_tune.search.BasicVariantGenerator(
                    max_concurrent=together, random_state=experiment.train.seed
                ),
                scheduler=scheduler(experiment.tune.scheduler, budget),
                reuse_actors=resources.num_workers == 1,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=ray_tune.RunConfig(
                name=name,
                storage_path=runs.directory_of(experiment),
                failure_config=ray_tune.FailureConfig(max_failures=2),  # of processes: lost ones go on elsewhere
                callbacks=[watcher],
                verbose=0,
            ),
        )
        results = tuner.fit()
    rows = [_row(result, experiment) for result in results]
    return sorted(rows, key=lambda row: (row[experiment.tune.metric] is None, row[experiment.tune.metric] or 0))


def trial(settings: dict[str, Any], *, template: Job, resources: Resources) -> None:
    """One trial: the template's run with these settings. What goes wrong in it is reported as its result."""
    from ray import tune as ray_tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from raylm import tokens as stores
    from raylm import train

    trial_id = _number(ray_tune.get_context().get_trial_id())
    directory = f"{template.directory}/{trial_id}"
    run = template.run.child(trial_id, directory=directory)
    budget = template.budget
    try:
        experiment = override(template.experiment, {**settings, "tune.space": {}})
        store = stores.open_store(template.store)
        budget = train.budget_of(experiment, store)
        run.parameters({**train.parameters(experiment, store, budget), **settings})
        run.text(dump(experiment), "experiment.yaml")
        job = dataclasses.replace(template, experiment=experiment, budget=budget, run=run, directory=directory)
        if resources.num_workers == 1:
            _fit_here(job)
        else:
            train.fit(job, resources, callbacks=[TuneReportCallback()])
    except Exception as error:
        cause = error if isinstance(error, RaylmError) else TrainingError(f"{type(error).__name__}: {error}")
        run.tags({"raylm.failure": cause.message})
        worst = dict.fromkeys(("perplexity", "bits_per_byte", "best_perplexity", "best_bits_per_byte"), math.inf)
        ray_tune.report({**worst, "step": 0, "tokens": budget.tokens, "failure": cause.message})


def _fit_here(job: Job) -> None:
    """Train in this very process, again with smaller micro-batches where memory ran out."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from raylm import loop, train

    while True:
        trainer = TorchTrainer(
            loop.train_loop_per_worker,
            train_loop_config={"job": dataclasses.replace(job, session=InTrial)},
            scaling_config=ScalingConfig(num_workers=0),
        )
        outcome = trainer.fit().return_value
        if outcome.error is None:
            return
        if not isinstance(outcome.error, OutOfMemory):
            raise outcome.error
        train.again(job, outcome.error)


class InTrial:
    """The only worker of a trial, in the trial's own process: a loop.Session over ray.tune."""

    rank = 0
    world_size = 1

    def report(self, metrics: dict[str, Any]) -> None:
        from ray import tune as ray_tune

        ray_tune.report(metrics)

    def agreed(self, value: Any) -> Any:
        return value

    def lost_nodes(self) -> list[str]:
        return []


def samplers(space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """tune.space in ray.tune's own terms."""
    from ray import tune as ray_tune

    def one(kind: str, values: list[Any]) -> Any:
        if kind == "choice":
            return ray_tune.choice(values)
        if kind == "grid":
            return ray_tune.grid_search(values)
        return getattr(ray_tune, kind)(*values)

    return {key: one(*next(iter(sampler.items()))) for key, sampler in space.items()}


def scheduler(section: SchedulerConfig, budget: Budget) -> Any:
    """The trial scheduler. Its rungs are counted in training tokens and lie where trials are evaluated."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if section.kind == "none":
        return FIFOScheduler()
    between = budget.eval_every * budget.batch_tokens
    grace = section.grace_tokens or budget.tokens // 8
    return ASHAScheduler(
        time_attr="tokens",
        max_t=budget.tokens,
        grace_period=min(max(1, round(grace / between)) * between, budget.tokens),
        reduction_factor=section.reduction_factor,
    )


def release(placement_group: str | None) -> None:
    """Free what the workers of a stopped trial had reserved, or the next trial waits for it forever.

    Tune kills a trial and with it Train's controller. Train has a cleaner for that case, but it asks the dashboard
    whether the controller lives, and without a dashboard (Ray 2.60) it never learns.
    """
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if placement_group is not None:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(placement_group))))


def trial_resources(resources: Resources) -> Any:
    """What a trial's own process reserves; with a worker group the workers have reservations of their own."""
    from ray import tune as ray_tune

    if resources.num_workers == 1:
        return ray_tune.PlacementGroupFactory([resources.per_worker])
    return ray_tune.PlacementGroupFactory([{"CPU": 0, "memory": 1}])  # one byte: Ray refuses to reserve nothing


def finish(
    experiment: Experiment, store: Store, parent: Run, resources: Resources, rows: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Export the best trial's model, score it as `raylm.evaluate` does and close every trial's run.

    The best row, with the exported model as its checkpoint; None if no trial has a result.
    """
    from raylm import card, train
    from raylm.perplexity import Score

    children = parent.children()
    for row in rows:
        child = children.get(row["trial_id"])
        if child is None:
            continue
        if row["perplexity"] is not None:
            child.metrics(train.best_metrics(experiment, row), row["best_step"])
        child.tags({"raylm.status": row["status"]})
        child.end("FAILED" if row["status"] == "failed" else "FINISHED")
        row["mlflow_run_id"] = child.run_id
    if not rows or rows[0]["perplexity"] is None:
        return None
    best = dict(rows[0])
    best["checkpoint"] = str(card.export(best["checkpoint"], f"{parent.directory}/model"))
    if experiment.eval.max_tokens is not None:
        with cli.task("Scoring the best trial on the whole validation split", "documents") as advance:
            scored = Score.of(train.score(best["checkpoint"], store.validation, experiment, resources, advance))
        best |= {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte}
    parent.metrics(train.best_metrics(experiment, best), best["best_step"])
    parent.tags({"raylm.best_trial": best["trial_id"], "raylm.checkpoint": best["checkpoint"]})
    return best


def answer(
    experiment: Experiment,
    name: str,
    parent: Run,
    rows: list[dict[str, Any]],
    best: dict[str, Any] | None,
    reused: bool,
) -> cli.Answer:
    """The ranked table, and what to do next; TrainingError if no trial has a result."""
    from raylm import tables, tracking
    from raylm.train import measured

    measure = measured(experiment)

    def named(row: dict[str, Any]) -> dict[str, Any]:
        return {measure if key == "perplexity" else key: value for key, value in row.items()}

    if best is None:
        reasons = "; ".join(sorted({row["failure"] for row in rows if row["failure"]}))
        raise TrainingError(f"no trial of the sweep has a result: {reasons}", where=name)
    record = {
        "sweep": name,
        "mlflow_run_id": parent.run_id,
        "tokens_reused": reused,
        "best": named(
            {key: best[key] for key in ("trial_id", "checkpoint", "perplexity", "bits_per_byte", "settings")}
        ),
        "trials": [named(row) for row in rows],
    }
    failures = "\n".join(f"{row['trial_id']} failed: {row['failure']}" for row in rows if row["failure"])
    facts = tables.facts(
        {
            "best trial": best["trial_id"],
            measure.replace("_", "-"): best["perplexity"],
            "checkpoint": best["checkpoint"],
            "repeat it": f"{sys.executable} -m raylm.train --config {best['checkpoint']}/experiment.yaml",
            "try it": f"{sys.executable} -m raylm.generate {best['checkpoint']} --prompt '...'",
            "compare trials": tracking.how_to_look(experiment.tracking),
        }
    )
    return cli.Answer(
        record, (tables.trials(rows, measure.replace("_", "-")), *([failures] if failures else []), "", facts)
    )


def _row(result: Any, experiment: Experiment) -> dict[str, Any]:
    metrics = result.metrics or {}
    failure = metrics.get("failure") or (str(result.error).strip().split("\n")[-1] if result.error else None)
    seen = metrics.get("tokens", 0)
    scored = failure is None and "best_perplexity" in metrics
    completed = seen >= metrics.get("budget_tokens", math.inf)
    return {
        "trial_id": _number(metrics.get("trial_id") or result.path.rsplit("_", 1)[-1]),
        "status": "failed" if failure else "completed" if completed else "stopped early",
        "perplexity": metrics["best_perplexity"] if scored else None,
        "bits_per_byte": metrics["best_bits_per_byte"] if scored else None,
        "tokens": 0 if failure else seen,
        "settings": {key: result.config[key] for key in experiment.tune.space},
        "checkpoint": metrics.get("best_checkpoint"),
        "best_step": metrics.get("best_step", 0),
        "failure": failure,
    }


def _shown(sampler: dict[str, Any]) -> str:
    ((kind, values),) = sampler.items()
    return f"{kind}({', '.join(f'{value:g}' if isinstance(value, float) else str(value) for value in values)})"


def _number(ray_id: str) -> str:
    """trial_00003 for Ray's 5f3a1_00003."""
    return f"trial_{ray_id.rsplit('_', 1)[-1]}"


def _trial_id(ray_trial: Any) -> str:
    return _number(ray_trial.trial_id)


def _watcher(advance: Any, tokens: int, metric: str) -> Any:
    """Tells how far all trials are together; a trial that is stopped early needs no more of its budget."""
    from ray.tune import Callback

    class Watcher(Callback):
        def __init__(self) -> None:
            self.seen: dict[str, int] = {}
            self.reserved: dict[str, str | None] = {}
            self.over: set[str] = set()
            self.total = 0

        def __reduce__(self) -> tuple:
            return object, ()  # Ray saves callbacks beside the sweep; a bar on a screen cannot be saved

        def setup(self, **info: Any) -> None:
            self.total = info.get("total_num_samples") or 0

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **_: Any) -> None:
            self.seen[trial.trial_id] = min(result.get("tokens", 0), tokens)
            self.reserved[trial.trial_id] = result.get("placement_group")
            self.show()

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
            self.over.add(trial.trial_id)
            release(self.reserved.pop(trial.trial_id, None))

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
            self.over.add(trial.trial_id)
            release(self.reserved.pop(trial.trial_id, None))
            result = trial.last_result or {}
            told = f"{metric.removeprefix('best_')} {result.get(metric, math.nan):.2f}"
            if result.get("failure"):
                told = f"failed: {result['failure']}"
            tokens_seen = self.seen.get(trial.trial_id, 0)
            cli.console.print(f"{_trial_id(trial)}: {tokens_seen:,} tokens, {told}", soft_wrap=True, markup=False)
            self.show()

        def show(self) -> None:
            done = sum(self.seen.values())
            left = sum(tokens - seen for trial_id, seen in self.seen.items() if trial_id not in self.over)
            left += tokens * max(0, self.total - len(self.seen))
            advance(done, done + left)

    return Watcher()


def main() -> None:
    cli.run(tune)


if __name__ == "__main__":
    from raylm.tune import main  # by its real name, so that Ray ships functions by reference

    main()
