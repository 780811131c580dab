"""Aiming at moments: the pull of a pattern that asks for certain changes of the head, in place of Φ's gradient (DESIGN §9).

A change a of the generator's head moves the patch by s ⊙ R a, s the patch's slope (`PatchNoise`). Wanted is a change of margin · σ on
every pixel, on its right side. A natural step along the adjoint w changes the head by F⁻¹ Rᵀ (s ⊙ w), F the generator's Fisher. So
the adjoint that asks for what is missing is

    w = ((R F⁻¹ Rᵀ)⁻¹ ((wanted - measured) / s)) / s        (`engine/natural/reach.py`)

and a natural step of it, its length kept, is the Gauss-Newton step. It is relaxed by the policy (`natural/step.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.noise import PatchNoise


@torch.no_grad()
def moments_pull(noise: PatchNoise, missing_R_C: Tensor) -> Tensor:
    """The adjoint whose natural step changes the patch by what is missing, (R, C).

    Args:
        noise: of the patch.
        missing_R_C: wanted less measured change of the weights.
    """
    slope = noise.slope_R_C.clamp_min(torch.finfo(missing_R_C.dtype).tiny)
    asked = (missing_R_C / slope).to(noise.reach.read_M_C)
    return noise.reach.pull(asked).x.to(missing_R_C) / slope
