"""Clipping by the global norm, and its adjoint.

    g' = c g,   c = min(1, M / (|g| + 1e-6))
    where it bites (c < 1):   ḡ = c (ḡ' - g <g, ḡ'> / (|g| (|g| + 1e-6)))

With g = g'/c on the right this is c (ḡ' - g' <g', ḡ'> / (c² |g| (|g| + 1e-6))), so that only the clipped gradient need
be kept. As `torch.nn.utils.clip_grad_norm_`. Source: DESIGN §7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers import blocks

GUARD = 1e-6  # what torch adds to the norm


def coefficient(norm: float, limit: float) -> float:
    """c for a gradient of this norm; a limit of 0 is none."""
    return min(1.0, limit / (norm + GUARD)) if limit > 0 else 1.0


@torch.no_grad()
def clip_(grad: Tensor, limit: float) -> float:
    """Clip a gradient in place.

    Args:
        grad: g, shape (n,).
        limit: M; 0 leaves it, and costs nothing.

    Returns:
        |g| before, 0 where no limit is set.
    """
    if not limit > 0:
        return 0.0
    norm = float(torch.linalg.vector_norm(grad))
    scale = coefficient(norm, limit)
    if scale < 1:
        grad.mul_(scale)
    return norm


@torch.no_grad()
def clip_adjoint_(grad_bar: Tensor, grad: Tensor, norm: float, limit: float) -> Tensor:
    """ḡ from ḡ', written over it.

    Args:
        grad_bar: ḡ', the adjoint of the clipped gradient, shape (n,).
        grad: the *clipped* gradient g'.
        norm: |g| before clipping.
        limit: M; 0 for none.
    """
    scale = coefficient(norm, limit)
    if scale == 1:
        return grad_bar
    along = float(torch.dot(grad, grad_bar)) / (scale**2 * norm * (norm + GUARD))
    for bar, part in blocks(grad_bar, grad):
        bar.add_(part, alpha=-along).mul_(scale)
    return grad_bar
