"""What follows from the text and the machine, for settings that nobody gave: decided once, then reused.

    any corpus          split by document or passage, and enough of it held out to rank trials by
    without --config    columns of the text, vocabulary, model, block size, batch, budget, evaluations, what is swept

decisions   where decisions lie, so that the same command finds them again
text        what follows from the text alone: columns, split, tokenizer, prefix
sizes       what follows from text and machine: model, batch, budget, evaluations, sweep
speed       how fast this machine trains a model; measured
"""

from raylm.derived.decisions import keep
from raylm.derived.sizes import BYTES_PER_TOKEN, OVERHEAD, START_SECONDS, SWEEP_SECONDS, shown, training
from raylm.derived.text import Derived, columns, prefix, text

__all__ = [
    "BYTES_PER_TOKEN",
    "OVERHEAD",
    "START_SECONDS",
    "SWEEP_SECONDS",
    "Derived",
    "columns",
    "keep",
    "prefix",
    "shown",
    "text",
    "training",
]
