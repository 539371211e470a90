"""What the model learns.

batches    examples -> batches with labels and weights, for each kind of objective
keywords   the tokens of objective.keywords
loss       the summed loss of a batch, and its gradient

The loss of a global batch is its summed cross entropy, in nats, divided once by what the batches count as `items`:
for causal, masked and fill_in_middle the predicted tokens, of all micro-batches and all workers. So one global batch
has one loss and one gradient, however it is split.
"""

from raylm.blocks import IGNORED
from raylm.objective.batches import NumberedExamples, build, check_settings
from raylm.objective.keywords import Keywords, warnings
from raylm.objective.loss import attach

__all__ = [
    "IGNORED",
    "Keywords",
    "NumberedExamples",
    "attach",
    "build",
    "check_settings",
    "warnings",
]
