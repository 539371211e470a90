"""What other tools call a setting: transformers' run_clm.py and TrainingArguments, axolotl, LLaMA-Factory, litgpt."""

from __future__ import annotations

from collections.abc import Sequence

from raylm.config.experiment import Experiment
from raylm.config.sections import section_of

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
    # transformers' run_clm.py and TrainingArguments
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
    "warmup_ratio": "train.warmup_steps",
    **{name: f"train.arguments.{name}" for name in (
        "adam_beta1", "adam_beta2", "adam_epsilon", "deepspeed", "fsdp_config", "gradient_checkpointing",
        "label_smoothing_factor", "logging_steps", "lr_scheduler_kwargs", "max_grad_norm", "neftune_noise_alpha",
    )},
    # axolotl
    "base_model": "model.path",
    "revision_of_model": "model.revision",
    "tokenizer_config": "tokenizer.path",
    "field_messages": "corpus.messages",
    "text_column": "corpus.text",
    "dataset_exact_deduplication": "corpus.deduplicate",
    "sequence_len": "blocks.block_size",
    "lr_scheduler": "train.lr_scheduler_type",
    "early_stopping_patience": "train.patience",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "ray_num_workers": "cluster.num_workers",
    "mlflow_tracking_uri": "tracking.uri",
    "mlflow_experiment_name": "tracking.experiment",
    # LLaMA-Factory
    "lora_rank": "model.lora.r",
    "cutoff_len": "blocks.block_size",
    "max_samples": "corpus.max_documents",
    "neat_packing": "blocks.isolate_documents",
    # litgpt
    "initial_checkpoint_dir": "model.path",
    "checkpoint_dir": "model.path",
    "tokenizer_dir": "tokenizer.path",
    "out_dir": "storage",
    "train_data_path": "corpus.paths",
    "val_data_path": "corpus.validation_paths",
    "epochs": "train.num_epochs",
    "lr_warmup_steps": "train.warmup_steps",
    "max_seq_length": "blocks.block_size",
    "max_norm": "train.arguments.max_grad_norm",
    "lr": "train.learning_rate",
}  # fmt: skip
"""Keys with another name than the setting that takes the same value."""

_BATCH = "train.batch_tokens and train.micro_batch_tokens"
_LEARNED = "corpus.text for what is learned and corpus.prompt for what is not"
_MINIMUM = "train.lr_scheduler_type=cosine_with_min_lr and train.arguments.lr_scheduler_kwargs"
_RESUMES = "nothing: the same command resumes, unless --resume says otherwise"
_WHOLE = "nothing: weights are trained as they are, not quantized"
_MLFLOW = "nothing: numbers go to MLflow, tracking.uri"

OTHERS = {
    # transformers' run_clm.py and TrainingArguments
    "model_type": "model.config, {model_type: gpt2}",
    "config_overrides": "model.config, {model_type: gpt2, n_layer: 4}",
    "dtype": "model.dtype, float32 or bfloat16",
    "torch_dtype": "model.dtype, float32 or bfloat16",
    "cache_dir": "HF_HOME in the environment",
    "use_fast_tokenizer": "nothing: tokenizers are fast ones",
    "dataset_name": "corpus.paths, hub://NAME",
    "dataset_config_name": "corpus.paths, hub://NAME?config=...",
    "streaming": "corpus.paths, hub://NAME?streaming=true",
    "max_eval_samples": "eval.max_tokens, in tokens",
    "validation_split_percentage": "corpus.validation_fraction, a fraction",
    "overwrite_cache": "nothing: tokens are made again when their text or settings change",
    "preprocessing_num_workers": "nothing: all CPUs prepare tokens",
    "keep_linebreaks": "nothing: text stays as it is",
    "do_train": "nothing: raylm train trains",
    "do_eval": "nothing: every training evaluates",
    "overwrite_output_dir": "nothing: a new run has a directory of its own",
    "resume_from_checkpoint": _RESUMES,
    # axolotl
    "datasets": "corpus.paths, and a column as corpus.text, corpus.prompt or corpus.messages",
    "pretraining_dataset": "corpus.paths, and a column as corpus.text",
    "test_datasets": "corpus.validation_paths",
    "val_set_size": "corpus.validation_fraction, a fraction",
    "dataset_prepared_path": "storage, where tokens are, too",
    "field": "corpus.text",
    "chat_template": "nothing: conversations are written by the tokenizer's own chat template",
    "train_on_inputs": _LEARNED,
    "sample_packing": "blocks.packing=packed and blocks.isolate_documents=true",
    "eval_sample_packing": "nothing: scores do not depend on how documents are batched",
    "pad_to_sequence_len": "nothing: packed blocks are full",
    "micro_batch_size": "train.micro_batch_tokens, in tokens",
    "batch_size": "train.batch_tokens, in tokens",
    "eval_batch_size": "eval.batch_tokens, in tokens",
    "cosine_min_lr_ratio": _MINIMUM,
    "evals_per_epoch": "train.eval_every_tokens, in tokens",
    "saves_per_epoch": "train.save_every_tokens, in tokens",
    "adapter": "model.lora, {} for its defaults",
    "lora_target_linear": "model.lora.target_modules=all-linear",
    "load_in_8bit": _WHOLE,
    "load_in_4bit": _WHOLE,
    "flash_attention": "model.attn_implementation=flash_attention_2",
    "sdp_attention": "model.attn_implementation=sdpa",
    "eager_attention": "model.attn_implementation=eager",
    "special_tokens": "tokenizer.eos_token, or tokenizer.train.special_tokens for a tokenizer that is trained",
    "group_by_length": "nothing: packed blocks have one length",
    "loss_watchdog_threshold": "nothing: a run with a loss that is not finite fails",
    "rl": "nothing: there is no training on preferences",
    "use_ray": "nothing: raylm is on Ray",
    "hub_model_id": "nothing: raylm push publishes a model",
    "wandb_project": _MLFLOW,
    # LLaMA-Factory
    "stage": "corpus.text for pt, corpus.prompt or corpus.messages for sft",
    "finetuning_type": "model.lora, {} for its defaults",
    "lora_target": "model.lora.target_modules, all-linear for all",
    "adapter_name_or_path": "nothing: a checkpoint has its updates merged, and is a model.path",
    "train_from_scratch": "model.config, {path: MODEL}",
    "dataset": "corpus.paths",
    "dataset_dir": "corpus.paths",
    "eval_dataset": "corpus.validation_paths",
    "val_size": "corpus.validation_fraction, a fraction",
    "template": "nothing: conversations are written by the tokenizer's own chat template",
    "train_on_prompt": _LEARNED,
    "mask_history": "nothing: all that the assistant says is learned",
    "packing": "blocks.packing, packed or padded",
    "mix_strategy": "blocks.mixture, weights of named sources",
    "interleave_probs": "blocks.mixture, weights of named sources",
    "tokenized_path": "storage, where tokens are, too",
    "flash_attn": "model.attn_implementation, flash_attention_2 or sdpa",
    "quantization_bit": _WHOLE,
    "pure_bf16": "model.dtype=bfloat16",
    "plot_loss": "nothing: MLflow has the curves",
    # litgpt
    "model_name": "model.config, or model.path for one with weights",
    "model_config": "model.config, by the fields of its transformers configuration",
    "precision": "train.precision, bfloat16 for bf16-mixed",
    "data": "corpus.paths",
    "global_batch_size": "train.batch_tokens, in tokens",
    "lr_warmup_fraction": "train.warmup_steps, a fraction of all steps",
    "save_interval": "train.save_every_tokens, in tokens",
    "min_lr": _MINIMUM,
    "tie_embeddings": "model.config, {tie_word_embeddings: true}",
    "eval.interval": "train.eval_every_tokens, in tokens",
    "eval.max_iters": "eval.max_tokens, in tokens",
    "initial_validation": "nothing: evaluations start after the first steps",
    "class_path": "train.optimizer, by its name in transformers",
    "betas": "train.arguments.adam_beta1 and train.arguments.adam_beta2",
    "devices": "cluster.num_workers",
    "num_nodes": "cluster.num_workers, on however many nodes",
    "logger_name": _MLFLOW,
    "resume": _RESUMES,
}
"""Keys whose value is given otherwise, or not at all: docs/coming-from.md has all of them, by tool."""


def meant_by(key: str) -> str | None:
    """What to use for another tool's key, with or without its section: settings, or `nothing: why`; None if unknown.

    "base_model"        "model.path"
    "eval.interval"     "train.eval_every_tokens, in tokens"
    "load_in_4bit"      "nothing: weights are trained as they are, not quantized"
    """
    for name in (key, key.rpartition(".")[2]):
        for table in (SAME, OTHERS, OWNED):
            if name in table:
                return table[name]
    return None


def settings_named(name: str) -> list[str]:
    """The dotted keys of the settings with this name, in all sections."""
    sections = ((key, section_of(Experiment, key)) for key in Experiment.model_fields)
    return [f"{key}.{name}" for key, section in sections if section is not None and name in section.model_fields]


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
        alike = settings_named(name) if name not in OTHERS else []
        same = SAME.get(name) or SAME.get(name.rpartition(".")[2]) or (alike[0] if len(alike) == 1 else None)
        if same is not None:
            settings.append(f"{same}={value}")
        elif name == "dataset_name":
            settings.append(f"corpus.paths=hub://{value}")
        elif theirs := meant_by(name):
            what, _, why = theirs.partition(": ") if theirs.startswith("nothing") else (theirs, "", "")
            others.append(f"{what} for {option}{f' ({why})' if why else ''}")
    return ", ".join(filter(None, [" ".join(settings), *others]))
