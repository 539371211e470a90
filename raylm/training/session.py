"""The task of a worker, its session and its outcome.

The training loop uses Ray only through its Session: ray.train in a worker group, and ray.tune in the process of a
trial, where every call of ray.train raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from raylm import timeline
from raylm.budget import Budget
from raylm.checkpoint import CheckpointManager
from raylm.config import EvalConfig, Experiment, ModelConfig, TokenizerConfig
from raylm.errors import RaylmError
from raylm.perplexity import Documents
from raylm.tracking import Run


class Session(Protocol):
    """The rank of a worker, and where its results go. Every rank calls each method equally often."""

    rank: int
    world_size: int

    def report(self, metrics: dict[str, Any]) -> None:
        """Report metrics to Ray."""

    def lost_nodes(self) -> list[str]:
        """Nodes of workers that will be taken away soon."""


class RayTrainSession:
    """A worker of Ray Train."""

    def __init__(self) -> None:
        from ray import train  # 0.8 s, which the command itself does not need

        self._train = train
        context = train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def report(self, metrics: dict[str, Any]) -> None:
        import ray

        # For the cleanup after a trial that is stopped. Without the check Ray would be started.
        reserved = ray.util.get_current_placement_group() if ray.is_initialized() else None
        self._train.report({**metrics, "placement_group": reserved.id.hex() if reserved else None})

    def lost_nodes(self) -> list[str]:
        found = self._train.get_preemption_info()
        return list(found.preempted_node_ids) if found is not None else []


def gathered(session: Session, value: Any) -> list[Any]:
    """The values of all ranks."""
    if session.world_size == 1:
        return [value]
    found: list[Any] = [None] * session.world_size
    torch.distributed.all_gather_object(found, value)
    return found


EVALUATED = ("perplexity", "bits_per_byte", "weighted_nll")
"""The scores of an evaluation; weighted_nll if tune.metric has weights."""


def better(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of the best_ metrics of two reports those with the better score; either may be empty."""
    if not one or not other:
        return one or other
    ranked_by = "best_weighted_nll" if "best_weighted_nll" in one else "best_perplexity"
    return one if one[ranked_by] < other[ranked_by] else other


class CollectiveError(Exception):
    """An error that every rank raises at the same step, so that none waits for another."""


class SingleProcess:
    """A process without Ray."""

    rank = 0
    world_size = 1

    def report(self, metrics: dict[str, Any]) -> None:
        pass

    def lost_nodes(self) -> list[str]:
        return []


@dataclass(frozen=True)
class TrainTask:
    """The training of a worker."""

    experiment: Experiment
    store: str
    """The token store's directory."""
    budget: Budget
    run: Run
    directory: str
    """The directory of the run."""
    session: type[Session] | None = None
    """Default: SingleProcess in a process of the command's own, else RayTrainSession."""
    channel: Any = None
    """A progress channel of the package cluster, or None."""
    sets: Mapping[str, str] = field(default_factory=dict)
    """The token store of each evaluation set by name."""
    callbacks: tuple[type[Any], ...] = ()
    """The classes of train.callbacks."""
    is_scored_untrained: bool = False
    """Whether the model is scored before its first step, too."""
    name: str = ""
    """The prefix of messages, if several trainings run at a time."""
    until: int | None = None
    """The step after which it stops. Default: the last of the budget."""
    cooldowns: Mapping[int, int] = field(default_factory=dict)
    """The steps after which a cooldown begins, and the number of its steps; see the module cooldown."""
    best_cooldown: dict[str, Any] = field(default_factory=dict)
    """The best_ metrics of the best cooldown so far; empty without one."""
    trunk: tuple[str, int] | None = None
    """Of a cooldown: the directory and the step of the training at whose checkpoint it begins."""

    def say(self, message: str) -> None:
        """Show a message to the user."""
        timeline.mark(message)
        if self.channel is not None:
            self.channel.say(f"{self.name}: {message}" if self.name else message)

    def report(self, figures: dict[str, float]) -> None:
        """Hand figures of the training to whoever watches: tokens, and loss or perplexity."""
        if self.channel is not None:
            self.channel.report(figures)

    @property
    def checkpoints(self) -> CheckpointManager:
        return CheckpointManager(f"{self.directory}/checkpoints")

    @property
    def micro_batch_file(self) -> str:
        """The file with the micro-batch tokens of the next start, written after memory ran out."""
        directory, _ = self.trunk or (self.directory, 0)
        return f"{directory}/micro_batch_tokens"

    @property
    def last_step(self) -> int:
        """The step after which it stops."""
        return self.budget.steps if self.until is None else self.until

    def bests(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The best_ metrics of a report: of `own`, the best evaluation of this training, or of a better cooldown."""
        found = {f"best_{name}": own[name] for name in (*EVALUATED, "step") if name in own}
        return better(self.best_cooldown, {**found, "best_checkpoint": self.checkpoints.path(own["step"])})


@dataclass(frozen=True)
class Outcome:
    """The outcome of a training."""

    best: dict[str, Any]
    """Metrics of the best evaluation, by perplexity; empty if there was none."""
    step: int
    """The last optimizer step."""
    last: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    stopped: bool = False
    """Whether it was asked to stop before the end."""
    lost_nodes: list[str] = field(default_factory=list)
    """Nodes because of which it stopped: they will be taken away."""
    error: RaylmError | None = None
    """The error, if all workers raised the same."""


@dataclass(frozen=True)
class ScoreTask:
    """The scoring of a worker."""

    model: str
    """A directory; empty for the model of `untrained`."""
    documents: Documents
    section: EvalConfig
    loaded: ModelConfig
    """How the model is loaded."""
    tokenizer: TokenizerConfig
    """The tokenizer, if it is not the model's own, and the prefix of documents."""
    cpus: float
    masked: bool = False
    """Whether it is a masked model; its configuration may not say so."""
    use_gpu: bool | None = None
    session: type[Any] = RayTrainSession
    progress: Callable[[float, float | None], None] | None = None
    keywords: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    """As in perplexity.score_documents."""
    max_tokens: int | None = None
    """Of `documents`, only the first up to so many tokens are scored."""
    untrained: tuple[Experiment, str] | None = None
    """The experiment whose model is scored as it is before its first step, and the token store it reads."""
