"""Linear maps.

Y = X Wᵀ + b    Ẏ = Ẋ Wᵀ + X Ẇᵀ + ḃ
reverse         Ẋ̄ = Ẏ̄ W       X̄ = Ȳ W + Ẏ̄ Ẇ       W̄ = Ȳᵀ X + Ẏ̄ᵀ Ẋ       b̄ = Σ Ȳ
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from dpg_cli.engine.inner.product import Precision, own_view, plus_times, times
from dpg_cli.engine.inner.remembered import Piece, Products
from dpg_cli.engine.reverse.forms.base import Form, MaybeTensor, parts, rows


class Linear(torch.autograd.Function):
    """(X, Ẋ, W, Ẇ, b, ḃ) -> X Wᵀ + b with its tangent. W is (out, in), possibly a transposed view; tangents may be None.

    Of `products`, which the inner step left, X Wᵀ + b and Ẋ̄ are taken, or left there (see `remembered.py`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_t: MaybeTensor,
        weight: Tensor,
        weight_t: MaybeTensor,
        bias: MaybeTensor,
        bias_t: MaybeTensor,
        precision: Precision = "float32",
        products: Products | None = None,
    ) -> tuple[Tensor, Tensor]:
        shape = (*x.shape[:-1], weight.shape[0])
        flat, flat_t = rows(x), None if x_t is None else rows(x_t)
        ctx.save_for_backward(flat, flat_t, weight, weight_t)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.precision, ctx.products = x.shape, precision, products
        out = None if products is None else products.take_out(len(flat))
        if out is None:
            out = times(flat, weight.mT, precision)
            if bias is not None:
                out.add_(bias)
        out_t = plus_times(None, flat_t, weight.mT, precision)
        out_t = plus_times(out_t, flat, None if weight_t is None else weight_t.mT, precision)
        if bias_t is not None:
            out_t = bias_t.expand(out.shape).clone() if out_t is None else out_t.add_(bias_t)
        out_t = torch.zeros_like(out) if out_t is None else out_t
        whole = own_view(out, shape)
        if products is not None and products.records:
            products.keep(out=whole.detach())
        return whole, own_view(out_t, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: MaybeTensor, out_t_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        x, x_t, weight, weight_t = ctx.saved_tensors
        need_x, need_x_t, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        bar = None if out_bar is None else rows(out_bar)
        bar_t = None if out_t_bar is None else rows(out_t_bar)
        x_bar = x_t_bar = weight_bar = None
        kind = ctx.precision
        if need_x:
            x_bar = plus_times(plus_times(None, bar, weight, kind), bar_t, weight_t, kind)
        if need_x_t and bar_t is not None:
            x_t_bar = None if ctx.products is None else ctx.products.take_x_bar(len(bar_t))
            if x_t_bar is None:
                x_t_bar = times(bar_t, weight, kind)
                if ctx.products is not None and ctx.products.records:
                    ctx.products.keep(x_bar=x_t_bar.clone())
        if need_weight:
            if weight.stride(-1) == 1 or weight.shape[-1] == 1:
                first = plus_times(None, None if bar is None else bar.mT, x, kind)
                weight_bar = plus_times(first, None if bar_t is None else bar_t.mT, x_t, kind)
            else:  # W is a transposed view: make the adjoint in the layout of what it is a view of
                first = plus_times(None, x.mT, bar, kind)
                weight_bar = plus_times(first, None if x_t is None else x_t.mT, bar_t, kind)
                weight_bar = None if weight_bar is None else weight_bar.mT
        bias_bar = bar.sum(0) if need_bias and bar is not None else None
        return (
            None if x_bar is None else x_bar.view(ctx.shape),
            None if x_t_bar is None else x_t_bar.view(ctx.shape),
            weight_bar,
            None,
            bias_bar,
            None,
            None,
            None,
        )


def dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: Precision = "float32",
    piece: Piece | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` on dual tensors."""
    if weight.ndim != 2:
        raise NotImplementedError(f"a linear map with a weight of {weight.ndim} axes has no dual form here")
    products = None if piece is None else piece.next(weight)
    return forward_ad.make_dual(*Linear.apply(*parts(x), *parts(weight), *parts(bias), precision, products))


def dual_addmm(
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    precision: Precision = "float32",
    piece: Piece | None = None,
) -> Tensor:
    """`torch.addmm` on dual tensors: what GPT-2 calls its linear maps by."""
    if beta != 1 or alpha != 1 or bias.ndim != 1:
        return torch.addmm(bias, x, weight, beta=beta, alpha=alpha)
    return dual_linear(x, weight.mT, bias, precision=precision, piece=piece)


FORM = Form({torch.nn.functional.linear: dual_linear, torch.addmm: dual_addmm}, with_products=True)
