"""Summed negative log-likelihood -> perplexity, bits per byte.

Every token of every document is scored exactly once, after the document's prefix (tokenizer.Frame), in windows of the
model's context. Context 4, stride 4, a document of tokens a to f (P: prefix):

    reads   P a b c         scores  a b c d
    reads   b c d e         scores        e f     the last window slides back, so that its context is full

This is the rolling log-likelihood of lm-evaluation-harness. A smaller stride gives every token more context. Without a
prefix the first token of a document is not scored; neither it nor its bytes (the mean of the document's tokens) count.

A masked model is scored on a fixed part of the tokens, the same for every model, which are masked together; or on
every token, each masked alone (MaskedTokens).
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from raylm import scorer
from raylm.config import EvalConfig
from raylm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from raylm.objective import Keywords
    from raylm.tokenizer import Frame

LONGEST_CONTEXT = 8192
"""Most tokens of a window unless eval.context is set: attention over all 131,072 positions of Llama 3 takes 16
times the time and memory per token."""

MASKED = 0.15
"""Fraction of tokens that a masked model is scored on, as in BERT's training (arXiv:1810.04805)."""


class Documents(Protocol):
    """Documents to score: their token ids and the UTF-8 bytes of their texts. A token store's split is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...
    def document_bytes(self, index: int) -> int: ...
    def answers(self, index: int) -> np.ndarray | None:
        """Whether each token is scored, bool; None: all are. The bytes are those of these tokens' text."""


@dataclass(frozen=True)
class Score:
    """Sums, so that scores of parts add up to the score of the whole."""

    # Sums, not means: batches hold different numbers of tokens, and the mean of their
    # perplexities is not the perplexity of the whole (10 at 2 and 90 at 8 give 6.96, not 5).
    nll: float = 0.0
    """Negative log-likelihood in nats."""
    tokens: int = 0
    bytes: int = 0
    keyword_nll: float = 0.0
    """Negative log-likelihood of the tokens that are part of a keyword, in nats."""
    keyword_tokens: int = 0

    @classmethod
    def of(cls, rows: np.ndarray) -> Score:
        """The score of rows that `score_documents` returns."""
        nll, tokens, num_bytes, keyword_nll, keyword_tokens = rows.sum(axis=0).tolist()
        return cls(nll, int(tokens), round(num_bytes), keyword_nll, int(keyword_tokens))

    def __add__(self, other: Score) -> Score:
        return Score(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    @property
    def perplexity(self) -> float:
        """Perplexity per token; infinite if it exceeds the range of a float."""
        return _exp(self.nll / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, unlike perplexity."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def keyword_perplexity(self) -> float:
        return _exp(self.keyword_nll / self.keyword_tokens) if self.keyword_tokens else math.nan

    def figures(self, measure: str) -> dict[str, float]:
        """The metrics of an evaluation; `measure` is the name of the score.

        If the text has keywords also keyword_nll, in nats per keyword token.
        """
        found = {measure: self.perplexity, "bits_per_byte": self.bits_per_byte}
        if self.keyword_tokens:
            found[f"keyword_{measure}"] = self.keyword_perplexity
            found["keyword_nll"] = self.keyword_nll / self.keyword_tokens
        return found


def _exp(value: float) -> float:
    return math.inf if value >= 709 else math.exp(value)


class MaskedTokens(NamedTuple):
    """How a masked model is scored: tokens are masked, and predicted from all others in their window.

    By default 15 % of each document's tokens, at least one, are masked together, in one forward pass per window. The
    choice depends on the document alone, so all models with one tokenizer are scored on the same tokens. With `every`,
    each token is masked alone for the pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659), in one forward pass
    per token. Neither is a probability of the text, so each compares masked models only.
    """

    mask_id: int
    frame: Frame
    """Special tokens around every window."""
    every: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, frame: Frame, every: bool = False) -> MaskedTokens:
        return cls(tokenizer.mask_token_id, frame, every)

    def chosen(self, document: np.ndarray) -> np.ndarray:
        """The positions of the scored tokens, in order."""
        if self.every or not len(document):
            return np.arange(len(document))
        digest = hashlib.blake2b(document.astype(np.int64).tobytes(), digest_size=8).digest()
        order = np.random.default_rng(int.from_bytes(digest)).permutation(len(document))
        return np.sort(order[: max(1, round(MASKED * len(document)))])


def context_of(section: EvalConfig, positions: int | None, block_size: int) -> int:
    """Tokens of a window: eval.context, or the positions of the model, or the block size if the model has no limit.

    ConfigError if the model has fewer positions than eval.context.
    """
    if section.context is None:
        return min(positions or block_size, LONGEST_CONTEXT)
    if positions is not None and section.context > positions:
        raise ConfigError(
            f"eval.context must be at most {positions}, the positions of the model, got {section.context}",
            "eval.context",
        )
    return section.context


class EvaluationStopped(Exception):
    """An evaluation was asked to stop before its end, on all workers."""


class Window(NamedTuple):
    """Positions in a document after its prefix (position 0)."""

    start: int
    """First token read."""
    end: int
    """One after the last token read; the model's output at `end - 1` scores the token at `end`."""
    scored: int
    """How many of its last outputs are scored."""


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Windows that score each of `num_tokens` tokens once: the first scores up to `context`, the others `stride`."""
    done, stride = 0, min(stride, context)
    while done < num_tokens:
        end = min(num_tokens, done + (stride if done else context))
        yield Window(max(0, end - context), end, end - done)
        done = end


def score(model: PreTrainedModel, documents: Documents, **how: Any) -> Score:
    """The score of all documents together; `how` as in `score_documents`."""
    return Score.of(score_documents(model, documents, **how))


NLL, TOKENS, BYTES, KEYWORD_NLL, KEYWORD_TOKENS, BANDS = range(6)
"""Columns of the rows of `score_documents`."""


def score_documents(
    model: PreTrainedModel,
    documents: Documents,
    *,
    frame: Frame,
    context: int,
    stride: int | None = None,
    batch_tokens: int = 16384,
    max_tokens: int | None = None,
    precision: str = "float32",
    masked: MaskedTokens | None = None,
    keywords: Keywords | None = None,
    positions: Sequence[int] = (),
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[float, float | None], None] | None = None,
    stopping: Callable[[], bool] | None = None,
) -> np.ndarray:
    """The fields of Score for each document, float64 of shape (documents, 5): NLL, TOKENS, BYTES, KEYWORD_NLL and
    KEYWORD_TOKENS are its columns. Masked models need `masked`.

    `positions`: the first positions of bands of the context. Each adds two columns after BANDS, nll and tokens of the
    scored tokens whose prediction is read off there, after as many tokens of their window.

    Only the first documents up to `max_tokens` tokens are scored (at least one). Each of several workers scores every
    world_size-th document, and torch.distributed combines the rows, so that all workers return all of them. They run
    equally many forward passes because sharded weights require it.
    `stopping` is called before each forward pass; once it is true on one worker, EvaluationStopped is raised on all.
    """
    device = next(model.parameters()).device
    count = first_documents(documents, max_tokens)
    chosen = range(count)[rank::world_size]
    rows = torch.zeros((count, BANDS + 2 * len(positions)), dtype=torch.float64)
    share = torch.ones(count, dtype=torch.float64)
    """Fraction of each document's tokens that are scored, from which its nll is estimated."""
    total, done = sum(_count(documents, index) for index in chosen), 0.0

    def read() -> Iterator[Part]:
        for index in chosen:
            ids = documents[index]
            marks = keywords.marked(ids) if keywords is not None else np.zeros(len(ids), bool)
            if masked is None:
                counts = _counting(documents, index)
                scored = np.flatnonzero(counts)
                if frame.prefix is None:
                    scored = scored[scored > 0]
                rows[index, 1] = len(scored)
                rows[index, 2] = documents.document_bytes(index) * len(scored) / max(1, counts.sum())
                yield from _windows_of(index, ids, marks, counts, frame, context, stride or context)
            else:
                scored = masked.chosen(ids)
                rows[index, 1] = len(ids)
                rows[index, 2] = documents.document_bytes(index)
                share[index] = len(scored) / max(1, len(ids))
                yield from _masked_windows_of(index, ids, marks, scored, masked, context)
            rows[index, 4] = marks[scored].sum().item()

    batches = batches_of(read(), context, batch_tokens)
    with scorer.scoring(model, precision) as nll:
        for batch in _agreed(batches, device if world_size > 1 else None, stopping):
            places, targets, inputs = tensors_of(batch, frame.end, masked is not None)
            each = nll(places, targets, **inputs).cpu()
            of = torch.tensor([part.document for part in batch for _ in part.places], dtype=torch.int64)
            marked = torch.from_numpy(np.concatenate([np.zeros(0, bool), *(part.marks for part in batch)]))
            rows[:, 0].index_add_(0, of, each)
            rows[:, 3].index_add_(0, of, each.where(marked, 0))
            if positions:
                at = np.concatenate([np.zeros(0, np.int64), *(part.places for part in batch)])
                column = 5 + 2 * torch.from_numpy(np.searchsorted(positions, at, side="right") - 1)
                rows.index_put_((of, column), each, accumulate=True)
                rows.index_put_((of, column + 1), torch.ones_like(each), accumulate=True)
            if progress is not None:
                done += (1 / share[of]).sum().item()
                progress(min(done, total), total)
    rows[:, 0] /= share.clamp(min=1e-9)
    if world_size > 1:
        rows = rows.to(device)
        torch.distributed.all_reduce(rows)  # the others' rows are zero
    return rows.cpu().numpy()


def _agreed(
    batches: Iterator[Sequence[Part]], device: torch.device | None, stopping: Callable[[], bool] | None
) -> Iterator[Sequence[Part]]:
    """The batches, then empty ones until all workers have finished theirs; or EvaluationStopped."""
    while True:
        batch: Sequence[Part] = next(batches, [])
        told = torch.tensor([len(batch), int(stopping is not None and stopping())], device=device)
        if device is not None:
            torch.distributed.all_reduce(told)
        left, is_stopping = told.tolist()
        if is_stopping and left:
            raise EvaluationStopped
        if not left:
            return
        yield batch


def first_documents(documents: Documents, max_tokens: int | None) -> int:
    """Number of first documents with at most `max_tokens` tokens together; at least one, if there is one."""
    if max_tokens is None:
        return len(documents)
    total = 0
    for index in range(len(documents)):
        total += len(documents[index])
        if total > max_tokens:
            return max(1, index)
    return len(documents)


def tokens_read(lengths: np.ndarray, context: int, stride: int | None, masked: MaskedTokens | None) -> np.ndarray:
    """Tokens that a model reads to score a document of each of these lengths, in all its windows."""
    if masked is None:
        further = -(-np.maximum(0, lengths - context) // min(stride or context, context))
        return np.minimum(lengths, context) + further * context
    around = len(masked.frame.around(()))
    room = max(1, context - around)
    windows, rest = np.divmod(lengths, room)
    if masked.every:  # each window once per token
        return windows * room * (room + around) + rest * (rest + around)
    return windows * (room + around) + (rest > 0) * (rest + around)


class Part(NamedTuple):
    """A window's tokens as the model reads them, and which of its outputs are scored."""

    document: int
    ids: np.ndarray
    places: np.ndarray
    """Positions of the scored outputs."""
    targets: np.ndarray
    """The tokens to predict."""
    marks: np.ndarray
    """Which of these tokens are part of a keyword."""


def _count(documents: Documents, index: int) -> int:
    """Number of tokens of a document that are scored."""
    answers = documents.answers(index)
    return len(documents[index]) if answers is None else int(answers.sum())


def _counting(documents: Documents, index: int) -> np.ndarray:
    """Whether each token of a document is scored, bool."""
    answers = documents.answers(index)
    return np.ones(len(documents[index]), bool) if answers is None else answers


def _windows_of(
    index: int, document: np.ndarray, marks: np.ndarray, counts: np.ndarray, frame: Frame, context: int, stride: int
) -> Iterator[Part]:
    ids = frame.around(document)[:-1]
    after = len(document) - len(ids) + 1  # the output at 0 predicts this token of the document
    marks, counts = marks[after:], counts[after:]
    for start, end, scored in windows(len(ids) - 1, context, stride):
        places = np.arange(end - scored, end)
        places = places[counts[places]]
        if len(places):
            yield Part(index, ids[start:end], places - start, ids[places + 1], marks[places])


def _masked_windows_of(
    index: int, document: np.ndarray, marks: np.ndarray, scored: np.ndarray, masked: MaskedTokens, context: int
) -> Iterator[Part]:
    around = masked.frame.around(())
    room = max(1, context - len(around))
    for start in range(0, len(document), room):
        ids = masked.frame.around(document[start : start + room])
        inside = scored[(scored >= start) & (scored < start + room)]
        for together in inside[:, None] if masked.every else [inside][: len(inside)]:
            places = together - start + len(around) - 1
            shown = ids.copy()
            shown[places] = masked.mask_id
            yield Part(index, shown, places, ids[places], marks[together])


class Read(Protocol):
    """The tokens of a row as the model reads them, the positions of its scored outputs, and the tokens to predict."""

    @property
    def ids(self) -> np.ndarray: ...
    @property
    def places(self) -> np.ndarray: ...
    @property
    def targets(self) -> np.ndarray: ...


Row = TypeVar("Row", bound=Read)


def batches_of(parts: Iterable[Row], context: int, batch_tokens: int) -> Iterator[Sequence[Row]]:
    """Batches of windows of about equal length. The windows of a few batches are sorted together to save padding."""
    size = max(1, batch_tokens // context)
    parts = iter(parts)
    while pool := sorted(itertools.islice(parts, 16 * size), key=lambda part: len(part.ids)):
        while pool:
            count = max(1, batch_tokens // len(pool[-1].ids))
            yield pool[-count:]
            del pool[-count:]


def tensors_of(batch: Sequence[Read], padding: int, masked: bool) -> tuple[Any, torch.Tensor, dict[str, Any]]:
    """(places, targets, inputs) of a batch, for scorer; an empty batch becomes one token that is not scored.

    Padding is on the right, which causal models do not see.
    """
    longest = max((len(part.ids) for part in batch), default=1)
    inputs = np.full((max(1, len(batch)), longest), padding)
    attention = np.zeros_like(inputs)
    for row, part in enumerate(batch):
        inputs[row, : len(part.ids)] = part.ids
        attention[row, : len(part.ids)] = 1
    rows = np.repeat(np.arange(len(batch)), [len(part.places) for part in batch])
    columns = np.concatenate([np.zeros(0, np.int64), *(part.places for part in batch)])
    targets = np.concatenate([np.zeros(0, np.int64), *(part.targets for part in batch)])
    options = {"attention_mask": torch.from_numpy(attention)} if masked else {"use_cache": False}
    places = torch.from_numpy(rows), torch.from_numpy(columns)
    return places, torch.from_numpy(targets), {"input_ids": torch.from_numpy(inputs), **options}
