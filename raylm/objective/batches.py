"""Training examples -> batches with labels, and weights where rows count differently.

    block               a b E c d        E = end-of-text id, M = mask token, - = not predicted
    causal              a b E c d        labels  - b E c d       each token from those before it
    masked              a b E M d        labels  - - - c -       a few tokens from all around them
    fill_in_middle      P S b M a E c    labels  - S b M a E c   a document as prefix, suffix, middle; then as causal
    keyword_weighted    as causal, and a weight for each row

Random choices for an example depend on the seed of data and its number alone, not on micro-batches or workers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from raylm import blocks
from raylm.blocks import IGNORED
from raylm.config import BlocksConfig, ObjectiveConfig, TrainedTokenizer
from raylm.errors import ConfigError
from raylm.examples import Examples
from raylm.objective.keywords import Keywords
from raylm.tokenizer import Frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    number: int
    """Its place in the order of training."""
    ids: np.ndarray
    marks: np.ndarray | None = None
    """blocks.ANSWER and END for each token, uint8; None without prompts."""


def build(
    section: ObjectiveConfig, cut: BlocksConfig, tokenizer: PreTrainedTokenizerBase, frame: Frame, seed: int
) -> Collator:
    """The collator of an objective, for the Trainer."""
    kinds: dict[str, type[Collator]] = {
        "causal": CausalCollator,
        "keyword_weighted": KeywordWeightedCollator,
        "masked": MaskedCollator,
        "fill_in_middle": FillInMiddleCollator,
    }
    check_settings(section, cut, tokenizer)
    return kinds[section.kind](section, cut, tokenizer, frame, seed)


def check_settings(
    section: ObjectiveConfig, cut: BlocksConfig, tokenizer: PreTrainedTokenizerBase | TrainedTokenizer
) -> None:
    """ConfigError if an objective lacks a setting, or tokens of the tokenizer, which may be still untrained."""
    vocabulary: Collection[str]
    if isinstance(tokenizer, TrainedTokenizer):
        vocabulary = tokenizer.special_tokens
        has_mask = not {"<mask>", "[MASK]"}.isdisjoint(vocabulary)
    else:
        vocabulary, has_mask = tokenizer.get_vocab(), tokenizer.mask_token is not None
    if section.kind == "keyword_weighted" and not section.keywords:
        raise ConfigError(
            "objective.kind=keyword_weighted needs words: objective.keywords=[plt, pd, fit]", "objective.keywords"
        )
    if section.is_masked and not has_mask:
        raise ConfigError(
            "objective.kind=masked: the tokenizer has no mask token; take a masked model's with tokenizer.path, or "
            "train one with it: tokenizer.train.special_tokens=['<|endoftext|>', '<mask>']",
            "objective.kind",
        )
    if section.is_masked and cut.isolate_documents:
        raise ConfigError(
            "blocks.isolate_documents: masked models cannot tell documents in a block apart; "
            "use blocks.packing=chunked or padded",
            "blocks.isolate_documents",
        )
    missing = [token for token in section.sentinels if token not in vocabulary]
    if section.kind == "fill_in_middle" and missing:
        raise ConfigError(
            f"objective.sentinels: the tokenizer has no {' '.join(missing)}; name the three it has, or train one with "
            f"them: tokenizer.train.special_tokens=['<|endoftext|>', {', '.join(map(repr, section.sentinels))}]",
            "objective.sentinels",
        )


class NumberedExamples(Dataset):
    """The training examples with their numbers, starting with number `first`."""

    def __init__(self, examples: Examples, first: int = 0):
        self.examples, self.first = examples, first

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, k: int) -> Example:
        return self.__getitems__([k])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Example]:
        """A micro-batch: what torch's DataLoader asks for in the place of one example after another."""
        numbers = [(self.first + k) % len(self) for k in indices]  # one batch is read ahead and not used
        rows, marks = self.examples.rows(numbers), self.examples.marks(numbers)
        return list(map(Example, numbers, rows) if marks is None else map(Example, numbers, rows, marks))


class Collator:
    """Examples -> one batch of tensors, int64 of shape (examples, longest row); see blocks.batch."""

    shifted = True
    """Whether the output at a token predicts the next one, or the token itself."""

    def __init__(
        self,
        section: ObjectiveConfig,
        cut: BlocksConfig,
        tokenizer: PreTrainedTokenizerBase,
        frame: Frame,
        seed: int,
    ):
        self.section, self.cut, self.tokenizer, self.frame, self.seed = section, cut, tokenizer, frame, seed
        self.set_up()

    def set_up(self) -> None:
        """Prepares what an objective needs in addition."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        made = self.arrays(examples)
        return {name: torch.from_numpy(values) for name, values in made.items()}

    def arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        marks = [example.marks for example in examples if example.marks is not None]
        return blocks.batch([example.ids for example in examples], self.cut, self.frame, marks)

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """This batch's share of the divisor of the global batch's loss."""
        return (batch["labels"] != IGNORED).sum()

    def random(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, number))


class CausalCollator(Collator):
    """Each token is predicted from those before it, so a block of B tokens has B - 1 predictions.

    The first label is IGNORED because GPT-2 and some other classes would count it as a prediction.
    """


class KeywordWeightedCollator(CausalCollator):
    """Causal; a row's tokens count alpha x (1 + the keywords in it): the Hugging Face course's loss for code.

    If normalized, the loss is divided by the weights' sum over the tokens of the global batch; without keywords it is
    the causal loss. Otherwise it is the course's formula: the mean over rows of weight x the row's mean loss.
    """

    def set_up(self) -> None:
        self.keywords = Keywords(self.section.keywords, self.tokenizer)

    def arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        made = super().arrays(examples)
        rows = [self.section.alpha * (1 + self.keywords.occurrences(example.ids)) for example in examples]
        weights = np.array(rows, np.float32)
        if not self.section.normalize:
            weights /= np.maximum((made["labels"] != IGNORED).sum(axis=1), 1)
        return made | {"weights": weights}

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if not self.section.normalize:
            return torch.tensor(len(batch["labels"]), device=batch["labels"].device)
        return (batch["weights"] * (batch["labels"] != IGNORED).sum(dim=1)).sum()


class MaskedCollator(Collator):
    """BERT's objective (Devlin et al. 2018, arXiv:1810.04805): some tokens are predicted from those on both sides.

    Of these, 80 % are shown as the mask token, 10 % as a random token and 10 % as they are. Special tokens are not
    predicted.
    """

    shifted = False

    def set_up(self) -> None:
        self.mask_id: int = self.tokenizer.mask_token_id
        self.special_ids = np.array([*self.tokenizer.all_special_ids, *self.frame.around(())])
        self.vocab_size = len(self.tokenizer)

    def arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        made = super().arrays(examples)
        made["labels"] = np.full_like(made["input_ids"], IGNORED)
        for place, (number, row, _) in enumerate(examples):
            shown, labels = self.masked(number, row)
            made["input_ids"][place, : len(row)] = shown
            made["labels"][place, : len(row)] = labels
        return made

    def masked(self, number: int, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(input ids, labels)"""
        random = self.random(number)
        chosen = (random.random(len(row)) < self.section.probability) & ~np.isin(row, self.special_ids)
        how = random.random(len(row))
        others = random.integers(0, self.vocab_size, len(row))
        shown = np.where(chosen & (how < 0.8), self.mask_id, np.where(chosen & (how >= 0.9), others, row))
        return shown, np.where(chosen, row, IGNORED)


class FillInMiddleCollator(CausalCollator):
    """Documents cut in three and put in another order (Bavarian et al. 2022, arXiv:2207.14255); then causal.

    PSM: P prefix S suffix M middle, and SPM: P S suffix M prefix middle, where P, S and M are the sentinels. They make
    a row longer, so it is cut off at block_size.
    """

    def set_up(self) -> None:
        self.sentinel_ids = [self.tokenizer.convert_tokens_to_ids(token) for token in self.section.sentinels]

    def arrays(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        return super().arrays([Example(number, self.transformed(number, row)) for number, row, _ in examples])

    def transformed(self, number: int, row: np.ndarray) -> np.ndarray:
        random = self.random(number)
        around = self.frame.around(())
        places = np.flatnonzero(np.isin(row, around))
        parts: list[Any] = []
        for piece in np.split(row, np.stack([places, places + 1], axis=1).ravel()):
            whole = len(piece) == 0 or piece[0] in around or random.random() >= self.section.rate
            parts += [piece] if whole else self.moved(piece, random)
        return np.concatenate(parts)[: self.cut.block_size].astype(row.dtype)

    def moved(self, piece: np.ndarray, random: np.random.Generator) -> list[Any]:
        prefix_id, middle_id, suffix_id = ([sentinel] for sentinel in self.sentinel_ids)
        first, last = sorted(random.integers(0, len(piece) + 1, 2))
        prefix, middle, suffix = piece[:first], piece[first:last], piece[last:]
        if random.random() < self.section.spm_rate:
            return [prefix_id, suffix_id, suffix, middle_id, prefix, middle]
        return [prefix_id, prefix, suffix_id, suffix, middle_id, middle]
