"""train.* -> TrainingArguments, and train.arguments checked against that class."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import tempfile
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from raylm.budget import Budget
from raylm.config import Experiment, TrainConfig
from raylm.errors import ConfigError

# TrainingArguments that raylm derives or answers for, and the setting to use instead.
OWNED = {
    "learning_rate": "train.learning_rate",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "seed": "train.seed",
    "data_seed": "train.seed",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "tf32": "train.precision",
    "max_steps": "train.max_tokens",
    "num_train_epochs": "train.num_epochs",
    "per_device_train_batch_size": "train.batch_tokens and train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "per_device_eval_batch_size": "eval.batch_tokens",
    "eval_strategy": "train.eval_every_tokens",
    "eval_steps": "train.eval_every_tokens",
    "save_strategy": "train.save_every_tokens",
    "save_steps": "train.save_every_tokens",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "storage",
    "report_to": "tracking.uri",
    "use_cpu": "cluster.use_gpu",
    "no_cuda": "cluster.use_gpu",
    "hub_token": "HF_TOKEN in the environment",
    "push_to_hub": "nothing: raylm push publishes a model",
    "auto_find_batch_size": "train.micro_batch_tokens",
    "train_sampling_strategy": "train.seed",
    "eval_on_start": "train.eval_every_tokens",
    "save_only_model": "train.save_every_tokens",
    "load_best_model_at_end": "nothing: the best checkpoint is kept and exported",
    "ignore_data_skip": "nothing: a run that goes on begins at its own example",
    "enable_jit_checkpoint": "nothing: a run that is asked to stop saves a checkpoint",
    "logging_nan_inf_filter": "nothing: a loss that is not finite ends the run",
}


def check(section: TrainConfig, *, has_updates: bool = False) -> None:
    """Refuse what the Trainer would refuse on the workers, with model.lora if that `has_updates` of its own."""
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
    if section.arguments.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        key = "train.arguments.deepspeed"
        raise ConfigError(
            f"{key} needs deepspeed, which is not installed: pip install deepspeed, or set train.arguments.fsdp=true",
            where=key,
        )
    kind = {"lr_scheduler_type": section.lr_scheduler_type}
    with tempfile.TemporaryDirectory() as directory:
        try:
            made = TrainingArguments(output_dir=directory, use_cpu=True, **kind, **section.arguments)
        except (ImportError, TypeError, ValueError) as error:
            problem = str(error).strip().split("\n")[0]
            raise ConfigError(f"train.arguments: {problem}", where="train.arguments") from None
    if made.fsdp and has_updates:
        raise ConfigError("model.lora cannot be combined with train.arguments.fsdp; leave one out", where="model.lora")
    if made.deepspeed and made.hf_deepspeed_config.is_zero3():
        key = "train.arguments.deepspeed.zero_optimization.stage"
        raise ConfigError(f"{key} must be 1 or 2, got 3; train.arguments.fsdp=true shares out the weights", where=key)
    sharding = made.fsdp_plugin_args or {}
    for name, only in (("fsdp_version", 2), ("state_dict_type", "FULL_STATE_DICT")):
        if (found := sharding.get(name, only)) != only:
            key = f"train.arguments.fsdp_config.{name.removeprefix('fsdp_')}"
            raise ConfigError(f"{key} must be {only}, got {found}; leave it out", where=key)


def of(experiment: Experiment, budget: Budget, scratch: str) -> TrainingArguments:
    """The arguments of one worker's Trainer, which writes to `scratch`."""
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
        "eval_strategy": "no",  # trainer._Schedule says when to evaluate and save
        "save_strategy": "no",
        "ignore_data_skip": True,  # the sampler begins at the right one, instead of reading all before it
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},
        "ddp_find_unused_parameters": False,
        **precision(section, on_gpu),
    }
    return TrainingArguments(**{**ours, **section.arguments})


def precision(section: TrainConfig, on_gpu: bool) -> dict[str, bool]:
    """The mixed precision of a worker, as TrainingArguments says it."""
    kind = section.precision
    if kind == "auto":
        kind = "bfloat16" if computes_in_bfloat16(on_gpu) else "float32"
    tf32 = {"tf32": True} if on_gpu and section.precision != "float32" else {}
    return {"bf16": kind == "bfloat16", "fp16": kind == "float16", **tf32}


def computes_in_bfloat16(on_gpu: bool) -> bool:
    """Whether the hardware does: elsewhere it is emulated, on a CPU 20 times as slow as float32."""
    if on_gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
