"""A worked example of a new inner optimiser: signed momentum, with a smooth sign so that it has a derivative.

m' = μ m + (1-μ) g      r = √(m'² + ε²)      θ' = θ - lr (m'/r + λ θ)

adjoint:    M = m̄' - lr θ̄' ε²/r³        ḡ = (1-μ) M        m̄ = μ M        θ̄ = (1 - lr λ) θ̄'
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers.base import OptimizerSpec, Rate, State, register
from dpg_cli.engine.inner.optimizers.elementwise import Elementwise


class SmoothSign(Elementwise):
    """The state's m is the momentum; `spec.momentum` is μ, `spec.eps` is ε."""

    vectors = 1

    def forward(self, spec: OptimizerSpec, step: int, rate: Rate, before: State, grad: Tensor, after: State) -> None:
        """The state after the step, written into `after`."""
        torch.lerp(grad, before.m, spec.momentum, out=after.m)
        torch.mul(before.theta, 1 - rate.lr * rate.weight_decay, out=after.theta)
        after.theta.addcdiv_(after.m, self.root(spec, after.m), value=-rate.lr)

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
        """ḡ, written into `grad_bar`, and the adjoints of the state before, unless no step precedes."""
        root = self.root(spec, torch.lerp(grad, before.m, spec.momentum))
        m_bar = after_bar.m - rate.lr * spec.eps**2 * after_bar.theta / root**3
        torch.mul(m_bar, 1 - spec.momentum, out=grad_bar)
        if before_bar is not None:
            torch.mul(m_bar, spec.momentum, out=before_bar.m)
            torch.mul(after_bar.theta, 1 - rate.lr * rate.weight_decay, out=before_bar.theta)

    def elasticity(self, spec: OptimizerSpec, grad: Tensor) -> Tensor:
        """ε²/r² at the first step: 1 where the update is linear in g, 0 where it is its sign."""
        root = self.root(spec, (1 - spec.momentum) * grad)
        return torch.where(grad == 0, 1.0, (spec.eps / root) ** 2)

    def root(self, spec: OptimizerSpec, m: Tensor) -> Tensor:
        """r; 1 where it would be 0, so that nothing moves there."""
        root = torch.sqrt(m * m + spec.eps**2)
        return root.masked_fill_(root == 0, 1.0)


register("smooth-sign", SmoothSign())
