"""How likely given answers are: Φ = mean over rows of log p(answer | prompt)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dpg_cli.data.shapes import Pair, items, shape_of
from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.behaviour.answers import Answers, require_way, rows_of, said_in
from dpg_cli.models.loading import LanguageModel


class AnswerProbability(Metric):
    """More probable answers to given prompts.

    Args:
        target: before fine-tuning.
        file: any source of rows with a prompt and a completion (docs/data.md). By default prompts of the embedded world, and
            the same sentences in German.
        by: "mean" over an answer's tokens, their "sum", or the "first" token alone.

    Raises:
        UsageError: if the file is not of that form.
    """

    def __init__(self, target: LanguageModel, file: str = "", by: str = "mean") -> None:
        super().__init__(target)
        self.way = require_way(by)
        if file:
            rows = rows_of(file)
            found = [item for _, item in items(rows, shape_of(rows))]
        else:
            found = [Pair(*pair) for pair in said_in("de", 32)]
        self.answers = Answers(target, found, file or "the embedded answers")
        self.notes = self.answers.notes

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        return self.answers.by(self.way, parameters, model).mean()

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Mean probability of a whole answer, and nats a token."""
        sums_N = self.answers.sums(parameters, model)
        nats = -float(sums_N.sum()) / int(self.answers.counts_N.sum())
        return {"probability": float(sums_N.exp().mean()), "nats": nats}
