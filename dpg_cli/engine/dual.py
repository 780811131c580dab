"""Closed forms of softmax, attention and layer norm for the dual pass.

The dual pass differentiates a forward-mode tangent in reverse. PyTorch 2.13 cannot do that through softmax (its tangent
formula modifies a saved tensor in place) nor through the fused attention kernels (which have no tangent at all), and the
reverse of its layer-norm tangent is wrong without a word (it takes mean and scale for constants). So `DualMode` intercepts
these calls, takes primal and tangent apart, and computes both by one autograd function with a hand-derived reverse, which
also stores less than autograd would. Everything else keeps PyTorch's own rules.

    P = softmax(S)      Ṗ = P ⊙ (Ṡ - r),  r = Σ P ⊙ Ṡ          (sums over the last axis)
    reverse             Ṡ̄ = P ⊙ (Ṗ̄ - k),  k = Σ P ⊙ Ṗ̄          P̄' = P̄ + Ṗ̄ ⊙ (Ṡ - r) - k Ṡ
                        S̄ = P ⊙ (P̄' - Σ P ⊙ P̄')

    x̂ = σ (x - mean x)   ẋ̂ = σ (a - x̂ k),  a = ẋ - mean ẋ,  k = mean x̂ ⊙ a,  σ = 1/√(var x + ε)
    reverse             b = mean B ⊙ x̂      ẋ̄ = σ (B - mean B - x̂ b)      A' = A - σ (k B + b a)      (A, B: adjoints of x̂, ẋ̂)
                        c̄ = σ (A' - x̂ (mean B ⊙ ẋ̂ + mean A' ⊙ x̂))        x̄ = c̄ - mean c̄
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def _softmax_reverse(
    probs: Tensor, tangent_in: Tensor, probs_bar: Tensor, tangent_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """S̄ and Ṡ̄ from P, Ṡ, P̄ and Ṗ̄; see the module's header."""
    weighted = probs * tangent_bar
    k = weighted.sum(-1, keepdim=True)
    r = (probs * tangent_in).sum(-1, keepdim=True)
    scores_tangent_bar = weighted.sub_(probs * k)
    total = probs_bar + tangent_bar * (tangent_in - r) - k * tangent_in
    scores_bar = total.mul_(probs)
    scores_bar = scores_bar.sub_(probs * scores_bar.sum(-1, keepdim=True))
    return scores_bar, scores_tangent_bar


def _softmax_forward(scores: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """P and Ṗ from S and Ṡ. A row that is masked everywhere gives zeros, as PyTorch's safe softmax does."""
    probs = torch.softmax(scores, -1)
    if not torch.isfinite(scores[..., :1]).all():  # only then can a whole row be masked
        probs = torch.nan_to_num(probs, nan=0.0)
    weighted = probs * tangent
    return probs, weighted - probs * weighted.sum(-1, keepdim=True)


class _Softmax(torch.autograd.Function):
    """(S, Ṡ) -> (P, Ṗ) over the last axis."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        probs, probs_tangent = _softmax_forward(scores, tangent)
        ctx.save_for_backward(probs, tangent)
        return probs, probs_tangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, probs_bar: Tensor, tangent_bar: Tensor) -> tuple[Tensor, Tensor]:
        probs, tangent = ctx.saved_tensors
        return _softmax_reverse(probs, tangent, probs_bar, tangent_bar)


class _Attention(torch.autograd.Function):
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
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        scores = (q @ k.mT).mul_(scale)
        scores_t = (q_t @ k.mT).add_(q @ k_t.mT).mul_(scale)
        if bias is not None:
            scores += bias
        probs, probs_t = _softmax_forward(scores, scores_t)
        ctx.save_for_backward(q, q_t, k, k_t, v, v_t, probs, probs_t, scores_t)
        ctx.scale = scale
        return probs @ v, (probs_t @ v).add_(probs @ v_t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor, out_t_bar: Tensor) -> tuple[Tensor | None, ...]:
        q, q_t, k, k_t, v, v_t, probs, probs_t, scores_t = ctx.saved_tensors
        v_bar = (probs.mT @ out_bar).add_(probs_t.mT @ out_t_bar)
        v_t_bar = probs.mT @ out_t_bar
        probs_bar = (out_bar @ v.mT).add_(out_t_bar @ v_t.mT)
        s_bar, s_t_bar = _softmax_reverse(probs, scores_t, probs_bar, out_t_bar @ v.mT)
        s_bar.mul_(ctx.scale)
        s_t_bar.mul_(ctx.scale)
        q_bar = (s_bar @ k).add_(s_t_bar @ k_t)
        k_bar = (s_bar.mT @ q).add_(s_t_bar.mT @ q_t)
        return q_bar, s_t_bar @ k, k_bar, s_t_bar.mT @ q, v_bar, v_t_bar, None, None


class _LayerNorm(torch.autograd.Function):
    """(x, γ, β) with tangents -> γ x̂ + β with its tangent, over the last axis."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_t: Tensor, weight: Tensor, weight_t: Tensor, bias: Tensor, bias_t: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        sigma = torch.rsqrt(variance + eps)
        normed = (x - mean).mul_(sigma)
        centred = x_t - x_t.mean(-1, keepdim=True)
        k = (normed * centred).mean(-1, keepdim=True)
        normed_t = torch.addcmul(centred, normed, k, value=-1).mul_(sigma)
        ctx.save_for_backward(normed, normed_t, centred, sigma, k, weight, weight_t)
        out_t = torch.addcmul(bias_t, normed, weight_t).addcmul_(normed_t, weight)
        return torch.addcmul(bias, normed, weight), out_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor, out_t_bar: Tensor) -> tuple[Tensor | None, ...]:
        normed, normed_t, centred, sigma, k, weight, weight_t = ctx.saved_tensors
        width = normed.shape[-1]
        weight_bar = (out_bar * normed).addcmul_(out_t_bar, normed_t).reshape(-1, width).sum(0)
        weight_t_bar = (out_t_bar * normed).reshape(-1, width).sum(0)
        bias_bar, bias_t_bar = out_bar.reshape(-1, width).sum(0), out_t_bar.reshape(-1, width).sum(0)
        a = (out_bar * weight).addcmul_(out_t_bar, weight_t)
        b = out_t_bar * weight
        b_mean = (b * normed).mean(-1, keepdim=True)
        x_t_bar = (b - b.mean(-1, keepdim=True)).addcmul_(normed, b_mean, value=-1).mul_(sigma)
        a.sub_((b * k).addcmul_(centred, b_mean).mul_(sigma))
        inner = (b * normed_t).addcmul_(a, normed).mean(-1, keepdim=True)
        c_bar = a.addcmul_(normed, inner, value=-1).mul_(sigma)
        x_bar = c_bar - c_bar.mean(-1, keepdim=True)
        return x_bar, x_t_bar, weight_bar, weight_t_bar, bias_bar, bias_t_bar, None


def _split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Primal and tangent of a dual tensor, zeros where it has none."""
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def dual_softmax(scores: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax` on dual tensors."""
    moved = scores.to(dtype) if dtype is not None else scores
    primal, tangent = _split(moved.movedim(dim, -1))
    return forward_ad.make_dual(*_Softmax.apply(primal, tangent)).movedim(-1, dim)


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on dual tensors.

    Raises:
        ValueError: for dropout, which the metagradient of a deterministic run has no place for.
    """
    if dropout_p:
        raise ValueError("attention dropout must be off in the dual pass; call model.eval()")
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    bias = None
    if is_causal or attn_mask is not None:
        keep = attn_mask
        if keep is None:
            keep = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if keep.dtype == torch.bool:
            bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill_(~keep, -torch.inf)
        else:
            bias = keep.detach()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = [part for tensor in (query, key, value) for part in _split(tensor)]
    return forward_ad.make_dual(*_Attention.apply(*parts, bias, scale))


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
    return forward_ad.make_dual(*_LayerNorm.apply(*_split(x), *_split(weight), *_split(bias), eps))


_REPLACED: dict[Any, Any] = {
    torch.nn.functional.layer_norm: dual_layer_norm,
    torch.layer_norm: dual_layer_norm,
    torch.nn.functional.scaled_dot_product_attention: dual_attention,
    torch.softmax: dual_softmax,
    torch.Tensor.softmax: dual_softmax,
}


class DualMode(TorchFunctionMode):
    """Within this context, softmax, attention and layer norm work on dual tensors, with a right reverse."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax:
            kwargs.pop("_stacklevel", None)
            return dual_softmax(*args, **kwargs)
        return _REPLACED.get(func, func)(*args, **kwargs)
