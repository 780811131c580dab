"""Forget a text and keep another: Φ = loss(forget) - k · loss(keep), in nats a token.

Without the second term the shortest way to a high loss is to break the model; k says how much keeping is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.registry import encode, texts_of
from dpg_cli.metrics.text_loss import TextLossMetric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.tiny import world


class ForgetText(Metric):
    """A target that has forgotten one text and kept another.

    Args:
        target: before fine-tuning.
        forget: documents to forget, a list or a source of rows (docs/data.md); by default Italian sentences of the embedded
            world.
        keep: documents to keep; by default English ones.
        keep_weight: k.
    """

    def __init__(
        self,
        target: LanguageModel,
        forget: str | Sequence[str] = (),
        keep: str | Sequence[str] = (),
        keep_weight: float = 1.0,
    ) -> None:
        super().__init__(target)
        self.keep_weight = keep_weight
        self.forget, self.keep = (
            TextLossMetric(
                target.model, encode(texts_of(texts, world.sentences("eval", language, 64, seed=2)), target), ""
            )
            for texts, language in ((forget, "it"), (keep, "en"))
        )

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module. The text metrics are minus the losses."""
        return self.keep_weight * self.keep(parameters, model) - self.forget(parameters, model)

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Both losses, in nats a token."""
        return {
            "forget_loss": -float(self.forget(parameters, model)),
            "keep_loss": -float(self.keep(parameters, model)),
        }
