"""python -m raylm.train: one training run."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from raylm import cli
from raylm.config import Experiment, dump, get
from raylm.errors import ConfigError, RaylmError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from raylm.budget import Budget
    from raylm.cluster import Resources
    from raylm.loop import Job
    from raylm.perplexity import Documents
    from raylm.tokens import Store

PARAMETERS = (
    "blocks.block_size",
    "blocks.packing",
    "objective.kind",
    "train.learning_rate",
    "train.warmup_steps",
    "train.weight_decay",
    "train.lr_scheduler_type",
    "train.batch_tokens",
    "train.seed",
    "cluster.num_workers",
)
"""The settings every MLflow run has as parameters, beside the swept ones and what `parameters` derives."""


def train(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.Answer:
    """Train one language model on the corpus; the tokens are prepared first, unless they are there already."""
    experiment = cli.experiment(config, settings, print_config)
    checked = plan(experiment)
    if dry_run:
        return checked
    from raylm import cluster, loop, report, tracking
    from raylm.perplexity import Score
    from raylm.prepare import prepared

    name = run_name("train")
    with cluster.connect(experiment.cluster) as resources:
        store, _ = prepared(experiment)
        budget = budget_of(experiment, store)
        tags = {"raylm.verb": "train"}
        run = tracking.start(experiment.tracking, experiment=experiment.name, name=name, tags=tags)
        status: tracking.Status = "FAILED"
        try:
            run.parameters(parameters(experiment, store, budget))
            run.text(dump(experiment), "experiment.yaml")
            with cli.task("Training", "tokens") as advance, cluster.watch(lambda t: advance(t, budget.tokens)) as board:
                job = loop.Job(experiment, store.path, budget, run, board=board)
                best, checkpoint = fit(job, resources, storage=runs(experiment), name=name)
            if experiment.eval.max_tokens is not None:  # the figure to compare is of the whole split
                with cli.task("Scoring the whole validation split", "documents") as advance:
                    scored = Score.of(score(checkpoint, store.validation, experiment, resources, advance))
                best |= {"perplexity": scored.perplexity, "bits_per_byte": scored.bits_per_byte}
            run.metrics(best_metrics(best), best["step"])
            run.tags({"raylm.checkpoint": checkpoint})
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            run.end(status)
    record = {
        "run": name,
        "checkpoint": checkpoint,
        "perplexity": best["perplexity"],
        "bits_per_byte": best["bits_per_byte"],
        "tokens": budget.tokens,
        "steps": budget.steps,
        "tokens_per_second": budget.tokens / best["training_seconds"],
        "mlflow_run_id": run.run_id,
    }
    view = report.facts(
        {
            "perplexity": best["perplexity"],
            "bits per byte": best["bits_per_byte"],
            "tokens": budget.tokens,
            "tokens/s": round(record["tokens_per_second"]),
            "checkpoint": checkpoint,
            "generate": f'{sys.executable} -m raylm.generate {checkpoint} --prompt "..."',
            "mlflow": tracking.how_to_look(experiment.tracking),
        }
    )
    return cli.Answer(record, view)


def plan(experiment: Experiment) -> cli.Answer:
    """Check whatever can be checked before Ray starts; what the run will do."""
    from raylm import cluster, corpus

    if "://" in experiment.storage:
        raise ConfigError(
            f"storage={experiment.storage}: runs need a directory that every node sees; only token stores can lie in "
            "object storage so far",
            where="storage",
        )
    sources = corpus.check(experiment.corpus)
    resources = cluster.plan(experiment.cluster)
    # Seconds of imports, after the quick checks.
    from raylm import budget, loop, model, objective, report, tokenizer, tokens

    loop.check(experiment.train)
    chosen = tokenizer.chosen(experiment.tokenizer, experiment.model.path)
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
    planned = budget.plan(
        experiment.train,
        block_size=experiment.blocks.block_size,
        num_workers=experiment.cluster.num_workers,
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
        "storage": runs(experiment),
        "tracking": experiment.tracking.uri,
    }
    pairs = {name.replace("_", " "): value for name, value in record.items() if name != "corpus"}
    return cli.Answer(record, report.facts({"corpus": f"{num_files:,} files, {num_bytes / 1e6:.1f} MB", **pairs}))


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
        num_workers=experiment.cluster.num_workers,
        epoch_examples=examples,
    )
    assert found is not None  # the examples are known
    return found


def fit(
    job: Job, resources: Resources, *, storage: str, name: str, callbacks: Sequence[Any] = ()
) -> tuple[dict[str, Any], str]:
    """Train on a group of workers. The metrics of the best evaluation and the path of its checkpoint."""
    from ray.train import CheckpointConfig, RunConfig
    from ray.train.torch import TorchTrainer

    from raylm import loop

    trainer = TorchTrainer(
        loop.train_loop_per_worker,
        train_loop_config={"job": job},
        scaling_config=scaling(resources),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="perplexity", checkpoint_score_order="min"
            ),
            callbacks=list(callbacks),
        ),
    )
    started = time.monotonic()
    with _workers_errors(name):
        result = trainer.fit()
    best = {"training_seconds": time.monotonic() - started, **result.return_value}
    saved = result.get_best_checkpoint("perplexity", "min")
    return best, saved.path


def score(
    directory: str,
    documents: Documents,
    experiment: Experiment,
    resources: Resources | None,
    progress: Callable[[float, float | None], None] | None = None,
) -> np.ndarray:
    """perplexity.score_documents of a saved model: in this process without `resources` of Ray, else on its workers."""
    from raylm import cluster, loop

    section = experiment.eval
    if resources is None or (resources.num_workers == 1 and cluster.is_local(experiment.cluster)):
        cpus = cluster.cpus_here()
        return loop.score_loop_per_worker(
            {"job": loop.Scoring(directory, documents, section, cpus, experiment.cluster.use_gpu, loop.Alone, progress)}
        )
    from ray.train import RunConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        loop.score_loop_per_worker,
        train_loop_config={
            "job": loop.Scoring(directory, documents, section, resources.cpus_per_worker, experiment.cluster.use_gpu)
        },
        scaling_config=scaling(resources),
        run_config=RunConfig(name=run_name("score"), storage_path=runs(experiment)),
    )
    with _workers_errors(directory):
        return trainer.fit().return_value


def scaling(resources: Resources) -> Any:
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=resources.num_workers,
        use_gpu=bool(resources.gpus_per_worker),
        resources_per_worker=resources.per_worker,
    )


def runs(experiment: Experiment) -> str:
    """Where the runs of an experiment lie."""
    return f"{experiment.storage}/{experiment.name}"


def parameters(experiment: Experiment, store: Store, budget: Budget) -> dict[str, Any]:
    """What an MLflow run has as parameters: the same keys for every run of an experiment."""
    from raylm import model

    masked = experiment.objective.kind == "masked"
    found = model.configuration(
        experiment.model, vocab_size=len(store.tokenizer), block_size=experiment.blocks.block_size, masked=masked
    )
    return {
        **{key: get(experiment, key) for key in PARAMETERS},
        "model": experiment.model.path or found.model_type,
        "model_parameters": model.num_parameters(found, masked=masked),
        "tokens": budget.tokens,
        "steps": budget.steps,
        "store": store.fingerprint,
    }


def best_metrics(best: dict[str, Any]) -> dict[str, float]:
    return {"best/eval_perplexity": best["perplexity"], "best/eval_bits_per_byte": best["bits_per_byte"]}


def run_name(verb: str) -> str:
    """A name that no other run has: Ray goes on with an old run where it finds one of the same name."""
    return f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@contextmanager
def _workers_errors(where: str) -> Iterator[None]:
    """What a worker raised, out of Ray's wrapping; and Ctrl-C as Ctrl-C, which Ray turns into an exit of its own."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not in_main_thread:  # a trial that the scheduler stops
            raise
        raise KeyboardInterrupt from None
    except Exception as error:
        raise _cause(error, where) from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGINT, handler)


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
