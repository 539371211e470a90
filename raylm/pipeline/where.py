"""Where two compared runs differ: what their kept scores say, and what scoring both models again adds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raylm import checkpoint, config, console, storage, tokenizer, tokens
from raylm.document_scores import DocumentScores, hash_of
from raylm.errors import ConfigError, RaylmError
from raylm.objective import Keywords
from raylm.perplexity import BANDS, BYTES, KEYWORD_NLL, KEYWORD_TOKENS, NLL
from raylm.pipeline import evaluation
from raylm.results import where
from raylm.results.where import DocumentPart, Part, Where
from raylm.training import launch

if TYPE_CHECKING:
    from raylm.results.compare import Comparison
    from raylm.results.compared_run import ComparedRun
    from raylm.tokens import Encoded, Split

TEXT_TOKENS = 60
"""Of a document that is shown."""

TEXT_CHARS = 150

OTHER_SCORES = 1e-3
"""Scores of one text that differ by more than this fraction are of different models."""


def explain(comparison: Comparison, keywords: Sequence[str] = ()) -> Comparison:
    """The comparison of two runs with `where` they differ; ConfigError if their scores cannot be paired.

    Sources, lengths and documents come from the scores that were kept. Positions in the context and keywords need the
    score of each token, of which none are kept: both models score the same documents again, with a progress bar. If a
    model or the text is gone, a note says what is missing.
    """
    if len(comparison.runs) != 2:
        raise ConfigError(f"--where: give two runs, got {len(comparison.runs)}", "--where")
    for run, difference in zip(comparison.runs, comparison.differences, strict=True):
        if difference.not_compared is not None:
            raise ConfigError(f"--where: {run.name}: {difference.not_compared}", "--where")
    by_best = sorted(zip(comparison.differences, comparison.runs, strict=True), key=lambda pair: not pair[0].is_best)
    (_, best), (difference, other) = by_best
    assert best.scores is not None
    assert other.scores is not None
    summed = other.scores.nll - best.scores.nll
    has_one_tokenizer = difference.nats_per_token is not None
    size = best.scores.tokens if has_one_tokenizer else best.scores.bytes
    summed = summed if has_one_tokenizer else summed / math.log(2)
    texts = {run.name: _text(run) for run in (best, other)}
    text = next((found for found in texts.values() if not isinstance(found, str)), None)
    notes = [] if text is not None else [f"the text is not shown: {texts[best.name]}"]
    sources = best.sources or other.sources or (text.sources() if text is not None else None)
    parts = {} if sources is None else {"source": where.by_source(summed, size, sources)}
    parts["length"] = where.by_length(summed, size, best.scores.bytes)
    if has_one_tokenizer:
        scored, missing = _scored_again(best, other, texts, keywords)
        parts |= scored
        notes += missing
    else:
        notes.append("positions in the context and keywords: not shown, because the tokenizers differ")
    documents = [
        DocumentPart(
            float(summed[number]),
            round(size[number]),
            None if sources is None else sources[number],
            *((None, None) if text is None else text.shown(number)),
        )
        for number in where.largest(summed)
    ]
    unit = "nats/token" if has_one_tokenizer else "bits/byte"
    shown = Where(other.name, best.name, unit, parts, documents, best.scored.unit, notes)
    return dataclasses.replace(comparison, where=shown)


@dataclass(frozen=True)
class _Text:
    """The documents that a run was scored on, each text once."""

    documents: Encoded | Split
    numbers: Sequence[int]
    """The number among `documents` of each scored one."""
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.documents[self.numbers[index]]

    def answers(self, index: int) -> np.ndarray | None:
        return self.documents.answers(self.numbers[index])

    def document_bytes(self, index: int) -> int:
        return self.documents.document_bytes(self.numbers[index])

    def sources(self) -> list[str]:
        return [self.documents.document_source(number) for number in self.numbers]

    def shown(self, index: int) -> tuple[str, str]:
        """The id and the beginning of a document."""
        text = " ".join(self.tokenizer.decode(self[index][:TEXT_TOKENS]).split())
        is_cut = len(text) > TEXT_CHARS or len(self[index]) > TEXT_TOKENS
        return (
            f"{self.documents.document_id(self.numbers[index]):016x}",
            text[:TEXT_CHARS].rstrip() + " …" * is_cut,
        )


def _text(run: ComparedRun) -> _Text | str:
    """The documents that a run was scored on, or why they are not there any more."""
    scores = run.scores
    assert scores is not None
    try:
        if run.store_path is not None:
            store = tokens.open_store(run.store_path)
            return _those_scored(store.validation, scores, store.tokenizer) or f"{run.store_path} has other documents"
        if run.model is None:
            return f"nothing says by which model {run.name} was made"
        directory, experiment = _model(run.model)
        plan = evaluation.resolve(run.model, directory, experiment, run.text_paths)
        found = _those_scored(plan.documents, scores, tokenizer.load(directory))
        return found or f"the text of {run.name} has changed, or was read with other settings"
    except RaylmError as error:
        return error.message


def _those_scored(documents: Encoded | Split, scores: DocumentScores, known: Any) -> _Text | None:
    """The first of some documents, as many as have these scores; None if these are of others."""
    numbers: dict[int, int] = {}
    for number in range(len(documents)):
        numbers.setdefault(documents.document_id(number), number)
        if len(numbers) == len(scores):
            break
    return _Text(documents, list(numbers.values()), known) if hash_of(numbers) == scores.documents else None


def _model(model: str) -> tuple[Any, config.Experiment]:
    """The local directory of a model, and the experiment that scores it on its validation split."""
    directory = checkpoint.locate(model).resolve()
    settings = [*evaluation.settings_of(directory, None), "eval.paths=[]"]
    return directory, config.load(checkpoint.experiment_file(directory), settings)


def _scored_again(
    best: ComparedRun, other: ComparedRun, texts: dict[str, _Text | str], keywords: Sequence[str]
) -> tuple[dict[str, list[Part]], list[str]]:
    """The parts of the text for which both models score it again; and what is not shown, and why."""
    what = f"positions in the context{' and keywords' * bool(keywords)}"
    rows = []
    for run in (best, other):
        text = texts[run.name]
        if isinstance(text, str):
            return {}, [f"{what}: not shown: {text}"]
        if run.model is None or not storage.names(run.model):
            return {}, [f"{what}: not shown: the model of {run.name} is gone"]
        try:
            rows.append(_rows(run, text, keywords))
        except RaylmError as error:
            return {}, [f"{what}: not shown: {error.message}"]
        assert run.scores is not None
        if not math.isclose(rows[-1][:, NLL].sum(), run.scores.nll.sum(), rel_tol=OTHER_SCORES):
            return {}, [f"{what}: not shown: {run.model} gives other scores than were kept"]
    assert not isinstance(text, str)
    base, own = rows
    parts, notes = {}, []
    if np.array_equal(own[:, BANDS + 1 :: 2], base[:, BANDS + 1 :: 2]):
        parts["position"] = where.by_position(own[:, BANDS:], base[:, BANDS:])
    else:
        notes.append("positions in the context: not shown, because the models read contexts of different lengths")
    if keywords:
        difference, size = own - base, own[:, KEYWORD_TOKENS]
        inside = [Part.of(" or ".join(keywords), difference[:, KEYWORD_NLL], size)] if size.any() else []
        # Summed over the bands, because a masked model's nll of a document is an estimate for all of its tokens.
        nll = difference[:, BANDS::2].sum(axis=1) - difference[:, KEYWORD_NLL]
        parts["keyword"] = [*inside, Part.of("all else", nll, own[:, BANDS + 1 :: 2].sum(axis=1) - size)]
        notes += [f"{word}: not in the text" for word in keywords if not _has(text, word)]
    return parts, notes


def _has(text: _Text, word: str) -> bool:
    keyword = Keywords([word], text.tokenizer)
    return any(keyword.occurrences(text[index]) for index in range(len(text)))


def _rows(run: ComparedRun, text: _Text, keywords: Sequence[str]) -> np.ndarray:
    """What perplexity.score_documents gives of a run's model on its documents, times the copies of each."""
    assert run.model is not None
    assert run.scores is not None
    directory, experiment = _model(run.model)
    experiment = config.override(experiment, {"objective.keywords": list(keywords)})
    with console.task(f"Scoring {run.name} by position", "tokens") as progress:
        rows = launch.score(str(directory), text, experiment, None, progress, as_given=True, positions=where.POSITIONS)
    copies = run.scores.bytes / np.maximum(rows[:, BYTES], 1)
    return rows * copies[:, None]
