"""What a trained model looks like on disk.

model.safetensors, config.json, generation_config.json, tokenizer files     a plain Hugging Face directory
lora.safetensors, lora.json    with model.lora: the adapter alone, to train it further; model.safetensors has it merged
optimizer.pt, scheduler.pt, rng_state*.pth, trainer_state.json              what the Trainer needs to resume
weights/, adapter/, optimizer/    with train.arguments.fsdp, in the place of *.safetensors and optimizer.pt: see shards
experiment.yaml    the resolved experiment: `python -m raylm.train --config` repeats the run
raylm.json         the score of these weights, the tokens they have seen, the token store they come from

An adapter alone, exported with model.lora.export=adapter, has adapter_model.safetensors and adapter_config.json in the
place of the model's weights and configuration. It is loaded over its base model.
"""

from __future__ import annotations

import atexit
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import config, storage
from raylm import tokenizer as tokenizers
from raylm.config import Experiment, ModelConfig, TokenizerConfig
from raylm.errors import ConfigError, RaylmError, StorageError, first_line, first_of
from raylm.tokenizer import Frame

if TYPE_CHECKING:  # commands that only list runs and sweeps need no torch, whose import takes 3 s
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from raylm.perplexity import MaskedTokens

EXPERIMENT = "experiment.yaml"
RECORD = "raylm.json"
MODEL_OR_ADAPTER = frozenset({"config.json", "adapter_config.json"})
"""The files of which a model's directory has at least one."""

OF_TRAINING = ("*.pt", "*.pth", "trainer_state.json", "optimizer/*", "global_step*/*")
"""Files that only a resumed training needs, twice the size of the model. A copy of a remote model leaves them out."""


@dataclass(frozen=True)
class TrainedModel:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    experiment: Experiment | None
    """None for a model that raylm did not train."""
    record: dict[str, Any]
    """raylm.json, or empty."""
    fills_in: bool = False
    """Whether it was loaded as a masked model though its configuration does not say so."""

    def frame(self, prefix: str | None = None) -> Frame:
        """The tokens around every document: as `prefix` says, or else as in the model's training."""
        own = self.experiment.tokenizer.prefix if self.experiment is not None else "auto"
        return tokenizers.frame(self.tokenizer, prefix or own)

    def masked(self, prefix: str | None = None, every: bool = False) -> MaskedTokens | None:
        """How a masked model is scored; None for other models. `every`: eval.pseudo_perplexity."""
        from raylm import model, perplexity

        is_masked = self.fills_in or model.is_masked(self.model.config)
        return perplexity.MaskedTokens.of(self.tokenizer, self.frame(prefix), every) if is_masked else None

    @property
    def context(self) -> int:
        """The maximum number of tokens that the model reads: its positions, or the block size if it has no limit."""
        from raylm import model

        limit = model.context(self.model.config)
        return limit or (self.experiment or Experiment()).blocks.block_size


def describe(directory: str | Path, experiment: Experiment, record: dict[str, Any]) -> None:
    """Write experiment.yaml and raylm.json beside a model."""
    config.save(experiment, Path(directory) / EXPERIMENT)
    (Path(directory) / RECORD).write_bytes(recorded(record))


def recorded(record: Mapping[str, Any]) -> bytes:
    """raylm.json"""
    return (json.dumps(record, indent=1) + "\n").encode()


def read_record(directory: str | Path) -> dict[str, Any]:
    path = Path(directory) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def experiment_file(directory: str | Path) -> Path | None:
    """The experiment's file beside a model; None if raylm did not train it."""
    path = Path(directory) / EXPERIMENT
    return path if path.exists() else None


def read_experiment(directory: str | Path) -> Experiment | None:
    path = experiment_file(directory)
    return config.load(path) if path is not None else None


def locate(directory: str | Path, gguf_file: str | None = None) -> Path:
    """The local directory of a model; a remote one is copied, and the copy removed when the process exits.

    ConfigError or StorageError if the directory cannot hold a model.
    """
    place = str(directory)
    with storage.reached(place):
        names = storage.names(place)
        if not names and not Path(place).is_dir():
            raise StorageError(f"{place} is not a directory; give one that holds a model", where=place)
        if gguf_file is not None and gguf_file not in names:
            raise ConfigError(f"model.gguf_file={gguf_file}: there is no such file in {place}", "model.gguf_file")
        if gguf_file is None and not MODEL_OR_ADAPTER.intersection(names):
            if packed := [name for name in names if name.endswith(".gguf")]:
                raise StorageError(f"{place} has no config.json; give model.gguf_file={packed[0]}", where=place)
            inside = [
                f"{place}/{name}" for name in names if MODEL_OR_ADAPTER.intersection(storage.names(f"{place}/{name}"))
            ]
            hint = f"; did you mean {inside[-1]}?" if inside else ""
            raise StorageError(f"{place} holds no model: it has no config.json{hint}", where=place)
    return _copied(place) if storage.is_remote(place) else Path(directory)


@lru_cache(maxsize=8)
def _copied(uri: str) -> Path:
    copies = contextlib.ExitStack()
    atexit.register(copies.close)
    return copies.enter_context(storage.here(uri, but_for=OF_TRAINING))


def load(
    directory: str | Path,
    section: ModelConfig | None = None,
    tokenizer: TokenizerConfig | None = None,
    *,
    masked: bool = False,
) -> TrainedModel:
    """Model (float32, on the CPU) and tokenizer of a checkpoint or any Hugging Face model directory. An adapter is
    merged into its base model.

    `section` says how the model is loaded, `tokenizer` which tokenizer it gets instead of its own. `masked` loads it as
    a masked model even if its configuration does not say so.
    """
    from transformers import AutoTokenizer

    from raylm import model

    section = section or ModelConfig()
    path = locate(directory, section.gguf_file)
    section = section.model_copy(update={"path": str(path), "config": None})
    try:
        found = model.pretrained_configuration(section)
        masked = masked or model.is_masked(found)
        network, missing = model.pretrained(section, found, masked=masked)
        if tokenizer is None or tokenizer == TokenizerConfig(prefix=tokenizer.prefix):
            packed = {"gguf_file": section.gguf_file} if section.gguf_file else {}
            known = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code, **packed)
        else:
            known = tokenizers.load_section(tokenizers.choose(tokenizer, section))
    except RaylmError:
        raise
    except Exception as error:  # safetensors and tokenizers raise their own errors
        problem = f"{directory} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        raise StorageError(problem, str(directory)) from error
    if missing:
        raise StorageError(
            f"{directory} has no weights for {first_of(missing, 3)} of {type(network).__name__}, which would be "
            "random, as would its results; train it first, with model.path",
            str(directory),
        )
    return TrainedModel(network, known, read_experiment(path), read_record(path), masked)
