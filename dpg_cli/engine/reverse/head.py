"""The LM head's cross-entropy along a direction, in closed form, over chunks of tokens. Notation: `inner/head.py`.

With tangents ḣ, Ẇ, ȧ (DESIGN §2, step 4):

    ż = ḣ Wᵀ + h Ẇᵀ + ȧ        r = Σ_u p_u ż_u        ℓ̇ = r - ż_y (and r - ż_u for any other label u)
    Hessian-vector product of Σ c ℓ̇:   s = p ⊙ (ż - r),   e = p - e_y
    h̄ = c (s W + e Ẇ)        ḣ̄ = c e W        W̄ = sᵀ (c h) + eᵀ (c ḣ)        ā = Σ c s

With soft labels a distribution q stands for e_y: ℓ̇ = r - Σ_u q_u ż_u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpg_cli.engine.inner.head import chunks, logits_at
from dpg_cli.engine.inner.product import plus_times, times
from dpg_cli.engine.soft import Expected, LabelSink


@dataclass(frozen=True)
class HeadDual:
    """What a direction says of the head's tokens.

    Attributes:
        token_M: credits, mask / Z · ℓ̇.
        hidden_bar, tangent_bar: h̄ and ḣ̄ of the Hessian-vector product, (M, D), or None.
    """

    token_M: Tensor
    hidden_bar: Tensor | None
    tangent_bar: Tensor | None


@torch.no_grad()
def second_order(
    hidden_M_D: Tensor,
    tangent_M_D: Tensor,
    weight: Tensor,
    weight_t: Tensor | None,
    bias: Tensor | None,
    bias_t: Tensor | None,
    labels_M: Tensor,
    factors_M: Tensor,
    *,
    need_hvp: bool,
    weight_into: Tensor | None,
    bias_into: Tensor | None,
    mask_M: Tensor,
    labels_into: Tensor | None = None,
    places_M: Tensor | None = None,
    tangent_bar: Tensor | None = None,
    expected: Expected | None = None,
    sink: LabelSink | None = None,
) -> HeadDual:
    """Credits along a direction and the head's part of the Hessian-vector product.

    Args:
        hidden_M_D, tangent_M_D: h and ḣ of the labelled tokens.
        weight, weight_t, bias, bias_t: W, Ẇ, a, ȧ; None where there is none.
        labels_M: y.
        factors_M: c, with the data weights.
        need_hvp: also the second-order terms.
        weight_into, bias_into: W̄ and ā are added here.
        mask_M: mask / Z of each token, the factor of the credits.
        labels_into: (rows, V); credits of every label are written to its rows `places_M`.
        tangent_bar: ḣ̄ where it is known: the first-order pass's h̄.
        expected: the distributions that the labels were drawn from; trained on unless it says otherwise.
        sink: is given the credits of every label chunk by chunk; needs `expected`.
    """
    token = torch.empty_like(factors_M)
    hidden_bar = torch.empty_like(hidden_M_D) if need_hvp else None
    known = tangent_bar is not None
    if need_hvp and tangent_bar is None:
        tangent_bar = torch.empty_like(hidden_M_D)
    for part in chunks(len(labels_M), weight.shape[0]):
        hidden, tangent, labels, factors = hidden_M_D[part], tangent_M_D[part], labels_M[part, None], factors_M[part]
        probs = torch.softmax(logits_at(hidden, weight, bias), -1)
        logits_t = logits_at(tangent, weight, bias_t)
        if weight_t is not None:
            plus_times(logits_t, hidden, weight_t.mT)
        weighted = probs * logits_t
        mean = weighted.sum(-1, keepdim=True)
        q = None if expected is None or not (expected.train or sink) else expected.q(part)
        soft = q if expected is not None and expected.train else None
        found = logits_t.gather(-1, labels) if soft is None else torch.linalg.vecdot(soft, logits_t)[:, None]
        token[part] = (mean - found)[:, 0] * mask_M[part]
        credit = None
        if labels_into is not None or sink is not None:
            credit = torch.sub(mean, logits_t, out=logits_t).mul_(mask_M[part, None])
        if labels_into is not None and places_M is not None and credit is not None:
            labels_into.index_copy_(0, places_M[part], credit)
        del logits_t
        if hidden_bar is not None and tangent_bar is not None:
            factors = factors[:, None]
            second = weighted.addcmul_(probs, mean, value=-1)
            error = probs.sub_(soft) if soft is not None else probs.scatter_add_(-1, labels, -torch.ones_like(factors))
            out = times(second, weight)
            if weight_t is not None:
                plus_times(out, error, weight_t)
            hidden_bar[part] = out.mul_(factors)
            if not known:
                tangent_bar[part] = times(error, weight).mul_(factors)
            if weight_into is not None:
                weight_into.addmm_(second.mT, hidden * factors).addmm_(error.mT, tangent * factors)
            if bias_into is not None:
                bias_into.addmv_(second.mT, factors[:, 0])
        if sink is not None and expected is not None and q is not None and credit is not None:
            sink.add(expected.labels, expected.places_M[part], labels[:, 0], q, credit)
    return HeadDual(token, hidden_bar, tangent_bar)
