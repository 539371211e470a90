"""Experiment -> plan: everything that follows from it, resolved once, before anything runs.

`--dry-run` shows the plan, and every later function takes it or a part of it. A command lists the corpus only here, so
that it reads the files that were checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from raylm import cluster, console, corpus, derived, runs, storage, tokenizer, tokens, tracking
from raylm.cluster import Resources
from raylm.config import Address, CorpusConfig, Experiment, TokenizerConfig, address_of, is_local
from raylm.corpus import Source
from raylm.derived import Derived
from raylm.errors import StorageError
from raylm.local_worker import is_alone, start_worker_early

if TYPE_CHECKING:  # a wrong setting is reported before torch and transformers are imported
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from raylm.budget import Budget
    from raylm.tokens import Store


@dataclass(frozen=True)
class TokensPlan:
    """A corpus as a token store."""

    experiment: Experiment
    """The experiment with its split decided; without a config file also its tokenizer."""
    sources: list[Source]
    """The files of every entry of corpus.paths, corpus.validation_paths and corpus.test_paths."""
    tokenizer: TokenizerConfig
    """The tokenizer to load or train: the model's if the experiment names none."""
    store: str
    """The directory of the token store, which may not exist yet."""

    @property
    def fingerprint(self) -> str:
        """Identifies the content of the store: files, filters, split, tokenizer."""
        return os.path.basename(self.store)

    @property
    def num_files(self) -> int:
        return sum(len(source.files) for source in self.sources)

    @property
    def num_bytes(self) -> int:
        return sum(source.num_bytes for source in self.sources)


@dataclass(frozen=True)
class EvaluationSet:
    """A set of eval.paths, which is scored in addition to the validation split."""

    key: str
    """The setting that named it."""
    corpus: CorpusConfig
    sources: list[Source]

    def store(self, storage: str, tokenizer: TokenizerConfig) -> str:
        """The directory of its token store, which may not exist yet."""
        return tokens.store_path(storage, self.corpus, tokenizer, self.sources)


@dataclass(frozen=True)
class Prepared:
    """The part of a plan that follows from its token store."""

    store: Store
    experiment: Experiment
    """The experiment as it is trained, with eval.max_tokens decided by `cost`."""
    budget: Budget
    scored: Mapping[str, Any]
    """scored_on, scored_documents and scored_tokens: the text of an evaluation during training."""
    evaluation_share: float
    """The fraction of a run's cost that is evaluations."""
    warnings: tuple[str, ...]
    """Warnings about a training on these tokens that is useless or probably a mistake."""


@dataclass(frozen=True)
class Plan:
    """A training, or the training that a sweep varies."""

    tokens: TokensPlan
    evaluation_sets: Mapping[str, EvaluationSet]
    address: Address | None
    """The cluster that is used; None for this machine."""
    resources: Resources | None
    """The resources of a run; None if they are known only once Ray is connected."""
    model_config: PreTrainedConfig
    num_parameters: int
    budget: Budget | None
    """The budget; None for a number of epochs over tokens that are not prepared yet."""
    prepared: Prepared | None = None
    """What follows from the token store; None if it does not exist yet."""

    @property
    def experiment(self) -> Experiment:
        """The experiment with all that was decided for it. It identifies a run, because it is the same before and after
        the tokens are prepared."""
        return self.tokens.experiment

    @property
    def precision(self) -> str | None:
        """The precision of a new run: that of this machine if train.precision is auto, None if a cluster elsewhere
        decides it."""
        from raylm.training import arguments  # with transformers

        section = self.experiment.train
        if section.precision != "auto":
            return section.precision
        return None if self.resources is None else arguments.fastest(on_gpu=bool(self.resources.gpus_per_worker))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about a training that is useless or probably a mistake, without those that need the tokens."""
        return self.prepared.warnings if self.prepared else ()

    def record(self) -> dict[str, Any]:
        """The plan for --json."""
        experiment, budget, prepared = self.experiment, self.budget, self.prepared
        section = experiment.tracking
        return {
            "corpus": {"files": self.tokens.num_files, "bytes": self.tokens.num_bytes},
            "store": self.tokens.store,
            "parameters": self.num_parameters,
            "steps": budget.steps if budget else None,
            "tokens": budget.tokens if budget else None,
            "passes": budget.passes if budget else None,
            **({"passes_over": budget.passes_over} if budget and budget.sources else {}),
            "scored_documents": prepared.scored["scored_documents"] if prepared else None,
            "scored_tokens": prepared.scored["scored_tokens"] if prepared else None,
            **_size_of_test(prepared),
            "evaluation_share": prepared.evaluation_share if prepared else None,
            "micro_batch": budget.micro_batch if budget else None,
            "accumulation": budget.accumulation if budget else None,
            "precision": self.precision,
            "num_workers": experiment.cluster.num_workers,
            "resources_per_worker": self.resources.per_worker if self.resources else None,
            "cluster": f"{self.address.value} ({self.address.setting})" if self.address else "this machine",
            "storage": runs.directory_of(experiment),
            "tracking": tracking.display_uri(section.uri) if section.uri else None,
            "experiment": section.experiment or experiment.name,
        }

    def with_training(self, experiment: Experiment) -> Plan:
        """The plan with other settings of the training, for the same tokens and model."""
        found = replace(self, tokens=replace(self.tokens, experiment=experiment), budget=_estimated(experiment))
        if self.prepared is None:
            return found
        prepared = found.with_store(self.prepared.store)
        return replace(found, budget=prepared.budget, prepared=prepared)

    def with_store(self, store: Store) -> Prepared:
        """What follows from the token store of this plan."""
        from raylm import blocks, budget, cost, objective, summary

        experiment = cost.with_eval_limit(self.experiment, store)
        planned = budget.for_store(experiment, store)
        own = tokens.tokenizer_section(store.path)
        paths = [each.store(experiment.storage, own) for each in self.evaluation_sets.values()]
        sets = [tokens.open_store(path).train for path in paths if tokens.is_store(path)]
        return Prepared(
            store,
            experiment,
            planned,
            summary.scored(experiment, store),
            cost.evaluation_share(experiment, store, planned, sets),
            (
                *objective.warnings(experiment.objective, store),
                *tokens.warnings(store),
                *blocks.warnings(store.train, experiment.blocks, store.frame(experiment.tokenizer.prefix)),
                *planned.warnings(experiment.train),
            ),
        )


def _size_of_test(prepared: Prepared | None) -> dict[str, int]:
    test = prepared.store.test if prepared is not None else None
    return {} if test is None else {"test_documents": len(test), "test_tokens": test.answer_tokens}


def resolve_tokens(experiment: Experiment, *, with_sizes: bool = False) -> TokensPlan:
    """The plan of a token store. ConfigError or DataError naming the setting that does not fit.

    `with_sizes` also derives the model, budget and sweep from the text if there is no config file.
    """
    (experiment, _), sources = derive(experiment, with_sizes=with_sizes)
    chosen = tokenizer.choose(experiment.tokenizer, experiment.model)
    path = tokens.store_path(experiment.storage, experiment.corpus, chosen, sources)
    return TokensPlan(experiment, sources, chosen, path)


def resolve(experiment: Experiment, *, starts: Literal["train", "tune"] | None = None) -> Plan:
    """The plan of a training, or of the training that a sweep varies. Checks all that can be checked without Ray.

    If the run `starts` now, its worker process or Ray starts in the background meanwhile.
    """
    if starts and not is_local(experiment.cluster):
        cluster.check_reachable(experiment.cluster)
    if experiment.tracking.uri is not None:
        tracking.check_uri(experiment.tracking.uri)
    planned = resolve_tokens(experiment, with_sizes=True)
    experiment, store = planned.experiment, planned.store
    sets = evaluation_sets(experiment)
    resources, address = cluster.planned_resources(experiment.cluster), address_of(experiment.cluster)
    alone = starts == "train" and is_alone(experiment.cluster)
    if alone:
        start_worker_early()
    if starts and resources is not None and not (alone and tokens.is_store(store)):
        cluster.start_ray_early()
    with console.loading():  # after the quick checks
        from raylm import model, objective, perplexity, training
        from raylm.training import callbacks

    callbacks.load(experiment.train.callbacks)
    training.check_settings(experiment.train)
    chosen = planned.tokenizer
    known: Any = chosen.train or load_tokenizer(planned)
    objective.check_settings(experiment.objective, experiment.blocks, known)
    if chosen.train:
        model_config = model.config_of(experiment, chosen.train.vocab_size)
    else:
        model_config = model.config_of(experiment, tokenizer=known)
    perplexity.context_of(experiment.eval, model.context(model_config), experiment.blocks.block_size)
    num_parameters = model.num_parameters(model_config, masked=experiment.objective.is_masked)
    found = Plan(planned, sets, address, resources, model_config, num_parameters, _estimated(experiment))
    if not tokens.is_store(store):
        return found
    prepared = found.with_store(tokens.open_store(store))
    return replace(found, budget=prepared.budget, prepared=prepared)


def _estimated(experiment: Experiment) -> Budget | None:
    """The budget as far as it is known without the tokens."""
    from raylm import budget

    return budget.compute(
        experiment.train,
        block_size=experiment.blocks.block_size,
        num_workers=experiment.cluster.most_workers,
        epoch_examples=None,
    )


def check_places(experiment: Experiment) -> list[str]:
    """For a dry run, which writes nothing: a warning if MLflow does not answer; StorageError if the storage directory
    can be neither written nor created."""
    place = experiment.storage
    if not storage.is_remote(place):  # remote storage would have to be written to
        parent = place
        while not os.path.lexists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
            raise StorageError(f"storage={place} cannot be written: {parent} is no directory to write in", "storage")
    uri = experiment.tracking.uri
    if uri is None or not uri.startswith("http"):  # a check would create a database
        return []
    problem = tracking.problem(uri)
    return [] if problem is None else [f"{problem}; a run would keep its metrics until raylm sync uploads them"]


def load_tokenizer(plan: TokensPlan) -> PreTrainedTokenizerFast:
    """The tokenizer of a plan that trains none; ConfigError if its settings do not fit it, DataError if it cannot be
    loaded."""
    section = plan.experiment.tokenizer
    found = tokenizer.load_section(plan.tokenizer, "tokenizer.path" if section.path else "model.path")
    tokenizer.frame(found, section.prefix)
    return found


def derive(experiment: Experiment, *, with_sizes: bool, anew: bool = False) -> tuple[Derived, list[Source]]:
    """The experiment with all that follows from its text, and from this machine `with_sizes`; and its sources.

    Sizes that were decided before for the same settings are reused, except if `anew`.
    """
    storage.look(experiment.storage)
    found = corpus.find_sources(experiment.corpus)
    experiment, reasons = derived.columns(experiment, found)
    sources = corpus.readable(found, experiment.corpus)
    if with_sizes:
        experiment, others = derived.training(experiment, sources, anew=anew)
    else:
        experiment, others = derived.text(experiment, sources)
    experiment, begins = derived.prefix(experiment)
    return Derived(experiment, {**reasons, **others, **begins}), sources


def evaluation_sets(experiment: Experiment) -> dict[str, EvaluationSet]:
    """The evaluation sets by name; DataError naming the set if its files do not exist."""
    section = experiment.eval
    return {name: evaluation_set(paths, experiment.corpus, section.key(name)) for name, paths in section.sets.items()}


def evaluation_set(paths: Sequence[str], like: CorpusConfig, key: str) -> EvaluationSet:
    """The text of paths that the setting `key` gave, read like the corpus, but without filters and split."""
    reading = {name: getattr(like, name) for name in ("text", "join", "separator", "encoding", "on_bad_row")}
    section = CorpusConfig(paths=tuple(paths), validation_fraction=0, **reading)
    found = corpus.find_sources(section, key)
    with_prompts = section.model_copy(update={"prompt": like.prompt, "messages": like.messages})
    if like.has_prompts and corpus.have_columns(found, with_prompts):  # of other text, a general set, all is scored
        section = with_prompts
    return EvaluationSet(key, section, corpus.readable(found, section, key))
