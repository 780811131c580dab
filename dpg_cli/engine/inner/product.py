"""Matrix products of the engine: which library multiplies, and in which precision.

MKL, which PyTorch takes for float32 on x86, runs far below the peak of processors that Intel did not make; oneDNN, which
PyTorch also carries, does not. Which one multiplies follows from the processor alone, never from a timing, so that a
resumed run repeats the same bytes. docs/performance.md has figures.

Mixed precision ("bf16"): the operands of the backbone's linear maps are rounded to bfloat16; their sums, and all else
(states, gradients, adjoints, norms, attention, softmax, LM head and cross-entropy), stay float32.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from dpg_cli.engine.inner.remembered import Piece, Products

Precision = Literal["float32", "bf16"]
SMALLEST = 1 << 20  # multiplications below which the choice of library does not matter


@cache
def prefer_onednn() -> bool:
    """Whether oneDNN multiplies float32 on this processor: it is there, and Intel did not make the processor."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:400]
    except OSError:
        return False


def _suits_onednn(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == "cpu"
        and left.is_contiguous()
        and 1 in right.stride()
        and left.numel() * right.shape[1] >= SMALLEST
        and prefer_onednn()
    )


def times(left: Tensor, right: Tensor, precision: Precision = "float32") -> Tensor:
    """left (M, K) times right (K, N); not for autograd to look into."""
    if precision == "bf16":
        return (left.bfloat16() @ right.bfloat16()).to(left.dtype)
    if _suits_onednn(left, right):
        return torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")
    return left @ right


def plus_times(
    total: Tensor | None, left: Tensor | None, right: Tensor | None, precision: Precision = "float32"
) -> Tensor | None:
    """total + left @ right, in place where it can be; None stands for zero."""
    if left is None or right is None:
        return total
    if total is None:
        return times(left, right, precision)
    if precision == "bf16" or _suits_onednn(left, right):
        return total.add_(times(left, right, precision))
    return total.addmm_(left, right)


def own_view(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A function's result in its shape; not a view to autograd, so that a model may write to it."""
    return torch.ops.aten._unsafe_view(matrix, shape)


class PlainLinear(torch.autograd.Function):
    """(X, W (out, in), b) -> X Wᵀ + b by `times`, for first-order passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        precision: Precision = "float32",
        products: Products | None = None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(flat, weight)
        ctx.shape, ctx.precision, ctx.products = x.shape, precision, products
        out = times(flat, weight.mT, precision)
        if bias is not None:
            out.add_(bias)
        return own_view(out, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = bar.reshape(-1, bar.shape[-1])
        x_bar = times(flat, weight, ctx.precision) if ctx.needs_input_grad[0] else None
        if ctx.products is not None:
            ctx.products.keep(x_bar=x_bar)
        weight_bar = None
        if ctx.needs_input_grad[1]:
            if weight.stride(-1) == 1 or weight.shape[-1] == 1:
                weight_bar = times(flat.mT, x, ctx.precision)
            else:  # W is a transposed view: make the adjoint in the layout of what it is a view of
                weight_bar = times(x.mT, flat, ctx.precision).mT
        bias_bar = flat.sum(0) if ctx.needs_input_grad[2] else None
        return None if x_bar is None else x_bar.view(ctx.shape), weight_bar, bias_bar, None, None


class PlainMode(TorchFunctionMode):
    """Within this context linear maps are `PlainLinear`.

    Args:
        precision: of their products.
        piece: where these are left for the dual pass.
    """

    def __init__(self, precision: Precision = "float32", piece: Piece | None = None) -> None:
        super().__init__()
        self.precision, self.piece = precision, piece

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.linear and not kwargs and args[1].ndim == 2:
            return self._linear(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and len(args) == 3 and args[0].ndim == 1:
            return self._linear(args[1], args[2].mT, args[0])
        return func(*args, **kwargs)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.piece is None:
            return PlainLinear.apply(x, weight, bias, self.precision)
        products = self.piece.add(weight)
        out = PlainLinear.apply(x, weight, bias, self.precision, products)
        products.keep(out=out.detach())
        return out
