"""Loss on held-out text: Φ = minus the target's mean token cross-entropy (paper, language and UUID experiments)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dpg_cli.engine.records import Examples
from dpg_cli.metrics.head import HeadChange


class TextLossMetric(HeadChange):
    """Φ = -Σ_documents Σ_tokens ℓ / tokens.

    Args:
        model: the target before fine-tuning.
        documents: token sequences; context tokens come first and carry no loss.
        about: what the text is, in words.
    """

    def __init__(self, model: PreTrainedModel, documents: Examples, about: str) -> None:
        super().__init__(model)
        self.documents = documents
        self.about = about

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the class."""
        ids = self.documents.ids_N_S
        logits = functional_call(model, dict(parameters), (), {"input_ids": ids, "use_cache": False}).logits[:, :-1]
        labels = ids[:, 1:].masked_fill(~self.documents.label_N_S[:, 1:], -100)
        return -cross_entropy(logits.flatten(0, 1), labels.flatten())

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Loss in nats a token, and perplexity."""
        loss = -float(self(parameters, model))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def describe(self) -> str:
        """What the data is for, in words."""
        return f"a lower loss on {self.about}"
