"""Runs side by side: scores, speed, data, settings that differ, and whether their scores can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raylm.config import Experiment
from raylm.console import as_html, format_number, label
from raylm.errors import ConfigError
from raylm.redaction import SECRET, redacted
from raylm.results import differences
from raylm.results.compared_run import ComparedRun, summarize
from raylm.results.differences import Difference
from raylm.results.tables import estimate, side_by_side
from raylm.results.where import Where
from raylm.runs import flat_settings

SHOWN = {"seconds": "seconds, with pauses", "tokens_per_second": "tokens/s in training", "mfu": "MFU"}
"""What figures are called on the screen, if not by their names."""

IGNORED_SECTIONS = ("name", "storage", "tracking", "tune")
"""Settings that change nothing about what a run trains."""


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: list[ComparedRun]
    settings: dict[str, list[Any]]
    """Dotted key -> its value in each run, of the settings that differ."""
    warnings: list[str]
    """Reasons why some of the scores cannot be compared."""
    where: Where | None = None
    """Where two runs differ, if that was asked for."""

    @cached_property
    def differences(self) -> list[Difference]:
        """Of each run to the best one of those that were scored on the same documents."""
        return differences.differences([run.scored for run in self.runs])

    def record(self) -> dict[str, Any]:
        """The comparison for --json."""
        return {
            "runs": [
                {"run": run.name, **run.record(), "difference": difference.record()}
                for run, difference in zip(self.runs, self.differences, strict=True)
            ],
            "settings": self.settings,
            "warnings": self.warnings,
            **({} if self.where is None else {"where": self.where.record()}),
        }

    def _repr_html_(self) -> str:
        return as_html(side_by_side([run.name for run in self.runs], self.rows()))

    def rows(self) -> dict[str, list[Any]]:
        """Label -> value in each run: scores, differences, speed, data and settings that differ; None if a run has no
        value."""
        records = [run.record() for run in self.runs]
        scores = [*dict.fromkeys(run.measure for run in self.runs), "bits_per_byte"]
        names = dict.fromkeys(name for record in records for name in record if not name.endswith(("_low", "_high")))
        facts = {
            SHOWN.get(name, label(name)): [record.get(name) for record in records]
            for name in names
            if name not in scores
        }
        facts = {name: values for name, values in facts.items() if any(value is not None for value in values)}
        return {
            **{label(score): [_with_interval(record, score) for record in records] for score in scores},
            **differences.rows(self.differences),
            **facts,
            **self.settings,
        }

    def views(self) -> list[Any]:
        """The comparison for the screen."""
        return [
            side_by_side([run.name for run in self.runs], self.rows()),
            *(f"\n{sentence}" for sentence in self.sentences()),
            *(f"\nwarning: {warning}" for warning in self.warnings),
            *(self.where.views() if self.where is not None else []),
        ]

    def sentences(self) -> list[str]:
        """Which run is better, and whether that is real."""
        return differences.sentences([run.scored for run in self.runs], self.differences)


def _with_interval(record: Mapping[str, Any], score: str) -> str | None:
    """A score with its interval, or as people write a number."""
    value = record.get(score)
    if value is None:
        return None
    return format_number(value) if record[f"{score}_low"] is None else estimate(record, score)


def compare(runs: Sequence[str]) -> Comparison:
    """The comparison of two or more runs, given by directory or name; StorageError if one is not a run."""
    if len(runs) < 2:
        given = f"there is nothing to compare {runs[0]} with; " if runs else ""
        raise ConfigError(f"{given}give two runs or more, of those that raylm ls lists", "RUN")
    compared = [summarize(run) for run in runs]
    experiments = [run.experiment for run in compared if run.experiment is not None]
    settings = differing(experiments) if len(experiments) == len(compared) else {}
    return Comparison(compared, settings, warnings(compared))


# What differs --------------------------------------------------------------------------------------------------------


def differing(experiments: Sequence[Experiment]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each experiment, of the settings that differ; None where it is not set."""
    flat = [training_settings(experiment) for experiment in experiments]
    keys = dict.fromkeys(key for each in flat for key in each if not SECRET.search(key))
    settings = {key: [each.get(key) for each in flat] for key in keys}
    return {key: values for key, values in settings.items() if any(value != values[0] for value in values)}


def training_settings(experiment: Experiment) -> dict[str, Any]:
    """Dotted key -> value of each setting that affects training, without the passwords in addresses."""
    every = flat_settings(experiment)
    return {key: redacted(value) for key, value in every.items() if key.partition(".")[0] not in IGNORED_SECTIONS}


OTHER_TOKENIZERS = "the tokenizers differ, so that perplexities are of other tokens: compare bits per byte"
OTHER_ARITHMETIC = (
    "the scores are of different arithmetic; raylm evaluate MODEL eval.precision=float32 makes them alike"
)


def warnings(runs: Sequence[ComparedRun]) -> list[str]:
    """Reasons why some of the scores cannot be compared; empty if all can."""
    if any(run.experiment is None for run in runs) and len({run.measure for run in runs}) == 1:
        return _of_other_documents(runs)
    reasons = []
    scored = [run for run in runs if run.perplexity is not None]
    if len({run.measure for run in runs}) > 1:
        kinds = ", ".join(dict.fromkeys(label(run.measure) for run in runs))
        reasons.append(f"the scores are of different kinds, which cannot be compared: {kinds}")
    if unknown := [run.name for run in runs if run.store is None]:
        reasons.append(f"nothing says on what text {', '.join(unknown)} was scored")
    if len({run.store for run in runs} - {None}) > 1 and (reason := _other_tokens(runs)):
        reasons.append(reason)
    if len({run.scored_on for run in scored}) > 1:
        reasons.append(
            "the scores are of other parts of the validation split; raylm evaluate MODEL scores the whole of it"
        )
    if len({run.scored_in for run in scored}) > 1:
        reasons.append(OTHER_ARITHMETIC)
    return reasons


def _of_other_documents(runs: Sequence[ComparedRun]) -> list[str]:
    """Why scores that include those of evaluations cannot be compared: by their documents."""
    kept = [run.scores for run in runs if run.scores is not None]
    reasons = []
    if len(kept) < len(runs) or len({scores.documents for scores in kept}) > 1:
        reasons.append(
            "the scores are of other documents, so that neither perplexity nor bits per byte can be compared"
        )
    elif any(not np.array_equal(scores.tokens, kept[0].tokens) for scores in kept):
        reasons.append(OTHER_TOKENIZERS)
    if len({run.scored_in for run in runs}) > 1:
        reasons.append(OTHER_ARITHMETIC)
    return reasons


def common_measure(runs: Sequence[ComparedRun]) -> str | None:
    """The score that compares all runs: their own, or bits_per_byte if tokenizers differ; None if no score does."""
    measures = {run.measure for run in runs}
    alike = [{run.scored_on for run in runs}, {run.scored_in for run in runs}, measures]
    if any(len(values) > 1 for values in alike) or None in {run.store for run in runs}:
        return None
    if len({run.store for run in runs}) == 1:
        return measures.pop()
    same_text, same_tokenizer, knows_all = _same_tokens(runs)
    if not same_text or not (same_tokenizer or knows_all):
        return None
    return measures.pop() if same_tokenizer else "bits_per_byte"


def _same_tokens(runs: Sequence[ComparedRun]) -> tuple[bool, bool, bool]:
    """Whether runs with different token stores have the same validation text, whether they have the same tokenizer, and
    whether each tokenizer knows all of the text."""
    manifests = [run.manifest for run in runs]
    knows_all = not any(each["validation"].get("unknown_tokens") for each in manifests if each)
    if all(manifests):
        texts = {tuple(each["validation"][count] for count in ("documents", "bytes")) for each in manifests}
        tokenizers = {json.dumps(each["tokenizer"]["files"], sort_keys=True) for each in manifests}
        # The tokenizer of an exported model has other files than the one that it comes from, but not other tokens.
        tokens = {tuple(shard["checksum"] for shard in each["validation"]["shards"]) for each in manifests}
        return len(texts) == 1, 1 in (len(tokenizers), len(tokens)), knows_all
    # A store no longer exists, so compare the settings; if these are equal, the files have changed.
    experiments = [run.experiment for run in runs if run.experiment is not None]
    chosen = {(each.tokenizer.model_dump_json(), each.model.path) for each in experiments}
    same_corpus = len({each.corpus.model_dump_json() for each in experiments}) == 1
    return same_corpus and len(chosen) > 1, len(chosen) == 1, knows_all


def _other_tokens(runs: Sequence[ComparedRun]) -> str | None:
    """Why scores on different token stores cannot be compared; None if the validation tokens are the same."""
    same_text, same_tokenizer, knows_all = _same_tokens(runs)
    if not same_text:
        return (
            "the validation texts differ, so that neither perplexity nor bits per byte can be compared; raylm evaluate "
            "MODEL --text FILE scores any model on the same text"
        )
    if not same_tokenizer and not knows_all:
        return (
            "the tokenizers differ, and of the validation text some tokens are unknown to one of them, so that neither "
            "perplexity nor bits per byte can be compared"
        )
    if not same_tokenizer:
        return OTHER_TOKENIZERS
    return None
