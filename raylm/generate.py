"""python -m raylm.generate MODEL --prompt TEXT: text from a trained model."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raylm import cli, console
from raylm.config import ClusterConfig, CorpusConfig, ModelConfig, Section, load_part, parse_setting
from raylm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from raylm.corpus import Shard, Source
    from raylm.generation import GeneratedText, TextGenerator

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="How to write: fields of transformers' GenerationConfig by their names, such as max_new_tokens=100 "
        "temperature=0.8 top_p=0.95 (the defaults) or do_sample=false. And settings of an experiment: corpus.… for the "
        "documents to go on from, cluster.… for the workers, model.trust_remote_code.",
    ),
]
FORMATS = (".jsonl", ".parquet")


class Sections(Section):
    """What generate takes of an experiment."""

    corpus: CorpusConfig = CorpusConfig(validation_fraction=0)
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    settings: Settings = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Go on from every document of corpus.paths, into this .jsonl or .parquet file."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text for a prompt.")] = 0,
    dry_run: cli.DryRun = False,
    json: cli.Json = False,
) -> cli.CommandResult:
    """Let a model go on from prompts, or from every document of a corpus; a masked model fills its mask tokens."""
    given, dotted = _parsed(settings or [])
    sections = _sections(dotted)
    texts = _prompts(prompt or [], prompts)
    _check_output(output, overwrite, texts, sections.corpus, dotted)
    from raylm import checkpoint, cluster

    directory = checkpoint.locate(model)
    trusted = sections.model.trust_remote_code
    how = _how(directory, given, trusted)
    mask = _mask(directory, trusted) if how is None else ""
    for text in texts:
        if mask not in text:
            raise ConfigError(f"--prompt {text!r}: a masked model fills {mask}; put one in", "--prompt")
    record: dict[str, Any] = {"model": model, **_shown(how), "seed": seed}
    if output is None and dry_run:
        record["prompts"] = texts
        return cli.CommandResult(record, console.key_values(record))
    from raylm import generation, storage

    # Workers on other nodes do not see this one's copy.
    where = model if output is not None and storage.is_remote(model) else str(directory.resolve())
    load = functools.partial(generation.load, where, how, seed, trusted)
    if output is None:
        with console.task("Loading the model"):
            writer = load(cluster.cpus_here(), None)
        return _answered(writer, texts, batch_size, stream=_may_stream(texts, how, json))
    resources = cluster.planned_resources(sections.cluster)
    sources, plan, documents = _documents(sections.corpus, mask)
    if not dry_run:
        return _written(load, plan, sections, output, documents=documents, batch_size=batch_size)
    record |= {"documents": documents, "sources": [source.name for source in sources], "output": str(output)}
    record["resources_per_worker"] = resources.per_worker if resources else None
    return cli.CommandResult(record, console.key_values(record))


# What is asked for ---------------------------------------------------------------------------------------------------


def _parsed(settings: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of the texts; and, as they were typed, those of sections of an experiment."""
    given, dotted = {}, {}
    for setting in settings:
        name, value = parse_setting(setting)
        section, dot, _ = name.partition(".")
        if not dot:
            given[name] = value
        elif section in ("corpus", "cluster") or name == "model.trust_remote_code":
            dotted[name] = setting
        else:
            raise ConfigError(
                f"{name}: generate takes settings of corpus and cluster, and model.trust_remote_code", name
            )
        if name.startswith(("corpus.validation_", "corpus.split_by")):
            raise ConfigError(f"{name}: generate goes on from every document; nothing is held out", name)
    return given, dotted


def _sections(dotted: dict[str, str]) -> Sections:
    sections = load_part(Sections, dotted.values())
    paths = [path if "://" in path else os.path.abspath(os.path.expanduser(path)) for path in sections.corpus.paths]
    corpus = sections.corpus.model_copy(update={"paths": tuple(paths)})
    return sections.model_copy(update={"corpus": corpus})


def _prompts(given: Sequence[str], file: Path | None) -> list[str]:
    texts = list(given)
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {file}: {error}", where="--prompts") from None
    return texts


def _check_output(
    output: Path | None, overwrite: bool, texts: list[str], corpus: CorpusConfig, dotted: Iterable[str]
) -> None:
    """Refuse what does not go together."""
    if not texts and not corpus.paths:
        raise ConfigError(
            "nothing to go on from; give --prompt TEXT, --prompts FILE, or corpus.paths=… with --output FILE",
            "--prompt",
        )
    for name in dotted:
        if texts and not name.startswith("model."):
            raise ConfigError(f"{name} excludes --prompt and --prompts; give one of them", name)
    if corpus.paths and output is None:
        raise ConfigError("corpus.paths needs --output FILE, for the texts", "--output")
    if output is None:
        return
    if not corpus.paths:
        raise ConfigError(f"--output {output} needs corpus.paths=…, the documents to go on from", "corpus.paths")
    if output.suffix not in FORMATS or "://" in str(output):
        raise ConfigError(f"--output must be a file on this machine, {' or '.join(FORMATS)}, got {output}", "--output")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} is there already; give another, or --overwrite", "--output")


def _how(directory: Path, given: dict[str, Any], trusted: bool) -> GenerationConfig | None:
    """How a causal model writes; None for a masked one, which has nothing to set."""
    from raylm import generation
    from raylm import model as models

    section = ModelConfig(path=str(directory), trust_remote_code=trusted)
    if not models.is_masked(models.pretrained_configuration(section)):
        return generation.resolve_settings(directory, given, trusted=trusted)
    if given:
        name = next(iter(given))
        raise ConfigError(
            f"{name}: {directory} is a masked model, which fills its masks with the likeliest token", name
        )
    return None


def _mask(directory: Path, trusted: bool) -> str:
    from transformers import AutoTokenizer

    mask = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted).mask_token
    if mask is None:
        raise DataError(f"{directory}: a masked model, but its tokenizer has no mask token to fill", str(directory))
    return mask


def _shown(how: GenerationConfig | None) -> dict[str, Any]:
    from raylm import generation

    values = {name: getattr(how, name, None) for name in generation.SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


def _may_stream(texts: list[str], how: GenerationConfig | None, json: bool) -> bool:
    """Whether the text is shown while it is made: beams go back on what they said."""
    return len(texts) == 1 and how is not None and (how.num_beams or 1) == 1 and not json and sys.stdout.isatty()


# Prompts -------------------------------------------------------------------------------------------------------------


def _answered(writer: TextGenerator, texts: list[str], batch_size: int, *, stream: bool) -> cli.CommandResult:
    if stream:
        try:
            found = [text for text, _ in writer.texts(texts, _print)]
        finally:
            _print("\n")
        return cli.CommandResult({"prompts": texts, "texts": found}, ())
    found = []
    with console.task("Writing", "texts") if len(texts) > batch_size else contextlib.nullcontext() as advance:
        for start in range(0, len(texts), batch_size):
            found += [text for text, _ in writer.texts(texts[start : start + batch_size])]
            if advance is not None:
                advance(len(found), len(texts))
    return cli.CommandResult({"prompts": texts, "texts": found}, "\n\n".join(found))


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# Documents -----------------------------------------------------------------------------------------------------------


def _documents(section: CorpusConfig, mask: str) -> tuple[list[Source], list[Shard], int]:
    """The sources, shards and number of the documents to go on from; each is read, to find now what cannot be."""
    import numpy as np

    from raylm import corpus

    sources = corpus.list_sources(section)
    plan = corpus.shards(sources)
    ledger: corpus.Ledger = corpus.Ledger()
    with console.task("Reading", "documents") as advance:

        def hashes(shards: list[corpus.Shard]) -> Iterator[bytes]:
            for shard in shards:
                found = []
                for document in corpus.documents(shard, section, ledger):
                    found.append((document.hash, document.source))
                    ledger["with mask"] += mask in document.text
                advance(ledger["kept"], None)
                yield np.array(found, corpus.SEEN).tobytes()

        chosen = corpus.select(plan, hashes, section)
    has_mask = ledger.pop("with mask", 0)
    documents = sum(int(np.unpackbits(np.frombuffer(shard.keep or b"", np.uint8)).sum()) for shard in chosen)
    if not documents:
        why = ", ".join(f"{what}: {count}" for what, count in ledger.items()) or "documents: 0"
        raise DataError(f"corpus.paths: there is no document to go on from; of what was read, {why}", "corpus.paths")
    if not has_mask:
        raise DataError(f"corpus.paths: no document has a {mask} to fill", "corpus.paths")
    return sources, chosen, documents


def _written(
    load: Callable[[float, bool | None], TextGenerator],
    plan: list[Shard],
    sections: Sections,
    output: Path,
    *,
    documents: int,
    batch_size: int,
) -> cli.CommandResult:
    """Go on from every document, on workers, into the file."""
    from raylm import cluster, generation

    done = tokens = 0
    with generation.output_file(output) as write, cluster.connect(sections.cluster) as resources:
        worker = functools.partial(load, resources.cpus_per_worker, sections.cluster.use_gpu)
        started = time.monotonic()
        with console.task("Writing", "documents") as advance:
            made = generation.generate_texts(
                plan,
                sections.corpus,
                worker,
                batch_size=batch_size,
                resources=resources,
                max_failures=sections.cluster.max_failures,
            )
            for answers in made:
                write([_row(answer, sections.corpus.paths) for answer in answers])
                done += len(answers)
                tokens += sum(answer.tokens for answer in answers)
                advance(done, documents)
        seconds = time.monotonic() - started
    record = {"output": str(output), "documents": done, "tokens": tokens, "tokens_per_second": tokens / seconds}
    return cli.CommandResult(record, console.key_values({**record, "tokens_per_second": round(tokens / seconds)}))


def _row(answer: GeneratedText, sources: Sequence[str]) -> dict[str, str]:
    """`doc_id` is the token store's, in hexadecimal: JSON has readers whose numbers end at 53 bits."""
    return {
        "prompt": answer.prompt,
        "text": answer.text,
        "source": sources[answer.source].encode(errors="backslashreplace").decode(),  # a name of any bytes
        "doc_id": f"{answer.hash:016x}",
    }


def main() -> None:
    cli.run(generate)


if __name__ == "__main__":
    from raylm.generate import main  # by its real name, so that Ray ships functions by reference

    main()
