"""Summed negative log-likelihood -> perplexity, bits per byte.

Per document, with its prefix in front (tokenizer.Frame); every token of every document is scored exactly once, in
windows of the model's context. Context 4, stride 4, a document of tokens a to f (P: prefix):

    reads   P a b c         scores  a b c d
    reads   b c d e         scores        e f     the last window slides back, so that its context is full

The definition of lm-evaluation-harness' rolling log-likelihood; a smaller stride gives every token more context.
Without a prefix the first token of a document is not scored, and not counted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from raylm.objective import Keywords
    from raylm.tokenizer import Frame


class Documents(Protocol):
    """What is scored: token ids of each document and the UTF-8 bytes of its text. A token store's split is one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> np.ndarray: ...
    def document_bytes(self, index: int) -> int: ...


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
    """Of the tokens that are part of a keyword."""
    keyword_tokens: int = 0

    @classmethod
    def of(cls, rows: np.ndarray) -> Score:
        """Of the rows that `score_documents` returns, or some of them."""
        nll, tokens, num_bytes, keyword_nll, keyword_tokens = rows.sum(axis=0).tolist()
        return cls(nll, int(tokens), int(num_bytes), keyword_nll, int(keyword_tokens))

    def __add__(self, other: Score) -> Score:
        return Score(*(mine + others for mine, others in zip(astuple(self), astuple(other), strict=True)))

    @property
    def perplexity(self) -> float:
        """Per token; infinite where it exceeds what a float holds."""
        return _exp(self.nll / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as perplexity is not."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def keyword_perplexity(self) -> float:
        return _exp(self.keyword_nll / self.keyword_tokens) if self.keyword_tokens else math.nan

    def figures(self, measure: str) -> dict[str, float]:
        """What is tracked of an evaluation; `measure` is perplexity or, of a masked model, pseudo_perplexity.

        Where keywords were looked for and found also keyword_nll, in nats a keyword token.
        """
        found = {measure: self.perplexity, "bits_per_byte": self.bits_per_byte}
        if self.keyword_tokens:
            found[f"keyword_{measure}"] = self.keyword_perplexity
            found["keyword_nll"] = self.keyword_nll / self.keyword_tokens
        return found


def _exp(value: float) -> float:
    return math.inf if value >= 709 else math.exp(value)


class MaskedTokens(NamedTuple):
    """How a masked model is scored: by pseudo-perplexity (Salazar et al. 2020, arXiv:1910.14659).

    Each token is masked in turn and predicted from all others in its window. That is not a probability of the text, so
    it compares masked models with each other only; and it costs a forward pass of the window for every token.
    """

    mask_id: int
    frame: Frame
    """Around every window."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, frame: Frame) -> MaskedTokens:
        return cls(tokenizer.mask_token_id, frame)


class Window(NamedTuple):
    """Positions in a document with its prefix put in front (position 0)."""

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


@torch.no_grad()
def score_documents(
    model: PreTrainedModel,
    documents: Documents,
    *,
    frame: Frame,
    context: int,
    stride: int | None = None,
    batch_tokens: int = 16384,
    max_tokens: int | None = None,
    masked: MaskedTokens | None = None,
    keywords: Keywords | None = None,
    rank: int = 0,
    world_size: int = 1,
    together: bool = False,
    progress: Callable[[float, float | None], None] | None = None,
) -> np.ndarray:
    """The fields of Score for each document, float64 of shape (documents, 5). `masked`, for masked models.

    Only the first documents up to `max_tokens` tokens are scored (at least one). With several workers each scores every
    world_size-th document and the rows are put together over torch.distributed, so that all workers return all of them.
    `together`: they run equally many forward passes, as they must where the model's weights are shared out among them.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    count = first_documents(documents, max_tokens)
    chosen = range(count)[rank::world_size]
    rows = torch.zeros((count, 5), dtype=torch.float64)

    def read() -> Iterator[Part]:
        for done, index in enumerate(chosen):
            ids = documents[index]
            marks = keywords.marked(ids) if keywords is not None else np.zeros(len(ids), bool)
            scored = len(ids) if frame.prefix is not None or masked is not None else max(0, len(ids) - 1)
            rows[index, 1] = scored
            rows[index, 2] = documents.document_bytes(index)
            rows[index, 4] = marks[len(ids) - scored :].sum().item()
            yield from _parts(index, ids, marks, frame, context, stride or context, masked)
            if progress is not None:
                progress(done + 1, len(chosen))

    batches = _batches(read(), context, batch_tokens)
    for batch in _as_many(batches, device) if together and world_size > 1 else batches:
        if not batch:
            model(input_ids=torch.full((1, 1), frame.end, device=device))
            continue
        each = _nll(model, batch, frame.end, device) if masked is None else _masked_nll(model, batch, masked, device)
        numbers = torch.tensor([part.document for part in batch])
        rows[:, 0].index_add_(0, numbers, each[:, 0].cpu())
        rows[:, 3].index_add_(0, numbers, each[:, 1].cpu())
    model.train(was_training)
    if world_size > 1:
        rows = rows.to(device)
        torch.distributed.all_reduce(rows)  # the others' rows are zero
    return rows.cpu().numpy()


def _as_many(batches: Iterator[Sequence[Part]], device: torch.device) -> Iterator[Sequence[Part]]:
    """The batches, and then empty ones until all workers had their last."""
    while True:
        batch = next(batches, [])
        left = torch.tensor(len(batch), device=device)
        torch.distributed.all_reduce(left)
        if not left.item():
            return
        yield batch


def first_documents(documents: Documents, max_tokens: int | None) -> int:
    """How many documents come before `max_tokens` tokens are exceeded; at least one, if there is one."""
    if max_tokens is None:
        return len(documents)
    total = 0
    for index in range(len(documents)):
        total += len(documents[index])
        if total > max_tokens:
            return max(1, index)
    return len(documents)


class Part(NamedTuple):
    """A window's tokens: the last `scored` of them are scored (masked: the one at `scored`), for the document."""

    document: int
    ids: np.ndarray
    scored: int
    marks: np.ndarray
    """Which of those that are scored are part of a keyword."""


def _parts(
    index: int,
    document: np.ndarray,
    marks: np.ndarray,
    frame: Frame,
    context: int,
    stride: int,
    masked: MaskedTokens | None,
) -> Iterator[Part]:
    if masked is None:
        ids = frame.around(document)[:-1]
        marks = marks[len(document) - len(ids) + 1 :]
        for window in windows(len(ids) - 1, context, stride):
            start, end, scored = window
            yield Part(index, ids[start : end + 1], scored, marks[end - scored : end])
        return
    around = len(masked.frame.around(()))
    room = max(1, context - around)
    for start in range(0, len(document), room):
        ids = masked.frame.around(document[start : start + room])
        for place in range(len(ids) - around):
            yield Part(index, ids, place + around - 1, marks[start + place : start + place + 1])


def _batches(parts: Iterable[Part], context: int, batch_tokens: int) -> Iterator[Sequence[Part]]:
    """Batches of windows of about equal length: a few batches' worth are sorted at a time, so little is padding."""
    size = max(1, batch_tokens // context)
    parts = iter(parts)
    while pool := sorted(itertools.islice(parts, 16 * size), key=lambda part: len(part.ids)):
        while pool:
            longest = len(pool[-1].ids) - 1
            count = max(1, batch_tokens // longest)
            yield pool[-count:]
            del pool[-count:]


def _nll(model: PreTrainedModel, batch: Sequence[Part], padding: int, device: torch.device) -> torch.Tensor:
    """Summed nll of each window's scored tokens, and of the keywords among them, float64 of shape (windows, 2).

    Padding is on the right, where causal models do not look.
    """
    longest = max(len(part.ids) for part in batch) - 1
    inputs = torch.full((len(batch), longest), padding)
    targets = torch.full((len(batch), longest), -100)
    marked = torch.zeros((len(batch), longest), dtype=torch.bool)
    for row, (_, ids, scored, marks) in enumerate(batch):
        end = len(ids) - 1
        inputs[row, :end] = torch.from_numpy(ids[:-1])
        targets[row, end - scored : end] = torch.from_numpy(ids[end - scored + 1 :])
        marked[row, end - scored : end] = torch.from_numpy(marks)
    logits = model(input_ids=inputs.to(device), use_cache=False).logits
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(device), reduction="none")
    each = each.double().view(len(batch), longest)
    return torch.stack([each.sum(dim=1), each.where(marked.to(device), 0).sum(dim=1)], dim=1)


def _masked_nll(
    model: PreTrainedModel, batch: Sequence[Part], masked: MaskedTokens, device: torch.device
) -> torch.Tensor:
    """The nll of each window's masked token, and again if it is of a keyword, float64 of shape (windows, 2)."""
    longest = max(len(part.ids) for part in batch)
    inputs = torch.full((len(batch), longest), masked.frame.end)
    attention = torch.zeros_like(inputs)
    for row, (_, ids, place, _) in enumerate(batch):
        inputs[row, : len(ids)] = torch.from_numpy(ids)
        inputs[row, place] = masked.mask_id
        attention[row, : len(ids)] = 1
    places = torch.tensor([part.scored for part in batch], device=device)
    truth = torch.tensor([int(part.ids[part.scored]) for part in batch], device=device)
    logits = model(input_ids=inputs.to(device), attention_mask=attention.to(device)).logits
    chosen = logits[torch.arange(len(batch), device=device), places]
    each = F.cross_entropy(chosen.float(), truth, reduction="none").double()
    marked = torch.tensor([bool(part.marks[0]) for part in batch], device=device)
    return torch.stack([each, each.where(marked, 0)], dim=1)
