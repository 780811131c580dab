"""Activations, elementwise.

y = f(x)        ẏ = f'(x) ẋ         reverse: ẋ̄ = f'(x) ẏ̄       x̄ = f'(x) ȳ + f''(x) ẋ ẏ̄
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from dpg_cli.engine.reverse.forms.base import Form, MaybeTensor, split

BLOCK = 1 << 17  # elements a thread and block of a chain of operations on the CPU: its temporaries stay cached
_aten = torch.ops.aten


def _blockwise(function: Any, outs: tuple[Tensor, ...], ins: tuple[Tensor, ...]) -> None:
    """outs = function(*ins), elementwise on contiguous tensors, in blocks on the CPU."""
    first = outs[0]
    size = BLOCK * torch.get_num_threads() if first.device.type == "cpu" else max(1, first.numel())
    blocks = zip(*(tensor.view(-1).split(size) for tensor in (*outs, *ins)), strict=True)
    for parts in blocks:
        function(*parts)


def _gelu_tanh_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' of f = x (1 + t) / 2 with t = tanh(c x + c a x³).

    With n = c + 3 c a x² and s = 1 - t²: f' = (1 + t + x s n) / 2, f'' = s (c + 6 c a x² - x t n²).
    """
    c, ca = math.sqrt(2 / math.pi), math.sqrt(2 / math.pi) * 0.044715
    square = x * x
    t = torch.mul(square, ca).add_(c).mul_(x).tanh_()
    s = torch.rsub(t * t, 1)
    n = torch.mul(square, 3 * ca).add_(c)
    xn = n * x
    second = square.mul_(6 * ca).add_(c).sub_(n.mul_(xn).mul_(t)).mul_(s)
    return s.mul_(xn).add_(t).add_(1).mul_(0.5), second


def _gelu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' of f = x Φ(x): Φ + x φ and φ (2 - x²)."""
    square = x * x
    density = torch.exp(square * -0.5).mul_(1 / math.sqrt(2 * math.pi))
    first = torch.erf(x * math.sqrt(0.5)).add_(1).mul_(0.5).addcmul_(x, density)
    return first, density.mul_(square.neg_().add_(2))


def _silu_slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """f' and f'' of f = x s, s = sigmoid(x): s + x r and r (2 + x (1 - 2 s)), with r = s (1 - s)."""
    s = torch.sigmoid(x)
    r = torch.addcmul(s, s, s, value=-1)
    second = torch.mul(s, -2).add_(1).mul_(x).add_(2).mul_(r)
    return s.addcmul_(x, r), second


ACTIVATIONS: dict[str, tuple[Any, Any, Any]] = {  # f and f' times a vector (PyTorch's fused kernels); f' with f''
    "gelu": (_aten.gelu, _aten.gelu_backward, _gelu_slopes),
    "gelu_tanh": (
        lambda x: _aten.gelu(x, approximate="tanh"),
        lambda vector, x: _aten.gelu_backward(vector, x, approximate="tanh"),
        _gelu_tanh_slopes,
    ),
    "silu": (_aten.silu, _aten.silu_backward, _silu_slopes),
}


class Activation(torch.autograd.Function):
    """(x, ẋ) -> (f(x), f'(x) ẋ) for an f of `ACTIVATIONS`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_t: Tensor, name: str) -> tuple[Tensor, Tensor]:
        value, slope_times, _ = ACTIVATIONS[name]
        x, x_t = x.contiguous(), x_t.contiguous()
        ctx.save_for_backward(x, x_t)
        ctx.name = name
        return value(x), slope_times(x_t, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor, out_t_bar: Tensor) -> tuple[MaybeTensor, ...]:
        x, x_t = ctx.saved_tensors
        slopes = ACTIVATIONS[ctx.name][2]

        def reverse(x_bar: Tensor, x_t_bar: Tensor, x: Tensor, x_t: Tensor, bar: Tensor, bar_t: Tensor) -> None:
            first, second = slopes(x)
            torch.mul(first, bar, out=x_bar).addcmul_(second.mul_(x_t), bar_t)
            torch.mul(first, bar_t, out=x_t_bar)

        outs = torch.empty_like(x), torch.empty_like(x)
        _blockwise(reverse, outs, (x, x_t, out_bar.contiguous(), out_t_bar.contiguous()))
        return *outs, None


def dual_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu` on dual tensors."""
    return forward_ad.make_dual(*Activation.apply(*split(x), "gelu_tanh" if approximate == "tanh" else "gelu"))


def dual_silu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu` on dual tensors."""
    return forward_ad.make_dual(*Activation.apply(*split(x), "silu"))


FORM = Form({torch.nn.functional.gelu: dual_gelu, torch.nn.functional.silu: dual_silu})
