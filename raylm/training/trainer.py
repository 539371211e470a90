"""The Trainer, with raylm's evaluation, checkpoints and order of examples in place of its own."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, TrainerCallback

from raylm import (
    checkpoint,
    console,
    document_scores,
    examples,
    lora,
    model,
    objective,
    perplexity,
    probe,
    samples,
    shards,
    storage,
    summary,
    tokens,
    tracking,
    transfer,
)
from raylm import tokenizer as tokenizers
from raylm.checkpoint import CheckpointManager
from raylm.document_scores import DocumentScores
from raylm.errors import ConfigError, RaylmError, StorageError, first_line
from raylm.perplexity import Documents, Score
from raylm.tokenizer import Frame
from raylm.training import arguments, muon, peak_flops, sampling
from raylm.training.checkpoint_writer import PROGRESS, CheckpointWriter
from raylm.training.costs import Costs
from raylm.training.guards import GradientGuard, MemoryGuard
from raylm.training.session import EVALUATED, CollectiveError, Outcome, Session, TrainTask, gathered
from raylm.training.sharding import ShardingTrainer

PROGRESS_SECONDS = 10.0
"""Between two messages about the progress of an evaluation."""

STOP_CHECK_SECONDS = 1.0
"""Between two checks whether the training was asked to stop."""


def build(task: TrainTask, session: Session, scratch: Path) -> _Trainer:
    """The Trainer of one worker. It writes checkpoints to `scratch` before they are uploaded."""
    experiment = task.experiment
    smaller = storage.read(task.micro_batch_file)
    budget = task.budget.shared_by(session.world_size, int(smaller) if smaller else experiment.train.micro_batch_tokens)
    store = tokens.open_store(task.store)
    frame = store.frame(experiment.tokenizer.prefix)
    network = model.build(
        experiment.model,
        store.tokenizer,
        block_size=experiment.blocks.block_size,
        seed=experiment.train.seed,
        masked=experiment.objective.is_masked,
    )
    batches = objective.build(
        experiment.objective, experiment.blocks, store.tokenizer, frame, experiment.train.seed_of_data
    )
    args = arguments.build(experiment, budget, str(scratch))
    is_sharded = bool(args.fsdp)
    if session.world_size == 1:  # nothing to shard
        args.fsdp = args.fsdp_plugin_args = None
    elif is_sharded and experiment.model.lora is not None:
        lora.untie_changed_ends(network)
    objective.attach(network, shifted=batches.shifted, smoothing=args.label_smoothing_factor)
    ordered = examples.build(
        store.train,
        experiment.blocks,
        frame,
        seed=experiment.train.seed_of_data,
        length=budget.steps * budget.examples,
    )
    chosen = muon.optimizer_of(network, args) if experiment.train.optimizer == "muon" else None
    trainer = _Trainer(
        task,
        session,
        store,
        model=network,
        optimizer_cls_and_kwargs=chosen,
        args=args,
        train_dataset=objective.NumberedExamples(ordered),
        data_collator=batches,
        processing_class=tokenizers.for_export(
            store.tokenizer, experiment.tokenizer.prefix, model.context(network.config)
        ),
    )
    trainer.is_sharded = is_sharded
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Reporting(trainer))
    for callback in task.callbacks:
        trainer.add_callback(callback())
    return trainer


class _Trainer(ShardingTrainer):
    loss_is_scaled_for_ga = True  # the loss is divided once, by the items of the whole step

    def __init__(self, task: TrainTask, session: Session, store: tokens.Store, **kwargs: Any):
        super().__init__(**kwargs)
        self.task, self.session, self.store = task, session, store
        self.best: dict[str, Any] = {}
        """The best evaluation that has a checkpoint."""
        self.better: dict[str, Any] | None = None
        """An even better evaluation, until its checkpoint is written."""
        self.latest: dict[str, Any] = {}
        self.worse_in_a_row = 0
        """Evaluations since the best one."""
        self.started_at = time.monotonic()
        self.start_step = 0
        """The step after which this process starts to train."""
        self.resumed: Path | None = None
        self.stopped = False
        self.lost_nodes: list[str] = []
        self.is_unscored = False
        """Whether the evaluation of the last checkpoint is left to the resumed run."""
        self.last_check = (0, 0.0)
        """Step and time of the last check whether to stop."""
        self.next_check = 1
        """The step of the next one."""
        self.writer = CheckpointWriter(task, session, Path(self.args.output_dir), self.say)
        self.memory = MemoryGuard(task, session, self.args.per_device_train_batch_size)
        self.gradients = GradientGuard(task, session)
        self.costs = Costs(self.args.device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.factors:
            transfer.scale_groups(optimizer, self.model, self.factors)
        return optimizer

    @cached_property
    def factors(self) -> dict[str, transfer.Factors]:
        """The factors of model.transfer; empty without it."""
        section = self.task.experiment.model.transfer
        return {} if section is None else transfer.factors(self.model.config, section.base)

    # The whole training

    def probe(self) -> None:
        """Refuse a model that cannot do what the experiment asks, before anything is trained."""
        # What is compiled for a few tokens would be compiled again for a block.
        compiled = torch.compiler.set_stance("force_eager") if self.args.torch_compile else contextlib.nullcontext()
        with compiled, self.memory.for_training():
            try:
                probe.check_training(
                    self.model,
                    self.task.experiment,
                    self.store.tokenizer,
                    self.frame,
                    one_row=self.args.per_device_train_batch_size == 1,
                )
                sampling.check_prompts(self.task.experiment, self.store)
            except ConfigError as error:
                raise CollectiveError(error) from error
        self.reshard()
        if self.task.experiment.eval.prompts and self.is_fsdp_enabled:
            self.say("eval.prompts: no texts are written, because the weights are sharded (train.arguments.fsdp)")

    def measure_peak(self) -> None:
        """Find out what MFU is a fraction of: a step's floating-point operations, and the devices' of all workers."""
        experiment, config = self.task.experiment, self.model.config
        kind = peak_flops.arithmetic(
            self.args.device, autocast=self.accelerator.mixed_precision, weights=next(self.model.parameters()).dtype
        )
        found = gathered(self.session, experiment.train.peak_flops or peak_flops.find(self.args.device, kind))
        if None in found:
            self.say(
                f"no MFU: the peak of {peak_flops.name(self.args.device)} in {kind} is not known; give a worker's, in "
                "FLOPs a second: train.peak_flops=312e12"
            )
            return
        counts = model.parameters(config, masked=experiment.objective.is_masked)
        a_token = model.flops_of_experiment(experiment, config, counts)
        self.costs.flops_of_a_step = float(a_token) * self.task.budget.batch_tokens
        self.costs.peak_flops = sum(found)

    def run(self) -> Outcome:
        """Train from the newest whole checkpoint to the end of the budget."""
        checkpoints = self.task.checkpoints
        step, skipped = self._on_rank_0(checkpoints.newest)
        for damage in skipped:
            self.say(f"skipping {damage}")
        if step is None and self.task.trunk is not None:
            trunk, step = self.task.trunk
            checkpoints = CheckpointManager(f"{trunk}/checkpoints")
        if step is not None:
            self.stored = checkpoints.path(step)
            self.resumed = checkpoints.fetch(step, Path(self.args.output_dir), but_for=[shards.FILES])
            self._restore(self.resumed, step)
        if self.session.rank == 0:
            self.task.run.rewind(self.start_step)
        if self.is_unscored:
            self._score_resumed()
        if self.start_step < self.task.last_step and not self._is_patience_over() and not self.stopped:
            self.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
        step = self.state.global_step or self.start_step
        return Outcome(self.best, step, last=self.latest, stopped=self.stopped, lost_nodes=self.lost_nodes)

    def _on_rank_0(self, read: Callable[[], Any]) -> Any:
        """What rank 0 reads from the checkpoints, for every rank: verifying one reads all of it. CollectiveError if it
        fails."""
        result: Any = None
        if self.session.rank == 0:
            try:
                with storage.reached(self.task.checkpoints.directory):
                    result = read()
            except RaylmError as error:
                result = error
        result = gathered(self.session, result)[0]
        if isinstance(result, RaylmError):
            raise CollectiveError(result)
        return result

    def _restore(self, directory: Path, step: int) -> None:
        record = checkpoint.read_record(directory)
        progress = json.loads((directory / PROGRESS).read_text(encoding="utf-8"))
        self.start_step = step
        self.worse_in_a_row = progress["worse_in_a_row"]
        self.is_unscored = progress.get("is_unscored", False)
        self.started_at -= progress["seconds"]
        self.costs.resume(progress)
        is_branch = self.task.trunk is not None and step == self.task.trunk[1]
        self.best = record["best"] if not is_branch else {}
        if self.best and self.best["step"] != step and self._is_lost(self.best["step"]):
            here = {name: record[name] for name in (*EVALUATED, "step", "tokens") if name in record}
            self.best = here if here["perplexity"] is not None else {}
        self.train_dataset.first = step * self.task.budget.examples
        if record["perplexity"] is not None:  # Ray may not have received it before the failure
            scores = record["perplexity"], record["bits_per_byte"], record.get("weighted_nll")
            self.latest = self._evaluation(step, *scores)
            if not is_branch:
                self.session.report(self._metrics())
        message = f"resuming from step {step:,} of {self.task.budget.steps:,}"
        if progress["world_size"] != self.session.world_size:
            now = console.counted(self.session.world_size, "worker")
            message += (
                f" with {now} instead of {progress['world_size']}: the same examples in the same steps, but not the "
                "same bits"
            )
        if step not in self.task.cooldowns and not is_branch:  # else this is what every rung does
            self.say(message)

    def _is_lost(self, step: int) -> bool:
        """Whether the checkpoint of the best evaluation is damaged; says so."""
        checkpoints = self.task.checkpoints
        damage = self._on_rank_0(lambda: checkpoints.damage(step))
        if damage is not None:
            self.say(f"the best checkpoint is lost: {checkpoints.path(step)}: {damage}")
        return damage is not None

    def say(self, message: str) -> None:
        """Show a message to the user, once for all ranks."""
        if self.session.rank == 0:
            self.task.say(message)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of a checkpoint, then put back this run's own learning rate, weight decay and so on.

        In population-based training the checkpoint is another trial's. The learning rate continues on this run's
        schedule at the step of the checkpoint.
        """
        groups = self.inner_optimizer.param_groups if checkpoint is not None else []
        ours = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        for number, (group, settings) in enumerate(zip(self.inner_optimizer.param_groups, ours, strict=False)):
            if group.get("initial_lr") != settings.get("initial_lr") and hasattr(self.lr_scheduler, "lr_lambdas"):
                peak, curve = settings["initial_lr"], self.lr_scheduler.lr_lambdas[number]
                self.lr_scheduler.base_lrs[number] = peak
                settings["lr"] = peak * curve(self.lr_scheduler.last_epoch)
            group.update(settings)

    # Examples

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # examples are in training order already

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        samples = super().get_batch_samples(*args, **kwargs)
        if self.resumed is not None:  # a data loader draws a number at its start; the saved states are later
            super()._load_rng_state(str(self.resumed))
            self.resumed = None
        return samples

    # Loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> Any:
        """The divisor of the loss of an optimizer step, summed over its micro-batches and workers."""
        if not batch_samples:
            return None
        items = torch.stack([self.data_collator.items(batch) for batch in batch_samples]).sum()
        # Nothing may be masked in a step of a few tokens: its loss is 0, not 0/0.
        # Without non_blocking the host waits for the GPU; four bytes are copied before the call returns, pinned or not.
        return self.accelerator.reduce(items.to(device, non_blocking=True), reduction="sum").clamp(min=1e-9)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs)["loss"] / num_items_in_batch
        return loss * self.accelerator.num_processes  # because DDP averages gradients

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.memory.for_training():
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not self.factors:
            return super()._clip_grad_norm(model)
        with transfer.gradients_without_multipliers(self.model, self.factors):
            return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # the scaler of fp16 skips a step that overflows
            self.gradients.before_step(self.state.global_step + 1, norm, self.inner_optimizer)
        return norm

    # Evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation split and the evaluation sets; decide whether to save a checkpoint."""
        step, task = self.state.global_step, self.task
        self.control.should_evaluate = False  # or the end of the data would evaluate the last step again
        self.is_unscored = False
        try:
            with self.costs.evaluating(), self.memory.for_scoring():
                rows = self._score(self.store.validation)
                sets = {name: Score.of(self._score(documents)) for name, documents in self.sets.items()}
        except perplexity.EvaluationStopped:  # saved as it is, and evaluated first when the run resumes
            self.is_unscored = self.stopped = True
            self.control.should_save = self.control.should_training_stop = True
            return {}
        score = Score.of(rows)
        if not math.isfinite(score.perplexity):
            raise CollectiveError(self.gradients.diverged(f"perplexity is {score.perplexity} at step {step}"))
        by_source = self._by_source(rows)
        weighted = self._weighted(by_source | sets)
        if weighted is not None and not math.isfinite(weighted):
            raise CollectiveError(self.gradients.diverged(f"weighted_nll is {weighted} at step {step}"))
        self.latest = self._evaluation(step, score.perplexity, score.bits_per_byte, weighted)
        ranked_by = "weighted_nll" if self.latest.get("weighted_nll") is not None else "perplexity"
        is_best = not self.best or self.latest[ranked_by] < self.best[ranked_by]
        if is_best:
            self.better = {name: self.latest[name] for name in (*EVALUATED, "step", "tokens") if name in self.latest}
        self.worse_in_a_row = 0 if is_best else self.worse_in_a_row + 1
        if self.session.rank == 0:
            name = self.task.experiment.measure
            scores = DocumentScores.of(rows, self.store.validation)
            self._keep_scores(step, scores)
            values = {f"eval/{what}": value for what, value in score.figures(name).items()}
            if "weighted_nll" in self.latest:
                values["eval/weighted_nll"] = self.latest["weighted_nll"]
            ends = document_scores.intervals(scores, name)
            values |= {f"eval/{end}": value for end, value in ends.items() if value is not None}
            if self.task.name:  # trials are compared by their best score, in MLflow while they run
                best = self.task.bests(self.latest if is_best else self.best)
                values |= summary.best_metrics(name, {key.removeprefix("best_"): best[key] for key in best})
            for each, found in by_source.items():
                values |= {f"validation/{each}/{what}": value for what, value in found.figures(name).items()}
            for each, found in sets.items():
                values |= {f"eval/{each}/{what}": value for what, value in found.figures(name).items()}
            self.task.run.log_metrics(values, step)
            self.task.report({"tokens": self.latest["tokens"], "perplexity": score.perplexity})
            self._keep_samples(step)
        if self._is_patience_over():
            self.control.should_training_stop = True
        is_last = step == task.last_step or self.control.should_training_stop
        self.control.should_save = is_best or is_last or self.stopped or step % task.budget.save_every == 0
        if not self.control.should_save:
            self._report()
        return {"eval_perplexity": score.perplexity}

    def _by_source(self, rows: np.ndarray) -> dict[str, Score]:
        """The score of each source that corpus.paths names, from the rows of the first validation documents."""
        split, names = self.store.validation, self.task.experiment.corpus.source_names
        if not names:
            return {}
        scores = {name: Score.of(rows[split.is_of(name)[: len(rows)]]) for name in names}
        return {name: score for name, score in scores.items() if score.tokens}

    def _weighted(self, scores: Mapping[str, Score]) -> float | None:
        """The weighted mean of the nll per token of sources and sets, by tune.metric; None without weights."""
        weights = self.task.experiment.tune.weights
        if not weights:
            return None
        missing = [name for name in weights if name not in scores]
        if missing:
            limit = self.task.experiment.eval.max_tokens
            way_out = "leave it out" if limit is None else f"raise eval.max_tokens, now {limit:,}, or leave it out"
            fault = f"tune.metric.{missing[0]}: no scored document is of {missing[0]}; {way_out}"
            raise CollectiveError(ConfigError(fault, "tune.metric"))
        total = sum(weight * scores[name].nll / scores[name].tokens for name, weight in weights.items())
        return total / sum(weights.values())

    def _keep_scores(self, step: int, scores: DocumentScores) -> None:
        """Keep the score of each document. Without it no difference to another trial is tested; training continues."""
        try:
            document_scores.write(self.task.directory, step, scores)
        except StorageError as error:
            self.say(f"the scores of single documents at step {step:,} are not kept: {error}")

    def _keep_samples(self, step: int) -> None:
        """Write and log the texts of eval.prompts. Without them the training continues."""
        experiment = self.task.experiment
        if not experiment.eval.prompts or self.is_fsdp_enabled:  # with shards all ranks would have to take part
            return
        try:
            with self.costs.evaluating():
                found = sampling.texts(self.model, experiment, self.store)
            rows = [
                {"tokens": self.latest["tokens"], "prompt": prompt, "text": text}
                for prompt, text in zip(experiment.eval.prompts, found, strict=True)
            ]
            self.task.run.log_file(samples.write(self.task.directory, step, rows), samples.FILE)
        except Exception as error:  # of a model that cannot generate, of memory, of storage
            self.say(f"the texts of eval.prompts at step {step:,} are not kept: {first_line(error)}")

    def score_untrained(self) -> None:
        """Score the weights before the first step. It is only logged: without a checkpoint they are never the best."""
        try:
            with self.costs.evaluating(), self.memory.for_scoring():
                score = Score.of(self._score(self.store.validation))
        except perplexity.EvaluationStopped:  # the training stops after its first step
            return
        if self.session.rank == 0 and math.isfinite(score.perplexity):
            figures = score.figures(self.task.experiment.measure)
            self.task.run.log_metrics({f"eval/{what}": value for what, value in figures.items()}, 0)
            self.task.report({"tokens": 0, "perplexity": score.perplexity})

    def _score_resumed(self) -> None:
        """Evaluate the weights that the run resumes from."""
        self._load_from_checkpoint(str(self.resumed))
        self.model.to(self.args.device)
        self.state.global_step = self.start_step
        self.evaluate()
        if self.is_unscored:  # asked to stop again
            return
        if self.better is not None:
            self.best, self.better = self.better, None
        if self.control.should_save:  # else it is reported
            self._report()

    def _is_patience_over(self) -> bool:
        patience = self.task.experiment.train.patience
        return patience is not None and self.worse_in_a_row >= patience

    def _evaluation(
        self, step: int, perplexity: float, bits_per_byte: float, weighted_nll: float | None
    ) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * self.task.budget.batch_tokens,
            "perplexity": perplexity,
            "bits_per_byte": bits_per_byte,
            **({} if weighted_nll is None else {"weighted_nll": weighted_nll}),
            "budget_tokens": self.task.budget.tokens,
            "seconds": time.monotonic() - self.started_at,
        }

    def _report(self) -> None:
        """Report the latest evaluation to Ray, and log what the training has cost up to it."""
        found = gathered(self.session, self.costs.peak_memory_bytes)
        peak = max((each for each in found if each is not None), default=None)
        if self.session.rank == 0:
            values = {f"{tracking.COST}{name}": value for name, value in self.costs.figures(peak).items()}
            self.task.run.log_metrics(values, self.state.global_step)
        self.session.report(self._metrics())

    def _metrics(self) -> dict[str, Any]:
        """The report to Ray: the latest evaluation, and the best one with its checkpoint."""
        return {**self.latest, **self.task.bests(self.best)}

    @property
    def masked(self) -> perplexity.MaskedTokens | None:
        """How a masked model is scored; None for other models."""
        experiment = self.task.experiment
        if not experiment.objective.is_masked:
            return None
        return perplexity.MaskedTokens.of(self.store.tokenizer, self.frame, experiment.eval.pseudo_perplexity)

    @property
    def frame(self) -> Frame:
        """The prefix and end of every document."""
        return self.store.frame(self.task.experiment.tokenizer.prefix)

    @cached_property
    def sets(self) -> dict[str, Documents]:
        """The evaluation sets by name."""
        return {name: tokens.open_store(path).train for name, path in self.task.sets.items()}

    @cached_property
    def keywords(self) -> objective.Keywords:
        return objective.Keywords(self.task.experiment.objective.keywords, self.store.tokenizer)

    def _score(self, documents: Documents) -> np.ndarray:
        """A row for each document, as `perplexity.score_documents` gives them."""
        progress = _EvaluationProgress(self.task, self.session, self.state.global_step)
        section, block_size = self.task.experiment.eval, self.task.experiment.blocks.block_size
        with self.float32_shards():
            return perplexity.score_documents(
                self.model,
                documents,
                frame=self.frame,
                context=perplexity.context_of(section, model.context(self.model.config), block_size),
                stride=section.stride,
                batch_tokens=section.batch_tokens,
                max_tokens=section.max_tokens,
                precision=section.precision,
                masked=self.masked,
                keywords=self.keywords,
                rank=self.session.rank,
                world_size=self.session.world_size,
                progress=progress.show,
                # Sharded weights cannot be scored before a resumed training starts.
                stopping=None if self.is_fsdp_enabled else progress.is_stopping,
            )

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            with self.costs.saving():
                super()._save_checkpoint(model, trial)
        except Exception as error:  # perhaps of this rank alone: CheckpointWriter.commit tells the others
            self.writer.failed = self.writer.failed or error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        try:
            super().save_model(output_dir, _internal_call)
        except Exception as error:  # this rank still takes part in gathering the optimizer's state
            self.writer.failed = error

    def _save(self, output_dir: str | None = None, state_dict: Mapping | None = None) -> None:
        directory = Path(output_dir or self.args.output_dir)
        is_adapted = self.task.experiment.model.lora is not None
        if is_adapted and not self.is_sharded:
            state_dict = lora.merged_state_dict(self.model)
        super()._save(str(directory), state_dict)
        if is_adapted and self.args.should_save:  # the other ranks have nothing to write
            if self.is_sharded:
                lora.save_description(self.model, directory)
            else:
                lora.save_updates(self.model, directory)
        (directory / "training_args.bin").unlink(missing_ok=True)  # a pickle

    def commit_checkpoint(self) -> None:
        """Commit the checkpoint that was just written locally, remove older ones, and report the evaluation."""
        step = self.state.global_step
        local = Path(self.args.output_dir) / f"checkpoint-{step}"
        best, self.better = self.better or self.best, None
        with self.costs.saving():
            self.writer.describe(local, *self._records(step, best, gathered(self.session, self._tr_loss.item())))
            is_last_chance = self.stopped or step == self.task.last_step or self._is_patience_over()
            if self.writer.commit(step, local, best=best.get("step"), is_last_chance=is_last_chance):
                self.best = best
        if self.latest.get("step") == step and self.best:
            self._report()

    def _records(self, step: int, best: dict[str, Any], losses: list[float]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of the model, with its score if it has one, and the progress that the Trainer does not save."""
        evaluated = self.latest if self.latest.get("step") == step else {}
        record = {
            "step": step,
            "tokens": step * self.task.budget.batch_tokens,
            "perplexity": evaluated.get("perplexity"),
            "bits_per_byte": evaluated.get("bits_per_byte"),
            **({"weighted_nll": evaluated["weighted_nll"]} if "weighted_nll" in evaluated else {}),
            "scored_on": summary.scored(self.task.experiment, self.store)["scored_on"],
            "scored_in": self.task.experiment.eval.precision,
            "best": best,
            "store": self.task.store,
            "prefix": summary.prefix(self.task.experiment, self.store),
            "unknown_tokens": self.store.validation.unknown_tokens,
            "mlflow_run_id": self.task.run.run_id,
        }
        progress = {
            "losses": losses,
            "logged_at": self._globalstep_last_logged,
            "worse_in_a_row": self.worse_in_a_row,
            "is_unscored": self.is_unscored,
            "world_size": self.session.world_size,
            "seconds": time.monotonic() - self.started_at,
            **self.costs.record(),
        }
        return record, progress

    # Stopping

    def check_stop(self) -> None:
        """Check whether to stop. Every rank does so after the same steps, about once a second."""
        step, now = self.state.global_step, time.monotonic()
        (last_step, last_time), self.last_check = self.last_check, (step, now)
        decision = None
        if self.session.rank == 0:
            stopping = self.task.channel is not None and self.task.channel.is_stopping()
            decision = (stopping, step + max(1, int((step - last_step) * STOP_CHECK_SECONDS / (now - last_time))))
        self.stopped, self.next_check = gathered(self.session, decision)[0]
        self.lost_nodes = self.session.lost_nodes()
        self.stopped = self.stopped or bool(self.lost_nodes)


class _EvaluationProgress:
    """Messages about a long evaluation, and whether to stop it; on rank 0 alone."""

    def __init__(self, task: TrainTask, session: Session, step: int):
        self.task, self.step = task, step
        self.is_first = session.rank == 0 and task.channel is not None
        self.shown_at = time.monotonic()
        self.checked_at = -math.inf

    def show(self, done: float, total: float | None) -> None:
        if self.is_first and time.monotonic() - self.shown_at > PROGRESS_SECONDS:
            self.shown_at = time.monotonic()
            self.task.say(f"evaluating after step {self.step:,}: {done:,.0f} of {total:,.0f} tokens")

    def is_stopping(self) -> bool:
        now = time.monotonic()
        if not self.is_first or now - self.checked_at < STOP_CHECK_SECONDS:
            return False
        self.checked_at = now
        return self.task.channel.is_stopping()


class _Reporting(TrainerCallback):
    """Decides when to evaluate, in steps of the budget, and logs the Trainer's own metrics."""

    def __init__(self, trainer: _Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Probe the model; restore the loss summed since it was last logged."""
        trainer = self.trainer
        trainer.probe()
        trainer.measure_peak()
        if trainer.task.is_scored_untrained and trainer.start_step == 0:
            trainer.score_untrained()
        trainer.last_check, trainer.next_check = (state.global_step, time.monotonic()), state.global_step + 1
        if trainer.resumed is None:
            return
        progress = json.loads((trainer.resumed / PROGRESS).read_text(encoding="utf-8"))
        losses = progress["losses"]
        same = progress["world_size"] == trainer.session.world_size
        trainer._tr_loss += losses[trainer.session.rank] if same else sum(losses) / len(losses)
        trainer._globalstep_last_logged = progress["logged_at"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.costs.step()
        budget = trainer.task.budget
        is_last = step == trainer.task.last_step
        control.should_evaluate = is_last or step % budget.eval_every == 0 or step % budget.save_every == 0
        control.should_log = control.should_log or is_last
        if step >= trainer.next_check and not is_last:
            trainer.check_stop()
        if trainer.stopped:
            control.should_save = True
        if trainer.stopped or is_last:
            control.should_training_stop = True
        if control.should_evaluate or control.should_log or control.should_save:
            trainer.gradients.check()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        names = {"loss": "train/loss", "learning_rate": "train/learning_rate", "grad_norm": "train/grad_norm"}
        values = {ours: logs[theirs] for theirs, ours in names.items() if logs and theirs in logs}
        if values and self.trainer.session.rank == 0:
            values["train/tokens"] = state.global_step * self.trainer.task.budget.batch_tokens
            self.trainer.task.run.log_metrics(values, state.global_step)
            self.trainer.task.run.log_system_metrics(state.global_step)
            if self.trainer.task.channel is not None:
                self.trainer.task.channel.advance(values["train/tokens"])
            if "train/loss" in values:
                self.trainer.task.report({"tokens": values["train/tokens"], "loss": values["train/loss"]})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.commit_checkpoint()
