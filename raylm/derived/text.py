"""What follows from the text alone: the columns that hold it, its split, a tokenizer."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from raylm import console
from raylm.config import Experiment, override
from raylm.derived import decisions

if TYPE_CHECKING:  # whoever has a wrong setting is told before these are imported
    from raylm.corpus import Holdout, Source

logger = logging.getLogger(__name__)

HELD_OUT_BYTES = 300_000
"""Of a large corpus, for validation: 100,000 tokens are scored in seconds, and 5 % of a corpus of 3 GB in an hour."""


class Derived(NamedTuple):
    """An experiment with settings that were derived for it."""

    experiment: Experiment
    reasons: dict[str, str]
    """Dotted key -> why it has its value, of settings that were derived now, not found as decided before."""


def columns(experiment: Experiment, sources: list[Source]) -> Derived:
    """The experiment with corpus.text of a table, if there is neither a config file nor that setting."""
    from raylm import corpus

    given = {"text", "tokens", "prompt", "messages"} & experiment.corpus.model_fields_set
    if given or not experiment.sizes_follow_text:
        return Derived(experiment, {})
    found = corpus.guess_columns(sources, experiment.corpus)
    if found is None:
        return Derived(experiment, {})
    logger.info(f"corpus.text={json.dumps(found.text, ensure_ascii=False)}: {found.why}")
    settings = {"corpus.text": found.text, "corpus.join": found.join}
    if found.join == experiment.corpus.join:
        del settings["corpus.join"]
    return Derived(override(experiment, settings), {"corpus.text": found.why})


def text(experiment: Experiment, sources: list[Source]) -> Derived:
    """The experiment with its split decided; without a config file also with a tokenizer, unless one was given.

    Reads some of the text, unless it was decided before.
    """
    return (with_tokenizer if experiment.sizes_follow_text else with_split)(experiment, sources)[0]


def prefix(experiment: Experiment) -> Derived:
    """The experiment with its prefix decided for conversations: they begin as a chat will, which the chat template and
    a tokenizer with a begin-of-text token of its own say."""
    from raylm import tokenizer as tokenizers

    section = experiment.tokenizer
    if experiment.corpus.messages is None or section.prefix != "auto":
        return Derived(experiment, {})
    chosen = tokenizers.choose(section, experiment.model)
    key = "tokenizer.path" if section.path else "model.path"
    if tokenizers.adds_begin(tokenizers.load_section(chosen, key)):
        return Derived(experiment, {})
    why = "conversations begin as the chat template begins them"
    return Derived(override(experiment, {"tokenizer.prefix": "none"}), {"tokenizer.prefix": why})


def with_split(experiment: Experiment, sources: list[Source]) -> tuple[Derived, Holdout]:
    """The experiment with its split, and what was found out for that."""
    from raylm import corpus

    section = experiment.corpus
    # It is the same with and without a test split.
    given = section.model_dump(mode="json", exclude={"test_paths", "test_fraction"} | section.not_given)
    path = decisions.path(experiment, "split", given, "json")
    decided = decisions.find(path)
    if decided is not None:
        found = corpus.Holdout(**json.loads(decided))
    else:
        with console.waiting("Looking at the text"):
            found = corpus.holdout(sources, section)
        decisions.decide(path, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    documents = console.counted(found.documents, "document")
    reasons = {"corpus.split_by": documents if found.complete else f"at least {documents}"}
    if found.split_by == "passage" and section.split_by is None and not (found.complete and found.units < 2):
        held = f"{100 * found.validation_fraction:.2g} %"
        if found.complete:
            held = f"about {max(1, found.units * found.validation_fraction):.0f} of {found.units:,}"
        logger.info(
            f"The text is {documents}, too few to hold any out: passages are held out for validation, {held}"
            + "; corpus.split_by=document holds out whole documents" * (found.documents > 1)
        )
        reasons["corpus.split_by"] = f"{documents}, too few to hold any out whole"
        reasons["corpus.validation_fraction"] = f"{held} passages"
    elif found.validation_fraction > section.validation_fraction:
        logger.info(
            f"corpus.validation_fraction={section.validation_fraction:g} of {documents} is too little to rank trials "
            f"by: {found.validation_fraction:.2g} is held out"
        )
        reasons["corpus.validation_fraction"] = "enough documents to rank trials by"
    settings = {"corpus.split_by": found.split_by, "corpus.validation_fraction": found.validation_fraction}
    return Derived(override(experiment, settings), reasons), found


def with_tokenizer(experiment: Experiment, sources: list[Source]) -> tuple[Derived, Holdout]:
    """The experiment with its split and a tokenizer to train, unless it has one."""
    from raylm import corpus

    given = experiment.corpus
    (experiment, reasons), held = with_split(experiment, sources)
    enough = max(HELD_OUT_BYTES, 3 * corpus.ENOUGH_UNITS * held.unit_bytes)
    if "validation_fraction" not in given.model_fields_set and size(held) * held.validation_fraction > enough:
        held = dataclasses.replace(held, validation_fraction=round(enough / size(held), 7))
        experiment = override(experiment, {"corpus.validation_fraction": held.validation_fraction})
        reasons["corpus.validation_fraction"] = f"{console.format_size(enough)}, which is scored in seconds"
    section, objective = experiment.tokenizer, experiment.objective
    is_given = section.path is not None or given.tokens is not None
    if is_given or (section.train is None and experiment.model.path is not None):
        return Derived(experiment, reasons), held
    needs = {"masked": ("<mask>",), "fill_in_middle": objective.sentinels}.get(objective.kind, ())
    trained = {"vocab_size": vocabulary(size(held)), "special_tokens": ["<|endoftext|>", *needs]}
    reasons["tokenizer.train"] = (
        f"for {console.format_size(size(held))} of text: twice the square root of its bytes, as words grow with a "
        "text (Heaps' law), to a power of two up to 8,192"
    )
    if section.train is not None:
        trained |= section.train.model_dump(exclude_unset=True)
    return Derived(override(experiment, {"tokenizer.train": trained}), reasons), held


def size(held: Holdout) -> int:
    """Bytes of the text; a data set that does not say is taken for a large one."""
    return held.num_bytes or 100_000_000


def vocabulary(num_bytes: int) -> int:
    """Entries for so much text: 512 for 50 kB, 2,048 for 1 MB, 8,192 from 12 MB on.

    Twice the square root, as words grow with a text (Heaps' law), to a power of two: more would be seen too rarely.
    """
    return 2 ** min(13, max(9, round(math.log2(2 * math.sqrt(max(1, num_bytes))))))
