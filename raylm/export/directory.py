"""A checkpoint -> a plain Hugging Face directory with its card, written atomically."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from raylm import shards, storage
from raylm.checkpoint import OF_TRAINING, locate, read_experiment, read_record
from raylm.checkpoint.directory import EXPERIMENT, MODEL_OR_ADAPTER, RECORD, recorded
from raylm.errors import StorageError
from raylm.export.files import ADAPTER, Files, model_files, published
from raylm.export.model_card import CARD, HERE, build_card


def export(checkpoint: str | Path, target: str | Path, score: Mapping[str, Any] | None = None) -> str:
    """Write the plain Hugging Face directory of a trained checkpoint: model, tokenizer, card, experiment, raylm.json.

    With LoRA the model is merged, the adapter alone, or merged with the adapter beside it, as model.lora.export says.
    Returns its full path. `score` replaces the evaluation during training in raylm.json and the card. An existing
    export is replaced atomically. Weights are hard links if the file system supports them, else copies; the small
    files are copies that can be edited.
    """
    with ExitStack() as opened:
        local = opened.enter_context(storage.here(str(checkpoint), but_for=OF_TRAINING))
        experiment = read_experiment(locate(local))
        if experiment is None:
            raise StorageError(f"{checkpoint} was not trained by raylm: it holds no {EXPERIMENT}", str(checkpoint))
        directory = opened.enter_context(shards.merged(local))
        lora = experiment.model.lora
        files = model_files(directory, lora.export if lora else None)
        record = {**read_record(directory), **(score or {})}
        card = build_card(directory, HERE, published(experiment), files, record)
        files |= {EXPERIMENT: directory / EXPERIMENT, RECORD: recorded(record), CARD: card}
        if storage.is_remote(str(target)):
            _send(files, str(target))
            return str(target)
        target = Path(target).resolve()
        with _replaced(target) as new:
            for name, content in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                if isinstance(content, bytes):
                    (new / name).write_bytes(content)
                elif name.endswith(".safetensors"):
                    _link(content, new / name)
                else:
                    shutil.copyfile(content, new / name)
        return str(target)


def _send(files: Files, target: str) -> None:
    """Upload the files to storage that cannot rename.

    config.json or adapter_config.json, which a directory needs to be a model, is removed first and written last. The
    card, which marks a directory as an export, is removed last and written first, so that an interrupted upload can be
    replaced.
    """
    with storage.reached(target):
        old = storage.names(target)
        is_other = CARD not in old and not all(name.endswith(".partial") for name in old)
        _check_replaceable(target, is_other)
        for name in sorted(MODEL_OR_ADAPTER):
            storage.remove_file(f"{target}/{name}")
        storage.remove(f"{target}/{ADAPTER}")
        for name in sorted({*old} - {ADAPTER}, key=lambda name: name == CARD):
            storage.remove_file(f"{target}/{name}")
        for name in sorted(files, key=lambda name: (name in MODEL_OR_ADAPTER, name != CARD)):
            content = files[name]
            if isinstance(content, bytes):
                storage.write(f"{target}/{name}", content)
            else:
                storage.upload(content, f"{target}/{name}")


def _check_replaceable(target: str | Path, is_other: object) -> None:
    if is_other:
        raise StorageError(f"{target} exists already and holds no exported model; move it away", where=str(target))


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A new directory that replaces `target` at the end; on failure StorageError, and `target` is unchanged."""
    _check_replaceable(target, target.exists() and not (target / CARD).exists())
    new, old = (target.with_name(f".{target.name}-{secrets.token_hex(4)}") for _ in range(2))
    try:
        new.mkdir(parents=True)
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)
    except OSError as error:
        if old.exists():
            old.rename(target)
        problem = error.strerror or error
        raise StorageError(f"{target}: the model cannot be exported there: {problem}", where=str(target)) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file.resolve(), to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(file, to)
