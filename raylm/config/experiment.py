"""An experiment: its sections, and the rules between settings of different sections."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import PrivateAttr, ValidationInfo, model_validator

from raylm import DEFAULT_STORAGE
from raylm.config.sections import (
    STABLE,
    BlocksConfig,
    ClusterConfig,
    CorpusConfig,
    EvalConfig,
    ModelConfig,
    ObjectiveConfig,
    Section,
    TokenizerConfig,
    TrackingConfig,
    TrainConfig,
    TuneConfig,
)
from raylm.config.values import Name

MUTABLE = (
    "train.learning_rate", "train.weight_decay", "train.warmup_steps", "train.arguments.adam_beta1",
    "train.arguments.adam_beta2", "train.arguments.adam_epsilon", "train.arguments.max_grad_norm",
    "train.arguments.label_smoothing_factor", "train.arguments.neftune_noise_alpha",
)  # fmt: skip
"""Settings that may change while a trial trains, because its weights and its optimizer's state remain valid."""
SEEDS = ("train.seed", "train.data_seed")
SUGGESTED = ("train.batch_tokens", "train.learning_rate", "train.weight_decay")
"""Settings that tune.points=suggested has formulas for."""
FILTERS = ("keep_any", "keep_matching", "min_chars", "max_chars")
"""Settings of corpus that look at the characters of a text."""


class Experiment(Section):
    name: Name = "experiment"
    """Name of the runs' directory and the MLflow experiment: letters, digits, dots, dashes, underscores."""
    storage: str = DEFAULT_STORAGE
    """Location of token stores, runs and checkpoints: a directory that every node sees, or a location in object storage
    such as s3://bucket/runs, with the credentials of the environment."""
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
        """Whether there is text but no config file, so that sizes that are not given are derived from it; see
        `derived`."""
        return self._sizes_follow_text

    @property
    def measure(self) -> str:
        """The name of the score: perplexity, masked_perplexity or pseudo_perplexity."""
        return self.eval.measure(masked=self.objective.is_masked)

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Experiment:
        """Refuse settings of different sections that exclude each other; each message starts with a dotted key."""
        self._sizes_follow_text = (info.context or {}).get("sizes_follow_text", False)
        if not self._sizes_follow_text or "batch_tokens" in self.train.model_fields_set:  # else it is to be derived
            self._batch_agrees()
        self._corpus_agrees()
        self._mixture_agrees()
        self._tokenizer_agrees()
        if self.model.transfer is not None:
            self._transfer_agrees()
        self._adapter_agrees()
        self._sweep_agrees()
        return self

    def _batch_agrees(self) -> None:
        fewest, most = self.cluster.fewest_workers, self.cluster.most_workers
        step = self.blocks.block_size * math.lcm(*range(fewest, most + 1))
        workers = f"{most}" if fewest == most else f"each of {fewest} to {most}"
        smallest = f"blocks.block_size x cluster.num_workers = {self.blocks.block_size} x {workers}"
        batch, budget = self.train.batch_tokens, self.train.max_tokens
        if batch % step:
            nearest = max(1, round(batch / step)) * step
            raise ValueError(f"train.batch_tokens must be a multiple of {smallest}, got {batch}; nearest: {nearest}")
        if budget is not None and budget < batch:
            way_out = f"lower train.batch_tokens too, to a multiple of {step}"
            if budget < step:
                way_out = f"raise it to that, or lower blocks.block_size too: a step has at least {smallest} tokens"
            raise ValueError(
                f"train.max_tokens must be at least one optimizer step, train.batch_tokens = {batch}, got {budget}; "
                f"{way_out}"
            )

    def _corpus_agrees(self) -> None:
        section = self.corpus
        held_out = section.validation_fraction + section.test_fraction
        if held_out >= 1 and not section.validation_paths and not section.test_paths:
            raise ValueError(
                "corpus.test_fraction must leave text to train on: less than 1 - corpus.validation_fraction = "
                f"{1 - section.validation_fraction:.6g}, got {section.test_fraction:g}"
            )
        if section.has_prompts:
            self._prompts_agree()
        if section.tokens is not None:
            self._tokens_agree()

    def _tokens_agree(self) -> None:
        """Refuse settings that need text together with a column of token ids."""
        for name in FILTERS:
            if getattr(self.corpus, name):
                raise ValueError(f"corpus.{name} is for text and cannot be given with corpus.tokens; leave it out")
        if self.corpus.split_by == "passage":
            raise ValueError("corpus.split_by must be document with corpus.tokens, got passage: token ids are not cut")
        if self.tokenizer.train is not None:
            raise ValueError(
                "tokenizer.train cannot be given with corpus.tokens: the ids are of the tokenizer that made them; give "
                "its directory or Hub id as tokenizer.path"
            )
        if self.tokenizer.path is None and self.model.path is None:
            raise ValueError(
                "corpus.tokens must come with tokenizer.path, the directory or Hub id of the tokenizer that made them"
            )

    def _prompts_agree(self) -> None:
        """Refuse settings that do not go together with documents of which a part alone is learned."""
        section = self.corpus
        name = "corpus.prompt" if section.prompt is not None else "corpus.messages"
        for other in ("messages", "tokens") if section.prompt is not None else ("tokens",):
            if getattr(section, other) is not None:
                raise ValueError(f"{name} cannot be given with corpus.{other}; leave one of them out")
        if section.split_by == "passage":
            raise ValueError(f"corpus.split_by must be document with {name}, got passage: an answer needs its prompt")
        if self.objective.kind not in ("causal", "keyword_weighted"):
            raise ValueError(
                f"objective.kind must be causal or keyword_weighted with {name}, got {self.objective.kind}"
            )
        if section.messages is None:
            return
        for other in FILTERS:
            if getattr(section, other):
                raise ValueError(f"corpus.{other} is for text and cannot be given with corpus.messages; leave it out")
        if self.tokenizer.train is not None or (self.tokenizer.path is None and self.model.path is None):
            raise ValueError(
                "corpus.messages must come with tokenizer.path, the directory or Hub id of a tokenizer with a chat "
                "template, or with the model.path of one; a tokenizer that is trained has none"
            )

    def _mixture_agrees(self) -> None:
        weights, names = self.blocks.mixture, self.corpus.source_names
        if not weights:
            return
        if not names:
            raise ValueError(
                "blocks.mixture must be left out unless corpus.paths names its sources, as in {books: a/*.txt, code: b}"
            )
        unlike = [name for name in (*weights, *names) if name not in weights or name not in names]
        if unlike:
            fault = "has no weight" if unlike[0] in names else "is no source"
            raise ValueError(
                "blocks.mixture must have a weight for each source that corpus.paths names, "
                f"{', '.join(names)}; {unlike[0]} {fault}"
            )
        if not any(weights.values()):
            raise ValueError("blocks.mixture must have a weight above 0")

    def _tokenizer_agrees(self) -> None:
        """Refuse settings of a tokenizer that is loaded together with those of one that is trained."""
        section = self.tokenizer
        for name in ("revision", "gguf_file", "eos_token"):
            if section.train is not None and getattr(section, name) is not None:
                way_out = {"eos_token": "name it first in tokenizer.train.special_tokens instead"}
                raise ValueError(
                    f"tokenizer.{name} is for a tokenizer that is loaded and cannot be given with tokenizer.train, got "
                    f"{getattr(section, name)}; {way_out.get(name, 'leave it out')}"
                )

    def _transfer_agrees(self) -> None:
        section = self.model
        if section.path is not None:
            raise ValueError(
                f"model.transfer is for a new model and cannot be given with model.path, got {section.path}: its "
                "initial values are scaled; leave it out"
            )
        if not {"model_type", "path"} & (section.config or {}).keys():
            raise ValueError("model.transfer must come with model.config, whose sizes it compares with the base's")
        if section.lora is not None:
            raise ValueError(
                "model.transfer cannot be given with model.lora: the widths that it scales by are not those of "
                "low-rank updates; leave one of them out"
            )
        if self.train.optimizer not in ("adamw", "muon"):
            raise ValueError(
                f"train.optimizer must be adamw or muon with model.transfer, got {self.train.optimizer}: its learning "
                "rate follows another rule; leave model.transfer out"
            )
        if self.train.arguments.get("deepspeed"):
            raise ValueError(
                "train.arguments.deepspeed cannot be given with model.transfer, whose learning rates differ between "
                "weights; set train.arguments.fsdp=true instead"
            )

    def _adapter_agrees(self) -> None:
        """Refuse to export an adapter without a base model that peft can load."""
        section = self.model
        if section.lora is None or section.lora.export == "merged":
            return
        got = f"model.lora.export must be merged {{}}, got {section.lora.export}: an adapter is of use with its base "
        if section.path is None:
            raise ValueError(got.format("without model.path") + "model alone, which is saved nowhere")
        if section.gguf_file is not None:
            raise ValueError(got.format("with model.gguf_file") + "model alone, which peft does not load from GGUF")

    def _sweep_agrees(self) -> None:
        tune = self.tune
        kinds = {kind for sampler in tune.space.values() for kind in sampler}
        if tune.searcher.kind == "optuna" and "grid" in kinds:
            raise ValueError("tune.searcher must be random for a space with a grid, got optuna; make the grid a choice")
        if tune.searcher.kind == "optuna" and tune.scheduler.kind == "pbt":
            raise ValueError(
                "tune.searcher must be random with tune.scheduler=pbt, got optuna: a population searches itself"
            )
        if tune.searcher.sampler == "gp" and tune.searcher.kind != "optuna":
            raise ValueError(f"tune.searcher.sampler must be tpe with tune.searcher={tune.searcher.kind}, got gp")
        if tune.against is not None and tune.searcher.kind != "optuna":
            raise ValueError(f"tune.against needs tune.searcher=optuna, got {tune.searcher.kind}")
        if tune.against == "seconds" and tune.scheduler.kind != "none":
            raise ValueError(
                f"tune.against must be parameters with tune.scheduler={tune.scheduler.kind}, got seconds: trials "
                "that are stopped early are the quickest"
            )
        if tune.weights:
            self._weights_agree()
        if tune.repeats > 1:
            self._repeats_agree()
        if tune.scheduler.ties == "promote" and tune.scheduler.kind != "asha":
            raise ValueError(
                f"tune.scheduler.ties must be drop with tune.scheduler={tune.scheduler.kind}, got promote: only asha "
                "promotes trials at rungs"
            )
        if tune.scheduler.cooldown is not None:
            self._cooldown_agrees()
        if tune.ladder:
            self._ladder_agrees()
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
        if tune.prior:
            self._prior_agrees()
        if tune.prior_sweeps and tune.searcher.kind == "random" and not tune.prior and tune.space:
            raise ValueError(
                "tune.prior_sweeps must come with tune.searcher=optuna or with a tune.prior: a random search learns "
                "from no results"
            )
        if tune.prior_sweeps and tune.against is not None:
            raise ValueError(f"tune.prior_sweeps must be left out with tune.against, got {tune.prior_sweeps[0]}")
        if tune.points == "suggested":
            if tune.space and not any(key in tune.space for key in SUGGESTED):
                raise ValueError(
                    f"tune.points must be a list unless tune.space has one of {', '.join(SUGGESTED)}, for which there "
                    "are formulas, got suggested"
                )
            return
        for point in tune.points:
            if unknown := [key for key in point if key not in tune.space]:
                raise ValueError(f"tune.points must have keys of tune.space, got {unknown[0]}")

    def _cooldown_agrees(self) -> None:
        kind, schedule = self.tune.scheduler.kind, self.train.lr_scheduler_type
        if kind != "asha":
            raise ValueError(f"tune.scheduler.cooldown is for asha and cannot be given with {kind}; leave it out")
        if schedule != STABLE or "train.lr_scheduler_type" in self.tune.space:
            got = schedule if schedule != STABLE else "it in tune.space"
            raise ValueError(
                f"train.lr_scheduler_type must be {STABLE} with tune.scheduler.cooldown, got {got}: with another one "
                "the learning rate has decayed at a rung already"
            )

    def _ladder_agrees(self) -> None:
        tune, length = self.tune, "tokens_per_parameter"
        sizes = {key: values for key, values in tune.ladder.items() if key != length}
        if unknown := [key for key in sizes if not key.startswith("model.config.")]:
            raise ValueError(f"tune.ladder must have keys of model.config and {length}, got {unknown[0]}")
        if not sizes or not tune.ladder.get(length) or not all(sizes.values()):
            raise ValueError(
                f"tune.ladder must have sizes of models and {length}, such as {{model.config.n_layer: [2, 4], "
                f"{length}: [5, 20]}}; got {', '.join(f'{key}: {[*values]}' for key, values in tune.ladder.items())}"
            )
        if len({*map(len, sizes.values())}) > 1:
            lengths = ", ".join(f"{len(values)} of {key}" for key, values in sizes.items())
            raise ValueError(f"tune.ladder must have lists of the same length for its sizes, got {lengths}")
        for key, values in tune.ladder.items():
            if wrong := [value for value in values if value <= 0 or (key != length and not isinstance(value, int))]:
                kind = "numbers" if key == length else "whole numbers"
                raise ValueError(f"tune.ladder.{key} must be {kind} above 0, got {wrong[0]}")
        for name, value, only in (
            ("searcher", tune.searcher.kind, "random"),
            ("scheduler", tune.scheduler.kind, "none"),
            ("repeats", tune.repeats, 1),
        ):
            if value != only:
                why = (
                    "models of other sizes are not compared on the way"
                    if name == "scheduler"
                    else "each draw is trained"
                )
                raise ValueError(f"tune.{name} must be {only} with tune.ladder, got {value}: {why}")
        if tune.prior:
            raise ValueError("tune.prior must be left out with tune.ladder: each draw is trained at every size")
        swept = [key for key in tune.space if key in (*sizes, "train.max_tokens", "train.num_epochs", "ladder")]
        if swept:
            raise ValueError(f"tune.space must not have {swept[0]} with tune.ladder, which gives it")

    def _prior_agrees(self) -> None:
        tune = self.tune
        if unknown := [key for key in tune.prior if key not in tune.space]:
            raise ValueError(f"tune.prior must have keys of tune.space, got {unknown[0]}")
        if tune.searcher.kind == "optuna":
            key, value = next(iter(tune.prior.items()))
            raise ValueError(
                "tune.prior must be left out with tune.searcher=optuna, which has no priors; to try its values first, "
                f"say tune.points=[{{{key}: {value}}}]"
            )
        if grids := [key for key, sampler in tune.space.items() if "grid" in sampler]:
            raise ValueError(f"tune.prior must be left out with a grid in tune.space ({grids[0]}); make it a choice")
        if tune.scheduler.kind == "pbt":
            raise ValueError("tune.prior must be left out with tune.scheduler=pbt: a population searches itself")

    def _weights_agree(self) -> None:
        tune, sources, sets = self.tune, self.corpus.source_names, tuple(self.eval.sets)
        known = (*sources, *sets)
        for name in tune.weights:
            if name in sources and name in sets:
                raise ValueError(f"tune.metric must name one thing by {name}: it is a source and a set of eval.paths")
            if name in sources and self.corpus.validation_paths:
                raise ValueError(
                    f"tune.metric must have sets of eval.paths with corpus.validation_paths, got source {name}: "
                    "validation text of its own has no names"
                )
        if unknown := [name for name in tune.weights if name not in known]:
            raise ValueError(
                "tune.metric must have names of sources of corpus.paths or of sets of eval.paths"
                f"{': ' + ', '.join(known) if known else ', and neither names any'}; got {unknown[0]}"
            )
        for key, value, default in (("repeats", tune.repeats, 1), ("scheduler.ties", tune.scheduler.ties, "drop")):
            if value != default:
                raise ValueError(
                    f"tune.{key} must be {default} with weights in tune.metric, got {value}: documents and runs are "
                    "compared by perplexity or bits per byte alone"
                )

    def _repeats_agree(self) -> None:
        tune = self.tune
        inner = (mapping for sampler in tune.space.values() for values in sampler.values() for mapping in values)
        swept = {*tune.space, *(key for mapping in inner if isinstance(mapping, Mapping) for key in mapping)}
        if seeds := sorted(swept & {*SEEDS}):
            raise ValueError(
                f"tune.repeats must be 1 with {seeds[0]} in tune.space, got {tune.repeats}: repeats have seeds of "
                f"their own; leave {seeds[0]} out of tune.space"
            )
        if tune.scheduler.kind == "pbt":
            raise ValueError(
                f"tune.repeats must be 1 with tune.scheduler=pbt, got {tune.repeats}: the settings of a population "
                "change during training, so that no other run can have them; take another scheduler"
            )
