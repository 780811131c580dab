"""Log-sum-exp and log-softmax. PyTorch's own tangents of them modify a tensor that their reverse needs.

y = log Σ exp x         ẏ = Σ p ẋ           p = exp(x - y)
z = x - y               ż = ẋ - ẏ

The tangents are spelt out in operations that autograd reverses by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpg_cli.engine.reverse.forms.base import Form, split


def dual_logsumexp(scores: Tensor, dim: int | tuple[int, ...] = -1, keepdim: bool = False) -> Tensor:
    """`torch.logsumexp` on dual tensors. An axis that is -inf throughout has the tangent 0."""
    primal, tangent = split(scores)
    total = torch.logsumexp(primal, dim, keepdim=True)
    probs = torch.exp(primal - total.masked_fill(total == -torch.inf, 0.0))
    value = forward_ad.make_dual(total, (probs * tangent).sum(dim, keepdim=True))
    return value if keepdim else value.squeeze(dim)


def dual_log_softmax(scores: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.log_softmax` on dual tensors."""
    primal, tangent = split(scores.to(dtype) if dtype is not None else scores)
    centred = tangent - (torch.softmax(primal, dim) * tangent).sum(dim, keepdim=True)
    return forward_ad.make_dual(torch.log_softmax(primal, dim), centred)


def dual_functional_log_softmax(
    scores: Tensor, dim: int = -1, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.nn.functional.log_softmax` on dual tensors: its third argument is another."""
    return dual_log_softmax(scores, dim, dtype)


FORM = Form(
    {
        torch.logsumexp: dual_logsumexp,
        torch.Tensor.logsumexp: dual_logsumexp,
        torch.log_softmax: dual_log_softmax,
        torch.Tensor.log_softmax: dual_log_softmax,
        torch.nn.functional.log_softmax: dual_functional_log_softmax,
    }
)
