"""What sweeps have seen: the size, training tokens and score of every training that came to the end of a schedule.

A trial at the end of its budget is one, and so is each of its cooldowns. An evaluation in the middle of a schedule is
none: the learning rate is still high there, and the score worse than that of a training of this length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from raylm import config, console, document_scores, model, storage
from raylm.config import Experiment
from raylm.document_scores import DocumentScores
from raylm.errors import ConfigError, StorageError
from raylm.results.sweep import SweepResults, scored_on_with_size
from raylm.scaling.law import FLOPS
from raylm.sweep.record import Trial, evaluated_in

SAME = 0.05
"""Budgets that differ by less are one."""


@dataclass(frozen=True)
class Observation:
    """A training that came to the end of its schedule."""

    sweep: SweepResults
    trial: Trial
    parameters: int
    """All of the model."""
    without_embeddings: int
    """Without the embeddings of tokens and positions, and the output head that is one of them."""
    flops_per_token: int
    """Floating-point operations of its training for each token."""
    tokens: int
    """Training tokens at the end of the schedule."""
    perplexity: float
    bits_per_byte: float
    place: tuple[str, int]
    """The directory and step of its evaluation."""
    draws: int = 1
    """Trainings of this size and budget of which it is the best."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return math.log(self.perplexity)

    @property
    def compute(self) -> float:
        """6 N D, what a law takes for the floating-point operations of a training."""
        return float(FLOPS) * self.parameters * self.tokens

    @property
    def flops(self) -> float:
        """Floating-point operations of its training, with attention and without embeddings that are looked up."""
        return float(self.flops_per_token) * self.tokens

    @property
    def experiment(self) -> Experiment:
        """What it trained, with the settings of its trial."""
        return of_settings(self.sweep.experiment, self.trial.settings)

    @property
    def scores(self) -> DocumentScores | None:
        return document_scores.read(*self.place)

    def record(self, measure: str) -> dict[str, Any]:
        """The training for --json; the key of the score is its name."""
        return {
            "parameters": self.parameters,
            "parameters_without_embeddings": self.without_embeddings,
            "tokens": self.tokens,
            "flops": self.flops,
            measure: self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "draws": self.draws,
            "sweep": self.sweep.name,
            "trial_id": self.trial.trial_id,
            "settings": dict(self.trial.settings),
        }


@dataclass(frozen=True)
class Observations:
    """The finished trainings of sweeps that were scored on the same documents."""

    sweeps: Sequence[SweepResults]
    every: Sequence[Observation]
    store: str
    """The directory of their token store."""

    @property
    def measure(self) -> str:
        return self.sweeps[0].measure

    @property
    def scored_on(self) -> str:
        """The documents, in words."""
        return scored_on_with_size(self.sweeps[0].experiment, self.sweeps[0].state.parameters)

    @cached_property
    def best(self) -> list[Observation]:
        """The best training of each size and budget, by the compute that it took.

        The law is one of tuned runs, so of the settings that were tried only the best count. Blocks of another size
        change the embeddings of positions, and other batches the whole number of steps: neither makes another size or
        budget.
        """
        groups: list[list[Observation]] = []
        for each in sorted(self.every, key=lambda each: (each.without_embeddings, each.tokens)):
            first = groups[-1][0] if groups else None
            if (
                first is None
                or each.without_embeddings != first.without_embeddings
                or each.tokens > (1 + SAME) * first.tokens
            ):
                groups.append([])
            groups[-1].append(each)
        chosen = [replace(min(group, key=lambda each: each.perplexity), draws=len(group)) for group in groups]
        return sorted(chosen, key=lambda each: each.compute)

    @cached_property
    def covariance(self) -> np.ndarray | None:
        """How the logarithms of the losses of `best` vary together over documents; None if the score of a document is
        not known for all.

        A loss is summed nll / summed tokens, and each document moves it by its own residual over the sum of tokens.
        """
        scores = [each.scores for each in self.best]
        kept = [each for each in scores if each is not None]
        if len(kept) < len(scores) or len({each.documents for each in kept}) > 1 or len(kept[0]) < 2:
            return None
        nll, tokens = np.stack([each.nll for each in kept]), kept[0].tokens
        losses = nll.sum(axis=1) / tokens.sum()
        moved = (nll - losses[:, None] * tokens) / (losses[:, None] * tokens.sum())
        return moved @ moved.T * len(tokens) / (len(tokens) - 1)

    @property
    def tokens_per_byte(self) -> float:
        """Of the scored documents: the ratio of the two scores, both in nats."""
        return self.best[-1].bits_per_byte * math.log(2) / self.best[-1].loss


def read(sweeps: Sequence[SweepResults]) -> Observations:
    """The finished trainings of sweeps; ConfigError if they were not scored on the same documents."""
    for results in sweeps:
        if results.experiment.tune.scheduler.kind == "pbt":
            raise ConfigError(
                f"{results.name}: tune.scheduler.kind=pbt changes the settings of a trial while it trains, so that no "
                "score is that of a size and its settings; leave it out",
                "SWEEP",
            )
    _check_same_documents(sweeps)
    store = f"{sweeps[0].experiment.storage}/tokens/{sweeps[0].state.parameters.get('store')}"
    sizes = Sizes(vocab_size(store))
    every = [each for results in sweeps for each in _of_sweep(results, sizes)]
    kinds = sorted({_architecture(each.experiment) for each in every})
    if len(kinds) > 1:
        raise ConfigError(f"a law is of one architecture, and these are trainings of {' and '.join(kinds)}", "SWEEP")
    return Observations(sweeps, every, store)


def _architecture(experiment: Experiment) -> str:
    """The model's type, or the pretrained model that it starts from."""
    section = experiment.model
    return str(section.path if section.config is None else section.config.get("model_type", section.config.get("path")))


def _check_same_documents(sweeps: Sequence[SweepResults]) -> None:
    """ConfigError that names the first thing in which the scores of two sweeps differ.

    Sweeps with other tokenizers have other token stores: neither tokens nor parameters nor losses per token are then
    the same units, and bits per byte would mend only the last of these.
    """
    first, *others = map(_scored, sweeps)
    for results, facts in zip(sweeps[1:], others, strict=True):
        for name, value in facts.items():
            if value != first[name]:
                raise ConfigError(
                    f"{results.name} has {name} {value}, and {sweeps[0].name} has {first[name]}: a law needs scores on "
                    "the same documents and tokens; leave one of them out",
                    "SWEEP",
                )


def _scored(results: SweepResults) -> dict[str, Any]:
    """What makes the scores of a sweep comparable."""
    parameters = results.state.parameters
    return {
        "token store": parameters.get("store"),
        "the score": console.label(results.measure),
        "scored documents": parameters.get("scored_documents"),
        "eval.max_tokens": results.experiment.eval.max_tokens,
        "eval.precision": results.experiment.eval.precision,
        "tokenizer.prefix": parameters.get("prefix"),
    }


def _of_sweep(results: SweepResults, sizes: Sizes) -> Iterator[Observation]:
    """The finished trainings of a sweep. A repeat of a trial is none: the best of them was not drawn for its seed."""
    for trial in results.data.trials:
        if trial.status == "failed" or trial.repeat_of is not None:
            continue
        for evaluation, tokens in ends(trial):
            if not math.isfinite(evaluation["perplexity"]) or evaluation["perplexity"] <= 1:
                continue
            training, step = evaluated_in(trial.trial_id, evaluation)
            size = sizes.of(of_settings(results.experiment, trial.settings))
            yield Observation(
                sweep=results,
                trial=trial,
                parameters=size.parameters,
                without_embeddings=size.without_embeddings,
                flops_per_token=size.flops_per_token,
                tokens=tokens,
                perplexity=evaluation["perplexity"],
                bits_per_byte=evaluation["bits_per_byte"],
                place=(f"{results.directory}/{training}", step),
            )


def ends(trial: Trial) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The evaluations of a trial at the ends of schedules, each with the tokens of such a training."""
    for cooled in trial.cooldowns:
        yield cooled, cooled["tokens"] + cooled["cooldown_tokens"]
    last = trial.results[-1] if trial.results else {}
    if last and last["tokens"] >= last.get("budget_tokens", math.inf):
        yield last, last["tokens"]


def of_settings(experiment: Experiment, settings: Mapping[str, Any]) -> Experiment:
    """The experiment of a training with the settings of a trial."""
    return config.override(experiment, {**settings, "tune.space": {}, "tune.points": []})


class Size(NamedTuple):
    """The size of a model, by what it has and by what it takes to train it."""

    parameters: int
    without_embeddings: int
    flops_per_token: int
    """Floating-point operations of a training for each token."""


class Sizes:
    """The sizes of models, each counted once."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self._known: dict[str, Size] = {}

    def of(self, experiment: Experiment) -> Size:
        """The size of an experiment's model, trained on its blocks."""
        key = f"{experiment.model.model_dump_json()} {experiment.blocks.block_size}"
        if key not in self._known:
            found = model.config_of(experiment, self.vocab_size)
            counts = model.parameters(found, masked=experiment.objective.is_masked)
            a_token = model.flops_of_experiment(experiment, found, counts)
            self._known[key] = Size(counts.all, counts.without_embeddings, a_token)
        return self._known[key]


def vocab_size(store: str) -> int:
    """Entries of the vocabulary of a token store; StorageError if the store no longer exists."""
    return manifest(store)["tokenizer"]["vocab_size"]


def manifest(store: str) -> dict[str, Any]:
    """The manifest of a token store; StorageError if the store no longer exists."""
    content = storage.read(f"{store}/manifest.json")
    if content is None:
        raise StorageError(
            f"{store}: the token store of the sweep is gone, and with it the vocabulary that sizes depend on; raylm "
            "prepare with the sweep's experiment.yaml writes it again",
            store,
        )
    return json.loads(content)
