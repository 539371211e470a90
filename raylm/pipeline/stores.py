"""The token stores that a plan needs, opened if they exist, else prepared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from raylm import blocks, budget, cluster, console, derived, storage, tokens
from raylm.config import Experiment
from raylm.errors import ConfigError, DataError, StorageError, first_line
from raylm.plan import EvaluationSet, Plan, TokensPlan, load_tokenizer
from raylm.tokens import Store


def open_or_prepare(plan: TokensPlan) -> tuple[Store, bool]:
    """`prepare`, which also connects to Ray if the store does not exist yet."""
    if tokens.is_store(plan.store):
        return tokens.open_store(plan.store), True
    if plan.tokenizer.train is None:
        load_tokenizer(plan)
    storage.check(plan.experiment.storage)
    derived.keep()
    with cluster.connect(plan.experiment.cluster):
        check_storage(plan.experiment)
        return prepare(plan)


def prepare(plan: TokensPlan) -> tuple[Store, bool]:
    """The token store, and whether it existed. If it does not, Ray must be connected. Shows progress."""
    if tokens.is_store(plan.store):
        return tokens.open_store(plan.store), True
    experiment = plan.experiment
    with console.task("Preparing tokens", "bytes") as progress:
        return tokens.prepare(
            experiment.corpus, plan.tokenizer, storage=experiment.storage, sources=plan.sources, progress=progress
        )


def prepare_evaluation_sets(plan: Plan, store: Store) -> dict[str, str]:
    """The token store of each evaluation set, by the tokenizer of the run's own store; a store that exists is used.

    Ray must be connected unless all stores exist (`exist`). Shows progress. A set is the `train` split of its store.
    """
    tokenizer = tokens.tokenizer_section(store.path)
    paths = {}
    for name, each in plan.evaluation_sets.items():
        empty = nothing_to_score(each)
        with console.task(f"Preparing tokens of evaluation set {name}", "bytes") as progress:
            try:
                made, _ = tokens.prepare(
                    each.corpus,
                    tokenizer,
                    storage=plan.experiment.storage,
                    sources=each.sources,
                    progress=progress,
                )
            except DataError as error:
                raise (empty if error.where == "corpus" else error) from None
        if not made.train.num_tokens:
            raise empty
        paths[name] = made.path
    return paths


def exist(plan: Plan) -> bool:
    """Whether the token stores of the run and of all evaluation sets exist."""
    store = plan.tokens.store
    if not tokens.is_store(store):
        return False
    tokenizer = tokens.tokenizer_section(store)
    paths = [each.store(plan.experiment.storage, tokenizer) for each in plan.evaluation_sets.values()]
    return all(map(tokens.is_store, paths))


def nothing_to_score(text: EvaluationSet) -> DataError:
    """The error for an evaluation set without text."""
    paths = ", ".join(text.corpus.labels)
    return DataError(
        f"{text.key}: there is nothing to score in {paths}: no document has any text; give other files", text.key
    )


def check_nodes(experiment: Experiment) -> None:
    """An error naming the setting that does not work on all nodes of the connected cluster."""
    check_storage(experiment)
    uri = experiment.tracking.uri
    if uri is not None and uri.startswith("sqlite") and (nodes := cluster.other_nodes()):
        raise ConfigError(
            f"tracking.uri={uri} is a file of this machine, and the cluster has nodes elsewhere: "
            f"{', '.join(sorted(set(nodes.values())))}; start a server (mlflow server --backend-store-uri {uri} --host "
            "0.0.0.0) and give its address, or tracking.uri=null: raylm sync uploads to any MLflow later",
            "tracking.uri",
        )


def check_storage(experiment: Experiment) -> None:
    """StorageError if other nodes of the connected cluster cannot read and write the same storage."""
    nodes = cluster.other_nodes()
    if not nodes:
        return
    marked = storage.mark(experiment.storage)
    results = cluster.on_nodes(nodes, storage.unusable, marked)
    storage.remove_file(marked)
    problems = [f"{nodes[node]}: {first_line(why)}" for node, why in results.items() if why is not None]
    if problems:
        way_out = "give a directory that all nodes share, or a place in object storage such as s3://bucket/runs"
        if storage.is_remote(experiment.storage):
            way_out = "have the credentials for it in the environment of every node"
        raise StorageError(
            f"storage={experiment.storage} cannot be read and written by all nodes of the cluster:\n  "
            + "\n  ".join(problems)
            + f"\n{way_out}",
            "storage",
        )


def verify(plan: TokensPlan) -> int:
    """The number of shards, after checking their checksums; DataError naming the files that are damaged or missing."""
    path = plan.store
    faults = tokens.damage(path)
    if faults is None:
        changes = tokens.changes(plan.experiment.storage, plan.experiment.corpus, plan.tokenizer, plan.sources)
        raise DataError(f"{path}: no token store there{changes and f'; {changes}'}; run raylm prepare", path)
    if not faults:
        faults = tokens.verify(tokens.open_store(path))
    if faults:
        raise DataError(f"{path} is damaged: {tokens.shown(faults)}; remove it and run raylm prepare", path)
    return sum(len(split.shards) for split in tokens.open_store(path).splits.values())


def record(store: Store) -> dict[str, Any]:
    """A token store for --json: the counts of its splits and its ledger."""
    splits = {name: store.counts(name) for name in store.splits}
    return {"store": store.path, "fingerprint": store.fingerprint, **splits, "ledger": store.manifest["ledger"]}


def warnings(plan: TokensPlan, store: Store) -> Iterator[str]:
    """Warnings about a token store that is useless or probably a mistake."""
    if not store.validation.num_tokens:
        yield budget.no_validation(plan.experiment).message
    if store.test is not None and not store.test.num_tokens:
        yield budget.no_test(plan.experiment).message
    yield from tokens.warnings(store)
    yield from blocks.warnings(store.train, plan.experiment.blocks, store.frame(plan.experiment.tokenizer.prefix))
