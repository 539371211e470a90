"""Corpus -> token store, once: `python -m raylm.prepare`. The other verbs do it by themselves where it is missing."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Annotated

import typer

from raylm import cli, console
from raylm.config import CorpusConfig, Experiment, TokenizerConfig
from raylm.errors import DataError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from raylm.tokens import Store

logger = logging.getLogger(__name__)


Verify = Annotated[
    bool, typer.Option("--verify", help="Check the store that is there against its checksums; write nothing.")
]


def prepare(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    verify: Verify = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Turn the corpus into a token store, once for all runs that share corpus and tokenizer."""
    from raylm import derived

    experiment = cli.experiment(config, settings, print_config, derived.text)
    if dry_run:
        return plan(experiment)
    if verify:
        return verified(experiment)
    from raylm import tokens

    store, reused = ready(experiment)
    if not store.validation.num_tokens:
        from raylm import budget

        logger.warning(budget.no_validation(experiment).message)
    record = {"store": store.path, "fingerprint": store.fingerprint, "reused": reused}
    for name in tokens.SPLITS:
        record[name] = {what: store.manifest[name][what] for what in tokens.COUNTED}
    record["ledger"] = store.manifest["ledger"]
    for warning in tokens.warnings(store):
        logger.warning(warning)
    return cli.CommandResult(record, summary(store, reused))


def ready(experiment: Experiment) -> tuple[Store, bool]:
    """`prepared`, with a Ray of its own if the store is not there yet."""
    from raylm import cluster, derived, storage, tokenizer, tokens

    storage.look(experiment.storage)
    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    path = tokens.store_path(experiment.storage, experiment.corpus, chosen)
    if tokens.is_store(path):
        return prepared(experiment, path)
    check_tokenizer(experiment)
    storage.check(experiment.storage)
    derived.keep()
    with cluster.connect(experiment.cluster):
        check_nodes(experiment)
        return prepared(experiment)


def check_tokenizer(experiment: Experiment) -> None:
    """ConfigError if the settings of the tokenizer do not fit it, DataError if it cannot be loaded."""
    from raylm import tokenizer

    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    if chosen.train is None:
        key = "tokenizer.path" if experiment.tokenizer.path else "model.path"
        tokenizer.frame(tokenizer.load_section(chosen, key), experiment.tokenizer.prefix)


def check_nodes(experiment: Experiment) -> None:
    """StorageError if other nodes of the cluster, which is connected, do not read and write in the same storage."""
    from raylm import cluster, storage

    nodes = cluster.other_nodes()
    if not nodes:
        return
    marked = storage.mark(experiment.storage)
    found = cluster.on_nodes(nodes, storage.unusable, marked)
    storage.remove_file(marked)
    problems = [f"{nodes[node]}: {str(why).splitlines()[0]}" for node, why in found.items() if why is not None]
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


def is_needed(experiment: Experiment, path: str) -> bool:
    """Whether a token store of a run is not there yet: its own, whose path is known, or that of an evaluation set."""
    from raylm import tokens

    if not tokens.is_store(path):
        return True
    known = tokenizer_of(path)
    corpora = evaluation_corpora(experiment).values()
    return not all(tokens.is_store(tokens.store_path(experiment.storage, corpus, known)) for corpus in corpora)


def tokenizer_of(store: str) -> TokenizerConfig:
    """The tokenizer that a token store was made with."""
    from raylm import tokens

    return TokenizerConfig(path=os.path.join(tokens.local_copy(store), "tokenizer"))


def prepared(experiment: Experiment, path: str | None = None) -> tuple[Store, bool]:
    """The experiment's token store, and whether it was there already. Progress is shown.

    One that is whole at a known path is opened without listing the corpus once more.
    """
    from raylm import tokenizer, tokens

    if path is not None and tokens.is_store(path):
        return tokens.open_store(path), True
    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    with console.task("Preparing tokens", "bytes") as progress:
        return tokens.prepare(experiment.corpus, chosen, storage=experiment.storage, progress=progress)


def evaluation_corpora(experiment: Experiment) -> dict[str, CorpusConfig]:
    """The corpus of each evaluation set by its name; DataError naming the set if its files are not there."""
    section = experiment.eval
    return {
        name: evaluation_corpus(paths, experiment.corpus, section.key(name)) for name, paths in section.sets.items()
    }


def evaluation_corpus(paths: Sequence[str], how: CorpusConfig, key: str) -> CorpusConfig:
    """A corpus of the paths that the setting `key` gave: read as `how` says, nothing filtered and nothing held out."""
    from raylm import corpus

    reading = {name: getattr(how, name) for name in ("text", "join", "separator", "encoding", "on_bad_row")}
    made = CorpusConfig(paths=tuple(paths), validation_fraction=0, **reading)
    corpus.list_sources(made, key)
    return made


def evaluation_sets(experiment: Experiment, store: Store) -> dict[str, str]:
    """The token store of each evaluation set, by the tokenizer of the run's store. Progress is shown; Ray is connected
    unless nothing `is_to_do`.

    A store that is there already is used. A set is the `train` split of its store: nothing is held out.
    """
    from raylm import tokens

    tokenizer = tokenizer_of(store.path)
    found = {}
    for name, corpus in evaluation_corpora(experiment).items():
        empty = nothing_to_score(experiment.eval.key(name), corpus.paths)
        with console.task(f"Preparing tokens of evaluation set {name}", "bytes") as progress:
            try:
                made, _ = tokens.prepare(corpus, tokenizer, storage=experiment.storage, progress=progress)
            except DataError as error:
                raise (empty if error.where == "corpus" else error) from None
        if not made.train.num_tokens:
            raise empty
        found[name] = made.path
    return found


def nothing_to_score(key: str, paths: Sequence[str]) -> DataError:
    """The error that the paths of an evaluation set hold no text."""
    return DataError(
        f"{key}: there is nothing to score in {', '.join(paths)}: no document has any text; give other files", key
    )


def verified(experiment: Experiment) -> cli.CommandResult:
    """The answer that the experiment's store is whole; DataError naming the files of it that are not."""
    from raylm import storage, tokenizer, tokens

    storage.look(experiment.storage)
    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    path = tokens.store_path(experiment.storage, experiment.corpus, chosen)
    faults = tokens.damage(path)
    if faults is None:
        known = tokens.changes(experiment.storage, experiment.corpus, chosen)
        raise DataError(f"{path}: no token store there{known and f'; {known}'}; run raylm prepare", path)
    if not faults:
        store = tokens.open_store(path)
        faults = tokens.verify(store)
    if faults:
        raise DataError(f"{path} is damaged: {tokens.shown(faults)}; remove it and run raylm prepare", path)
    files = sum(len(store.manifest[name]["shards"]) for name in tokens.SPLITS)
    record = {"store": path, "fingerprint": store.fingerprint, "verified": True, "shards": files}
    return cli.CommandResult(record, f"{path}: {files} shards, all as they were written")


def plan(experiment: Experiment) -> cli.CommandResult:
    """What prepare would do: the sources, and where the store lies."""
    from raylm import corpus, storage, tokenizer, tokens

    storage.look(experiment.storage)
    sources = corpus.list_sources(experiment.corpus)
    check_tokenizer(experiment)
    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    path = tokens.store_path(experiment.storage, experiment.corpus, chosen, sources)
    faults = tokens.damage(path)
    exists = faults == []
    state = (
        "there already"
        if exists
        else f"damaged, to be written again: {tokens.shown(faults)}"
        if faults
        else "to be written"
    )
    lines = [f"{source.name}: {len(source.files):,} files, {source.num_bytes:,} bytes" for source in sources]
    if others := corpus.left_out(sources):
        lines.append(f"left out: {others}")
    lines.append(f"store: {path} ({state})")
    record = {
        "store": path,
        "fingerprint": os.path.basename(path),
        "reused": exists,
        "sources": [{"name": source.name, "files": len(source.files), "bytes": source.num_bytes} for source in sources],
    }
    return cli.CommandResult(record, "\n".join(lines))


def summary(store: Store, reused: bool) -> Table:
    """The splits in numbers, and what became of the documents that were read."""
    from rich.table import Table

    from raylm import corpus

    table = Table("split", "documents", "tokens", "bytes", "bytes a token", "unknown tokens", title=store.path)
    for name in ("train", "validation"):
        split = store.manifest[name]
        each = f"{split['bytes'] / split['tokens']:.2f}" if split["tokens"] else "-"
        counts = [f"{split[what]:,}" for what in ("documents", "tokens", "bytes")]
        table.add_row(name, *counts, each, f"{split['unknown_tokens']:,}")
    ledger = store.manifest["ledger"]
    counted = ", ".join(f"{what} {count:,}" for what, count in ledger.items())
    table.caption = (
        f"{100 * corpus.kept_fraction(ledger):.2f}% of data after filtering; read: {counted}\n"
        f"{'reused' if reused else 'written'}, ids by {store.manifest['tokenizer']['encoder']['name']}"
    )
    return table


def main() -> None:
    cli.run(prepare)


if __name__ == "__main__":
    from raylm.prepare import main  # by its real name, so that Ray ships functions by reference

    main()
