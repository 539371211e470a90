"""The tokenizer that the settings name: found, loaded, and identified by its files."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raylm import hub
from raylm.config import ModelConfig, TokenizerConfig
from raylm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

FILES = ("tokenizer", "vocab", "merges", "special", "added", "spiece", "sentencepiece")
"""How the names of a tokenizer's files start."""

WITH_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""The files that transformers reads, and so downloads, if there is a tokenizer.json."""

PROBES = ("A word", "naïve", "ﬁ", "two  spaces ", " x", "don't", "1234", "東京", "a\n\n\tb", "أَهْلًا", "हिन्दी", "한국")
"""What tokenizers treat differently: case, accents, spaces, quotes, digits, Chinese, lines, the vowel signs of Arabic
and Hindi, the syllables of Korean."""


def choose(section: TokenizerConfig, model: ModelConfig) -> TokenizerConfig:
    """The section with its default filled in: the pretrained model's own tokenizer, of its revision or GGUF file."""
    if section.train is not None:
        return section
    if section.path is not None:
        _check_files(section.path, "tokenizer.path", section.gguf_file)
        return section
    if model.path is None:
        if (path := (model.config or {}).get("path")) and (why := hub.problem(path, or_file=True)):
            raise ConfigError(f"model.config.path={path}: {why}", "model.config.path")
        raise ConfigError(
            "tokenizer: a model from a config has no tokenizer of its own; give tokenizer.path or tokenizer.train",
            "tokenizer",
        )
    _check_files(model.path, "model.path", section.gguf_file or model.gguf_file)
    own = {name: getattr(section, name) or getattr(model, name) for name in ("revision", "gguf_file")}
    return section.model_copy(update={"path": model.path, **own})


def _check_files(path: str, key: str, gguf_file: str | None) -> None:
    """ConfigError if the names of its files show that a path, given by the setting `key`, has no tokenizer."""
    why = hub.problem(path, gguf_file=gguf_file)
    if why is None and gguf_file is None and os.path.isdir(path):
        names = sorted(os.listdir(path))
        ours = [name for name in names if name.startswith(FILES)]
        packed = [name for name in names if name.endswith(".gguf")]
        if not ours and packed:
            why = f"there is no tokenizer in it but in a GGUF file; give {key.split('.')[0]}.gguf_file={packed[0]}"
        elif not ours:
            why = (
                "there is no tokenizer in it, no tokenizer.json nor anything like it; give tokenizer.path, or "
                "tokenizer.train for one of your own text"
            )
        elif not {"tokenizer.json", "tokenizer_config.json", "config.json"} & {*names}:
            why = (
                f"{', '.join(ours)} alone do not say how text is split, and GPT-2, RoBERTa and Qwen do it differently; "
                'put a tokenizer_config.json beside them, {"tokenizer_class": "GPT2Tokenizer"} if it is GPT-2\'s'
            )
    if why is not None:
        raise ConfigError(f"{key}={path}: {why}", key)


def load_section(section: TokenizerConfig, key: str = "tokenizer.path") -> PreTrainedTokenizerFast:
    """The tokenizer that a section of settings names by its path, which the setting `key` gave."""
    assert section.path is not None
    tokenizer = load(
        section.path, revision=section.revision, gguf_file=section.gguf_file, eos_token=section.eos_token, key=key
    )
    if section.gguf_file is None and (how := _other_rules(tokenizer, section.path, section.revision)):
        _say_once(f"{key}={section.path}: {how}")
    return tokenizer


_say_once = lru_cache(logger.info)


def _other_rules(tokenizer: PreTrainedTokenizerFast, path: str, revision: str | None) -> str | None:
    """How a loaded tokenizer differs from its tokenizer.json, in words; None if it does not.

    Some classes of transformers have rules of their own: BertTokenizer makes all text lower case unless
    tokenizer_config.json has do_lower_case=false, and ignores tokenizer.json.
    """
    from tokenizers import Tokenizer
    from transformers.utils import cached_file

    backend = getattr(tokenizer, "backend_tokenizer", None)
    file = cached_file(path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if backend is None or file is None:
        return None
    in_file = Tokenizer.from_file(file)
    in_file.no_truncation()
    in_file.no_padding()
    entries = in_file.get_vocab_size()
    own = (in_file.decode([entry]) for entry in range(0, entries, max(1, entries // 1000)))
    # The vocabulary may lack all of a probe, so the normalized text before tokenization is compared, too.
    readings = [(_tokens, text) for text in (*PROBES, *own)] + [(spelled, text) for text in PROBES]
    for reading, text in readings:
        by_file, loaded = reading(in_file, text), reading(backend, text)
        if by_file != loaded:
            return (
                f"transformers reads {text!r} as {loaded}, its tokenizer.json as {by_file}: "
                f"{type(tokenizer).__name__} has rules of its own, set in tokenizer_config.json by settings such as "
                "do_lower_case; raylm uses what transformers reads"
            )
    return None


def _tokens(backend: Any, text: str) -> str:
    try:
        found = backend.encode(text, add_special_tokens=False)
    except Exception:  # it has no unknown token, and this text is unknown to it
        return "nothing"
    return " ".join(token for token, is_text in zip(found.tokens, found.attention_mask, strict=True) if is_text)


def spelled(backend: Any, text: str) -> str:
    """The text that is cut into tokens: normalized, without dropped spaces, in the letters of the vocabulary."""
    text = backend.normalizer.normalize_str(text) if backend.normalizer is not None else text
    if backend.pre_tokenizer is None:
        return text
    return "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))


def load(
    path: str | os.PathLike,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    eos_token: str | None = None,
    key: str | None = None,
) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory or Hub id. DataError if it has no end-of-text token, ConfigError if it lacks
    `eos_token`."""
    from transformers import AutoTokenizer

    options = {"revision": revision, "gguf_file": gguf_file}
    with hub.loading(DataError, key, os.fspath(path), gguf_file=gguf_file):
        tokenizer = AutoTokenizer.from_pretrained(path, **{name: value for name, value in options.items() if value})
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"tokenizer.eos_token={eos_token}: it is not among the {len(tokenizer)} tokens of {path}; "
                f"its special ones: {', '.join(tokenizer.all_special_tokens) or 'none'}",
                "tokenizer.eos_token",
            )
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer.path: {path}: it names no end-of-text token, and documents need one between them; "
            f"name one with tokenizer.eos_token, of: {', '.join(tokenizer.all_special_tokens) or 'its vocabulary'}",
            "tokenizer.eos_token",
        )
    return tokenizer


def same(path: str, other: str) -> bool:
    """Whether two tokenizers give the same ids."""
    return load(path).backend_tokenizer.to_str() == load(other).backend_tokenizer.to_str()


def rules(path: str) -> str:
    """All that the ids of a text depend on, and which special tokens there are; the same for equal tokenizers."""
    tokenizer = load(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        return json.dumps(fingerprint(TokenizerConfig(path=path)), sort_keys=True)
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json.dumps([backend.to_str(), sorted(tokenizer.all_special_tokens), names], sort_keys=True)


def fingerprint(section: TokenizerConfig) -> dict[str, str]:
    """A checksum of each of the tokenizer's files, which changes only when the tokenizer does.

    On the Hub it is that of the files, not the commit: a commit to the README changes no token.
    """
    if section.path is None:
        return {}
    directory = Path(section.path)
    if not directory.is_dir():
        return _files_on_hub(section.path, section.revision, section.gguf_file)
    if section.gguf_file is not None:  # large files: size and time
        status = (directory / section.gguf_file).stat() if (directory / section.gguf_file).exists() else None
        return {section.gguf_file: f"{status.st_size} {status.st_mtime_ns}" if status else ""}
    import hashlib

    return {
        name: hashlib.blake2b((directory / name).read_bytes(), digest_size=16).hexdigest()
        for name in _files(file.name for file in directory.iterdir())
    }


def _files(names: Iterable[str]) -> list[str]:
    """The files of a directory that define its tokenizer; a tokenizer.json replaces other vocabulary files."""
    found = sorted(name for name in names if name.startswith(FILES) and name.endswith((".json", ".txt", ".model")))
    return [name for name in found if name in WITH_JSON] if "tokenizer.json" in found else found


@lru_cache(maxsize=8)
def _files_on_hub(path: str, revision: str | None, gguf_file: str | None) -> dict[str, str]:
    """The Hub's own checksums of a tokenizer's files; those of the local cache if the Hub cannot be reached."""
    import huggingface_hub

    wanted = _files if gguf_file is None else lambda names: [name for name in names if name == gguf_file]
    if hub.out_of_reach() is None:
        with contextlib.suppress(Exception):  # any of a dozen, such as a private repository
            found = huggingface_hub.model_info(path, revision=revision, timeout=10, files_metadata=True)
            files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in found.siblings or ()}
            return {name: files[name] or "" for name in wanted(files)}
    for known in ("tokenizer.json", "tokenizer_config.json", gguf_file):
        cached = huggingface_hub.try_to_load_from_cache(path, known, revision=revision) if known else None
        if isinstance(cached, str):  # a link to a file named by its checksum
            snapshot = Path(cached).parent
            return {name: (snapshot / name).resolve().name for name in wanted(os.listdir(snapshot))}
    return {}
