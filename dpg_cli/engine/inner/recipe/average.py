"""The running average of the weights over the steps of a run, and its adjoint.

    a_1 = θ_1,   a_t = d a_{t-1} + (1 - d) θ_t      so that   a_T = Σ_t c_t θ_t,   c_1 = d^(T-1),   c_t = (1 - d) d^(T-t)

Φ reads a_T, and each θ_t of the trajectory gets c_t ∂Φ/∂a_T. As `torch.optim.swa_utils.AveragedModel` with
`get_ema_multi_avg_fn(d)`, updated after every step. Source: DESIGN §7.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def averaged(average: Tensor | None, theta: Tensor, decay: float) -> Tensor:
    """The average after one more step; written over the one before.

    Args:
        average: a_{t-1}, shape (n,); None before the first step.
        theta: θ_t, shape (n,); a_1 is a copy of it.
        decay: d.
    """
    return theta.clone() if average is None else average.lerp_(theta, 1 - decay)


def shares(decay: float, total: int) -> list[float]:
    """c_t of θ_1 … θ_T; without a decay all of it is θ_T's.

    Args:
        decay: d, in [0, 1).
        total: T.
    """
    return [(1 - decay if step > 1 else 1.0) * decay ** (total - step) for step in range(1, total + 1)]
