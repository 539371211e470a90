"""What other tools call a setting: TrainingArguments of transformers, and the options of its example run_clm.py."""

from __future__ import annotations

from collections.abc import Sequence

from raylm.config.setting_errors import settings_named

# TrainingArguments that raylm derives or answers for, and the setting to use instead.
OWNED = {
    "learning_rate": "train.learning_rate",
    "warmup_steps": "train.warmup_steps",
    "weight_decay": "train.weight_decay",
    "lr_scheduler_type": "train.lr_scheduler_type",
    "seed": "train.seed",
    "data_seed": "train.data_seed",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "tf32": "train.precision",
    "torch_compile": "train.compile",
    "optim": "train.optimizer",
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
    "train_sampling_strategy": "train.data_seed",
    "eval_on_start": "train.eval_every_tokens",
    "save_only_model": "train.save_every_tokens",
    "load_best_model_at_end": "nothing: the best checkpoint is kept and exported",
    "ignore_data_skip": "nothing: a resumed run starts at its next example",
    "enable_jit_checkpoint": "nothing: a run that is asked to stop saves a checkpoint",
    "logging_nan_inf_filter": "nothing: a run with a loss that is not finite fails",
}

SAME = {
    "model_name_or_path": "model.path",
    "model_revision": "model.revision",
    "config_name": "model.config.path",
    "tokenizer_name": "tokenizer.path",
    "train_file": "corpus.paths",
    "validation_file": "corpus.validation_paths",
    "test_file": "corpus.test_paths",
    "max_train_samples": "corpus.max_documents",
    "num_train_epochs": "train.num_epochs",
    "save_total_limit": "train.keep_checkpoints",
    "output_dir": "storage",
}
"""Options with another name than the setting that takes the same value."""


def as_settings(arguments: Sequence[str], known: Sequence[str]) -> str:
    """The settings to use for the options of a command line that are not `known`; empty if there are none.

    --learning_rate 1e-3 --seed=1 --max_steps 9
    "train.learning_rate=1e-3 train.seed=1, train.max_tokens for --max_steps"
    """
    settings, others = [], []
    for position, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or option in known:
            continue
        name = option.removeprefix("--").replace("-", "_")
        following = arguments[position + 1] if position + 1 < len(arguments) else "--"
        value = value if equals else "..." if following.startswith("--") or "=" in following else following
        alike = settings_named(name)
        if name in SAME or len(alike) == 1:
            settings.append(f"{SAME.get(name) or alike[0]}={value}")
        elif name == "dataset_name":
            settings.append(f"corpus.paths=hub://{value}")
        elif name in OWNED:
            others.append(f"{OWNED[name]} for {option}")
    return ", ".join(filter(None, [" ".join(settings), *others]))
