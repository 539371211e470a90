"""python -m raylm.evaluate MODEL: perplexity and bits per byte of a checkpoint or any Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylm import cli
from raylm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from raylm.perplexity import Score
    from raylm.tokens import Encoded, Split


def evaluate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    settings: cli.Settings = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="Score these files, a document each. May be repeated.")
    ] = None,
    config: cli.ConfigFile = None,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.Answer:
    """Score a model: on --text, on eval.paths, or on the validation split it was trained with.

    The number depends on the model and the text alone, not on batch size, workers or training block size.
    """
    from raylm import checkpoint, cluster, report

    directory = checkpoint.check(model)
    here = ["cluster={}"]  # whatever the model was trained on
    experiment = cli.experiment(
        config or checkpoint.experiment_file(directory), [*here, *(settings or [])], print_config
    )
    paths = [str(path) for path in text or experiment.eval.paths]
    from transformers import AutoConfig

    from raylm import model as models
    from raylm import perplexity, train

    resources = cluster.plan(experiment.cluster)
    documents, source = _documents(directory, paths)
    if dry_run:
        record = {"model": str(directory), "documents": len(documents), "source": source}
        return cli.Answer(record, report.facts(record))
    where = str(directory.resolve())
    with cli.task("Scoring", "documents") as progress:
        if resources is not None and resources.num_workers == 1:
            rows = train.score(where, documents, experiment, None, progress)
        else:
            with cluster.connect(experiment.cluster) as connected:
                rows = train.score(where, documents, experiment, connected, progress)
    measure = "pseudo_perplexity" if models.is_masked(AutoConfig.from_pretrained(directory)) else "perplexity"
    total = figures(perplexity.Score.of(rows), measure)
    names = [documents.document_source(index) for index in range(len(rows))]
    by_source = {name: rows[[name == other for other in names]] for name in dict.fromkeys(names)}
    sources = {name: figures(perplexity.Score.of(part), measure) for name, part in by_source.items()}
    view = report.facts({"model": str(directory), "text": source, **total})
    table = ("", report.scores(sources)) if len(sources) > 1 else ()
    return cli.Answer({**total, "sources": sources}, (view, *table))


def figures(score: Score, measure: str) -> dict[str, Any]:
    """A score as the record of a command has it, the perplexity by its name; nll is summed, in nats."""
    return {
        measure: score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        "nll": score.nll,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def _documents(directory: Path, paths: list[str]) -> tuple[Encoded | Split, str]:
    """What is scored, and its name."""
    from raylm import checkpoint, tokens

    if paths:
        found: Encoded | Split = tokens.encode_files(paths, str(directory))
        source = ", ".join(paths)
    else:
        store = checkpoint.read_record(directory).get("store")
        if store is None:
            raise ConfigError(
                f"{directory} was not trained by raylm, so nothing says what to score; give --text FILE", "--text"
            )
        found = tokens.open_store(store).validation
        source = f"the validation split of {store}"
    if not len(found):
        raise DataError(f"{source}: there is no document to score", where="eval.paths")
    return found, source


def main() -> None:
    cli.run(evaluate)


if __name__ == "__main__":
    from raylm.evaluate import main  # by its real name, so that Ray ships functions by reference

    main()
