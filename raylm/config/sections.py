"""Every setting of an experiment: its type, default, unit and effect.

A section is named like the module that reads it. This file knows nothing of YAML or command lines.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    Strict,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from raylm.errors import ConfigError


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _class_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
            raise ValueError(f"must be package.module:Class, got {value}")
    return values


def _evaluation_sets(value: Any) -> Any:
    """Paths, or a mapping of the user's own names to paths: checked here, so that a fault is told of eval.paths."""
    if isinstance(value, Mapping):
        for name, paths in value.items():
            if not isinstance(name, str) or not re.fullmatch(NAME, name):
                raise ValueError(f"must have names of letters, digits, dots, dashes, underscores; got {name!r}")
            if not _listed(paths) or not _are_texts(_listed(paths)):
                raise ValueError(f"must have text or a list of texts for {name}, got {paths!r}")
        return {name: tuple(_listed(paths)) for name, paths in value.items()}
    if not _are_texts(_listed(value)):
        raise ValueError(f"must be text, a list of texts or a mapping of names to them, got {value!r}")
    return tuple(_listed(value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got {value!r}: {error}") from None
    return value


def _unescaped(value: str) -> str:
    r"""Text in which \n, \r, \t and \f stand for the characters, even where YAML or a shell has left them alone."""
    return re.sub(r"\\([nrtf])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "f": "\f"}[match[1]], value)


def _encoding(value: str) -> str:
    try:
        "".encode(value)
    except LookupError:
        raise ValueError(f"must be an encoding that Python knows, such as cp1252 or utf-16; got {value!r}") from None
    return value


def _template(value: str) -> str:
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"must be a column or a template of columns in braces, got {value!r}: {error}") from None
    if "" in names:
        raise ValueError(f"must name the column between its braces, got {value!r}")
    return value


def _range(value: Any) -> Any:
    """A number, or (fewest, most)."""
    if not isinstance(value, (list, tuple)):
        return _whole(value)
    pair = tuple(_whole(each) for each in value)
    if len(pair) != 2 or not all(isinstance(each, int) and not isinstance(each, bool) for each in pair):
        raise ValueError(f"must be a number of workers or [fewest, most], got {list(value)}")
    if not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"must be [fewest, most] with 1 <= fewest <= most, got {list(value)}")
    return pair


def _amount_or_auto(value: Any) -> Any:
    if value == "auto" or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise ValueError(f"must be auto or a number more than 0, got {value!r}")


def _other_kinds(value: Mapping[str, float]) -> Mapping[str, float]:
    for kind in {"CPU", "GPU"} & value.keys():
        raise ValueError(f"must not have {kind}: that is cluster.{kind.lower()}s_per_worker")
    return value


Workers = Annotated[int, Field(ge=1)] | tuple[int, int]
MUTABLE = (
    "train.learning_rate", "train.weight_decay", "train.warmup_steps", "train.arguments.adam_beta1",
    "train.arguments.adam_beta2", "train.arguments.adam_epsilon", "train.arguments.max_grad_norm",
    "train.arguments.label_smoothing_factor", "train.arguments.neftune_noise_alpha",
)  # fmt: skip
"""Settings that may change while a trial is trained: its weights and its optimizer's state stay as they are."""
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

Count = Annotated[int, BeforeValidator(_whole)]  # 1e6 is a float in YAML and a fine number of tokens
Escaped = Annotated[str, AfterValidator(_unescaped)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_listed), Strict(False)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    exclusive: ClassVar[tuple[str, ...]] = ()
    """Settings of which at most one may be given; a later layer's choice replaces an earlier one's."""

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


class CorpusConfig(Section):
    paths: Strings = ()
    """Where the text is: files, directories, globs, s3:// and the like; hub://ID?split=train[:5000] (also &config=,
    &revision=, &streaming=true); python://stdlib and python://PACKAGE for source code."""
    text: Annotated[Escaped, AfterValidator(_template)] = "text"
    """In files with columns, the one that holds the text, by a dotted path into it (answers.text), or a template of
    several: "Question: {question}\\nAnswer: {answers.text}". One whose columns are all of the same list of objects,
    "{messages.role}: {messages.content}", is filled in for each of them."""
    join: Escaped = " "
    """Put between the texts of a column that holds a list of them."""
    separator: Escaped | None = None
    """In plain text files, what ends a document: \\n makes every line one, \\n\\n every paragraph. Default: a file is a
    document."""
    encoding: Annotated[str, AfterValidator(_encoding)] = "utf-8"
    """Of plain text and CSV files, by its name in Python: cp1252, gb18030, utf-16. Files with a byte order mark are
    read as that says."""
    validation_paths: Strings = ()
    """Sources held out for validation, instead of a fraction of `paths`."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the text held out, chosen by a hash of the content of each document or passage. Not used with
    validation_paths."""
    split_by: Literal["document", "passage"] | None = None
    """What is held out: whole documents, or passages of 500 to 1,000 characters, where a corpus of few long documents
    has enough of them. Default: passages for fewer than 50 documents."""
    keep_any: Strings = ()
    """Keep only documents that contain at least one of these strings; empty keeps all."""
    keep_matching: Annotated[str, AfterValidator(_regular_expression)] | None = None
    """Keep only documents in which this regular expression is found."""
    min_chars: Annotated[Count, Field(ge=1)] | None = None
    """Keep only documents of at least this many characters."""
    max_chars: Annotated[Count, Field(ge=1)] | None = None
    """Keep only documents of at most this many characters."""
    deduplicate: bool = False
    """Keep only the first of documents with exactly the same text. The corpus is read twice."""
    max_documents: Annotated[Count, Field(ge=1)] | None = None
    """Keep at most this many documents: the first of each source in turn, then the second of each, and so on."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A document that cannot be read (not UTF-8, not JSON, no text): stop, or leave it out, counted and listed in the
    store's rejected.jsonl. A plain text file in a directory or glob is left out in either case."""


class TrainedTokenizer(Section):
    kind: Literal["byte_bpe", "wordpiece", "unigram"] = "byte_bpe"
    """byte_bpe: byte-level byte-pair encoding, as GPT-2's. wordpiece: as BERT's. unigram: as T5's."""
    vocab_size: Annotated[Count, Field(ge=257)] = 8192
    """Entries of the vocabulary, special tokens included."""
    min_frequency: Annotated[Count, Field(ge=1)] = 2
    """A pair of tokens is merged only if the corpus has it at least this often. Not used by unigram."""
    special_tokens: Annotated[Strings, Field(min_length=1)] = ("<|endoftext|>",)
    """The first one is the end-of-text token. <mask> or [MASK] becomes the mask token, and so for pad and unk."""


class TokenizerConfig(Section):
    exclusive: ClassVar = ("path", "train")
    path: str | None = None
    """A directory or Hub id. Default: the model's own tokenizer, from model.path."""
    train: TrainedTokenizer | None = None
    """Train a tokenizer on the corpus instead; `{}` for one with defaults."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    gguf_file: str | None = None
    """The GGUF file to read the tokenizer from, in the directory or repository of `path`."""
    eos_token: str | None = None
    """The end-of-text token, of those that the tokenizer has. Default: the one it names itself."""
    prefix: Literal["auto", "bos", "eos", "none"] = "auto"
    """The token in front of every document, in training, scores and prompts. auto: the begin-of-text token if the
    tokenizer puts it there itself, as Llama's and Gemma's do; else the end-of-text token. none: nothing, so that the
    first token of a document is not predicted. The token store does not depend on it."""


class BlocksConfig(Section):
    block_size: Annotated[Count, Field(ge=2)] = 512
    """Tokens of a training example, the model's context during training."""
    packing: Literal["packed", "chunked", "padded"] = "packed"
    """packed: documents joined by the end-of-text token and cut across. chunked: windows inside a document, short tails
    dropped. padded: a document a row, truncated."""
    isolate_documents: bool = False
    """packed: documents in a block do not see each other; positions start again with each. Refused of a model
    that does not look for that, such as OPT, Falcon or Mamba, before it is trained."""


class Lora(Section):
    r: Annotated[Count, Field(ge=1)] = 8
    """Rank of the update of each matrix."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The update is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the update's input."""
    target_modules: Strings = ()
    """Names of the layers to adapt, or all-linear. Default: peft's choice for the type of model."""


class ModelConfig(Section):
    exclusive: ClassVar = ("path", "config")
    path: str | None = None
    """A pretrained model: a directory or Hub id."""
    config: dict[str, Any] | None = None
    """A new model: {model_type: gpt2, n_layer: 4, ...}, the fields of that model's configuration; or of another one's,
    {path: distilgpt2, n_layer: 2, ...}, those that are to differ (path: a directory, a config.json or a Hub id)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; of the model's own tokenizer, too."""
    gguf_file: str | None = None
    """The GGUF file to read, in the directory or repository of `path`; its weights are unpacked."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights and the optimizer's state. For mixed precision keep float32 and set train.arguments.bf16."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...: how attention is computed. Default: transformers' choice."""
    lora: Lora | None = None
    """Train low-rank updates (Hu et al. 2021, arXiv:2106.09685) instead of all weights; needs peft. `{}` for defaults.
    Checkpoints hold the model with the updates merged."""
    pad_vocab_to: Annotated[Count, Field(ge=1)] | None = None
    """Round the vocabulary of a new model up to a multiple of this, 64 for example: quicker on GPUs."""
    trust_remote_code: bool = False
    """Run the code that comes with the model at `path`, as its makers wrote it."""


class ObjectiveConfig(Section):
    kind: Literal["causal", "keyword_weighted", "masked", "fill_in_middle"] = "causal"
    """causal: predict each next token. keyword_weighted: causal, blocks with keywords count more. masked: predict
    hidden tokens, as BERT does. fill_in_middle: causal, some documents as prefix, suffix, middle, for code models."""
    keywords: Strings = ()
    """The words, [plt, pd, fit], each also with a space before it; of one or several tokens. keyword_weighted: those
    that count more. Of any kind: evaluations tell the perplexity on their tokens, too."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """keyword_weighted: a block weighs alpha x (1 + keywords in it). Only matters if not normalized."""
    normalize: bool = True
    """keyword_weighted: divide by the sum of weights over the global batch. False is the Hugging Face course's formula,
    whose gradient grows with alpha and the number of keywords."""
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """masked: part of the tokens that are predicted."""
    rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """fill_in_middle: part of the documents that are reordered."""
    spm_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """fill_in_middle: part of the reordered ones that have the suffix first."""
    sentinels: Annotated[Strings, Field(min_length=3, max_length=3)] = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>")
    """fill_in_middle: the tokens put before prefix, middle and suffix. The tokenizer must have them."""

    @property
    def is_masked(self) -> bool:
        return self.kind == "masked"


class TrainConfig(Section):
    exclusive: ClassVar = ("max_tokens", "num_epochs")
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak of the schedule."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    """Optimizer steps of linear warmup; below 1 a fraction of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's decay; not applied to biases and norms."""
    lr_scheduler_type: str = "cosine"
    """The schedule after warmup, by its name in transformers: linear, cosine, constant_with_warmup, ... Its own
    arguments are train.arguments.lr_scheduler_kwargs; where it needs some, warmup_stable_decay decays over a tenth of
    the steps, cosine_with_min_lr and cosine_warmup_with_min_lr to a tenth of the rate."""
    batch_tokens: Annotated[Count, Field(ge=2)] = 32768
    """Tokens of one optimizer step over all workers: a multiple of block_size x num_workers."""
    micro_batch_tokens: Annotated[Count, Field(ge=1)] = 8192
    """Most tokens a worker holds in one forward pass. Memory only: the rest of a step is accumulated."""
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training budget in tokens, rounded down to whole steps. Default: one epoch."""
    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Training budget in passes over the training split, instead of max_tokens."""
    seed: Annotated[Count, Field(ge=0)] = 0
    """Seed of the weights, dropout, the order of examples and the sweep's draws."""
    eval_every_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training tokens between evaluations. Default: a tenth of the budget."""
    save_every_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training tokens between checkpoints, beside those of the best evaluation so far and of the last step. Default: at
    every evaluation."""
    keep_checkpoints: Annotated[Count, Field(ge=1)] = 2
    """The last so many checkpoints are kept, and the best one: a damaged one has another to fall back on."""
    patience: Annotated[Count, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row without a better perplexity. Default: train to the end of the budget."""
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Of the arithmetic in training; weights stay as model.dtype has them, and scores are as eval.precision says. auto:
    bfloat16 where the hardware computes in it, with TF32 for the rest on GPUs; else float32."""
    callbacks: Annotated[Strings, AfterValidator(_class_names)] = ()
    """Classes of transformers.TrainerCallback to add to the Trainer, as package.module:Class; each is made without
    arguments in every worker."""
    arguments: dict[str, Any] = {}
    """Any other field of transformers' TrainingArguments, by its own name."""


DEFAULT_STORAGE = "runs"
"""Where a run is looked for by its name, too."""

WHOLE_SPLIT = "the whole validation split"
"""What a score is of, unless eval.max_tokens says less."""


class EvalConfig(Section):
    paths: Annotated[tuple[str, ...] | dict[str, tuple[str, ...]], BeforeValidator(_evaluation_sets)] = ()
    """Other text to score: as corpus.paths, and read as corpus.text, .join and .separator say; or several sets by their
    names, {books: a/*.txt, code: [b, c]}. Scored at every evaluation beside the validation split, by which trials are
    ranked all the same; and by `raylm evaluate` instead of it."""
    stride: Annotated[Count, Field(ge=1)] | None = None
    """New tokens scored in each window. Default: all, windows that do not overlap."""
    context: Annotated[Count, Field(ge=1)] | None = None
    """Tokens of a window. Default: the model's context, at most 8,192."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the arithmetic of scores, whatever train.precision and model.dtype are; recorded with them."""
    pseudo_perplexity: bool = False
    """Masked models: score every token, each masked by itself, a forward pass for each (Salazar et al. 2020,
    arXiv:1910.14659). Default: a fixed 15 % of the tokens, masked together, a forward pass for each window."""
    batch_tokens: Annotated[Count, Field(ge=1)] = 4096
    """Tokens in one forward pass, at least one window. Memory only: the result does not depend on it."""
    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    """During training, score only the first documents of the validation split, and of each set, up to this many tokens
    (at least one document)."""

    def measure(self, *, masked: bool) -> Literal["perplexity", "masked_perplexity", "pseudo_perplexity"]:
        """What the score is called: a masked model has no perplexity, and a causal one no other (ConfigError)."""
        if not masked:
            if self.pseudo_perplexity:
                key = "eval.pseudo_perplexity"
                raise ConfigError(f"{key}=true is for masked models; leave it out, or set objective.kind=masked", key)
            return "perplexity"
        return "pseudo_perplexity" if self.pseudo_perplexity else "masked_perplexity"

    @property
    def scored_on(self) -> str:
        """What evaluations during training are of."""
        return WHOLE_SPLIT if self.max_tokens is None else f"the first {self.max_tokens:,} validation tokens"

    @property
    def sets(self) -> dict[str, tuple[str, ...]]:
        """The paths of each evaluation set; one without a name is called eval."""
        if isinstance(self.paths, tuple):
            return {"eval": self.paths} if self.paths else {}
        return self.paths

    def key(self, name: str) -> str:
        """The setting that gave a set its paths."""
        return "eval.paths" if isinstance(self.paths, tuple) else f"eval.paths.{name}"


class ClusterConfig(Section):
    address: str | None = None
    """A Ray cluster. Default: RAY_ADDRESS if set (as in a submitted job), else this machine, where Ray is
    started if there is something to prepare, or there are several workers or trials."""
    num_workers: Annotated[Workers, BeforeValidator(_range)] = 1
    """Processes that train one model together. [1, 4]: as many as the cluster has room for, one at least and four at
    most, more or fewer while it trains; a step has the same examples all the same."""
    max_failures: Annotated[Count, Field(ge=0)] = 3
    """A run whose workers die goes on from its last checkpoint this many times. Lost nodes that Ray was warned of are
    not counted."""
    use_gpu: bool | None = None
    """Whether a worker takes GPUs. Default: if the cluster has any."""
    cpus_per_worker: Annotated[float | Literal["auto"], BeforeValidator(_amount_or_auto)] = "auto"
    """CPUs reserved for a worker; its torch threads. auto: the CPUs of the cluster divided by the workers that train at
    a time, or by the GPUs where workers take GPUs. Decided when a run or sweep starts, and kept when it resumes: with
    another number of threads, sums differ in their last bits."""
    gpus_per_worker: Annotated[float, Field(gt=0)] = 1.0
    """GPUs reserved for a worker that takes GPUs; a fraction lets trials share one."""
    resources_per_worker: Annotated[Mapping[str, Annotated[float, Field(gt=0)]], AfterValidator(_other_kinds)] = {}
    """What else is reserved for a worker, by Ray's names: {memory: 16e9} in bytes, and the cluster's custom ones."""
    accelerator_type: str | None = None
    """Workers only on nodes that have these, by Ray's names: A10G, H100, ..."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Several workers of a model: near each other or apart; STRICT_ are on one node, or each on one of its own."""

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def fewest_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]


class TrackingConfig(Section):
    uri: str | None = "sqlite:///mlflow.db"
    """MLflow's tracking store or server; null tracks nothing."""
    experiment: str | None = None
    """MLflow experiment. Default: the experiment's name."""
    log_model: bool = False
    """Store the best model in MLflow too, where mlflow.transformers.load_model("runs:/RUN/model") loads it."""
    register_as: Annotated[str, Field(pattern=r"^[^/:'\"]+$")] | None = None
    """Store it, and register it under this name: as the newest version, which has the alias champion."""


class SchedulerConfig(Section):
    kind: Literal["none", "asha", "median", "hyperband", "pbt"] = "asha"
    """none: every trial runs to its end. asha: trials wait at rungs, and the best of them go on before new ones begin
    (Li et al. 2020, arXiv:1810.05934). median: stop trials that are worse than the median of the others so far.
    hyperband: brackets of trials that wait for each other (Li et al. 2016, arXiv:1603.06560). pbt: the worst trials go
    on as copies of the best ones, with settings of train changed a little, inside the ranges that tune.space gives them
    (Jaderberg et al. 2017, arXiv:1711.09846)."""
    grace_tokens: Annotated[Count, Field(ge=1)] | None = None
    """asha, median: no trial waits or is stopped before this many training tokens. Default: an eighth of the budget."""
    reduction_factor: Annotated[float, Field(gt=1)] = 2.0
    """asha, hyperband: one of this many trials goes on at each rung, and rungs are this factor apart."""
    every_tokens: Annotated[Count, Field(ge=1)] | None = None
    """pbt: training tokens between two comparisons. Default: an eighth of the budget."""


def _kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class StopConfig(Section):
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Begin no evaluation after the sweep has run this long, stops and their resumption counted together."""
    tokens: Annotated[Count, Field(ge=1)] | None = None
    """Training tokens of all trials together."""
    perplexity: Annotated[float, Field(gt=0)] | None = None
    """A trial has reached this, by tune.metric."""


class TuneConfig(Section):
    space: dict[str, dict[str, Any]] = {}
    """What to sweep: dotted key -> {one of ray.tune's samplers: its arguments}, e.g. {loguniform: [1e-4, 1e-2]}.
    Ranges that depend on each other: a name without a dot -> {choice: [mapping, mapping, ...]}, of which a trial gets
    one, with keys -> values or samplers."""
    num_samples: Annotated[Count, Field(ge=1)] = 8
    """Trials drawn from the space; each point of a grid is drawn this often, of grids alone once."""
    points: Annotated[tuple[dict[str, Any], ...], Strict(False)] = ()
    """Settings to try first, [{train.learning_rate: 1e-3}]: these are in place of what the first trials would draw."""
    searcher: Literal["random", "optuna"] = "random"
    """How points are drawn. random: at random, with every point of a grid. optuna: where the results so far are best,
    by the tree-structured Parzen estimator (Bergstra et al. 2011); needs optuna."""
    scheduler: Annotated[SchedulerConfig, BeforeValidator(_kind)] = SchedulerConfig()
    """Who goes on: none, asha, median, hyperband or pbt, or its settings."""
    metric: Literal["perplexity", "bits_per_byte"] = "perplexity"
    """What trials are ranked and stopped by; less is better. bits_per_byte where tokenizers differ."""
    against: Literal["parameters", "seconds"] | None = None
    """searcher optuna: look for trials that are good for their size, or for the seconds of their training, too."""
    stop: StopConfig = StopConfig()
    """End the sweep before all trials have: on any of these."""
    max_concurrent_trials: Annotated[Count, Field(ge=1)] | None = None
    """Trials at a time. Default: as many as the cluster's resources hold."""


class Experiment(Section):
    name: Annotated[str, Field(pattern=NAME)] = "experiment"
    """Names the runs' directory and the MLflow experiment: letters, digits, dot, dash, underscore."""
    storage: str = DEFAULT_STORAGE
    """Where token stores, runs and checkpoints go: a directory that every node sees, or a place in object storage such
    as s3://bucket/runs, with the credentials of the environment."""
    corpus: CorpusConfig = CorpusConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    blocks: BlocksConfig = BlocksConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    tune: TuneConfig = TuneConfig()

    _sizes_follow_text: bool = PrivateAttr(False)

    @property
    def sizes_follow_text(self) -> bool:
        """Whether there is text but no file: sizes that nobody gave are derived from the text, see `derived`."""
        return self._sizes_follow_text

    @property
    def measure(self) -> str:
        """What the score is called."""
        return self.eval.measure(masked=self.objective.is_masked)

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Experiment:
        """Settings of different sections that cannot go together; each message starts with its dotted key."""
        self._sizes_follow_text = (info.context or {}).get("sizes_follow_text", False)
        if not self._sizes_follow_text or "batch_tokens" in self.train.model_fields_set:  # else it is to be derived
            self._batch_agrees()
        self._tokenizer_agrees()
        self._sweep_agrees()
        return self

    def _batch_agrees(self) -> None:
        fewest, most = self.cluster.fewest_workers, self.cluster.most_workers
        step = self.blocks.block_size * math.lcm(*range(fewest, most + 1))
        if self.train.batch_tokens % step:
            nearest = max(1, round(self.train.batch_tokens / step)) * step
            workers = f"{most}" if fewest == most else f"each of {fewest} to {most}"
            raise ValueError(
                f"train.batch_tokens must be a multiple of blocks.block_size x cluster.num_workers = "
                f"{self.blocks.block_size} x {workers}, got {self.train.batch_tokens}; "
                f"nearest: {nearest}"
            )
        if self.train.max_tokens is not None and self.train.max_tokens < self.train.batch_tokens:
            raise ValueError(
                f"train.max_tokens must be at least one optimizer step, train.batch_tokens = "
                f"{self.train.batch_tokens}, got {self.train.max_tokens}; lower train.batch_tokens too, to a "
                f"multiple of {step}"
            )

    def _tokenizer_agrees(self) -> None:
        """What says which token or file of a tokenizer to load says nothing about one that is trained."""
        section = self.tokenizer
        for name in ("revision", "gguf_file", "eos_token"):
            if section.train is not None and getattr(section, name) is not None:
                way_out = {"eos_token": "name it first in tokenizer.train.special_tokens instead"}
                raise ValueError(
                    f"tokenizer.{name} is for a tokenizer that is loaded and cannot be given with tokenizer.train, got "
                    f"{getattr(section, name)}; {way_out.get(name, 'leave it out')}"
                )

    def _sweep_agrees(self) -> None:
        tune = self.tune
        kinds = {kind for sampler in tune.space.values() for kind in sampler}
        if tune.searcher == "optuna" and "grid" in kinds:
            raise ValueError("tune.searcher must be random for a space with a grid, got optuna; make the grid a choice")
        if tune.searcher == "optuna" and tune.scheduler.kind == "pbt":
            raise ValueError(
                "tune.searcher must be random with tune.scheduler=pbt, got optuna: a population searches itself"
            )
        if tune.against is not None and tune.searcher != "optuna":
            raise ValueError(f"tune.against needs tune.searcher=optuna, got {tune.searcher}")
        if tune.against == "seconds" and tune.scheduler.kind != "none":
            raise ValueError(
                f"tune.against must be parameters with tune.scheduler={tune.scheduler.kind}, got seconds: trials "
                "that are stopped early are the quickest"
            )
        if tune.scheduler.kind == "pbt" and tune.space:
            changed = [key for key in tune.space if key in MUTABLE]
            if not changed:
                raise ValueError(
                    f"tune.space must have one of {', '.join(MUTABLE)} with tune.scheduler=pbt, which changes settings "
                    f"while a trial runs; got {', '.join(tune.space)}"
                )
            if grids := [key for key in changed if "grid" in tune.space[key]]:
                raise ValueError(
                    f"tune.space.{grids[0]} must be drawn with tune.scheduler=pbt, which changes it while trials run; "
                    "got a grid; make it a choice"
                )
        for point in tune.points:
            if unknown := [key for key in point if key not in tune.space]:
                raise ValueError(f"tune.points must have keys of tune.space, got {unknown[0]}")
