"""Loss on held-out text: Φ = minus the target's mean token cross-entropy (paper, language and UUID experiments)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from dpg_cli.engine.head import Head, MeanLoss, find_head
from dpg_cli.engine.product import PlainMode
from dpg_cli.engine.records import Examples
from dpg_cli.engine.target import hidden_of
from dpg_cli.metrics.head import HeadChange

TOKENS = 8192  # of documents in the model at once


def piece_loss(head: Head | None, parameters: dict[str, Tensor], model: nn.Module, piece: Examples) -> Tensor:
    """Mean loss of the labelled tokens of a piece, with a graph to the parameters."""
    places = piece.label_N_S.reshape(-1).nonzero()[:, 0]
    labels = piece.ids_N_S.reshape(-1)[places]
    if head is None:
        logits = functional_call(model, parameters, (), {"input_ids": piece.ids_N_S, "use_cache": False}).logits
        return cross_entropy(logits.flatten(0, 1)[places - 1], labels)
    with PlainMode():
        hidden = hidden_of(head, parameters, piece).flatten(0, 1)[places - 1]
    weight, bias = head.parameters(parameters)
    return MeanLoss.apply(hidden, weight, bias, labels)


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
        self.tokens_at_once = min(TOKENS, documents.ids_N_S.numel())
        self.pieces: tuple[Head | None, list[Examples]] | None = None

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the class.

        Documents go through the model a few thousand tokens at a time and are computed again for the gradient, and a
        standard LM head comes in closed form, so that memory grows with neither the documents nor the vocabulary.
        """
        if self.pieces is None:
            head = find_head(model)
            size = max(1, TOKENS // self.documents.ids_N_S.shape[1])
            count = len(self.documents)
            self.pieces = head, [self.documents.rows(start, start + size) for start in range(0, count, size)]
        head, pieces = self.pieces
        total = int(self.documents.label_N_S.sum())
        value: Tensor | None = None
        for piece in pieces:
            if len(pieces) == 1 or not torch.is_grad_enabled():
                loss = piece_loss(head, dict(parameters), model, piece)
            else:
                loss = checkpoint(piece_loss, head, dict(parameters), model, piece, use_reentrant=False)
            share = loss * (int(piece.label_N_S.sum()) / total)
            value = share if value is None else value + share
        assert value is not None
        return -value

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Loss in nats a token, and perplexity."""
        loss = -float(self(parameters, model))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def describe(self) -> str:
        """What the data is for, in words."""
        return f"a lower loss on {self.about}"
