"""python -m raylm.train: one training run. The same command goes on with a run that stopped before its end."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from raylm import cli, console
from raylm.config import WHOLE_SPLIT, Experiment, dump, from_environment
from raylm.errors import ConfigError, Diverged, Interrupted, OutOfMemory

if TYPE_CHECKING:
    from raylm.cluster import Resources
    from raylm.runs import ActiveRun
    from raylm.tokens import Store
    from raylm.tracking import Run

logger = logging.getLogger(__name__)


def train(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    resume: cli.Resume = "auto",
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Train one language model on the corpus; the tokens are prepared first, unless they are there already."""
    from raylm import derived

    experiment = cli.experiment(config, settings, print_config, derived.training)
    checked = plan(experiment, begins=None if dry_run else "train")
    if dry_run:
        return checked
    from raylm import cluster, prepare, runs, storage, summary, tracking

    storage.check(experiment.storage)
    derived.keep()
    begun = runs.start_or_resume(experiment, "train", os.path.basename(checked.record["store"]), resume)
    for directory in begun.abandoned:
        summary.start(experiment, directory, os.path.basename(directory), "train").end_if_running("KILLED")
    run = summary.start(experiment, begun.directory, begun.name, "train")
    status: tracking.Status = "FAILED"
    try:
        with contextlib.ExitStack() as connection:
            decided = begun.decided.get("cluster.cpus_per_worker")
            alone = cluster.single_worker_resources(experiment.cluster, decided=decided)
            if alone is not None and not prepare.is_needed(experiment, checked.record["store"]):
                resources = alone
            else:
                resources = connection.enter_context(cluster.connect(experiment.cluster, decided=decided))
                check_nodes(experiment)
            store, reused = prepare.prepared(experiment, checked.record["store"])
            if not reused:  # else the plan has told
                warn(experiment, store)
            sets = prepare.evaluation_sets(experiment, store)
            if alone is not None:
                connection.close()  # the worker has the machine for itself
            answer = trained(experiment, store, sets, run, begun, resources)
            begun.end(answer.record)
            status = "FINISHED"
            return answer
    except (KeyboardInterrupt, Interrupted):
        status = "KILLED"
        raise
    except (Diverged, OutOfMemory) as error:
        if error.where not in runs.MUTABLE_ON_RESUME:  # else it can go on with another
            begun.end({"error": error.message})  # with the same settings it would fail again
        raise
    finally:
        run.end(status)
        tracking.settle(run, logger.info)


def check_nodes(experiment: Experiment) -> None:
    """An error that names the setting which does not do for all nodes of the cluster, which is connected."""
    from raylm import cluster, prepare

    prepare.check_nodes(experiment)
    uri = experiment.tracking.uri
    if uri is not None and uri.startswith("sqlite") and (nodes := cluster.other_nodes()):
        raise ConfigError(
            f"tracking.uri={uri} is a file of this machine, and the cluster has nodes elsewhere: "
            f"{', '.join(sorted(set(nodes.values())))}; start a server (mlflow server --backend-store-uri {uri} --host "
            "0.0.0.0) and give its address, or tracking.uri=null: raylm sync ships to any MLflow later",
            "tracking.uri",
        )


def trained(
    experiment: Experiment, store: Store, sets: dict[str, str], run: Run, begun: ActiveRun, resources: Resources
) -> cli.CommandResult:
    """Train to the end of the budget, export the best model and score it."""
    from raylm import budget, cluster, cost, export, launch, summary, tables, tokens, tracking, training
    from raylm.perplexity import Score

    experiment = begun.settled(experiment, {"cluster.cpus_per_worker": resources.cpus_per_worker})
    experiment = cost.with_eval_limit(experiment, store)
    planned = budget.for_store(experiment, store)
    run.parameters(summary.parameters(experiment, store, planned))
    run.text(dump(experiment), "experiment.yaml")
    summary.log_data(run, experiment, store)
    if begun.step is not None:
        logger.info(f"{begun.directory}: the newest checkpoint is of step {begun.step:,} of {planned.steps:,}")
    job = training.TrainTask(experiment, store.path, planned, run, begun.directory, sets=sets)
    started = time.monotonic()
    with (
        console.task("Training", "tokens") as advance,
        cluster.handle_signals(logger.info),
        cluster.progress_channel(lambda done: advance(done, planned.tokens), logger.info) as board,
    ):
        outcome = launch.fit(dataclasses.replace(job, board=board), resources)
        if outcome.stopped or cluster.stop_signal() is not None:  # after the last look at it: a score is left to do
            raise cluster.interruption(begun.directory, f"stopped after step {outcome.step:,}, which is saved")
    seconds = time.monotonic() - started
    best = dict(outcome.best)
    ending = {"best_tokens": best["tokens"], "last_perplexity": outcome.last.get("perplexity")}
    overfitting = tables.overfitting({**best, **ending})
    checkpoint, target = job.checkpoints.path(best["step"]), f"{begun.directory}/model"
    score = {name: best[name] for name in ("perplexity", "bits_per_byte")}
    scored_on = experiment.eval.scored_on
    # The figure to compare is of the whole split.
    if experiment.eval.max_tokens is not None and cost.whole_is_affordable(experiment, store, planned):
        scored_on = WHOLE_SPLIT
        with console.task("Scoring the whole validation split", "tokens") as advance:
            scored = Score.of(launch.score(checkpoint, store.validation, experiment, resources, advance))
        score = {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte}
    best |= score
    export.export(checkpoint, target, {**score, "scored_on": scored_on})
    summary.log_best(run, experiment, best)
    run.tags({"raylm.checkpoint": target})
    run.model(target, experiment.tracking, best["step"], logger.info)
    measure = experiment.measure
    trained_here = (outcome.step - (begun.step or 0)) * planned.batch_tokens
    record = {
        "run": begun.name,
        "checkpoint": target,
        measure: best["perplexity"],
        "bits_per_byte": best["bits_per_byte"],
        "prefix": summary.prefix(experiment, store),
        "unknown_tokens": store.validation.unknown_tokens,
        "incomparable": tokens.incomparable(store.validation.unknown_tokens, store.validation.num_tokens),
        "scored_on": scored_on,
        "scored_in": experiment.eval.precision,
        "tokens": outcome.step * planned.batch_tokens,
        "steps": outcome.step,
        "best_step": best["step"],
        **ending,
        "resumed_from": begun.step,
        "tokens_per_second": trained_here / seconds,
        "mlflow_run_id": run.run_id,
    }
    view = tables.key_values(
        {
            measure.replace("_", "-"): best["perplexity"],
            "bits per byte": best["bits_per_byte"],
            "incomparable": record["incomparable"],
            "tokens": record["tokens"],
            "tokens/s": round(record["tokens_per_second"]) or None,
            "checkpoint": target,
            "training": next(iter(overfitting), None),
            "generate": f'{sys.executable} -m raylm.generate {target} --prompt "..."',
            "mlflow": tracking.how_to_look(experiment.tracking),
        }
    )
    return cli.CommandResult(record, view)


def plan(
    experiment: Experiment,
    *,
    begins: Literal["train", "tune"] | None = None,
    trials_at_a_time: Callable[[], int] = lambda: 1,
) -> cli.CommandResult:
    """Check whatever can be checked without Ray; what the run will do.

    If one begins then, what it needs starts meanwhile: the process of its worker, Ray. How many trials there are at a
    time is asked in the end, since that takes imports.
    """
    from raylm import cluster, corpus, storage, tokenizer, tokens, tracking
    from raylm.prepare import evaluation_corpora, tokenizer_of

    if begins:
        cluster.check_reachable(experiment.cluster)
    if experiment.tracking.uri is not None:
        tracking.check(experiment.tracking.uri)
    storage.look(experiment.storage)
    sources = corpus.list_sources(experiment.corpus)
    sets = evaluation_corpora(experiment)
    resources, elsewhere = cluster.planned_resources(experiment.cluster), cluster.address_of(experiment.cluster)
    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    store = tokens.store_path(experiment.storage, experiment.corpus, chosen, sources)
    is_alone = begins == "train" and cluster.single_worker_resources(experiment.cluster) is not None
    if is_alone:
        cluster.start_worker_early()
    if begins and resources is not None and not (is_alone and tokens.is_store(store)):
        cluster.start_ray_early()
    with console.waiting("Loading PyTorch and transformers"), console.importing():  # after the quick checks
        from raylm import budget, cost, model, objective, perplexity, runs, summary, tables, training

    training.check_settings(experiment.train, has_updates=experiment.model.lora is not None)
    key = "tokenizer.path" if experiment.tokenizer.path else "model.path"
    known: Any = chosen.train or tokenizer.load_section(chosen, key)
    if chosen.train is None:
        tokenizer.frame(known, experiment.tokenizer.prefix)
    objective.check_settings(experiment.objective, experiment.blocks, known)
    found = model.config_of(
        experiment, chosen.train.vocab_size if chosen.train else model.num_ids(experiment.model, known)
    )
    perplexity.context_of(experiment.eval, model.context(found), experiment.blocks.block_size)
    scored: dict[str, int] = {}
    share = None
    if tokens.is_store(store):
        opened = tokens.open_store(store)
        warn(experiment, opened)
        decided = budget.for_store(experiment, opened)
        planned: budget.Budget | None = decided
        limited = cost.with_eval_limit(experiment, opened)
        scored = summary.scored(limited, opened)
        paths = [tokens.store_path(experiment.storage, corpus, tokenizer_of(store)) for corpus in sets.values()]
        prepared = [tokens.open_store(path).train for path in paths if tokens.is_store(path)]
        share = cost.evaluation_share(limited, opened, decided, prepared)
    else:
        planned = budget.compute(
            experiment.train,
            block_size=experiment.blocks.block_size,
            num_workers=experiment.cluster.most_workers,
            epoch_examples=None,
        )
    resources = cluster.planned_resources(experiment.cluster, trials=trials_at_a_time())
    num_files = sum(len(source.files) for source in sources)
    num_bytes = sum(source.num_bytes for source in sources)
    record = {
        "corpus": {"files": num_files, "bytes": num_bytes},
        "store": store,
        "parameters": model.num_parameters(found, masked=experiment.objective.is_masked),
        "steps": planned.steps if planned else None,
        "tokens": planned.tokens if planned else None,
        "passes": planned.passes if planned else None,
        "scored_documents": scored.get("scored_documents"),
        "scored_tokens": scored.get("scored_tokens"),
        "evaluation_share": share,
        "micro_batch": planned.micro_batch if planned else None,
        "accumulation": planned.accumulation if planned else None,
        "num_workers": experiment.cluster.num_workers,
        "resources_per_worker": resources.per_worker if resources else None,
        "cluster": f"{elsewhere.value} ({elsewhere.setting})" if elsewhere else "this machine",
        "storage": runs.directory_of(experiment),
        "tracking": tracking.shown(experiment.tracking.uri) if experiment.tracking.uri else None,
        "experiment": experiment.tracking.experiment or experiment.name,
    }
    pairs = {name.replace("_", " "): value for name, value in record.items() if name != "corpus"}
    pairs["evaluation share"] = None if share is None else f"{share:.1%} of the run"
    for key, variable in from_environment(experiment).items():
        name = {"tracking.uri": "tracking", "tracking.experiment": "experiment"}[key]
        pairs[name] = f"{pairs[name]} (from {variable})"
    others = corpus.left_out(sources)
    found = f"{num_files:,} files, {console.format_size(num_bytes)}" + (f"; left out: {others}" if others else "")
    return cli.CommandResult(record, tables.key_values({"corpus": found, **pairs}))


def warn(experiment: Experiment, store: Store) -> None:
    """Say what the training will most likely be sorry for, before it starts."""
    from raylm import budget, objective, tokens

    objective.warn_of_absent(experiment.objective, store)
    for warning in tokens.warnings(store):
        logger.warning(warning)
    for warning in budget.for_store(experiment, store).warnings(experiment.train):
        logger.warning(warning)


def main() -> None:
    cli.run(train)


if __name__ == "__main__":
    from raylm.train import main  # by its real name, so that Ray ships functions by reference

    main()
