"""Layer norm over the last axis.

x̂ = σ (x - mean x)   ẋ̂ = σ (a - x̂ k),  a = ẋ - mean ẋ,  k = mean x̂ ⊙ a,  σ = 1/√(var x + ε)
reverse             b = mean B ⊙ x̂      ẋ̄ = σ (B - mean B - x̂ b)      A' = A - σ (k B + b a)      (A, B: adjoints of x̂, ẋ̂)
                    x̄ = N(A') - σ x̂ mean B ⊙ ẋ̂,  N(u) = σ (u - mean u - x̂ mean x̂ ⊙ u)        (ẋ̂ = N(ẋ), ẋ̄ = N(B))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from dpg_cli.engine.reverse.forms.base import Form, MaybeTensor, rows, split

_aten = torch.ops.aten


def _norm_adjoint(bar: Tensor, x: Tensor, mean: Tensor, sigma: Tensor, weight: MaybeTensor = None) -> Tensor:
    """N(γ bar), N(u) = σ (u - mean u - x̂ mean x̂ ⊙ u): layer norm's adjoint by x, and its tangent, in one kernel."""
    shape = [x.shape[-1]]
    mask = [True, False, False]
    return _aten.native_layer_norm_backward(bar.contiguous(), x, shape, mean, sigma, weight, None, mask)[0]


class LayerNorm(torch.autograd.Function):
    """(x, γ, β) with tangents -> γ x̂ + β with its tangent, over the last axis."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_t: Tensor, weight: Tensor, weight_t: Tensor, bias: Tensor, bias_t: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        normed, mean, sigma = torch.native_layer_norm(x, [x.shape[-1]], None, None, eps)
        normed_t = _norm_adjoint(x_t, x, mean, sigma)
        k = (normed * x_t).mean(-1, keepdim=True).mul_(sigma)
        ctx.save_for_backward(x, mean, sigma, normed, normed_t, k, weight, weight_t)
        out_t = torch.addcmul(bias_t, normed, weight_t).addcmul_(normed_t, weight)
        return torch.addcmul(bias, normed, weight), out_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor, out_t_bar: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, sigma, normed, normed_t, k, weight, weight_t = ctx.saved_tensors
        needs = ctx.needs_input_grad
        weight_bar = weight_t_bar = bias_bar = bias_t_bar = None
        if needs[2]:
            weight_bar = rows((out_bar * normed).addcmul_(out_t_bar, normed_t)).sum(0)
        if needs[3]:
            weight_t_bar = rows(out_t_bar * normed).sum(0)
        if needs[4]:
            bias_bar = rows(out_bar).sum(0)
        if needs[5]:
            bias_t_bar = rows(out_t_bar).sum(0)
        x_t_bar = _norm_adjoint(out_t_bar, x, mean, sigma, weight)
        b = out_t_bar * weight
        b_mean = (b * normed).mean(-1, keepdim=True)
        inner = (b * normed_t).mean(-1, keepdim=True).mul_(sigma)
        # A' = A - σ k B - b (ẋ̂ + σ k x̂), since σ a = ẋ̂ + σ k x̂; `k` here is σ k
        a = (out_bar * weight).addcmul_(out_t_bar, weight_t).addcmul_(b, k, value=-1)
        a.addcmul_(normed_t, b_mean, value=-1).addcmul_(normed, b_mean * k, value=-1)
        x_bar = _norm_adjoint(a, x, mean, sigma).addcmul_(normed, inner, value=-1)
        return x_bar, x_t_bar, weight_bar, weight_t_bar, bias_bar, bias_t_bar, None


def dual_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """`torch.nn.functional.layer_norm` on dual tensors.

    Raises:
        NotImplementedError: for a normalisation over more than the last axis, which no language model here uses.
    """
    if len(normalized_shape) != 1:
        raise NotImplementedError(f"layer norm over {len(normalized_shape)} axes has no dual form here")
    weight = x.new_ones(normalized_shape[0]) if weight is None else weight
    bias = x.new_zeros(normalized_shape[0]) if bias is None else bias
    return forward_ad.make_dual(*LayerNorm.apply(*split(x), *split(weight), *split(bias), eps))


FORM = Form({torch.nn.functional.layer_norm: dual_layer_norm, torch.layer_norm: dual_layer_norm})
