"""Embedding.

y = W[ids]      ẏ = Ẇ[ids], but 0 where the id is `padding_idx`     (stock PyTorch gives that row no gradient through here)
reverse         W̄[ids] += ȳ, at `padding_idx` too                   (what <d, g> is of W, it is of all of W)
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd import forward_ad

from dpg_cli.engine.inner.cuts import refuse_embedding
from dpg_cli.engine.reverse.forms.base import Form, parts


def dual_embedding(
    ids: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`torch.nn.functional.embedding` on dual tensors.

    Raises:
        UsageError: for what changes the weight, or whose gradient depends on the micro-batch.
    """
    refuse_embedding(max_norm, scale_grad_by_freq)
    primal, tangent = parts(weight)
    assert primal is not None
    rows = nn.functional.embedding(ids, primal)
    if tangent is None:
        return rows
    rows_t = nn.functional.embedding(ids, tangent)
    if padding_idx is not None:
        rows_t = rows_t.masked_fill((ids == padding_idx % len(weight))[..., None], 0.0)
    return forward_ad.make_dual(rows, rows_t)


FORM = Form({nn.functional.embedding: dual_embedding})
