"""SGD with momentum, as `torch.optim.SGD`: the weight decay is coupled.

b' = μ b + (g + λ θ)        θ' = θ - lr b'

adjoint:    ḡ = b̄' - lr θ̄'        b̄ = μ ḡ        θ̄ = θ̄' + λ ḡ
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers.base import OptimizerSpec, Rate, State
from dpg_cli.engine.inner.optimizers.elementwise import Elementwise


class SGD(Elementwise):
    """See the module's header; b is the state's m."""

    vectors = 1

    def check(self, spec: OptimizerSpec) -> None:
        """See `Optimizer`."""
        if spec.nesterov and not spec.momentum > 0:
            raise ValueError("nesterov needs a momentum above 0")

    def forward(self, spec: OptimizerSpec, step: int, rate: Rate, before: State, grad: Tensor, after: State) -> None:
        """See `Elementwise`."""
        torch.add(grad, before.m, alpha=spec.momentum, out=after.m)
        if rate.weight_decay:
            after.m.add_(before.theta, alpha=rate.weight_decay)
        if not spec.nesterov:
            torch.add(before.theta, after.m, alpha=-rate.lr, out=after.theta)
            return
        shrink = 1 - rate.lr * rate.weight_decay
        torch.mul(before.theta, shrink, out=after.theta).add_(grad, alpha=-rate.lr)
        after.theta.add_(after.m, alpha=-rate.lr * spec.momentum)

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
        ahead = spec.momentum if spec.nesterov else 1.0
        torch.add(after_bar.m, after_bar.theta, alpha=-rate.lr * ahead, out=grad_bar)
        if before_bar is not None:
            torch.mul(grad_bar, spec.momentum, out=before_bar.m)
        if spec.nesterov:
            grad_bar.add_(after_bar.theta, alpha=-rate.lr)
        if before_bar is not None:
            torch.add(after_bar.theta, grad_bar, alpha=rate.weight_decay, out=before_bar.theta)

    def elasticity(self, spec: OptimizerSpec, grad: Tensor) -> Tensor:
        """Linear in the gradient."""
        return torch.ones_like(grad)
