"""Softmax.

P = softmax(S)      Ṗ = P ⊙ D,  D = Ṡ - Σ P ⊙ Ṡ          (sums over the last axis)
reverse             E = Ṗ̄ - Σ P ⊙ Ṗ̄      Ṡ̄ = P ⊙ E      Q = P̄ + E ⊙ D      S̄ = P ⊙ (Q - Σ P ⊙ Q)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from dpg_cli.engine.reverse.forms.base import Form, split


def softmax_forward(scores: Tensor, tangent: Tensor, may_be_empty: bool) -> tuple[Tensor, Tensor, Tensor]:
    """P, Ṗ and D from S and Ṡ. A row that is masked everywhere gives zeros, as PyTorch's safe softmax does."""
    probs = torch.softmax(scores, -1)
    if may_be_empty and not torch.isfinite(scores[..., :1]).all():  # only then can a whole row be masked
        probs = torch.nan_to_num(probs, nan=0.0)
    weighted = probs * tangent
    centred = tangent - weighted.sum(-1, keepdim=True)
    return probs, torch.mul(probs, centred, out=weighted), centred


def softmax_reverse(probs: Tensor, centred: Tensor, probs_bar: Tensor, tangent_bar: Tensor) -> tuple[Tensor, Tensor]:
    """S̄ and Ṡ̄ from P, D, P̄ and Ṗ̄, whose memory is used up; see the module's header."""
    weighted = probs * tangent_bar
    outer = tangent_bar.sub_(weighted.sum(-1, keepdim=True))
    scores_tangent_bar = torch.mul(probs, outer, out=weighted)
    scores_bar = probs_bar.addcmul_(outer, centred).mul_(probs)
    return scores_bar.addcmul_(probs, scores_bar.sum(-1, keepdim=True), value=-1), scores_tangent_bar


class Softmax(torch.autograd.Function):
    """(S, Ṡ) -> (P, Ṗ) over the last axis."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        probs, probs_t, centred = softmax_forward(scores, tangent, True)
        ctx.save_for_backward(probs, centred)
        return probs, probs_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, probs_bar: Tensor, tangent_bar: Tensor) -> tuple[Tensor, Tensor]:
        probs, centred = ctx.saved_tensors
        return softmax_reverse(probs, centred, probs_bar.clone(), tangent_bar.clone())


def dual_softmax(scores: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax` on dual tensors."""
    moved = scores.to(dtype) if dtype is not None else scores
    primal, tangent = split(moved.movedim(dim, -1))
    return forward_ad.make_dual(*Softmax.apply(primal, tangent)).movedim(-1, dim)


def dual_functional_softmax(
    scores: Tensor, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.softmax` on dual tensors: its third argument is another."""
    return dual_softmax(scores, dim, dtype)


FORM = Form(
    {
        torch.softmax: dual_softmax,
        torch.Tensor.softmax: dual_softmax,
        torch.nn.functional.softmax: dual_functional_softmax,
    }
)
