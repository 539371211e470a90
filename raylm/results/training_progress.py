"""The loss and score of a training while it runs, as curves on a terminal, as lines elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from raylm import console

logger = logging.getLogger(__name__)

CURVE_WIDTH = 16
"""Characters of a curve: two of them and their numbers fit into 80 columns."""


class TrainingProgress:
    """Shows a training of so many tokens through `advance`, which `console.task` yields."""

    def __init__(self, advance: console.Advance, budget_tokens: int, measure: str):
        self.advance, self.budget_tokens = advance, budget_tokens
        self.score_name = console.label(measure)
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.tokens = 0.0

    def show(self, tokens: float) -> None:
        """Show the number of trained tokens."""
        self.tokens = tokens
        self.advance(tokens, self.budget_tokens, self.curves())

    def report(self, figures: Mapping[str, float]) -> None:
        """Show a training loss, or the perplexity of an evaluation, which also is a line."""
        if "loss" in figures:
            self.losses.append(figures["loss"])
        if "perplexity" in figures:
            self.scores.append(figures["perplexity"])
            if not console.screen.is_terminal:
                logger.info(self.line(figures["tokens"]))
        self.show(max(self.tokens, figures["tokens"]))

    def line(self, tokens: float) -> str:
        """The newest figures."""
        loss = f"training loss {self.losses[-1]:.4g}, " if self.losses else ""
        score = f"{self.score_name} {console.format_number(self.scores[-1])}"
        return f"{tokens:,.0f} tokens: {loss}{score}" if tokens else f"before training: {score}"

    def curves(self) -> str:
        """Loss and score from the first to the newest one: loss 6.241 █▅▃▂▁ 4.61   perplexity 502 █▃▁ 95.76."""
        return "   ".join(
            " ".join(filter(None, (name, *_ends(values))))
            for name, values in (("loss", self.losses), (self.score_name, self.scores))
            if values
        )


def _ends(values: list[float]) -> tuple[str, ...]:
    """The first value, a curve and the newest value; a single value without a curve."""
    first, last = (console.format_number(value) for value in (values[0], values[-1]))
    return (first, console.sparkline(values, CURVE_WIDTH), last) if len(values) > 1 else (last,)
