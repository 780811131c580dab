"""Loss on held-out text: Φ = minus the target's mean token cross-entropy (paper, language and UUID experiments)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dpg_cli.engine.inner.head import Head, MeanLoss, find_head
from dpg_cli.engine.inner.product import PlainMode
from dpg_cli.engine.inner.target import hidden_of
from dpg_cli.engine.records import Examples
from dpg_cli.metrics.head import HeadChange

TOKENS = 4096  # of documents in the model at once


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


class PiecewiseLoss(torch.autograd.Function):
    """(pieces, parameters) -> mean loss of all their labelled tokens, with the gradient taken a piece at a time.

    One piece's activations live at once, and nothing is computed twice; one more vector of the parameters' size does.
    """

    @staticmethod
    def forward(
        ctx: Any, head: Head | None, model: nn.Module, pieces: list[Examples], names: list[str], *values: Tensor
    ) -> Tensor:
        needed = ctx.needs_input_grad[4:]
        given = {
            name: value.detach().requires_grad_(need) for name, value, need in zip(names, values, needed, strict=True)
        }
        leaves = [value for value in given.values() if value.requires_grad]
        counts = [int(piece.label_N_S.sum()) for piece in pieces]
        total = torch.zeros((), dtype=values[0].dtype, device=values[0].device)
        with torch.set_grad_enabled(bool(leaves)):
            for piece, count in zip(pieces, counts, strict=True):
                loss = piece_loss(head, given, model, piece) * (count / sum(counts))
                if leaves:
                    torch.autograd.backward(loss, inputs=leaves)
                total += loss.detach()
        ctx.save_for_backward(*(value.grad for value in given.values()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad.mul_(bar) for grad in ctx.saved_tensors)  # in place, as `MeanLoss` does
        return None, None, None, None, *grads


def in_pieces(documents: Examples) -> list[Examples]:
    """Documents, at most `TOKENS` tokens at a time."""
    size = max(1, TOKENS // documents.ids_N_S.shape[1])
    return [documents.rows(start, start + size) for start in range(0, len(documents), size)]


def mean_loss(head: Head | None, parameters: Mapping[str, Tensor], model: nn.Module, pieces: list[Examples]) -> Tensor:
    """Mean loss of the labelled tokens of all pieces, with a graph to the parameters."""
    if len(pieces) == 1:
        return piece_loss(head, dict(parameters), model, pieces[0])
    return PiecewiseLoss.apply(head, model, pieces, list(parameters), *parameters.values())


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
        self.notes: tuple[str, ...] = ()  # how the documents were understood
        self.tokens_read = documents.ids_N_S.numel()
        self.pieces: tuple[Head | None, list[Examples]] | None = None

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; memory grows with neither the documents (see `PiecewiseLoss`) nor a standard LM head's vocabulary."""
        if self.pieces is None:
            self.pieces = find_head(model), in_pieces(self.documents)
        head, pieces = self.pieces
        return -mean_loss(head, parameters, model, pieces)

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Loss in nats a token, and perplexity."""
        loss = -float(self(parameters, model))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}

    def describe(self) -> str:
        """What the data is for, in words."""
        return f"a lower loss on {self.about}"
