"""Attention in slabs, with tangents (`../../inner/attention/` says what a slab is, and has the notation).

    Ṡ = scale (q̇ kᵀ + q k̇ᵀ)    Ċ = f Ṡ,  f = 1 - tanh²(S / c)      μ = Σ P ⊙ Ċ + p σ̇,  p = exp(σ - L)      D = Ċ - μ
    O = P v                     Ȯ = (P ⊙ D) v + P v̇

reverse, from Ō and Ȱ:

    v̄ = Pᵀ Ō + (P ⊙ D)ᵀ Ȱ      v̇̄ = Pᵀ Ȱ
    A = Ȱ vᵀ (of P ⊙ D)         a = Σ P ⊙ A        Ċ̄ = P ⊙ (A - a)
    B = Ō vᵀ + Ȱ v̇ᵀ (of P)      Q = B + (A - a) ⊙ D     r = Σ P ⊙ Q + p Q_σ,  Q_σ = -a (σ̇ - μ)     C̄ = P ⊙ (Q - r)
    Ṡ̄ = f Ċ̄                     S̄ = f C̄ - (2 tanh(S / c) / c) f Ṡ ⊙ Ċ̄
    q̇̄ = scale Ṡ̄ k               q̄ = scale (S̄ k + Ṡ̄ k̇)      k̄ = scale (S̄ᵀ q + Ṡ̄ᵀ q̇)      k̇̄ = scale Ṡ̄ᵀ q
    σ̇̄ = - Σ p a                 σ̄ = Σ p (Q_σ - r)          (over queries)

These are `softmax.py`'s equations with the sink as one more column, whose value is 0. Kept for the reverse: q, k, v, their tangents, and L and
μ, a number a row each. The reverse computes S and Ṡ again: 21 matrix products in place of 18, of which a causal attention leaves out half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpg_cli.engine.inner.attention.plain import scores_of
from dpg_cli.engine.inner.attention.seen import Seen
from dpg_cli.engine.inner.attention.slabs import Shape, normalise_, slabs, slope_of
from dpg_cli.engine.reverse.forms.base import MaybeTensor


class AttentionSlabs(torch.autograd.Function):
    """(q, k, v, σ) with tangents -> O with its tangent. Shapes as `PlainAttention`'s."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        q_t: Tensor,
        k: Tensor,
        k_t: Tensor,
        v: Tensor,
        v_t: Tensor,
        sink: MaybeTensor,
        sink_t: MaybeTensor,
        seen: Seen,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        shape, width = Shape.of(q, k, v), v.shape[-1]
        out, out_t = (q.new_zeros(*q.shape[:-1], width) for _ in range(2))
        logs, means = (q.new_zeros(*q.shape[:-1], 1) for _ in range(2))
        k_both, v_both = torch.cat((k, k_t), -1), torch.cat((v, v_t), -1)
        for slab in slabs(shape, seen, q.device):
            if slab.keys.stop == slab.keys.start:
                continue
            rows, rows_t = slab.rows(q) * scale, slab.rows(q_t) * scale
            scores, turned = scores_of(rows, slab.columns(k), slab, seen, cap)
            probs, log = normalise_(scores, None if sink is None else slab.sinks(sink))
            tangent = torch.bmm(torch.cat((rows_t, rows), -1), slab.columns(k_both).mT)
            if turned is not None:
                tangent.mul_(slope_of(turned))
            weighted = probs * tangent
            mean = weighted.sum(-1, keepdim=True)
            if sink is not None and sink_t is not None:
                mean += torch.exp(slab.sinks(sink) - log) * slab.sinks(sink_t)
            torch.mul(tangent.sub_(mean), probs, out=weighted)
            both = torch.bmm(probs, slab.columns(v_both))
            slab.write_(out, both[..., :width])
            slab.write_(out_t, both[..., width:].add_(torch.bmm(weighted, slab.columns(v))))
            slab.write_(logs, log)
            slab.write_(means, mean)
        ctx.save_for_backward(q, q_t, k, k_t, v, v_t, sink, sink_t, logs, means)
        ctx.seen, ctx.scale, ctx.cap = seen, scale, cap
        return out, out_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor, out_t_bar: Tensor) -> tuple[MaybeTensor, ...]:
        q, q_t, k, k_t, v, v_t, sink, sink_t, logs, means = ctx.saved_tensors
        shape, scale, cap = Shape.of(q, k, v), ctx.scale, ctx.cap
        wide, tall = shape.width, shape.out
        q_bar, q_t_bar = (torch.zeros_like(q, memory_format=torch.contiguous_format) for _ in range(2))
        k_both, v_both = torch.cat((k, k_t), -1), torch.cat((v, v_t), -1)
        k_bars, v_bars = torch.zeros_like(k_both), torch.zeros_like(v_both)  # (k̇̄, k̄) and (v̄, v̇̄)
        sink_bar, sink_t_bar = (None if sink is None else torch.zeros_like(sink) for _ in range(2))
        for slab in slabs(shape, ctx.seen, q.device):
            if slab.keys.stop == slab.keys.start:
                continue
            rows, rows_t = slab.rows(q) * scale, slab.rows(q_t) * scale
            columns, columns_both = slab.columns(k), slab.columns(k_both)
            scores, turned = scores_of(rows, columns, slab, ctx.seen, cap)
            log, mean = slab.rows(logs), slab.rows(means)
            probs = scores.sub_(log).exp_()
            centred = torch.bmm(torch.cat((rows_t, rows), -1), columns_both.mT)  # Ṡ, Ċ, D
            bent = None  # t Ṡ
            if turned is not None and cap is not None:
                slope = slope_of(turned)
                bent = turned.mul_(centred)
                centred.mul_(slope)
            centred.sub_(mean)

            bar, bar_t = slab.rows(out_bar), slab.rows(out_t_bar)
            bars = torch.cat((bar, bar_t), -1)
            values, v_into = slab.columns(v), slab.columns(v_bars)
            v_into.baddbmm_(probs.mT, bars)
            weighted = probs * centred
            v_into[..., :tall].baddbmm_(weighted.mT, bar_t)
            outer = torch.bmm(bar_t, values.mT)  # A, A - a
            low = torch.mul(probs, outer, out=weighted).sum(-1, keepdim=True)  # a
            outer.sub_(low)
            inner = torch.bmm(bars, slab.columns(v_both).mT).addcmul_(outer, centred)  # Q
            total = torch.mul(probs, inner, out=weighted).sum(-1, keepdim=True)  # r
            if sink is not None and sink_t is not None and sink_bar is not None and sink_t_bar is not None:
                share = torch.exp(slab.sinks(sink) - log)
                of_sink = (slab.sinks(sink_t) - mean).mul_(low).neg_()
                total += share * of_sink
                sink_bar[slab.heads] += slab.per_head(share * (of_sink - total))
                sink_t_bar[slab.heads] -= slab.per_head(share * low)
            s_bar, s_t_bar = inner.sub_(total).mul_(probs), outer.mul_(probs)
            if bent is not None and cap is not None:
                s_t_bar.mul_(slope)
                s_bar.mul_(slope).addcmul_(bent, s_t_bar, value=-2 / cap)

            by_keys = torch.bmm(s_t_bar, columns_both)
            slab.write_(q_t_bar, by_keys[..., :wide].mul(scale))
            slab.write_(q_bar, torch.bmm(s_bar, columns).add_(by_keys[..., wide:]).mul_(scale))
            into = slab.columns(k_bars)
            into.baddbmm_(s_t_bar.mT, torch.cat((rows, rows_t), -1))
            into[..., wide:].baddbmm_(s_bar.mT, rows)
        return (
            q_bar, q_t_bar, k_bars[..., wide:], k_bars[..., :wide], v_bars[..., :tall], v_bars[..., tall:],
            sink_bar, sink_t_bar, None, None, None,
        )  # fmt: skip
