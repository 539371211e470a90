"""What a model can do, checked by running it on some ten tokens, because a list of names lacks the next architecture.

    row      E a b c d E e f g h     two documents of a block; E: the end-of-text token
    later    E a b c d s t u v w     a causal model gives the first half the same logits as above
    former   E w x y z E e f g h     if documents are isolated, the second one has the same logits as above

It runs on the model's device and in its precision: some attention needs a GPU, or two-byte numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from raylm import blocks, model
from raylm.config import BlocksConfig, Experiment, ModelConfig
from raylm.errors import ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from raylm.tokenizer import Frame

DOCUMENT = 5
"""Tokens of each of the two documents, if they fit the model."""

ROUNDING = 1e-5
"""How much a logit may change without seeing a changed token, relative to one that sees it.

Of 34 architectures, in one batch in float32 and bfloat16, logits that do not see it do not change at all; of those
that do, LFM2's change least, by 4e-5 (untrained, hidden size 16).
"""


def check_training(
    network: PreTrainedModel,
    experiment: Experiment,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    *,
    one_row: bool = False,
) -> None:
    """ConfigError if the model cannot do what an experiment asks. Its loss is attached (objective.attach).

    `one_row`: each micro-batch has one row. Every worker must call it, because weights may be sharded.
    """
    section = experiment.blocks
    setting = "model.path" if experiment.model.path is not None else "model.config"
    objective = experiment.objective
    sentinels = objective.sentinels if objective.kind == "fill_in_middle" else ()
    named = _named(experiment.model)
    probe = _Probe(network, tokenizer, frame, named, setting, section.block_size, objective.is_masked, sentinels)
    probe.check_direction()
    probe.check_isolation(section, one_row)
    probe.check_length(section)


def check_scoring(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    frame: Frame,
    *,
    named: str,
    context: int,
    masked: bool,
) -> None:
    """ConfigError if a score of the model would be meaningless; `named` is the user's name for the model."""
    probe = _Probe(network, tokenizer, frame, named, named, context, masked)
    probe.check_direction()


class _Probe:
    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        frame: Frame,
        named: str,
        where: str,
        most: int,
        masked: bool,
        sentinels: Sequence[str] = (),
    ):
        self.network, self.frame, self.where, self.masked = network, frame, where, masked
        self.named = f"{named} (model_type {network.config.model_type})"
        self.device = next(network.parameters()).device
        around = frame.around(())
        plain = np.setdiff1d(model.ids_of_text(tokenizer), around)
        plain = plain if len(plain) else around
        special = [tokenizer.mask_token_id] if masked else tokenizer.convert_tokens_to_ids(list(sentinels))
        self.largest = int(max(*plain, *around, *special))
        tokens = max(1, min(DOCUMENT, (most - 2 * frame.in_stream) // 2))
        chosen = np.random.default_rng(0).integers(0, len(plain), 2 * tokens + 4)
        one, other = plain[chosen], plain[(chosen + 1) % len(plain)]
        self.document = one
        self.row = self._joined(one[:tokens], one[-tokens:])[:most]
        self.former = self._joined(other[:tokens], one[-tokens:])[:most]
        self.half = len(self.row) // 2
        self.later = np.concatenate([self.row[: self.half], other[: len(self.row) - self.half]])

    def _joined(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Two documents as in a stream."""
        behind = second if self.frame.in_stream == 1 else self.frame.around(second)[:-1]
        return np.concatenate([self.frame.around(first), behind])

    def check_vocabulary(self, rows: int, what: str) -> None:
        if self.largest >= rows:
            raise ConfigError(
                f"{self.named}: the largest id of the tokenizer is {self.largest}, and the model has {rows} {what}; "
                "use the model's own tokenizer",
                where=self.where,
            )

    def check_direction(self) -> None:
        # Checked before anything runs, because a GPU does not recover from an id outside the embedding.
        self.check_vocabulary(self.network.get_input_embeddings().weight.shape[0], "embeddings")
        row, again, later = self._logits([self.row, self.row, self.later], BlocksConfig())
        self.check_vocabulary(row.shape[-1], "outputs")
        seen = _change(row[self.half :], later[self.half :])
        change, rounding = _change(row[: self.half], later[: self.half]), _change(row, again)
        limit = ROUNDING * seen + 4 * rounding
        if self.masked and seen > 0 and change <= limit:
            raise ConfigError(
                f"objective.kind=masked: {self.named} does not see later tokens; take a model such as bert, "
                "modernbert or deberta-v2, or objective.kind=causal",
                where="objective.kind",
            )
        if not self.masked and change > limit:
            raise ConfigError(
                f"{self.named} sees later tokens, so also those that it must predict, and its perplexity would be "
                f"near 1; {self._way_out()}",
                where=self.where,
            )

    def _way_out(self) -> str:
        config = self.network.config
        ways = ["take a causal model such as gpt2 or llama"]
        if self.where == "model.config" and getattr(config, "is_decoder", None) is False:
            ways.append("set model.config.is_decoder=true")
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
            ways.append("set objective.kind=masked")
        return ", or ".join(ways)

    def check_isolation(self, section: BlocksConfig, one_row: bool) -> None:
        rows = [self.row, self.later, self.former]
        begins = blocks.batch(rows, section, self.frame).get("position_ids")
        if begins is None:  # each row is one document
            return
        # flash_attention_2 looks for documents only in batches of one row (transformers 5.23).
        found = [self._logits([row], section)[0] for row in rows] if one_row else self._logits(rows, section)
        row, later, former = found
        second = int(np.flatnonzero(begins[0] == 0)[-1])
        if second == 0:  # there is no room for a second document
            return
        seen = _change(row[:second], former[:second])
        rounding = _change(row[: self.half], later[: self.half])  # separate rows may be rounded differently
        if _change(row[second:], former[second:]) > ROUNDING * seen + 4 * rounding:
            attention = str(self.network.config._attn_implementation)
            a_row = ", or train.micro_batch_tokens to that of blocks.block_size" if "flash" in attention else ""
            raise ConfigError(
                f"blocks.isolate_documents=true: {self.named} with {attention} attention sees the document before in "
                f"the same block; set it to false{a_row}, or take blocks.packing=padded, or a model such as gpt2 or "
                "llama",
                where="blocks.isolate_documents",
            )

    def check_length(self, section: BlocksConfig) -> None:
        """Run the loss on a block that is one document."""
        row = np.resize(self.document, section.block_size)
        try:
            self._run(blocks.batch([row], section, self.frame))
        except (IndexError, RuntimeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise
            raise ConfigError(
                f"blocks.block_size={section.block_size}: {self.named} runs on {len(self.row)} tokens, but not on so "
                f"many ({first_line(error)}); lower it",
                where="blocks.block_size",
            ) from error

    def _logits(self, rows: list[np.ndarray], section: BlocksConfig) -> torch.Tensor:
        """float32 of shape (rows, tokens, vocabulary)"""
        made = blocks.batch(rows, section, self.frame)
        del made["labels"]
        return self._run(made).logits.float()

    @torch.no_grad()
    def _run(self, made: dict[str, np.ndarray]) -> Any:
        options = {} if self.masked else {"use_cache": False}  # masked models have no cache
        training = self.network.training
        self.network.eval()
        try:
            inputs = {name: torch.from_numpy(values).to(self.device) for name, values in made.items()}
            return self.network(**inputs, **options)
        finally:
            self.network.train(training)


def _change(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def _named(section: ModelConfig) -> str:
    """The setting that names the model, and its value."""
    if section.path is not None:
        return f"model.path={section.path}"
    fields = section.config or {}
    key = "path" if "path" in fields else "model_type"
    return f"model.config.{key}={fields.get(key)}"
