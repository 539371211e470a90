"""What a worker is given to do, and where it stands among the others.

The loop meets Ray only through the Session it is handed: in a worker group that is ray.train, in a trial of a sweep
ray.tune, where every call of ray.train raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from raylm.budget import Budget
from raylm.checkpoint import CheckpointManager
from raylm.config import EvalConfig, Experiment, ModelConfig, TokenizerConfig
from raylm.errors import RaylmError
from raylm.perplexity import Documents
from raylm.tracking import Run


class Session(Protocol):
    """Where a worker stands among the others, and where its results go. Every rank calls each equally often."""

    rank: int
    world_size: int

    def report(self, metrics: dict[str, Any]) -> None:
        """Hand on metrics."""

    def lost_nodes(self) -> list[str]:
        """The nodes of workers that will be taken away soon."""


class RayTrainSession:
    """A worker of Ray Train."""

    def __init__(self) -> None:
        from ray import train  # 0.8 s, which a command that only hands out the task does not need

        self._train = train
        context = train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def report(self, metrics: dict[str, Any]) -> None:
        import ray

        # For whoever has to clear up after a trial that is stopped; a Ray that is not there would be started.
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


class CollectiveError(Exception):
    """An error that every rank meets at the same step, so that none of them waits for another."""


class SingleProcess:
    """A process without Ray."""

    rank = 0
    world_size = 1


@dataclass(frozen=True)
class TrainTask:
    """What a worker is given to do."""

    experiment: Experiment
    store: str
    """The token store's directory."""
    budget: Budget
    run: Run
    directory: str
    """The run's own."""
    session: type[Session] = RayTrainSession
    channel: Any = None
    """What cluster.progress_channel gives: told how far the training is, and asked whether it shall stop. None if
    nobody watches."""
    sets: Mapping[str, str] = field(default_factory=dict)
    """The token store of each evaluation set, by its name: what pipeline.stores.prepare_evaluation_sets gives."""
    callbacks: tuple[type[Any], ...] = ()
    """Of train.callbacks: what `callbacks.load` gives."""
    name: str = ""
    """What is said of the training begins with it, where there are others beside it."""

    def say(self, message: str) -> None:
        """Tell whoever watches."""
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
        """Where workers that ran out of memory leave how many tokens they shall hold at once the next time."""
        return f"{self.directory}/micro_batch_tokens"


@dataclass(frozen=True)
class Outcome:
    """What became of a training."""

    best: dict[str, Any]
    """Metrics of the best evaluation, by perplexity; empty if there was none."""
    step: int
    """The last optimizer step."""
    last: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    stopped: bool = False
    """Whether it was asked to stop before the end."""
    lost_nodes: list[str] = field(default_factory=list)
    """Nodes that made it stop, since they will be taken away."""
    error: RaylmError | None = None
    """Why it failed, where all workers found the same."""


@dataclass(frozen=True)
class ScoreTask:
    """What a worker is given to score."""

    model: str
    """A directory."""
    documents: Documents
    section: EvalConfig
    loaded: ModelConfig
    """How the model is loaded."""
    tokenizer: TokenizerConfig
    """Which tokenizer it has, if not its own, and the prefix of documents."""
    cpus: float
    masked: bool = False
    """That it is a masked model, though its configuration may not say so."""
    use_gpu: bool | None = None
    session: type[Any] = RayTrainSession
    progress: Callable[[float, float | None], None] | None = None
    keywords: tuple[str, ...] = ()
