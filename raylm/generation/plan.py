"""Arguments -> plan: the model, its settings, and the prompts or documents; all checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, GenerationConfig

from raylm import checkpoint, cluster, console, corpus, storage
from raylm import model as models
from raylm.cluster import Resources
from raylm.config import ClusterConfig, CorpusConfig, ModelConfig, Section, absolute, load_part, parse_setting
from raylm.corpus import Ledger, Shard, Source
from raylm.errors import ConfigError, DataError
from raylm.generation.output import FORMATS
from raylm.generation.settings import SETTINGS, resolve_settings


class Sections(Section):
    """The sections of an experiment that generation takes."""

    corpus: CorpusConfig = CorpusConfig(validation_fraction=0)
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()


@dataclass(frozen=True)
class Documents:
    """The documents of corpus.paths that are continued, and the file for their texts."""

    output: Path
    sources: list[Source]
    shards: list[Shard]
    number: int
    resources: Resources | None
    """None if they are known only once Ray is connected."""


@dataclass(frozen=True)
class GenerationPlan:
    """A model, its generation settings, and prompts or documents."""

    model: str
    """The model as it was given: a local directory or one in object storage."""
    directory: Path
    """The local directory of the model."""
    settings: GenerationConfig | None
    """None for a masked model, which has no settings."""
    seed: int
    batch_size: int
    sections: Sections
    prompts: list[str]
    documents: Documents | None

    @property
    def can_stream(self) -> bool:
        """Whether a text can be shown while it is generated: beam search revises its text."""
        return len(self.prompts) == 1 and self.settings is not None and (self.settings.num_beams or 1) == 1

    @property
    def place(self) -> str:
        """Where workers load the model from: other nodes do not have this one's copy."""
        is_remote = self.documents is not None and storage.is_remote(self.model)
        return self.model if is_remote else str(self.directory.resolve())

    def record(self) -> dict[str, Any]:
        """The plan for --dry-run."""
        values = {name: getattr(self.settings, name, None) for name in SETTINGS}
        shown = {name: value for name, value in values.items() if value is not None}
        record = {"model": self.model, **shown, "seed": self.seed}
        if self.documents is None:
            return {**record, "prompts": self.prompts}
        resources = self.documents.resources
        return {
            **record,
            "documents": self.documents.number,
            "sources": [source.label for source in self.documents.sources],
            "output": str(self.documents.output),
            "resources_per_worker": resources.per_worker if resources else None,
        }


def resolve(
    model: str,
    settings: Iterable[str],
    prompts: Sequence[str] = (),
    prompts_file: Path | None = None,
    output: Path | None = None,
    *,
    overwrite: bool = False,
    batch_size: int = 16,
    seed: int = 0,
) -> GenerationPlan:
    """The plan of `settings` (name=value) and prompts, or of the documents of corpus.paths with an `output` file.

    Documents are read, so that unreadable ones are refused now. No weights are loaded.
    """
    given, dotted = _parsed(settings)
    sections = _sections(dotted)
    prompts = [*prompts, *(_lines(prompts_file) if prompts_file else ())]
    _check_output(output, overwrite, prompts, sections.corpus, dotted)
    directory = checkpoint.locate(model)
    trusted = sections.model.trust_remote_code
    generation_config = _generation_config(directory, given, trusted)
    mask = "" if generation_config is not None else _mask_token(directory, trusted)
    for prompt in prompts:
        if mask not in prompt:
            raise ConfigError(f"--prompt {prompt!r}: a masked model fills {mask}; put one in", "--prompt")
    documents = None if output is None else _documents(output, sections, mask)
    return GenerationPlan(model, directory, generation_config, seed, batch_size, sections, prompts, documents)


def _parsed(settings: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of generation by name; and settings of an experiment's sections, as typed."""
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
        if name.startswith(("corpus.validation_", "corpus.test_", "corpus.split_by")):
            raise ConfigError(f"{name}: generate continues every document; nothing is held out", name)
        if name in ("corpus.tokens", "corpus.messages"):
            way_out = "give its column as corpus.text, or what a chat template writes as --prompt"
            raise ConfigError(f"{name}: generate continues text; {way_out}", name)
    return given, dotted


def _sections(dotted: dict[str, str]) -> Sections:
    sections = load_part(Sections, dotted.values())
    corpus = sections.corpus.model_copy(update={"paths": absolute(sections.corpus.paths)})
    return sections.model_copy(update={"corpus": corpus})


def _lines(file: Path) -> list[str]:
    """The prompts of a file, or of standard input for `-`: one a line, in a .jsonl file as JSON."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file}: {error}", where="--prompts") from None
    lines = [line for line in text.split("\n") if line]
    return [_unpacked(line, file) for line in lines] if file.suffix == ".jsonl" else lines


def _unpacked(line: str, file: Path) -> str:
    """The prompt of a line of JSON: a text, or an object with the field prompt, as `--output` writes them."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    prompt = found.get("prompt") if isinstance(found, dict) else found
    if not isinstance(prompt, str):
        raise ConfigError(
            f'--prompts {file}: each line must be "a text" or {{"prompt": "a text"}} in JSON, got {line[:60]}',
            "--prompts",
        )
    return prompt


def _check_output(
    output: Path | None, overwrite: bool, prompts: list[str], corpus: CorpusConfig, dotted: Iterable[str]
) -> None:
    """Refuse settings that exclude each other."""
    if not prompts and not corpus.paths:
        raise ConfigError(
            "nothing to continue; give --prompt TEXT, --prompts FILE, or corpus.paths=… with --output FILE", "--prompt"
        )
    for name in dotted:
        if prompts and not name.startswith("model."):
            raise ConfigError(f"{name} excludes --prompt and --prompts; give one of them", name)
    if corpus.paths and output is None:
        raise ConfigError("corpus.paths needs --output FILE, for the texts", "--output")
    if output is None:
        return
    if not corpus.paths:
        raise ConfigError(f"--output {output} needs corpus.paths=…, the documents to continue", "corpus.paths")
    if output.suffix not in FORMATS or "://" in str(output):
        raise ConfigError(f"--output must be a file on this machine, {' or '.join(FORMATS)}, got {output}", "--output")
    if output.exists() and not overwrite:
        raise ConfigError(f"--output {output} exists already; give another, or --overwrite", "--output")


def _generation_config(directory: Path, given: dict[str, Any], trusted: bool) -> GenerationConfig | None:
    """The settings of a causal model; None for a masked one."""
    section = ModelConfig(path=str(directory), trust_remote_code=trusted)
    if not models.is_masked(models.pretrained_configuration(section)):
        return resolve_settings(directory, given, trusted=trusted)
    if given:
        name = next(iter(given))
        raise ConfigError(
            f"{name}: {directory} is a masked model, which fills its masks with the likeliest token", name
        )
    return None


def _mask_token(directory: Path, trusted: bool) -> str:
    mask = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted).mask_token
    if mask is None:
        raise DataError(f"{directory}: a masked model, but its tokenizer has no mask token to fill", str(directory))
    return mask


def _documents(output: Path, sections: Sections, mask: str) -> Documents:
    """The documents that are kept; each is read. DataError if there is none, or none with a mask to fill."""
    resources = cluster.planned_resources(sections.cluster)
    section = sections.corpus
    sources = corpus.list_sources(section)
    ledger: Ledger = Ledger()
    with console.task("Reading", "documents") as advance:

        def read(shard: Shard) -> Iterator[tuple[int, int, str]]:
            for document in corpus.documents(shard, section, ledger):
                ledger["with mask"] += mask in document.prompt
                yield document.hash, document.source, document.text

        def records(shards: list[Shard]) -> Iterator[bytes]:
            for shard in shards:
                yield corpus.records(read(shard), section)
                advance(ledger["kept"], None)

        shards = corpus.select(corpus.shards(sources), records, section)
    has_mask = ledger.pop("with mask", 0)
    number = sum(int(np.unpackbits(np.frombuffer(shard.keep or b"", np.uint8)).sum()) for shard in shards)
    if not number:
        counts = ", ".join(f"{outcome}: {count}" for outcome, count in ledger.items()) or "documents: 0"
        raise DataError(f"corpus.paths: there is no document to continue; of what was read, {counts}", "corpus.paths")
    if not has_mask:
        raise DataError(f"corpus.paths: no document has a {mask} to fill", "corpus.paths")
    return Documents(output, sources, shards, number, resources)
