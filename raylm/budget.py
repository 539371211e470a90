"""Tokens -> optimizer steps. Budgets are in tokens, so that runs with other block sizes or workers stay comparable.

For example, batch_tokens 2048, block_size 128, 2 workers, micro_batch_tokens 512:

    16 examples a step = 2 workers x 4 examples at once x 2 accumulated
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from raylm import examples
from raylm.config import Experiment, TrainConfig
from raylm.errors import DataError
from raylm.tokens import Store

FEW_PASSES = 4
"""Up to four passes over a text are nearly as good as new text (Muennighoff et al. 2023, arXiv:2305.16264)."""


class SourceTokens(NamedTuple):
    """A source of a mixture."""

    name: str
    share: float
    """Its fraction of the training tokens."""
    epoch_tokens: int
    """Tokens of one pass over it."""


@dataclass(frozen=True)
class Budget:
    steps: int
    """Optimizer steps of the whole run."""
    batch_tokens: int
    """Tokens of one step, over all workers."""
    examples: int
    """Examples of one step, over all workers: micro_batch x accumulation x workers."""
    micro_batch: int
    """Examples a worker holds at once."""
    accumulation: int
    """Micro-batches that a worker accumulates for a step."""
    eval_every: int
    """Steps between evaluations; there is one at the last step as well."""
    save_every: int
    """Steps between checkpoints, beside those of the best evaluations and the last step."""
    decay_steps: int = 0
    """Steps at the end in which the learning rate of warmup_stable_decay decays; 0 for other schedules."""

    epoch_tokens: int | None = None
    """Tokens of one pass over the training split, once that is known."""
    sources: tuple[SourceTokens, ...] = ()
    """Those of a mixture."""

    @property
    def tokens(self) -> int:
        return self.steps * self.batch_tokens

    @property
    def passes(self) -> float | None:
        """Passes over the training split."""
        return self.tokens / self.epoch_tokens if self.epoch_tokens else None

    @property
    def passes_over(self) -> dict[str, float]:
        """Passes over each source of a mixture."""
        return {each.name: self.tokens * each.share / each.epoch_tokens for each in self.sources}

    def warnings(self, section: TrainConfig) -> Iterator[str]:
        """Warnings about a budget that most likely is a mistake."""
        for name, passes in self.passes_over.items():
            if passes > FEW_PASSES:
                yield (
                    f"{passes:.2g} passes over source {name}: more than {FEW_PASSES} teach little; lower "
                    f"blocks.mixture.{name}, or give it more text"
                )
        if not self.sources and self.passes is not None and self.passes > 1.5 * FEW_PASSES:
            yield (
                f"{self.passes:,.0f} passes over {self.epoch_tokens:,} tokens of training text: expect overfitting; "
                f"train.max_tokens={FEW_PASSES * (self.epoch_tokens or 0)} makes {FEW_PASSES}"
            )
        if section.warmup_steps >= self.steps:
            yield (
                f"train.warmup_steps={section.warmup_steps:g} is all of the {self.steps:,} steps: the learning "
                "rate never reaches its peak; below 1 it is a fraction of the steps"
            )

    def shared_by(self, num_workers: int, micro_batch_tokens: int) -> Budget:
        """The same steps and examples for another number of workers, each with at most so many tokens at once."""
        a_worker = self.examples // num_workers
        most = max(1, micro_batch_tokens * self.examples // self.batch_tokens)
        micro_batch = max(size for size in range(1, a_worker + 1) if a_worker % size == 0 and size <= most)
        return replace(self, micro_batch=micro_batch, accumulation=a_worker // micro_batch)


def compute(section: TrainConfig, *, block_size: int, num_workers: int, epoch_examples: int | None) -> Budget | None:
    """The budget of a run; None if it is a number of epochs and `epoch_examples` is not known yet.

    It is rounded down to whole steps, at least one.
    """
    if epoch_examples == 0:
        raise DataError(
            f"the training split has less than one block of blocks.block_size={block_size} tokens; "
            "give corpus.paths more text or lower blocks.block_size",
            where="blocks.block_size",
        )
    if section.max_tokens is not None:
        steps = section.max_tokens // section.batch_tokens
    elif epoch_examples is None:
        return None
    else:
        epochs = section.num_epochs if section.num_epochs is not None else 1.0
        steps = max(1, int(epochs * epoch_examples * block_size / section.batch_tokens))

    def in_steps(tokens: int) -> int:
        return max(1, round(tokens / section.batch_tokens))

    eval_every = in_steps(section.eval_every_tokens) if section.eval_every_tokens else max(1, steps // 10)
    budget = Budget(
        steps=steps,
        batch_tokens=section.batch_tokens,
        examples=section.batch_tokens // block_size,
        micro_batch=1,
        accumulation=1,
        epoch_tokens=epoch_examples * block_size if epoch_examples is not None else None,
        eval_every=eval_every,
        save_every=in_steps(section.save_every_tokens) if section.save_every_tokens else eval_every,
        decay_steps=section.decay_steps(steps),
    )
    return budget.shared_by(num_workers, section.micro_batch_tokens)


def no_validation(experiment: Experiment) -> DataError:
    """The error for an empty validation split."""
    section = experiment.corpus
    if section.validation_paths:
        why = f"corpus.validation_paths={', '.join(section.validation_paths)} holds no text"
        way_out = "name files that do"
    elif not section.validation_fraction:
        why = "corpus.validation_fraction=0 holds nothing out"
        way_out = "give one such as 0.05, or corpus.validation_paths"
    else:
        unit = section.split_by or "passage"
        why = f"the text is a single {unit}, which cannot be split"
        way_out = "corpus.split_by=passage, " * (unit == "document") + "give more text, or corpus.validation_paths"
    return DataError(
        f"the validation split is empty, so no perplexity can be measured: {why}; {way_out}",
        where="corpus.validation_fraction",
    )


def no_test(experiment: Experiment) -> DataError:
    """The error for an empty test split."""
    section = experiment.corpus
    if section.test_paths:
        why, key = f"corpus.test_paths={', '.join(section.test_paths)} holds no text", "corpus.test_paths"
        way_out = "name files that do"
    else:
        few = f"the text has few {section.split_by or 'document'}s"
        why, key = f"{few}, and corpus.test_fraction={section.test_fraction:g} of them is none", "corpus.test_fraction"
        way_out = "raise it, give more text, or give corpus.test_paths"
    return DataError(f"the test split is empty, so the best model cannot be scored on it: {why}; {way_out}", where=key)


def for_store(experiment: Experiment, store: Store) -> Budget:
    """The budget of a run over a token store; DataError if there is nothing to train or score on."""
    if not store.validation.num_tokens:
        raise no_validation(experiment)
    if store.test is not None and not store.test.num_tokens:
        raise no_test(experiment)
    section = experiment.blocks
    sources = examples.of_sources(store.train, section, store.frame(experiment.tokenizer.prefix))
    found = compute(
        experiment.train,
        block_size=section.block_size,
        num_workers=experiment.cluster.most_workers,
        epoch_examples=sum(map(len, sources.values())),
    )
    assert found is not None  # the examples are known
    if not section.mixture:
        return found
    shares = examples.shares(section)
    mixed = [SourceTokens(name, shares[name], len(cut) * section.block_size) for name, cut in sources.items()]
    return replace(found, sources=tuple(mixed))
