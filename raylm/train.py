"""python -m raylm.train: one training run. The same command goes on with a run that stopped before its end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raylm import cli
from raylm.config import Experiment, dump, get
from raylm.errors import ConfigError, Diverged, Interrupted, OutOfMemory, RaylmError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np

    from raylm.budget import Budget
    from raylm.cluster import Resources
    from raylm.loop import Job, Outcome
    from raylm.perplexity import Documents
    from raylm.runs import Begun
    from raylm.tokens import Store
    from raylm.tracking import Run


Resume = Annotated[
    Literal["auto", "never", "must"],
    typer.Option(
        help="auto: go on with the newest run of this name that stopped before its end. never: begin a new one. must: "
        "fail if there is none to go on with."
    ),
]


def train(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    resume: Resume = "auto",
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.Answer:
    """Train one language model on the corpus; the tokens are prepared first, unless they are there already."""
    experiment = cli.experiment(config, settings, print_config)
    checked = plan(experiment)
    if dry_run:
        return checked
    from raylm import cluster, objective, runs, storage, tracking
    from raylm.prepare import prepared

    storage.check(experiment.storage)
    begun = runs.begin(experiment, "train", os.path.basename(checked.record["store"]), resume)
    for directory in begun.abandoned:
        tracked(experiment, directory, os.path.basename(directory)).end_if_running("KILLED")
    run = tracked(experiment, begun.directory, begun.name)
    status: tracking.Status = "FAILED"
    try:
        with cluster.connect(experiment.cluster) as resources:
            check_nodes(experiment)
            store, reused = prepared(experiment)
            if not reused:  # else the plan has told
                objective.warn_of_absent(experiment.objective, store)
            answer = trained(experiment, store, run, begun, resources)
            begun.end(answer.record)
            status = "FINISHED"
            return answer
    except (KeyboardInterrupt, Interrupted):
        status = "KILLED"
        raise
    except (Diverged, OutOfMemory) as error:
        if error.where not in runs.FREE:  # else it can go on with another
            begun.end({"error": error.message})  # with the same settings it would fail again
        raise
    finally:
        run.end(status)
        tracking.settle(run, cli.say)


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


def tracked(experiment: Experiment, directory: str, name: str, verb: str = "train") -> Run:
    """The run in MLflow of a run's directory: the one it had before, or a new one."""
    from raylm import tracking

    tags = {"raylm.verb": verb}
    return tracking.start(
        experiment.tracking,
        experiment=experiment.name,
        name=name,
        tags=tags,
        directory=directory,
        metric=f"best/eval_{measured(experiment)}",
    )


def trained(experiment: Experiment, store: Store, run: Run, begun: Begun, resources: Resources) -> cli.Answer:
    """Train to the end of the budget, export the best model and score it."""
    from raylm import card, cluster, loop, tracking
    from raylm.perplexity import Score
    from raylm.prepare import evaluation_sets

    budget = budget_of(experiment, store)
    sets = evaluation_sets(experiment, store)
    run.parameters(parameters(experiment, store, budget))
    run.text(dump(experiment), "experiment.yaml")
    tell_data(run, experiment, store)
    if begun.step is not None:
        cli.say(f"{begun.directory}: the newest checkpoint is of step {begun.step:,} of {budget.steps:,}")
    job = loop.Job(experiment, store.path, budget, run, begun.directory, sets=sets)
    started = time.monotonic()
    with (
        cli.task("Training", "tokens") as advance,
        cluster.signals(cli.say),
        cluster.watch(lambda tokens: advance(tokens, budget.tokens), cli.say) as board,
    ):
        outcome = fit(dataclasses.replace(job, board=board), resources)
        if outcome.stopped:
            raise interrupted(begun.directory, f"stopped after step {outcome.step:,}, which is saved")
    seconds = time.monotonic() - started
    best = dict(outcome.best)
    target = f"{begun.directory}/model"
    card.export(job.checkpoints.path(best["step"]), target)
    if experiment.eval.max_tokens is not None:  # the figure to compare is of the whole split
        with cli.task("Scoring the whole validation split", "documents") as advance:
            scored = Score.of(score(target, store.validation, experiment, resources, advance))
        best |= {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte}
    run.metrics(best_metrics(experiment, best), 0)  # which MLflow shows as bars; a point at another step as a dot
    run.tags({"raylm.checkpoint": target})
    run.model(target, experiment.tracking, best["step"], cli.say)
    measure = measured(experiment)
    trained_here = (outcome.step - (begun.step or 0)) * budget.batch_tokens
    record = {
        "run": begun.name,
        "checkpoint": target,
        measure: best["perplexity"],
        "bits_per_byte": best["bits_per_byte"],
        "tokens": outcome.step * budget.batch_tokens,
        "steps": outcome.step,
        "best_step": best["step"],
        "resumed_from": begun.step,
        "tokens_per_second": trained_here / seconds,
        "mlflow_run_id": run.run_id,
    }
    from raylm import tables

    view = tables.facts(
        {
            measure.replace("_", "-"): best["perplexity"],
            "bits per byte": best["bits_per_byte"],
            "tokens": record["tokens"],
            "tokens/s": round(record["tokens_per_second"]) or None,
            "checkpoint": target,
            "generate": f'{sys.executable} -m raylm.generate {target} --prompt "..."',
            "mlflow": tracking.how_to_look(experiment.tracking),
        }
    )
    return cli.Answer(record, view)


def interrupted(directory: str, how: str) -> BaseException:
    """What a command that was asked to stop ends with."""
    from raylm import cluster

    told = f"{directory}: {how}; the same command goes on from there"
    if cluster.stopped_by() == signal.SIGINT:
        return KeyboardInterrupt(told)
    return Interrupted(told, directory)


def measured(experiment: Experiment) -> str:
    """What the score is called: a masked model has no perplexity."""
    return "pseudo_perplexity" if experiment.objective.kind == "masked" else "perplexity"


def plan(experiment: Experiment) -> cli.Answer:
    """Check whatever can be checked before Ray starts; what the run will do."""
    from raylm import cluster, corpus, runs, storage
    from raylm.prepare import evaluation_corpora

    storage.look(experiment.storage)
    sources = corpus.check(experiment.corpus)
    evaluation_corpora(experiment)
    resources = cluster.plan(experiment.cluster)
    # Seconds of imports, after the quick checks.
    from raylm import budget, loop, model, objective, tables, tokenizer, tokens

    loop.check(experiment.train, has_updates=experiment.model.lora is not None)
    chosen = tokenizer.chosen(experiment.tokenizer, experiment.model)
    known: Any = chosen.train or tokenizer.load_section(chosen)
    objective.check(experiment.objective, experiment.blocks, known)
    masked = experiment.objective.kind == "masked"
    found = model.configuration(
        experiment.model,
        vocab_size=chosen.train.vocab_size if chosen.train else len(known),
        block_size=experiment.blocks.block_size,
        masked=masked,
    )
    store = tokens.store_path(experiment.storage, experiment.corpus, chosen, sources)
    if tokens.is_store(store):
        objective.warn_of_absent(experiment.objective, tokens.open_store(store))
    planned = budget.plan(
        experiment.train,
        block_size=experiment.blocks.block_size,
        num_workers=experiment.cluster.most_workers,
        epoch_examples=None,
    )
    num_files = sum(len(source.files) for source in sources)
    num_bytes = sum(source.num_bytes for source in sources)
    record = {
        "corpus": {"files": num_files, "bytes": num_bytes},
        "store": store,
        "parameters": model.num_parameters(found, masked=masked),
        "steps": planned.steps if planned else None,
        "tokens": planned.tokens if planned else None,
        "micro_batch": planned.micro_batch if planned else None,
        "accumulation": planned.accumulation if planned else None,
        "num_workers": experiment.cluster.num_workers,
        "resources_per_worker": resources.per_worker if resources else None,
        "cluster": "this machine" if resources else "elsewhere",
        "storage": runs.directory_of(experiment),
        "tracking": experiment.tracking.uri,
    }
    pairs = {name.replace("_", " "): value for name, value in record.items() if name != "corpus"}
    return cli.Answer(record, tables.facts({"corpus": f"{num_files:,} files, {num_bytes / 1e6:.1f} MB", **pairs}))


def budget_of(experiment: Experiment, store: Store) -> Budget:
    """The run's budget, now that the tokens are counted; DataError if there is nothing to train or score on."""
    from raylm import blocks, budget
    from raylm.errors import DataError

    if not store.validation.num_tokens:
        raise DataError(
            "the validation split is empty, so no perplexity can be told; raise corpus.validation_fraction="
            f"{experiment.corpus.validation_fraction:g} or give corpus.validation_paths",
            where="corpus.validation_fraction",
        )
    section = experiment.blocks
    examples = len(blocks.of(store.train, section, store.eos_id))
    found = budget.plan(
        experiment.train,
        block_size=section.block_size,
        num_workers=experiment.cluster.most_workers,
        epoch_examples=examples,
    )
    assert found is not None  # the examples are known
    return found


def fit(job: Job, resources: Resources, callbacks: Sequence[Any] = ()) -> Outcome:
    """Train on a group of workers, again with smaller micro-batches where memory ran out, until the end or a stop."""
    while True:
        try:
            outcome = on_workers(job, resources, callbacks)
            if outcome.error is not None:
                raise outcome.error
        except OutOfMemory as error:
            again(job, error)
            continue
        if outcome.lost_nodes and resources.without(outcome.lost_nodes).most_runs:
            cli.say(f"a node is being taken away; going on without it from step {outcome.step:,}")
            continue
        return outcome


def again(job: Job, error: OutOfMemory) -> None:
    """Say that a training begins again with less at once; the error itself if there is nothing less."""
    if error.where != "train.micro_batch_tokens":
        raise error
    if job.board is not None:
        job.board.say.remote(error.message)


def on_workers(job: Job, resources: Resources, callbacks: Sequence[Any]) -> Outcome:
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchTrainer

    from raylm import loop

    with bookkeeping() as kept:
        trainer = TorchTrainer(
            loop.train_loop_per_worker,
            train_loop_config={"job": job},
            scaling_config=scaling(resources),
            run_config=RunConfig(
                **kept,
                failure_config=FailureConfig(max_failures=job.experiment.cluster.max_failures),
                callbacks=list(callbacks),
            ),
        )
        return result_of(trainer, job.directory)


@contextlib.contextmanager
def bookkeeping() -> Iterator[dict[str, str]]:
    """Where Ray remembers what it knows of a worker group: nowhere for long, since it would go on with it.

    Not in `storage`: the checkpoints are ours, and a storage that fails would take the workers with it.
    """
    from raylm import runs

    with tempfile.TemporaryDirectory(prefix="raylm-ray-") as directory:
        yield {"name": runs.named("attempt"), "storage_path": directory}


def score(
    directory: str,
    documents: Documents,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None = None,
) -> np.ndarray:
    """perplexity.score_documents of a saved model: in this process without `resources` of Ray, else on its workers."""
    from raylm import cluster, loop

    job = loop.Scoring(
        directory,
        documents,
        experiment.eval,
        cpus=resources.cpus_per_worker if resources is not None else cluster.cpus_here(),
        use_gpu=experiment.cluster.use_gpu,
        keywords=experiment.objective.keywords,
        trust_remote_code=experiment.model.trust_remote_code,
    )
    if resources is None or (resources.num_workers == 1 and cluster.is_local(experiment.cluster)):
        alone = dataclasses.replace(job, cpus=cluster.cpus_here(), session=loop.Alone, progress=progress)
        return loop.score_loop_per_worker({"job": alone})
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer

    with bookkeeping() as kept:
        trainer = TorchTrainer(
            loop.score_loop_per_worker,
            train_loop_config={"job": job},
            scaling_config=scaling(resources),
            run_config=RunConfig(**kept),
        )
        return result_of(trainer, directory)


def scaling(resources: Resources) -> Any:
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=resources.num_workers
        if resources.num_workers == resources.most_workers
        else (resources.num_workers, resources.most_workers),
        use_gpu=bool(resources.gpus_per_worker),
        resources_per_worker=resources.per_worker,
    )


def parameters(experiment: Experiment, store: Store, budget: Budget) -> dict[str, Any]:
    """What an MLflow run has as parameters: the same keys for every run of an experiment."""
    from raylm import card, model

    masked = experiment.objective.kind == "masked"
    found = model.configuration(
        experiment.model, vocab_size=len(store.tokenizer), block_size=experiment.blocks.block_size, masked=masked
    )
    return {
        **{key: get(experiment, key) for key in card.SETTINGS},
        "model": experiment.model.path or found.model_type,
        "model_parameters": model.num_parameters(found, masked=masked),
        "tokens": budget.tokens,
        "steps": budget.steps,
        "store": store.fingerprint,
    }


def tell_data(run: Run, experiment: Experiment, store: Store) -> None:
    """The splits of the token store as what an MLflow run reads."""
    for split, context in (("train", "training"), ("validation", "validation")):
        profile = {what: store.manifest[split][what] for what in ("documents", "tokens", "bytes")}
        name = f"{experiment.name} {split}"
        run.dataset(name, digest=store.fingerprint, source=store.path, profile=profile, context=context)


def best_metrics(experiment: Experiment, best: dict[str, Any]) -> dict[str, float]:
    return {f"best/eval_{measured(experiment)}": best["perplexity"], "best/eval_bits_per_byte": best["bits_per_byte"]}


def result_of(trainer: Any, where: str) -> Any:
    """What the workers' function returned on rank 0; what a worker raised, out of Ray's wrapping.

    Never in the main thread, where Ray would take Ctrl-C for itself and end the run without a checkpoint.
    """
    results: list[Any] = []
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            results.append(trainer.fit().return_value)
        except BaseException as error:
            failures.append(error)

    if threading.current_thread() is threading.main_thread():
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)  # a signal is handled between two waits
    else:
        fit()
    if not failures:
        return results[0]
    if isinstance(failures[0], Exception):
        raise _cause(failures[0], where) from failures[0]
    raise failures[0]  # a trial that the scheduler stops


def _cause(error: Exception, name: str) -> Exception:
    """What a worker raised; raylm's own errors, of any rank, before the others': ranks die of each other's death."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    for failure in failures.values():
        seen = failure
        while seen is not None:
            if isinstance(seen, RaylmError):
                return type(seen)(seen.message, seen.where)
            seen = getattr(seen, "cause", None) or getattr(seen, "base_exc", None) or seen.__cause__
    rank, cause = next(iter(failures.items()))
    last = str(cause).strip().split("\n")[-1]
    return TrainingError(f"worker {rank} failed: {type(cause).__name__}: {last}", where=name)


def main() -> None:
    cli.run(train)


if __name__ == "__main__":
    from raylm.train import main  # by its real name, so that Ray ships functions by reference

    main()
