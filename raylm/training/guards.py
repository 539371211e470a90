"""Errors of training with their way out: memory that runs out, a gradient that is not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from raylm import storage
from raylm.errors import Diverged, OutOfMemory, first_line
from raylm.training.session import CollectiveError, Session, TrainTask

KINDS = (torch.OutOfMemoryError, MemoryError)
"""Exceptions of PyTorch and Python for a lack of memory."""


class MemoryGuard:
    """Turns a lack of memory into an error that says what to do."""

    def __init__(self, task: TrainTask, session: Session, micro_batch: int):
        self.task, self.session, self.micro_batch = task, session, micro_batch

    def for_training(self) -> contextlib.AbstractContextManager[None]:
        return self._guarded(self._fewer_at_once)

    def for_scoring(self) -> contextlib.AbstractContextManager[None]:
        return self._guarded(self._too_much_scored)

    @contextlib.contextmanager
    def _guarded(self, too_much: Callable[[str], OutOfMemory]) -> Iterator[None]:
        problem = None
        try:
            yield
        except (*KINDS, RuntimeError) as error:
            if not isinstance(error, KINDS) and "can't allocate memory" not in str(error):  # torch, on a CPU
                raise
            problem = too_much(first_line(error))
        if problem is not None:  # outside of the except, which would keep the tensors alive
            raise CollectiveError(problem) if self.session.world_size == 1 else problem

    def _fewer_at_once(self, problem: str) -> OutOfMemory:
        """The error of a training step; half as many tokens are used at the next start, if possible."""
        budget, held = self.task.budget, self.micro_batch
        block_size = budget.batch_tokens // budget.examples
        if held == 1:
            return OutOfMemory(
                f"out of memory with a single block of blocks.block_size={block_size} tokens at once ({problem}); "
                "lower it or the model's size, or set train.arguments.gradient_checkpointing=true",
                "blocks.block_size",
            )
        fewer = held // 2 * block_size
        storage.write(self.task.micro_batch_file, str(fewer).encode())
        return OutOfMemory(
            f"out of memory with {held * block_size:,} tokens at once ({problem}); resuming with {fewer:,}, and "
            f"{budget.batch_tokens:,} a step as before",
            "train.micro_batch_tokens",
        )

    def _too_much_scored(self, problem: str) -> OutOfMemory:
        held = self.task.experiment.eval.batch_tokens
        return OutOfMemory(
            f"out of memory in an evaluation with eval.batch_tokens={held} ({problem}); lower it: no figure depends on "
            "it, and the run resumes from its last checkpoint",
            "eval.batch_tokens",
        )


class GradientGuard:
    """Keeps gradients that are not finite out of the optimizer."""

    def __init__(self, task: TrainTask, session: Session):
        self.task, self.session = task, session
        self.first_bad_step: torch.Tensor | None = None

    def before_step(self, step: int, norm: Any, optimizer: Any) -> None:
        """Called just before each optimizer step."""
        if self.runs_ahead(norm, optimizer):
            self._skip(step, norm, optimizer)
        elif not math.isfinite(norm):
            raise CollectiveError(self.diverged(f"the gradient is {float(norm)} at step {step}"))

    def runs_ahead(self, norm: Any, optimizer: Any) -> bool:
        """Whether a GPU still computes the norm, and the optimizer takes a tensor that makes it skip a step."""
        is_known = not (isinstance(norm, torch.Tensor) and norm.is_cuda)
        is_sharded = isinstance(optimizer.param_groups[0]["params"][0], DTensor)
        return not is_known and not is_sharded and bool(optimizer.defaults.get("fused"))

    def _skip(self, step: int, norm: torch.Tensor, optimizer: Any) -> None:
        """Have a fused optimizer skip all steps from the first bad one on, without waiting for the GPU.

        `found_inf` is the argument that fp16's scaler uses; `check` raises the error later.
        """
        if self.first_bad_step is None:
            self.first_bad_step = torch.full((), math.inf, device=norm.device)
        bad = torch.where(torch.isfinite(norm), torch.inf, torch.full_like(self.first_bad_step, step))
        self.first_bad_step = torch.minimum(self.first_bad_step, bad)
        optimizer.grad_scale, optimizer.found_inf = None, torch.isfinite(self.first_bad_step).float()

    def check(self) -> None:
        """Raise Diverged if a step was skipped; waits for the GPU."""
        if self.first_bad_step is not None and math.isfinite(first := self.first_bad_step.item()):
            raise CollectiveError(self.diverged(f"the gradient is not finite at step {int(first)}"))

    def diverged(self, how: str) -> Diverged:
        kept = self.task.checkpoints.steps() if self.session.rank == 0 else []
        last = f"; the last checkpoint is {self.task.checkpoints.path(kept[-1])}" if kept else ""
        rate = self.task.experiment.train.learning_rate
        return Diverged(
            f"training diverged: {how}; lower train.learning_rate={rate:g} or raise train.warmup_steps{last}",
            where="train.learning_rate",
        )
