"""A text and this machine -> an experiment for them, as `raylm init` writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylm import config, console, corpus, plan
from raylm.config import Experiment
from raylm.corpus import Profile, Source


@dataclass(frozen=True)
class Proposal:
    """An experiment for a text, and a profile of the text."""

    experiment: Experiment
    sources: list[Source]
    profile: Profile
    text: str
    """The YAML file, with a comment on every setting that was derived."""
    reasons: dict[str, str]
    """Dotted key -> why it has its value."""

    def record(self, file: str) -> dict[str, Any]:
        """The proposal for --json."""
        return {
            "file": file,
            "files": sum(len(source.files) for source in self.sources),
            "bytes": sum(source.num_bytes for source in self.sources),
            "left_out": corpus.left_out(self.sources) or None,
            "text": dataclasses.asdict(self.profile),
            "settings": config.settings_of(self.text),
            "reasons": self.reasons,
        }


DUPLICATES = 0.01
"""Fraction of duplicates, or of more near ones, from which on the file shows how to drop them."""


def propose(experiment: Experiment, given: Mapping[str, Any]) -> Proposal:
    """A proposal for the text of `experiment`, which was loaded without a config file, and this machine.

    `given`: the settings that the user typed, by dotted keys; the file has the paths as typed. DataError if there is no
    text.
    """
    (experiment, reasons), sources = plan.derive(experiment, with_sizes=True, anew=True)
    with console.waiting("Counting duplicates and scripts"):
        profile = corpus.profile(sources, experiment.corpus)
    tree = experiment.model_dump(mode="json", exclude_unset=True)
    derived = {
        f"{section}.{name}": value
        for section, values in tree.items()
        for name, value in (values.items() if isinstance(values, dict) else ())
        if section != "tracking"  # it belongs to a machine, like storage
    }
    told = [
        f"{part:.0%} of {profile.seen:,} documents repeat another {how}; {way} drops them"
        for part, how, way, others in (
            (profile.duplicates, "exactly", "exact", 0.0),
            (profile.near_duplicates, "at least nearly", "near", profile.duplicates),
        )
        if part >= others + DUPLICATES
    ]
    if told and not experiment.corpus.deduplicate:
        derived["corpus.deduplicate"] = False
        reasons["corpus.deduplicate"] = "; ".join(told)
    paths = ", ".join(experiment.corpus.labels)
    head = f"An experiment for {paths}, by raylm init; raylm tune --config THIS_FILE runs it."
    typed = {key: value for key, value in given.items() if key not in derived or key == "corpus.paths"}
    text = config.outline({"name": experiment.name, **derived, **typed}, reasons, head)
    return Proposal(experiment, sources, profile, text, reasons)
