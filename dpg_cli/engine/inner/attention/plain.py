"""Attention in slabs, first order. Notation: `slabs.py`.

    O = P v
    reverse     v̄ = Pᵀ Ō      E = Ō vᵀ      C̄ = P ⊙ (E - Σ P ⊙ E)      S̄ = (1 - tanh²) C̄      q̄ = scale S̄ k      k̄ = scale S̄ᵀ q
                σ̄ = - Σ exp(σ - L) Σ P ⊙ E      (over queries)

Where an attention is plainly causal, or sees everything, PyTorch's own kernel is as small and faster; this is for what it has no
argument for: windows, packed rows and padding without a matrix, caps, sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from dpg_cli.engine.inner.attention.seen import Seen
from dpg_cli.engine.inner.attention.slabs import Shape, Slab, cap_, hide_, normalise_, slabs, slope_of


def scores_of(rows: Tensor, columns: Tensor, slab: Slab, seen: Seen, cap: float | None) -> tuple[Tensor, Tensor | None]:
    """C of a slab from scaled queries and keys, and tanh(S / c) where there is a cap."""
    scores = torch.bmm(rows, columns.mT)
    turned = cap_(scores, cap)
    hide_(scores, slab, seen)
    return scores, turned


class PlainAttention(torch.autograd.Function):
    """(q, k, v, σ) -> O. Shapes (B, H, S, D), (B, G, J, D), (B, G, J, E), (H,) or None -> (B, H, S, E)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, seen: Seen, scale: float, cap: float | None
    ) -> Tensor:
        shape = Shape.of(q, k, v)
        out = q.new_zeros(*q.shape[:-1], shape.out)
        logs = q.new_zeros(*q.shape[:-1], 1)
        for slab in slabs(shape, seen, q.device):
            if slab.keys.stop == slab.keys.start:
                continue
            scores, _ = scores_of(slab.rows(q) * scale, slab.columns(k), slab, seen, cap)
            probs, log = normalise_(scores, None if sink is None else slab.sinks(sink))
            slab.write_(out, torch.bmm(probs, slab.columns(v)))
            slab.write_(logs, log)
        ctx.save_for_backward(q, k, v, sink, logs)
        ctx.seen, ctx.scale, ctx.cap = seen, scale, cap
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_bar: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sink, logs = ctx.saved_tensors
        q_bar, k_bar, v_bar = (torch.zeros_like(part, memory_format=torch.contiguous_format) for part in (q, k, v))
        sink_bar = None if sink is None else torch.zeros_like(sink)
        for slab in slabs(Shape.of(q, k, v), ctx.seen, q.device):
            if slab.keys.stop == slab.keys.start:
                continue
            rows, columns = slab.rows(q) * ctx.scale, slab.columns(k)
            scores, turned = scores_of(rows, columns, slab, ctx.seen, ctx.cap)
            log = slab.rows(logs)
            probs, bar = scores.sub_(log).exp_(), slab.rows(out_bar)
            slab.columns(v_bar).baddbmm_(probs.mT, bar)
            inner = torch.bmm(bar, slab.columns(v).mT)
            mean = (probs * inner).sum(-1, keepdim=True)
            inner.sub_(mean).mul_(probs)
            if turned is not None:
                inner.mul_(slope_of(turned))
            slab.write_(q_bar, torch.bmm(inner, columns).mul_(ctx.scale))
            slab.columns(k_bar).baddbmm_(inner.mT, rows)
            if sink is not None and sink_bar is not None:
                share = torch.exp(slab.sinks(sink) - log)
                sink_bar[slab.heads] -= slab.per_head(share * mean)
        return q_bar, k_bar, v_bar, sink_bar, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Seen,
    *,
    scale: float | None = None,
    cap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """softmax(scale q kᵀ, capped, hidden, with a sink) v in slabs.

    Args:
        q: queries, (B, H, S, D).
        k, v: keys (B, G, J, D) and values (B, G, J, E); G divides H.
        seen: what each query sees.
        scale: of the scores; 1/√D without.
        cap: c of c tanh(scores / c).
        sink: a score a head, (H,), that takes its share and gives nothing.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(attention, (q, k, v), q, k, v, seen, scale=scale, cap=cap, sink=sink)
    return PlainAttention.apply(q, k, v, sink, seen, q.shape[-1] ** -0.5 if scale is None else scale, cap)
