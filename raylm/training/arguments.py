"""train.* -> TrainingArguments, and train.arguments checked against that class."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_tf32_available

from raylm import scorer
from raylm.budget import Budget
from raylm.config import OWNED, Experiment, TrainConfig
from raylm.errors import ConfigError, did_you_mean, first_line

BY_SCORE = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)
"""Schedules that the Trainer steps after evaluations of its own."""

WITH_MINIMUM = (SchedulerType.COSINE_WITH_MIN_LR, SchedulerType.COSINE_WARMUP_WITH_MIN_LR)

REFUSED = {
    "use_liger_kernel": "puts a loss of its own in place of raylm's, and it would be divided twice; leave it out: "
    "raylm's holds no whole logits either",
    "parallelism_config": "has several workers share one block, and a step would have fewer tokens than "
    "train.batch_tokens; leave it out, and set train.arguments.fsdp=true for a model that is too large for one worker",
}
"""Arguments with which numbers would be wrong without a word, and why."""

STEPS = 100
"""Of the training that a schedule is tried for."""


def check_settings(section: TrainConfig) -> None:
    """ConfigError for what the Trainer would refuse on the workers."""
    schedules = [schedule.value for schedule in SchedulerType if schedule not in BY_SCORE]
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
            guess = did_you_mean(name, known)
            hint = f", {guess}" if guess else ""
            raise ConfigError(f"{key}: not a field of transformers.TrainingArguments{hint}", where=key)
        if name in REFUSED and section.arguments[name]:
            raise ConfigError(f"{key} {REFUSED[name]}", where=key)
    if section.arguments.get("deepspeed") and importlib.util.find_spec("deepspeed") is None:
        key = "train.arguments.deepspeed"  # without it the Trainer would fail on the workers alone
        raise ConfigError(
            f"{key} needs deepspeed, which is not installed: pip install deepspeed, or set train.arguments.fsdp=true",
            where=key,
        )
    kind = {"lr_scheduler_type": section.lr_scheduler_type, **_optimizer(section)}
    with tempfile.TemporaryDirectory() as directory:
        try:
            made = TrainingArguments(output_dir=directory, use_cpu=True, **kind, **section.arguments)
        except (ImportError, TypeError, ValueError) as error:
            raise ConfigError(f"train.arguments: {first_line(error)}", where="train.arguments") from None
    _check_schedule(made)
    _check_loading(made)
    if not isinstance(made.ddp_timeout, int) or made.ddp_timeout < 1:
        key = "train.arguments.ddp_timeout"
        raise ConfigError(f"{key} must be a whole number of seconds, at least 1, got {made.ddp_timeout!r}", where=key)
    if "optim" in kind:
        _check_optimizer(made)
    if section.optimizer == "muon" and (made.fsdp or made.deepspeed):
        raise ConfigError(
            "train.optimizer must be another one with train.arguments.fsdp or .deepspeed, got muon, which needs whole "
            "matrices",
            where="train.optimizer",
        )
    if made.deepspeed and made.hf_deepspeed_config.is_zero3():
        key = "train.arguments.deepspeed.zero_optimization.stage"
        raise ConfigError(f"{key} must be 1 or 2, got 3; train.arguments.fsdp=true shares out the weights", where=key)
    if made.fsdp and (section.compile == "on" or made.torch_compile):
        raise ConfigError(
            "train.compile must be off with train.arguments.fsdp, got on: sharded weights that are compiled can be "
            "trained, but not scored",
            where="train.compile",
        )
    sharding = made.fsdp_plugin_args or {}
    if sharding.get("activation_checkpointing"):
        key = "train.arguments.fsdp_config.activation_checkpointing"
        raise ConfigError(
            f"{key}: what is computed again has other dropout than before, and gradients are wrong; set "
            "train.arguments.gradient_checkpointing=true instead",
            where=key,
        )
    for name, only in (("fsdp_version", 2), ("state_dict_type", "FULL_STATE_DICT")):
        if (found := sharding.get(name, only)) != only:
            key = f"train.arguments.fsdp_config.{name.removeprefix('fsdp_')}"
            raise ConfigError(f"{key} must be {only}, got {found}; leave it out", where=key)


def _check_schedule(made: TrainingArguments) -> None:
    """ConfigError if the schedule does not take the arguments that it will get."""
    weights = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=made.learning_rate)
    try:
        get_scheduler(made.lr_scheduler_type, weights, 0, STEPS, _schedule_arguments(made, STEPS // 10))
    except (TypeError, ValueError) as error:
        key = "train.arguments.lr_scheduler_kwargs"
        raise ConfigError(
            f"{key}={made.lr_scheduler_kwargs} is not what train.lr_scheduler_type={made.lr_scheduler_type.value} "
            f"takes: {first_line(error)}",
            where=key,
        ) from None


def _check_loading(made: TrainingArguments) -> None:
    """ConfigError if the Trainer would take other examples for a step than train.batch_tokens says, or in any order."""
    settings = made.accelerator_config
    faults = {
        "accelerator_config.split_batches": settings.split_batches
        and "each worker would get a part of its micro-batch, and a step fewer tokens than train.batch_tokens",
        "accelerator_config.gradient_accumulation_kwargs.num_steps": "num_steps"
        in (settings.gradient_accumulation_kwargs or {})
        and "it is derived from train.batch_tokens and train.micro_batch_tokens",
        "dataloader_in_order": not made.dataloader_in_order
        and "a run that resumes would see some examples twice and others never",
    }
    for name, problem in faults.items():
        if problem:
            key = f"train.arguments.{name}"
            raise ConfigError(f"{key}: {problem}; leave it out", where=key)


def _optimizer(section: TrainConfig) -> dict[str, str]:
    """train.optimizer as an argument of the Trainer; empty for AdamW, its default, and Muon, which is raylm's."""
    if section.optimizer in ("adamw", "muon"):
        return {}
    known = [name.value for name in OptimizerNames]
    if section.optimizer not in known:
        guess = did_you_mean(section.optimizer, ["adamw", "muon", *known])
        raise ConfigError(
            "train.optimizer must be adamw, muon or the name of an optimizer of transformers, such as adafactor, got "
            f"{section.optimizer!r}{f'; {guess}' if guess else ''}",
            where="train.optimizer",
        )
    return {"optim": section.optimizer}


def _check_optimizer(made: TrainingArguments) -> None:
    """ConfigError if the optimizer does not do here, or cannot be had: one of a package that is not installed."""
    from transformers import Trainer  # 2 s, which the usual optimizer does not need

    key, name, problem = "train.optimizer", made.optim.value, ""
    if name.startswith("schedule_free"):
        problem = (
            "the weights that it trains are not those to score and keep, and a run that resumes would start its "
            "average again; take adamw with train.lr_scheduler_type=constant_with_warmup"
        )
    elif name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        problem = (
            "it changes the weights in every backward pass, so once a micro-batch, not once a step of "
            "train.batch_tokens; take adamw or adafactor"
        )
    else:
        try:
            Trainer.get_optimizer_cls_and_kwargs(made)
        except (ImportError, ValueError) as error:
            problem = first_line(error)
            if "pass a" in problem:  # model, to some optimizers
                return
    if problem:
        raise ConfigError(f"{key}={name}: {problem}", where=key)


def _schedule_arguments(made: TrainingArguments, decay_steps: int) -> dict[str, Any]:
    """The arguments of the schedule's own, with what transformers leaves to the user where it is not given."""
    given = made.lr_scheduler_kwargs or {}
    if made.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY:
        # This shape ends lower than a line or a cosine (Hägele et al. 2024, arXiv:2405.18392).
        return {"num_decay_steps": decay_steps, "decay_type": "1-sqrt", **given}
    if made.lr_scheduler_type in WITH_MINIMUM and "min_lr" not in given:
        return {"min_lr_rate": 0.1, **given}
    return given


def build(experiment: Experiment, budget: Budget, scratch: str) -> TrainingArguments:
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
        "eval_strategy": "no",  # trainer._Reporting says when to evaluate and save
        "save_strategy": "no",
        "ignore_data_skip": True,  # the sampler starts at the right example, instead of reading all before it
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": not on_gpu,
        "torch_compile": section.compile == "on",
        "dataloader_pin_memory": on_gpu,
        "accelerator_config": {"non_blocking": on_gpu},
        "ddp_find_unused_parameters": False,
        **_optimizer(section),
        **precision(section, on_gpu),
    }
    made = TrainingArguments(**{**ours, **section.arguments})
    if on_gpu:  # both ways: a trial's process may have trained another one before
        scorer.set_tf32(section.precision != "float32" and is_torch_tf32_available())
    made.lr_scheduler_kwargs = _schedule_arguments(made, budget.decay_steps)
    return made


def precision(section: TrainConfig, on_gpu: bool) -> dict[str, bool]:
    """The mixed precision of a worker, as TrainingArguments says it."""
    kind = fastest(on_gpu) if section.precision == "auto" else section.precision
    return {"bf16": kind == "bfloat16", "fp16": kind == "float16"}


def fastest(on_gpu: bool) -> str:
    """The precision for auto on this machine: bfloat16 where there is hardware for its products, else float32.

    On a CPU that is AMX, with 16 times the products of float32 a cycle. avx512_bf16 alone has at most twice as many,
    and a run there keeps the bits of float32: a step of GPT-2 of 1 x 16, 4 x 256 and 6 x 384 took 0.9, 0.67 and 0.46 of
    the time in bfloat16 (AMD EPYC, one thread). Without either it is emulated, 20 times as slow as float32.
    """
    if on_gpu:
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return "bfloat16" if is_native else "float32"
