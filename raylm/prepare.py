"""Corpus -> token store, once: `python -m raylm.prepare`. Other commands do it themselves where it is missing."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from raylm import cli

logger = logging.getLogger(__name__)

Verify = Annotated[
    bool, typer.Option("--verify", help="Check the store that is there against its checksums; write nothing.")
]


def prepare(
    settings: cli.Settings = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    print_schema: cli.PrintSchema = False,
    dry_run: cli.DryRun = False,
    verify: Verify = False,
    timeline: cli.Timeline = None,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Turn the corpus into a token store, once for all runs that share corpus and tokenizer."""
    experiment = cli.experiment(config, settings, print_config, "text")
    from raylm import plan, views
    from raylm.pipeline import stores

    resolved = plan.resolve_tokens(experiment)
    if dry_run:
        if resolved.tokenizer.train is None:
            plan.load_tokenizer(resolved)
        return cli.CommandResult(*views.tokens_plan(resolved))
    if verify:
        shards = stores.verify(resolved)
        record = {"store": resolved.store, "fingerprint": resolved.fingerprint, "verified": True, "shards": shards}
        return cli.CommandResult(record, f"{resolved.store}: {shards} shards, all as they were written")
    store, reused = stores.open_or_prepare(resolved)
    for warning in stores.warnings(resolved, store):
        logger.warning(warning)
    return cli.CommandResult({**stores.record(store), "reused": reused}, views.store(store, reused))


def main() -> None:
    cli.run(prepare)


if __name__ == "__main__":
    from raylm.prepare import main  # by its real name, so that Ray ships functions by reference

    main()
