"""Closed forms of linear maps, softmax, attention, layer norm and activations for the dual pass.

Each takes primal and tangent apart and has a hand-derived reverse; `dual.py` says why, and puts them in place.

    Y = X Wᵀ + b    Ẏ = Ẋ Wᵀ + X Ẇᵀ + ḃ
    reverse         Ẋ̄ = Ẏ̄ W       X̄ = Ȳ W + Ẏ̄ Ẇ       W̄ = Ȳᵀ X + Ẏ̄ᵀ Ẋ       b̄ = Σ Ȳ

    P = softmax(S)      Ṗ = P ⊙ D,  D = Ṡ - Σ P ⊙ Ṡ          (sums over the last axis)
    reverse             E = Ṗ̄ - Σ P ⊙ Ṗ̄      Ṡ̄ = P ⊙ E      Q = P̄ + E ⊙ D      S̄ = P ⊙ (Q - Σ P ⊙ Q)

    x̂ = σ (x - mean x)   ẋ̂ = σ (a - x̂ k),  a = ẋ - mean ẋ,  k = mean x̂ ⊙ a,  σ = 1/√(var x + ε)
    reverse             b = mean B ⊙ x̂      ẋ̄ = σ (B - mean B - x̂ b)      A' = A - σ (k B + b a)      (A, B: adjoints of x̂, ẋ̂)
                        x̄ = N(A') - σ x̂ mean B ⊙ ẋ̂,  N(u) = σ (u - mean u - x̂ mean x̂ ⊙ u)        (ẋ̂ = N(ẋ), ẋ̄ = N(B))

    y = f(x)        ẏ = f'(x) ẋ         reverse: ẋ̄ = f'(x) ẏ̄       x̄ = f'(x) ȳ + f''(x) ẋ ẏ̄          (elementwise)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpg_cli.engine.inner.product import Precision, own_view, plus_times, times
from dpg_cli.engine.inner.remembered import Products

MaybeTensor = Tensor | None
BLOCK = (
    1 << 17
)  # elements a thread and block of a chain of elementwise operations on the CPU: its temporaries stay cached
_aten = torch.ops.aten


def _rows(tensor: Tensor) -> Tensor:
    """All axes but the last as one."""
    return tensor.reshape(-1, tensor.shape[-1])


class Linear(torch.autograd.Function):
    """(X, Ẋ, W, Ẇ, b, ḃ) -> X Wᵀ + b with its tangent. W is (out, in), possibly a transposed view; tangents may be None.

    Of `products`, which the inner step left, X Wᵀ + b and Ẋ̄ are taken (see `remembered.py`).
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
        flat, flat_t = _rows(x), None if x_t is None else _rows(x_t)
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
        return own_view(out, shape), own_view(out_t, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: MaybeTensor, out_t_bar: MaybeTensor) -> tuple[MaybeTensor, ...]:
        x, x_t, weight, weight_t = ctx.saved_tensors
        need_x, need_x_t, need_weight, _, need_bias, *_ = ctx.needs_input_grad
        bar = None if out_bar is None else _rows(out_bar)
        bar_t = None if out_t_bar is None else _rows(out_t_bar)
        x_bar = x_t_bar = weight_bar = None
        kind = ctx.precision
        if need_x:
            x_bar = plus_times(plus_times(None, bar, weight, kind), bar_t, weight_t, kind)
        if need_x_t and bar_t is not None:
            x_t_bar = None if ctx.products is None else ctx.products.take_x_bar(len(bar_t))
            if x_t_bar is None:
                x_t_bar = times(bar_t, weight, kind)
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


def _softmax_forward(scores: Tensor, tangent: Tensor, may_be_empty: bool) -> tuple[Tensor, Tensor, Tensor]:
    """P, Ṗ and D from S and Ṡ. A row that is masked everywhere gives zeros, as PyTorch's safe softmax does."""
    probs = torch.softmax(scores, -1)
    if may_be_empty and not torch.isfinite(scores[..., :1]).all():  # only then can a whole row be masked
        probs = torch.nan_to_num(probs, nan=0.0)
    weighted = probs * tangent
    centred = tangent - weighted.sum(-1, keepdim=True)
    return probs, torch.mul(probs, centred, out=weighted), centred


def _softmax_reverse(probs: Tensor, centred: Tensor, probs_bar: Tensor, tangent_bar: Tensor) -> tuple[Tensor, Tensor]:
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
        probs, probs_t, centred = _softmax_forward(scores, tangent, True)
        ctx.save_for_backward(probs, centred)
        return probs, probs_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, probs_bar: Tensor, tangent_bar: Tensor) -> tuple[Tensor, Tensor]:
        probs, centred = ctx.saved_tensors
        return _softmax_reverse(probs, centred, probs_bar.clone(), tangent_bar.clone())


class Attention(torch.autograd.Function):
    """(q, k, v) with tangents -> softmax(scale q kᵀ + bias) v with its tangent. Shapes (..., S, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_t: Tensor,
        k: Tensor,
        k_t: Tensor,
        v: Tensor,
        v_t: Tensor,
        bias: MaybeTensor,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.shape, ctx.scale = (q.shape, k.shape, v.shape), scale
        out_shape = (*q.shape[:-1], v.shape[-1])
        q, q_t, k, k_t, v, v_t = (part.reshape(-1, *part.shape[-2:]) for part in (q, q_t, k, k_t, v, v_t))
        scores = torch.bmm(q, k.mT).mul_(scale)
        if bias is not None:
            scores.view(*out_shape[:-1], -1).add_(bias)
        scores_t = torch.bmm(q_t, k.mT).baddbmm_(q, k_t.mT, beta=scale, alpha=scale)
        probs, probs_t, centred = _softmax_forward(scores, scores_t, bias is not None and bias.ndim > 2)
        ctx.save_for_backward(q, q_t, k, k_t, v, v_t, probs, probs_t, centred)
        out = torch.bmm(probs, v)
        return out.view(out_shape), torch.bmm(probs_t, v).baddbmm_(probs, v_t).view(out_shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor, out_t_bar: Tensor) -> tuple[MaybeTensor, ...]:
        q, q_t, k, k_t, v, v_t, probs, probs_t, centred = ctx.saved_tensors
        shape_q, shape_k, shape_v = ctx.shape
        out_bar, out_t_bar = (part.reshape(-1, *part.shape[-2:]) for part in (out_bar, out_t_bar))
        v_t_bar = torch.bmm(probs.mT, out_t_bar)
        v_bar = torch.bmm(probs.mT, out_bar).baddbmm_(probs_t.mT, out_t_bar)
        probs_bar = torch.bmm(out_bar, v.mT).baddbmm_(out_t_bar, v_t.mT)
        s_bar, s_t_bar = _softmax_reverse(probs, centred, probs_bar, torch.bmm(out_t_bar, v.mT))
        scale = ctx.scale
        q_bar = torch.bmm(s_bar, k).baddbmm_(s_t_bar, k_t, beta=scale, alpha=scale)
        k_bar = torch.bmm(s_bar.mT, q).baddbmm_(s_t_bar.mT, q_t, beta=scale, alpha=scale)
        q_t_bar, k_t_bar = torch.bmm(s_t_bar, k).mul_(scale), torch.bmm(s_t_bar.mT, q).mul_(scale)
        return (
            q_bar.view(shape_q), q_t_bar.view(shape_q), k_bar.view(shape_k), k_t_bar.view(shape_k),
            v_bar.view(shape_v), v_t_bar.view(shape_v), None, None,
        )  # fmt: skip


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
            weight_bar = _rows((out_bar * normed).addcmul_(out_t_bar, normed_t)).sum(0)
        if needs[3]:
            weight_t_bar = _rows(out_t_bar * normed).sum(0)
        if needs[4]:
            bias_bar = _rows(out_bar).sum(0)
        if needs[5]:
            bias_t_bar = _rows(out_t_bar).sum(0)
        x_t_bar = _norm_adjoint(out_t_bar, x, mean, sigma, weight)
        b = out_t_bar * weight
        b_mean = (b * normed).mean(-1, keepdim=True)
        inner = (b * normed_t).mean(-1, keepdim=True).mul_(sigma)
        # A' = A - σ k B - b (ẋ̂ + σ k x̂), since σ a = ẋ̂ + σ k x̂; `k` here is σ k
        a = (out_bar * weight).addcmul_(out_t_bar, weight_t).addcmul_(b, k, value=-1)
        a.addcmul_(normed_t, b_mean, value=-1).addcmul_(normed, b_mean * k, value=-1)
        x_bar = _norm_adjoint(a, x, mean, sigma).addcmul_(normed, inner, value=-1)
        return x_bar, x_t_bar, weight_bar, weight_t_bar, bias_bar, bias_t_bar, None


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
