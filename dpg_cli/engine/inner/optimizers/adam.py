"""Adam, as `torch.optim.Adam`: AdamW of the gradient with the weight decay in it.

    ĝ = g + λ θ,  then AdamW's equations without decay in ĝ
    adjoint:    ḡ as AdamW's by ĝ       θ̄ = θ̄' + λ ḡ

Source: DESIGN §7 (coupled decay).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers.adamw import AdamW
from dpg_cli.engine.inner.optimizers.base import OptimizerSpec, Rate, State


class Adam(AdamW):
    """See the module's header. Its elasticity is AdamW's, by ĝ."""

    def forward(self, spec: OptimizerSpec, step: int, rate: Rate, before: State, grad: Tensor, after: State) -> None:
        """See `Elementwise`."""
        decayed = torch.add(grad, before.theta, alpha=rate.weight_decay)
        super().forward(spec, step, rate._replace(weight_decay=0.0), before, decayed, after)

    def reverse(
        self,
        spec: OptimizerSpec,
        step: int,
        rate: Rate,
        after_bar: State,
        before: State,
        grad: Tensor,
        grad_bar: Tensor,
        before_bar: State | None,
    ) -> None:
        """See `Elementwise`."""
        decayed = torch.add(grad, before.theta, alpha=rate.weight_decay)
        free = rate._replace(weight_decay=0.0)
        super().reverse(spec, step, free, after_bar, before, decayed, grad_bar, before_bar)
        if before_bar is not None:
            before_bar.theta.add_(grad_bar, alpha=rate.weight_decay)
