"""Aiming at moments: the pull of a pattern that asks for certain changes of the head, in place of Φ's gradient (DESIGN §9).

A tilt a of the generator's logits changes the patch by s ⊙ F a (`PatchNoise`). Wanted is a change of margin · σ on every pixel, on
its right side. A natural step along the adjoint w moves the patch by s ⊙ F (s ⊙ w); so the w that asks for what is missing is

    w = (F⁻¹ ((wanted - measured) / s)) / s

and a natural step of it, its length kept, is the Gauss-Newton step. It is relaxed by the policy (`generator/natural.py`), and
exact to first order where the generator's hidden states are the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.generator.fisher import conjugate_gradients
from dpg_cli.engine.noise import PatchNoise

DAMPING = 1e-3  # of F, by the product that preconditions it
EXACT, MOST = 1e-2, 200  # relative residual and products of the solve


@torch.no_grad()
def moments_pull(noise: PatchNoise, missing_R_C: Tensor) -> Tensor:
    """The adjoint whose natural step changes the patch by what is missing, (R, C).

    Args:
        noise: of the patch.
        missing_R_C: wanted less measured change of the weights.
    """
    slope = noise.slope_R_C.clamp_min(torch.finfo(missing_R_C.dtype).tiny)
    asked = (missing_R_C / slope).to(noise.fisher.hidden_M_D)
    kronecker = noise.fisher.kronecker()
    tilt = conjugate_gradients(
        lambda vector, out: kronecker.add_product(noise.fisher.product(vector, out), vector, DAMPING),
        kronecker.solve,
        asked,
        iterations=MOST,
        tolerance=EXACT,
    ).x
    return tilt.to(missing_R_C) / slope
