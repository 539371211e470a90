"""What every worker executes: the Hugging Face Trainer over the token store, scored by raylm's own perplexity.

The loop meets Ray only through the Session it is handed: in a worker group that is ray.train, in a trial of a sweep
ray.tune, where every call of ray.train raises.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import ray.train
import ray.util
import torch
import transformers
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments

from raylm import blocks, checkpoint, model, objective, perplexity, tokens
from raylm.budget import Budget
from raylm.config import EvalConfig, Experiment, TrainConfig
from raylm.errors import ConfigError, TrainingError
from raylm.perplexity import Documents, Score
from raylm.tracking import Run

# TrainingArguments that raylm derives or answers for, and the setting to use instead.
OWNED = {
    "learning_rate": "train.learning_rate",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "max_steps": "train.max_tokens",
    "num_train_epochs": "train.num_epochs",
    "per_device_train_batch_size": "train.batch_tokens and train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "per_device_eval_batch_size": "eval.batch_tokens",
    "eval_strategy": "train.eval_every_tokens",
    "eval_steps": "train.eval_every_tokens",
    "save_strategy": "train.save_every_tokens",
    "save_steps": "train.save_every_tokens",
    "output_dir": "storage",
    "report_to": "tracking.uri",
    "use_cpu": "cluster.use_gpu",
    "no_cuda": "cluster.use_gpu",
    "auto_find_batch_size": "train.micro_batch_tokens",
    "train_sampling_strategy": "train.seed",
    "eval_on_start": "train.eval_every_tokens",
    "save_only_model": "train.save_every_tokens",
    "logging_nan_inf_filter": "nothing: a loss that is not finite ends the run",
}


class Session(Protocol):
    """Where a worker stands among the others, and where its results go."""

    rank: int
    world_size: int

    def report(self, metrics: dict[str, Any], directory: str | None) -> None:
        """Hand on metrics, and the checkpoint in `directory`. Called by every rank, equally often."""

    def latest(self) -> Any:
        """A context with the directory of the checkpoint to go on from, or None."""


class WorkerGroup:
    """A worker of Ray Train."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()

    def report(self, metrics: dict[str, Any], directory: str | None) -> None:
        saved = ray.train.Checkpoint.from_directory(directory) if directory else None
        reserved = ray.util.get_current_placement_group()  # for whoever has to clear up after a trial that is stopped
        metrics["placement_group"] = reserved.id.hex() if reserved else None
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=f"step_{metrics['step']:08d}")

    @contextmanager
    def latest(self) -> Iterator[str | None]:
        saved = ray.train.get_checkpoint()
        if saved is None:
            yield None
        else:
            with saved.as_directory() as directory:
                yield directory


@dataclass(frozen=True)
class Job:
    """What a worker is given to do."""

    experiment: Experiment
    store: str
    """The token store's directory."""
    budget: Budget
    run: Run
    session: type[Session] = WorkerGroup
    board: Any = None
    """A cluster.Board that is told how far the training is, if somebody watches."""


class Alone:
    """A process without Ray."""

    rank = 0
    world_size = 1


@dataclass(frozen=True)
class Scoring:
    """What a worker is given to score."""

    model: str
    """A directory."""
    documents: Documents
    section: EvalConfig
    cpus: float
    use_gpu: bool | None = None
    session: type[Any] = WorkerGroup
    progress: Callable[[float, float | None], None] | None = None


def check(section: TrainConfig) -> None:
    """Refuse what TrainingArguments would refuse on the workers."""
    schedules = [schedule.value for schedule in SchedulerType]
    if section.lr_scheduler_type not in schedules:
        raise ConfigError(
            f"train.lr_scheduler_type must be one of {', '.join(schedules)}, got {section.lr_scheduler_type!r}",
            where="train.lr_scheduler_type",
        )
    known = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
    for name in section.arguments:
        key = f"train.arguments.{name}"
        if name in OWNED:
            raise ConfigError(f"{key} is derived by raylm; set {OWNED[name]} instead", where=key)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{key}: not a field of transformers.TrainingArguments{hint}", where=key)
    kind = {"lr_scheduler_type": section.lr_scheduler_type}
    with tempfile.TemporaryDirectory() as directory:
        try:
            TrainingArguments(output_dir=directory, use_cpu=True, **kind, **section.arguments)
        except (ImportError, TypeError, ValueError) as error:
            problem = str(error).strip().split("\n")[0]
            raise ConfigError(f"train.arguments: {problem}", where="train.arguments") from None


def train_loop_per_worker(config: dict[str, Job]) -> dict[str, Any]:
    """Train one model to the end of its budget; the metrics of its best evaluation, by perplexity."""
    job = config["job"]
    session = job.session()
    set_up_torch(job.experiment.cluster.cpus_per_worker)
    scratch = tempfile.mkdtemp(
        prefix=f"raylm-rank{session.rank}-"
    )  # one per rank: ranks on a node must not share files
    try:
        with session.latest() as resume:
            trainer = _trainer(job, session, scratch)
            if resume is not None:
                trainer.best = checkpoint.read_record(resume)["best"]
            trainer.train(resume_from_checkpoint=resume)
        return trainer.best
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def score_loop_per_worker(config: dict[str, Scoring]) -> np.ndarray:
    """What perplexity.score_documents tells of a saved model, the documents shared out among the workers."""
    job = config["job"]
    session = job.session()
    set_up_torch(job.cpus)
    trained = checkpoint.load(job.model)
    return perplexity.score_documents(
        trained.model.to(device(job.use_gpu)),
        job.documents,
        eos_id=trained.tokenizer.eos_token_id,
        context=trained.context,
        stride=job.section.stride,
        batch_tokens=job.section.batch_tokens,
        masked=trained.masked,
        rank=session.rank,
        world_size=session.world_size,
        progress=job.progress,
    )


def set_up_torch(cpus: float) -> None:
    """As many torch threads as the worker was given CPUs: Ray leaves one, and a machine's default is all."""
    torch.set_num_threads(max(1, int(cpus)))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def device(use_gpu: bool | None = None) -> torch.device:
    """This process's GPU, if it has one (a worker of Ray sees only its own) and may use it; else the CPU."""
    return torch.device("cuda" if use_gpu is not False and torch.cuda.is_available() else "cpu")


def _trainer(job: Job, session: Session, scratch: str) -> _Trainer:
    experiment, budget = job.experiment, job.budget
    store = tokens.open_store(job.store)
    cut = blocks.of(store.train, experiment.blocks, store.eos_id)
    network = model.build(
        experiment.model,
        store.tokenizer,
        block_size=experiment.blocks.block_size,
        seed=experiment.train.seed,
        masked=experiment.objective.kind == "masked",
    )
    batches = objective.of(experiment.objective, experiment.blocks, store.tokenizer, experiment.train.seed)
    arguments = _arguments(experiment, budget, scratch)
    objective.attach(network, shifted=batches.shifted, smoothing=arguments.label_smoothing_factor)
    examples = blocks.Stream(cut, seed=experiment.train.seed, length=budget.steps * budget.examples)
    trainer = _Trainer(
        job,
        session,
        store,
        model=network,
        args=arguments,
        train_dataset=objective.Numbered(examples),
        data_collator=batches,
        processing_class=store.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Schedule(trainer))
    return trainer


def _arguments(experiment: Experiment, budget: Budget, scratch: str) -> TrainingArguments:
    section = experiment.train
    on_gpu = torch.cuda.is_available() and experiment.cluster.use_gpu is not False
    ours: dict[str, Any] = {
        "output_dir": scratch,
        "learning_rate": section.learning_rate,
        "warmup_steps": section.warmup_steps,
        "weight_decay": section.weight_decay,
        "lr_scheduler_type": section.lr_scheduler_type,
        "seed": section.seed,
        "max_steps": budget.steps,
        "per_device_train_batch_size": budget.micro_batch,
        "gradient_accumulation_steps": budget.accumulation,
        "logging_steps": max(1, budget.steps // 100),
        "logging_nan_inf_filter": False,  # or a run of NaN logs a loss of 0.0, the best of the sweep
        "eval_strategy": "no",  # _Schedule says when to evaluate and save
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(**{**ours, **section.arguments})


class _Trainer(Trainer):
    """The Trainer, with raylm's evaluation, reports and order of examples in place of its own."""

    loss_is_scaled_for_ga = True  # the loss is divided once, by the items of the whole step

    def __init__(self, job: Job, session: Session, store: tokens.Store, **kwargs: Any):
        super().__init__(**kwargs)
        self.job, self.session, self.store = job, session, store
        self.best: dict[str, Any] = {}
        self.latest: dict[str, Any] = {}
        self.started = time.monotonic()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # a Stream is in training order already

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """What the loss of an optimizer step is divided by: over all its micro-batches and workers."""
        if not batch_samples:
            return None
        items = torch.stack([self.data_collator.items(batch) for batch in batch_samples]).sum()
        # Nothing may be masked in a step of a few tokens: its loss is 0, not 0/0.
        return self.accelerator.reduce(items.to(device), reduction="sum").clamp(min=1e-9)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs)["loss"] / num_items_in_batch
        return loss * self.accelerator.num_processes  # of whose gradients DDP takes the mean

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm, just before the optimizer's step: the last moment at which the weights are still sound."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.scaler is not None  # fp16: the scaler skips a step that overflows and goes on
        if norm is not None and not scaled and not math.isfinite(norm):
            raise self._diverged(f"the gradient is {float(norm)} at step {self.state.global_step + 1}")
        return norm

    def _diverged(self, how: str) -> TrainingError:
        return TrainingError(
            f"training diverged: {how}; lower train.learning_rate={self.args.learning_rate:g} or raise "
            "train.warmup_steps",
            where="train.learning_rate",
        )

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation split, decide whether the weights are kept, and report."""
        step = self.state.global_step
        self.control.should_evaluate = False  # or the end of the data would evaluate the last step again
        score = self._score()
        if not math.isfinite(score.perplexity):
            raise self._diverged(f"perplexity is {score.perplexity} at step {step}")
        self.latest = {
            "step": step,
            "tokens": step * self.job.budget.batch_tokens,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
            "budget_tokens": self.job.budget.tokens,
            "seconds": time.monotonic() - self.started,
        }
        is_best = not self.best or score.perplexity < self.best["perplexity"]
        if is_best:
            self.best = dict(self.latest)
        self.latest |= {f"best_{name}": self.best[name] for name in ("perplexity", "bits_per_byte", "step")}
        if self.session.rank == 0:
            name = "perplexity" if self.masked is None else "pseudo_perplexity"
            values = {f"eval/{name}": score.perplexity, "eval/bits_per_byte": score.bits_per_byte}
            self.job.run.metrics(values, step)
        every = self.job.budget.save_every
        due = is_best or (every is not None and step % every == 0)
        self.control.should_save = due or step == self.job.budget.steps
        if not self.control.should_save:
            self.session.report(dict(self.latest), None)
        return {"eval_perplexity": score.perplexity}

    @property
    def masked(self) -> perplexity.MaskedTokens | None:
        """How the model is scored if it is a masked one."""
        is_masked = self.job.experiment.objective.kind == "masked"
        return perplexity.MaskedTokens.of(self.store.tokenizer) if is_masked else None

    def _score(self) -> Score:
        section = self.job.experiment.eval
        return perplexity.score(
            self.model,
            self.store.validation,
            eos_id=self.store.eos_id,
            context=model.context(self.model.config) or self.job.experiment.blocks.block_size,
            stride=section.stride,
            batch_tokens=section.batch_tokens,
            max_tokens=section.max_tokens,
            masked=self.masked,
            rank=self.session.rank,
            world_size=self.session.world_size,
        )

    def _save(self, output_dir: str | None = None, state_dict: Mapping | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        if self.job.experiment.model.lora is not None:
            state_dict = model.merged(self.model)
        super()._save(str(directory), state_dict)
        if self.job.experiment.model.lora is not None:
            model.save_updates(self.model, directory)
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model_to_load: Any = None) -> None:
        if self.job.experiment.model.lora is not None:  # the weights there are merged, and those here are the base
            model.load_updates(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model_to_load)

    def keep(self) -> None:
        """Hand the checkpoint that was just written to Ray, and remove it here."""
        directory = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.session.rank == 0:
            record = {**self.latest, "best": self.best, "store": self.job.store, "mlflow_run_id": self.job.run.run_id}
            checkpoint.describe(directory, self.job.experiment, record)
        self.session.report(dict(self.latest), str(directory))
        shutil.rmtree(directory, ignore_errors=True)


class _Schedule(TrainerCallback):
    """When to evaluate, counted in the budget's steps; and where the Trainer's own figures go."""

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        budget = self.trainer.job.budget
        every = [budget.eval_every, *([budget.save_every] if budget.save_every else [])]
        control.should_evaluate = state.global_step == budget.steps or any(state.global_step % n == 0 for n in every)
        control.should_log = control.should_log or state.global_step == budget.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        names = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}
        values = {ours: logs[theirs] for theirs, ours in names.items() if logs and theirs in logs}
        if values and self.trainer.session.rank == 0:
            values["train/tokens"] = state.global_step * self.trainer.job.budget.batch_tokens
            self.trainer.job.run.metrics(values, state.global_step)
            if self.trainer.job.board is not None:
                self.trainer.job.board.put.remote(values["train/tokens"])

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.keep()
