"""Scaled dot-product attention: matrix products, and between them the softmax of `softmax.py`; in slabs where rows are long.

Rows of `LONG` queries and more go through `attention_slabs.py`, whose memory is linear in the length, and which is also
faster there. So do calls of `inner/attention/`'s own `attention`, of whatever length. A bias that depends on parameters
(Doge's masks, learned relative positions) takes the products and the softmax one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from dpg_cli.engine.inner.attention.plain import attention
from dpg_cli.engine.inner.attention.seen import Causal, Full, Given, Seen
from dpg_cli.engine.reverse.forms.attention_slabs import AttentionSlabs
from dpg_cli.engine.reverse.forms.base import Form, MaybeTensor, parts, split
from dpg_cli.engine.reverse.forms.softmax import dual_softmax, softmax_forward, softmax_reverse

LONG = 256  # queries from which slabs are taken


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
        probs, probs_t, centred = softmax_forward(scores, scores_t, bias is not None and bias.ndim > 2)
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
        s_bar, s_t_bar = softmax_reverse(probs, centred, probs_bar, torch.bmm(out_t_bar, v.mT))
        scale = ctx.scale
        q_bar = torch.bmm(s_bar, k).baddbmm_(s_t_bar, k_t, beta=scale, alpha=scale)
        k_bar = torch.bmm(s_bar.mT, q).baddbmm_(s_t_bar.mT, q_t, beta=scale, alpha=scale)
        q_t_bar, k_t_bar = torch.bmm(s_t_bar, k).mul_(scale), torch.bmm(s_t_bar.mT, q).mul_(scale)
        return (
            q_bar.view(shape_q), q_t_bar.view(shape_q), k_bar.view(shape_k), k_t_bar.view(shape_k),
            v_bar.view(shape_v), v_t_bar.view(shape_v), None, None,
        )  # fmt: skip


def _learned(bias: Tensor) -> bool:
    """Whether a mask is a bias that depends on parameters."""
    primal, tangent = parts(bias)
    return tangent is not None or (primal is not None and primal.requires_grad)


def _grouped(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether slabs can take these shapes: rows, heads, places, numbers, with heads of keys that divide those of queries."""
    shapes = query.shape, key.shape, value.shape
    if any(len(shape) != 4 or shape[0] != query.shape[0] for shape in shapes) or key.shape[1] != value.shape[1]:
        return False
    heads, groups = query.shape[1], key.shape[1]
    return heads % groups == 0 and (enable_gqa or groups in (1, heads))


def dual_slabs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Seen,
    *,
    scale: float | None = None,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """`inner.attention.plain.attention` on dual tensors."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    given = [part for tensor in (query, key, value) for part in split(tensor)]
    sinks = (None, None) if sink is None else split(sink)
    return forward_ad.make_dual(*AttentionSlabs.apply(*given, *sinks, seen, scale, cap))


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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    learned = attn_mask is not None and _learned(attn_mask)
    if query.shape[-2] >= LONG and not learned and _grouped(query, key, value, enable_gqa):
        seen: Seen = Causal() if is_causal else Full() if attn_mask is None else Given(attn_mask.detach())
        return dual_slabs(query, key, value, seen, scale=scale)
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    if key.shape[:-2] != query.shape[:-2]:  # multi-query attention: one head of keys for all
        key, value = (part.expand(*query.shape[:-2], *part.shape[-2:]) for part in (key, value))
    if attn_mask is not None and learned:
        scores = torch.matmul(query * scale, key.transpose(-2, -1)) + attn_mask
        return torch.matmul(dual_softmax(scores), value)
    bias = None
    if is_causal or attn_mask is not None:
        keep = attn_mask
        if keep is None:
            keep = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if keep.dtype == torch.bool:
            bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill_(~keep, -torch.inf)
        else:
            bias = keep.detach()
    given = [part for tensor in (query, key, value) for part in split(tensor)]
    return forward_ad.make_dual(*Attention.apply(*given, bias, scale))


FORM = Form({torch.nn.functional.scaled_dot_product_attention: dual_attention, attention: dual_slabs})
