"""Every setting of an experiment: its type, default, unit and effect.

A section is named like the module that reads it. This file knows nothing of YAML or command lines.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from raylm.config.values import (
    AmountOrAuto,
    ClassNames,
    Column,
    Count,
    Duplicates,
    Encoding,
    Escaped,
    Metric,
    NamedPaths,
    Numbers,
    OtherResources,
    Points,
    RegisteredName,
    RegularExpression,
    Strings,
    Switch,
    Workers,
)
from raylm.errors import ConfigError

SplitName = Literal["train", "validation", "test"]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    exclusive: ClassVar[tuple[str, ...]] = ()
    """Settings of which at most one may be given; one of a later layer replaces one of an earlier layer."""

    @classmethod
    def conflict(cls, values: Mapping[str, Any]) -> list[str]:
        """The exclusive settings among the values, if they are more than one."""
        given = [name for name in cls.exclusive if values.get(name) is not None]
        return given if len(given) > 1 else []

    @model_validator(mode="after")
    def _one_of_exclusive(self) -> Section:
        if names := self.conflict(self.__dict__):
            raise PydanticCustomError("exclusive", "exclude each other", {"names": names})
        return self


def section_of(section: type[BaseModel] | None, name: str) -> Any:
    """The section class of a field; None if the field is not a section."""
    field = section.model_fields.get(name) if section else None
    kinds = (field.annotation, *typing.get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


class CorpusConfig(Section):
    paths: NamedPaths = ()
    """Sources of text: files, directories, globs, s3:// and other URIs; hub://ID?split=train[:5000] (also &config=,
    &revision=, &streaming=true); python://stdlib and python://PACKAGE for source code. Or several named sources:
    {books: a/*.txt, code: [b, c]}, which are scored one by one and mixed by blocks.mixture."""
    text: Column = "text"
    """Column that holds the text, as a dotted path (answers.text), or a template of several columns: "Question:
    {question}\\nAnswer: {answers.text}". A template whose columns all belong to one list of objects, "{messages.role}:
    {messages.content}", is filled in for each object."""
    prompt: Column | None = None
    """Column or template of what stands before the text and is not learned, "Question: {question}\\nAnswer: ": the loss
    and all scores are of the tokens of `text` alone. Spaces at the end of the prompt are the beginning of the answer,
    because tokens contain the space before a word."""
    messages: str | None = None
    """Column that holds conversations, lists of {role, content} or {from, value}, instead of text; a dotted path may
    lead to it. The tokenizer's chat template writes them, and the loss and all scores are of what the assistant says
    alone, with the token that ends it unless that is the end of the document, which is learned and never scored."""
    tokens: str | None = None
    """Column that holds token ids instead of text, made by the tokenizer of tokenizer.path or model.path; a dotted path
    may lead to it. Special tokens in front of a document and at its end are removed, because tokenizer.prefix puts them
    there. Evaluation sets and prompts are text."""
    join: Escaped = " "
    """Separator between the texts of a column that holds a list of texts."""
    separator: Escaped | None = None
    """End of a document in plain text files: with \\n every line is a document, with \\n\\n every paragraph. Default:
    each file is one document."""
    encoding: Encoding = "utf-8"
    """Encoding of plain text and CSV files, by its name in Python: cp1252, gb18030, utf-16. A byte order mark in a file
    takes precedence."""
    validation_paths: Strings = ()
    """Sources of validation text, instead of a fraction of `paths`."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the text that is held out for validation, chosen by a hash of the content of each document or
    passage. Not used with validation_paths."""
    test_paths: Strings = ()
    """Sources of test text: no trial and no checkpoint is chosen by it. The best model alone is scored on it, once."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the text that is held out for the test split, chosen by hash like the validation split, which stays
    the same. Not used with test_paths."""
    split_by: Literal["document", "passage"] | None = None
    """Unit that is held out: document, or passage of 500 to 1,000 characters for a corpus of few long documents.
    Default: passage if there are fewer than 50 documents."""
    keep_any: Strings = ()
    """Keep only documents that contain at least one of these strings; empty keeps all."""
    keep_matching: RegularExpression | None = None
    """Keep only documents in which this regular expression is found."""
    min_chars: Annotated[Count, Field(ge=1)] | None = None
    """Keep only documents of at least this many characters."""
    max_chars: Annotated[Count, Field(ge=1)] | None = None
    """Keep only documents of at most this many characters."""
    deduplicate: Duplicates = False
    """Keep only the first of several documents that are the same. exact (or true): the same text. near: also texts that
    share about three quarters of their words in order, found by MinHash. No duplicate of held-out text is trained on.
    The corpus is read twice."""
    max_documents: Annotated[Count, Field(ge=1)] | None = None
    """Keep at most this many documents: the first of each source in turn, then the second of each, and so on."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Whether a document that cannot be read (not UTF-8, not JSON, no text) is an error or is skipped, counted and
    listed in the store's rejected.jsonl. An unreadable plain text file in a directory or glob is always skipped."""

    @property
    def entries(self) -> tuple[tuple[str | None, str], ...]:
        """(name of the source, one of its paths) for each path of `paths`; the name is None without names."""
        if isinstance(self.paths, Mapping):
            return tuple((name, path) for name, paths in self.paths.items() for path in paths)
        return tuple((None, path) for path in self.paths)

    @property
    def labels(self) -> tuple[str, ...]:
        """For each path of `paths` the name of its source, or the path itself."""
        return tuple(name or path for name, path in self.entries)

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names in `paths`; empty if it has none."""
        return tuple(self.paths) if isinstance(self.paths, Mapping) else ()

    @property
    def not_given(self) -> set[str]:
        """The settings for rows that hold something else than text, if they are not given: a corpus of text does not
        depend on them."""
        return {name for name in ("tokens", "prompt", "messages") if getattr(self, name) is None}

    @property
    def has_prompts(self) -> bool:
        """Whether only a part of each document is learned and scored."""
        return self.prompt is not None or self.messages is not None

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """The splits of the corpus."""
        has_test = bool(self.test_paths or self.test_fraction)
        return ("train", "validation", "test") if has_test else ("train", "validation")


class TrainedTokenizer(Section):
    kind: Literal["byte_bpe", "wordpiece", "unigram"] = "byte_bpe"
    """Type of tokenizer. byte_bpe: byte-level byte-pair encoding, as in GPT-2. wordpiece: as in BERT. unigram: as in
    T5."""
    vocab_size: Annotated[Count, Field(ge=257)] = 8192
    """Number of entries of the vocabulary, including special tokens."""
    min_frequency: Annotated[Count, Field(ge=1)] = 2
    """Number of times that the corpus must contain a pair of tokens before it is merged. Not used by unigram."""
    special_tokens: Annotated[Strings, Field(min_length=1)] = ("<|endoftext|>",)
    """Special tokens. The first is the end-of-text token; <mask> or [MASK] becomes the mask token, and <pad>, [PAD],
    <unk> and [UNK] likewise."""


class TokenizerConfig(Section):
    exclusive: ClassVar = ("path", "train")
    path: str | None = None
    """Tokenizer to load: a directory or Hub id. Default: the model's own, from model.path."""
    train: TrainedTokenizer | None = None
    """Tokenizer to train on the corpus, instead of `path`; `{}` for the defaults."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    gguf_file: str | None = None
    """GGUF file to read the tokenizer from, in the directory or repository of `path`."""
    eos_token: str | None = None
    """End-of-text token, one of those that the tokenizer has. Default: the tokenizer's own."""
    prefix: Literal["auto", "bos", "eos", "none"] = "auto"
    """Token before every document, in training, scores and prompts. auto: the begin-of-text token if the tokenizer adds
    it itself, as Llama's and Gemma's do; else the end-of-text token. none: no token, so that the first token of a
    document is not predicted. The token store does not depend on it."""


class BlocksConfig(Section):
    block_size: Annotated[Count, Field(ge=2)] = 512
    """Tokens per training example, which is the model's context during training."""
    packing: Literal["packed", "chunked", "padded"] = "packed"
    """How documents become examples. packed: joined by the end-of-text token and cut, so an example may span documents.
    chunked: windows inside a document, without short tails. padded: one document per example, truncated."""
    isolate_documents: bool = False
    """packed: whether attention stops at the boundaries of documents in a block, and positions restart with each
    document. Refused for models that ignore this, such as OPT, Falcon or Mamba."""
    mixture: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Weights of the sources that corpus.paths names: {books: 2, code: 1} gives books two thirds of the training
    tokens, whatever the sizes of both. Each is then an epoch by itself. Default: each text once in an epoch. The token
    store does not depend on it, so it can be swept: tune.space.blocks.mixture.books."""


class Lora(Section):
    r: Annotated[Count, Field(ge=1)] = 8
    """Rank of the update of each matrix."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Scale of the update: it is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the update's input."""
    target_modules: Strings = ()
    """Names of the layers to adapt, or all-linear. Default: peft's choice for the type of model."""
    modules_to_save: Strings = ()
    """Names of modules that are trained entirely, beside the updates, such as [embed_tokens, lm_head]. Of a tied
    embedding and output head each is then trained by itself."""
    export: Literal["merged", "adapter", "both"] = "merged"
    """What becomes of the best model. merged: a model that needs neither peft nor its base model. adapter: the updates
    alone, as peft loads them over the model at model.path. both: the merged model, with the adapter in its directory
    adapter."""


class Transfer(Section):
    base: Annotated[dict[str, Annotated[Count, Field(ge=1)]], Field(min_length=1)]
    """Sizes of the base, by their names in model.config: {n_embd: 128, n_layer: 2}. Those that are not named follow:
    heads and the MLP's width are proportional to the width, the number of layers is the model's."""


class ModelConfig(Section):
    exclusive: ClassVar = ("path", "config")
    path: str | None = None
    """Pretrained model: a directory or Hub id."""
    config: dict[str, Any] | None = None
    """New model, by fields of its transformers configuration: {model_type: gpt2, n_layer: 4, ...}; or by the fields
    that differ from another configuration: {path: distilgpt2, n_layer: 2, ...} (path: a directory, a config.json or a
    Hub id)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id, also for the model's own tokenizer."""
    gguf_file: str | None = None
    """GGUF file to read, in the directory or repository of `path`; its weights are dequantized."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and the optimizer's state. For mixed precision keep float32 and set train.precision."""
    attn_implementation: str | None = None
    """Implementation of attention: eager, sdpa, flash_attention_2, ... Default: transformers' choice."""
    lora: Lora | None = None
    """Low-rank updates (Hu et al. 2021, arXiv:2106.09685) to train instead of all weights; needs peft. `{}` for the
    defaults. Checkpoints contain the model with the updates merged."""
    transfer: Transfer | None = None
    """Smaller model of the same kind whose best settings are to be best for this one: {base: {n_embd: 128, n_layer:
    2}}. Initial values and the learning rate, weight decay and epsilon of each weight are scaled by width (muP, Yang et
    al. 2022, arXiv:2203.03466) and depth (CompleteP, Dey et al. 2025, arXiv:2505.01618); the base itself is trained as
    without it. For new models of gpt2, llama, mistral, qwen2 and qwen3 with adamw or muon."""
    pad_vocab_to: Annotated[Count, Field(ge=1)] | None = None
    """Multiple to which the vocabulary size of a new model is rounded up; 64, for example, is faster on GPUs."""
    trust_remote_code: bool = False
    """Whether to execute the code that comes with the model at `path`."""


class ObjectiveConfig(Section):
    kind: Literal["causal", "keyword_weighted", "masked", "fill_in_middle"] = "causal"
    """Training objective. causal: predict each next token. keyword_weighted: causal, with more weight on blocks that
    contain keywords. masked: predict masked tokens, as BERT does. fill_in_middle: causal, with some documents reordered
    as prefix, suffix, middle, for code models."""
    keywords: Strings = ()
    """Keywords such as [plt, pd, fit], each also with a space before it; one or several tokens long. keyword_weighted
    gives them more weight; with every kind, evaluations also report the perplexity on their tokens."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """keyword_weighted: the weight of a block is alpha x (1 + keywords in it). Only matters without normalize."""
    normalize: bool = True
    """keyword_weighted: whether to divide by the sum of weights over the global batch. false is the formula of the
    Hugging Face course, whose gradient grows with alpha and the number of keywords."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """masked: fraction of the tokens that are predicted."""
    rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """fill_in_middle: fraction of the documents that are reordered."""
    spm_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """fill_in_middle: fraction of the reordered documents that start with the suffix."""
    sentinels: Annotated[Strings, Field(min_length=3, max_length=3)] = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    """fill_in_middle: tokens before prefix, middle and suffix, which the tokenizer must have."""

    @property
    def is_masked(self) -> bool:
        return self.kind == "masked"


STABLE = "warmup_stable_decay"
"""The learning rate schedule that stays at its peak until it decays at the end."""


class TrainConfig(Section):
    exclusive: ClassVar = ("max_tokens", "num_epochs")
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate of the schedule."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Optimizer steps of linear warmup; a value below 1 is a fraction of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of the optimizer; not applied to biases and norms."""
    optimizer: str = "adamw"
    """Optimizer: adamw, muon, or another by its name in transformers, such as adafactor or sgd. muon: Muon for the
    matrices of the layers, with updates of the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that the same
    learning rates serve; AdamW for embeddings, head, biases and norms."""
    lr_scheduler_type: str = "linear"
    """Learning rate schedule after warmup, by its name in transformers: linear, cosine, constant_with_warmup, ... Its
    arguments are train.arguments.lr_scheduler_kwargs. Without them, warmup_stable_decay decays over the last tenth of
    the steps, by one minus the square root, and cosine_with_min_lr and cosine_warmup_with_min_lr decay to a tenth of
    the rate."""
    batch_tokens: Annotated[Count, Field(ge=2)] = 32768
    """Tokens of one optimizer step over all workers; a multiple of block_size x num_workers."""
    micro_batch_tokens: Annotated[Count, Field(ge=1)] = 8192
    """Maximum tokens of a forward pass on one worker. Affects memory only: the rest of a step is accumulated."""
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training budget in tokens, rounded down to whole steps. Default: one epoch."""
    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Training budget in epochs over the training split, instead of max_tokens."""
    seed: Annotated[Count, Field(ge=0)] = 0
    """Seed of the weights, dropout, the order of examples and the sweep's draws."""
    data_seed: Annotated[Count, Field(ge=0)] | None = None
    """Seed of the order of examples and of what is masked or reordered in them. Default: train.seed."""
    eval_every_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training tokens between evaluations. Default: a tenth of the budget."""
    save_every_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training tokens between checkpoints. The best evaluation so far and the last step are always saved. Default: save
    at every evaluation."""
    keep_checkpoints: Annotated[Count, Field(ge=1)] = 2
    """Number of most recent checkpoints to keep, besides the best one."""
    patience: Annotated[Count, Field(ge=1)] | None = None
    """Number of consecutive evaluations without a better perplexity after which training stops. Default: train to the
    end of the budget."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    """Mixed-precision dtype for training; weights keep model.dtype, and scores are computed in eval.precision. auto:
    bfloat16 on GPUs that have it, with TF32 for the rest, and on CPUs with AMX; else float32. Decided when a run or
    sweep starts, and kept when it resumes."""
    compile: Switch = "off"
    """Whether torch.compile compiles the model: on two CPUs a step takes 0.9 of the time, after 20 s of compiling.
    auto: in a training that is expected to take five minutes or more, but not in a sweep, whose trials are compiled one
    by one. Decided when a run starts, and kept when it resumes, because sums differ in their last bits."""
    peak_flops: Annotated[float, Field(ge=1e9)] | None = None
    """Floating-point operations a second that the device of a worker can do in the arithmetic of the training, of which
    `mfu` is a fraction: 312e12. Default: by the data sheet of a known GPU, or measured on a CPU in a tenth of a
    second."""
    callbacks: ClassNames = ()
    """Classes of transformers.TrainerCallback to add to the Trainer, as package.module:Class; every worker creates one
    of each without arguments."""
    arguments: dict[str, Any] = {}
    """Any other field of transformers' TrainingArguments, by its name."""

    @property
    def seed_of_data(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    def decay_steps(self, steps: int) -> int:
        """Of so many steps those at the end in which the learning rate of warmup_stable_decay decays; 0 for other
        schedules."""
        if self.lr_scheduler_type != STABLE:
            return 0
        given = (self.arguments.get("lr_scheduler_kwargs") or {}).get("num_decay_steps")
        return given if isinstance(given, int) else max(1, steps // 10)


WHOLE_SPLIT = "the whole validation split"
"""The documents that are scored unless eval.max_tokens limits them."""


class EvalConfig(Section):
    paths: NamedPaths = ()
    """Other text to score, given like corpus.paths and read like it (corpus.text, .join, .separator; .prompt or
    .messages if it has their columns), or several named sets: {books: a/*.txt, code: [b, c]}. Every evaluation scores
    it in addition to the validation split, by which trials are ranked; `raylm evaluate` scores it instead of that
    split."""
    stride: Annotated[Count, Field(ge=1)] | None = None
    """New tokens scored in each window. Default: all, so that windows do not overlap."""
    context: Annotated[Count, Field(ge=1)] | None = None
    """Tokens of a scoring window. Default: the model's context, at most 8,192."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Dtype in which scores are computed, whatever train.precision and model.dtype are; recorded with the scores. auto:
    that of the training, if the model scores the first documents alike in it and in float32 before its first step, to a
    thousandth; else float32. Decided when a run or sweep starts; `raylm evaluate` takes what the run had."""
    pseudo_perplexity: bool = False
    """Masked models: whether to score every token, masked by itself, with one forward pass per token (Salazar et al.
    2020, arXiv:1910.14659). Default: score a fixed 15 % of the tokens, masked together, with one forward pass per
    window."""
    batch_tokens: Annotated[Count, Field(ge=1)] = 4096
    """Tokens of a forward pass, at least one window. Affects memory only, not the result."""
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Limit of evaluations during training, in tokens: they score the first documents of the validation split and of
    each set (at least one document). Default: no limit; for a masked model a tenth of the cost of the training since
    the previous evaluation."""
    prompts: Strings = ()
    """Prompts such as ["Once upon", "def main("] that every evaluation during training continues with the likeliest
    tokens, to see what the model has learned: samples.jsonl in the run's directory, an artifact in MLflow. The training
    stays bit-identical. Not with train.arguments.fsdp on several workers."""
    sample_tokens: Annotated[Count, Field(ge=1)] = 64
    """Most tokens that are written after each of eval.prompts."""

    def measure(self, *, masked: bool) -> Literal["perplexity", "masked_perplexity", "pseudo_perplexity"]:
        """The name of the score; ConfigError if pseudo-perplexity is asked of a causal model."""
        if not masked:
            if self.pseudo_perplexity:
                key = "eval.pseudo_perplexity"
                raise ConfigError(f"{key}=true is for masked models; leave it out, or set objective.kind=masked", key)
            return "perplexity"
        return "pseudo_perplexity" if self.pseudo_perplexity else "masked_perplexity"

    @property
    def scored_on(self) -> str:
        """The documents that evaluations during training score."""
        return WHOLE_SPLIT if self.max_tokens is None else f"the first {self.max_tokens:,} validation tokens"

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """The paths of each evaluation set; a single set without a name is called eval."""
        if isinstance(self.paths, tuple):
            return {"eval": self.paths} if self.paths else {}
        return self.paths

    def key(self, name: str) -> str:
        """The dotted key of the setting that gives the paths of a set."""
        return "eval.paths" if isinstance(self.paths, tuple) else f"eval.paths.{name}"


class ClusterConfig(Section):
    address: str | None = None
    """Address of a Ray cluster. Default: RAY_ADDRESS if set (as in a submitted job), else this machine, where Ray
    starts if there is text to prepare or there are several workers or trials."""
    num_workers: Workers = 1
    """Number of processes that train one model together. [1, 4]: as many as the cluster has room for, between one and
    four, which may change during training; the examples of a step stay the same."""
    max_failures: Annotated[Count, Field(ge=0)] = 3
    """Number of times that a run resumes from its last checkpoint after a worker dies. Drained nodes do not count."""
    use_gpu: bool | None = None
    """Whether workers use GPUs. Default: true if the cluster has any."""
    cpus_per_worker: AmountOrAuto = "auto"
    """CPUs reserved for each worker, and its number of torch threads. auto: the CPUs of the cluster divided by the
    number of concurrent workers, or by the number of GPUs if workers use them. Decided when a run or sweep starts, and
    kept when it resumes, because with another number of threads sums differ in their last bits."""
    gpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """GPUs reserved for each worker if workers use GPUs; a fraction lets trials share one."""
    resources_per_worker: OtherResources = {}
    """Other resources reserved for each worker, by their names in Ray: {memory: 16e9} in bytes, custom resources."""
    accelerator_type: str | None = None
    """Accelerator that the nodes of workers must have, by its name in Ray: A10G, H100, ..."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Placement of the workers of a model: PACK on few nodes or SPREAD over many; STRICT_PACK on one node,
    STRICT_SPREAD each on a different node."""

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]


class TrackingConfig(Section):
    uri: str | None = "sqlite:///mlflow.db"
    """Address of MLflow's tracking store or server; null turns tracking off."""
    experiment: str | None = None
    """Name of the MLflow experiment. Default: `name`."""
    log_model: bool = False
    """Whether to log the best model in MLflow, where mlflow.transformers.load_model("runs:/RUN/model") loads it."""
    register_as: RegisteredName | None = None
    """Name under which the best model is logged and registered, as the newest version with the alias champion."""


SchedulerKind = Literal["none", "asha", "median", "hyperband", "pbt"]


class SchedulerConfig(Section):
    kind: SchedulerKind = "asha"
    """Algorithm of the scheduler. none: every trial trains on the full budget. asha: trials pause at rungs, and the
    best are promoted before new trials start (Li et al. 2020, arXiv:1810.05934). median: trials stop if they are worse
    than the median of the others so far. hyperband: brackets of trials that wait for each other (Li et al. 2016,
    arXiv:1603.06560). pbt: the worst trials resume as copies of the best, with small changes of train settings inside
    their ranges in tune.space (Jaderberg et al. 2017, arXiv:1711.09846)."""
    grace_tokens: Annotated[Count, Field(ge=1)] | None = None
    """asha, median: training tokens before which no trial is paused or stopped. Default: an eighth of the budget."""
    reduction_factor: Annotated[float, Field(gt=1)] = 2.0
    """asha, hyperband: factor between rungs; at each rung one of this many trials is promoted."""
    ties: Literal["drop", "promote"] = "drop"
    """asha: what becomes of a trial that is not among the best at a rung, but whose documents show no difference to the
    last one that is. drop: it stays paused. promote: it resumes while there is room: a place that no trial among the
    best and no new trial takes. Of fewer than six documents nothing is known, and it stays paused."""
    cooldown: Annotated[float, Field(gt=0, le=1)] | None = None
    """asha: length of a cooldown at each rung, as a fraction of the tokens so far, such as 0.1. A branch of the trial,
    whose learning rate decays to zero, is scored in place of the trial itself, whose rate is still at its peak; a trial
    that is promoted goes on from before the branch (Hägele et al. 2024, arXiv:2405.18392). Needs
    train.lr_scheduler_type=warmup_stable_decay. Default: trials are compared as they are."""
    every_tokens: Annotated[Count, Field(ge=1)] | None = None
    """pbt: training tokens between comparisons of the trials. Default: an eighth of the budget."""


def _with_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


SearcherKind = Literal["random", "optuna"]


class SearcherConfig(Section):
    kind: SearcherKind = "random"
    """Where settings come from. random: drawn at random, with every point of a grid. optuna: near the best results so
    far; needs optuna."""
    sampler: Literal["tpe", "gp"] = "tpe"
    """optuna: the model of the results. tpe: the tree-structured Parzen estimator (Bergstra et al. 2011). gp: a
    Gaussian process (Optuna's GPSampler); it takes no inner spaces."""

    @property
    def label(self) -> str:
        """The searcher in words."""
        return self.kind if self.kind == "random" else f"{self.kind}, {self.sampler}"


class StopConfig(Section):
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Run time in seconds after which the sweep stops, added up over resumes."""
    tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training tokens of all trials together after which the sweep stops."""
    perplexity: Annotated[float, Field(gt=0)] | None = None
    """Score, in tune.metric, that stops the sweep once a trial reaches it."""


class TuneConfig(Section):
    space: dict[str, dict[str, Any]] = {}
    """Search space: dotted key -> {sampler of ray.tune: its arguments}, for example {loguniform: [1e-4, 1e-2]}. For
    ranges that depend on each other: a name without a dot -> {choice: [mapping, mapping, ...]}; each trial draws one
    mapping of keys to values or samplers."""
    ladder: dict[str, Numbers] = {}
    """Sizes of models and lengths of trainings, {model.config.n_layer: [2, 4, 6], tokens_per_parameter: [5, 20]}: each
    draw of the space is trained at every size for every length. Width and heads follow the depth, 64 dimensions and one
    head for each layer as in GPT-2, unless they are given as lists of the same length; the batch follows Step Law
    (arXiv:2503.04715), unless it is in the space. Needs searcher random and scheduler none."""
    num_samples: Annotated[Count, Field(ge=1)] = 8
    """Number of trials drawn from the space. Each point of a grid is drawn this often, or once if the space has only
    grids."""
    points: Points = ()
    """Settings to try first, [{train.learning_rate: 1e-3}]; they replace what the first trials would draw. suggested: a
    point with the values of published formulas for this model and budget, for those of train.batch_tokens,
    train.learning_rate and train.weight_decay that are in the space; they are said, with the range in which the
    formulas hold."""
    prior: dict[str, Any] = {}
    """searcher random: values that you expect to be good, {train.learning_rate: 1e-3}. The first trial has them; of the
    others half are drawn anywhere in the space, and half around these values and around the best trial so far, more and
    more around that which the best trials are near (PriorBand, Mallik et al. 2023, arXiv:2306.12370)."""
    prior_sweeps: Strings = ()
    """searcher optuna, or prior: earlier sweeps, by directory or name, whose trials count as results so far. They must
    have trained on the same token store and scored the same text; their trials are taken that have the same budget, the
    same settings outside of the space, and values that the space can give."""
    repeats: Annotated[Count, Field(ge=1)] = 1
    """Number of runs by which settings are judged. 1: by their trial alone. More: once the trials have ended, the two
    or three best settings are trained so many times again, each time with another train.seed (and train.data_seed, if
    it is given), and the results say which settings are better, apart from which model is."""
    searcher: Annotated[
        SearcherConfig, BeforeValidator(_with_kind, json_schema_input_type=SearcherKind | SearcherConfig)
    ] = SearcherConfig()
    """How settings are drawn: random or optuna, or a mapping with its settings."""
    scheduler: Annotated[
        SchedulerConfig, BeforeValidator(_with_kind, json_schema_input_type=SchedulerKind | SchedulerConfig)
    ] = SchedulerConfig()
    """Trial scheduler: none, asha, median, hyperband or pbt, or a mapping with its settings."""
    metric: Metric = "perplexity"
    """Score by which trials are ranked and stopped; smaller is better. Use bits_per_byte if tokenizers differ. Or the
    weights of sources that corpus.paths names and of sets of eval.paths, {books: 1, general: 0.5}: the weighted mean of
    their negative log-likelihoods in nats a token, by which the best checkpoint of a trial is chosen, too."""
    against: Literal["parameters", "seconds"] | None = None
    """searcher optuna: second objective to minimize, the size of the model or the seconds of training; the results mark
    the Pareto-optimal trials."""
    stop: StopConfig = StopConfig()
    """Limits of the sweep; it stops when any of them is reached."""
    keep: Literal["all", "best"] = "all"
    """Which trials keep their checkpoints once the sweep has finished. best: those of the trials that lost are removed;
    these can then neither be exported, generated from or scored again, nor trained further. Their curves, scores and
    settings stay."""
    max_concurrent_trials: Annotated[Count, Field(ge=1)] | None = None
    """Maximum number of concurrent trials. Default: as many as the cluster's resources allow."""

    @property
    def ranked_by(self) -> Literal["perplexity", "bits_per_byte", "weighted_nll"]:
        """The name of the score by which trials are ranked."""
        return "weighted_nll" if isinstance(self.metric, Mapping) else self.metric

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights of sources and sets in `metric`; empty without them."""
        return self.metric if isinstance(self.metric, Mapping) else {}
