"""AdamW: decoupled weight decay. With ε_root = 0 it is `torch.optim.AdamW`.

    m' = β1 m + (1-β1) g        v' = β2 v + (1-β2) g²        c_k = 1 - β_k^(t+1)
    u  = (m'/c1) / (√(v'/c2 + ε_root) + ε)        θ' = θ - lr (u + λ θ)

    adjoint, with r = √(v'/c2 + ε_root):
    a  = -lr θ̄' / (c1 (r + ε))                    b  = v̄' + lr m' θ̄' / (2 c1 c2 (r + ε)² r)
    ḡ  = (1-β1) (m̄' + a) + 2 (1-β2) b g           m̄ = β1 (m̄' + a)      v̄ = β2 b      θ̄ = (1 - lr λ) θ̄'

Where v' + ε_root = 0 the root's derivative is infinite while its numerator m' is 0: that term's limit is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers.base import OptimizerSpec, Rate, State
from dpg_cli.engine.inner.optimizers.elementwise import Elementwise


class AdamW(Elementwise):
    """See the module's header."""

    vectors = 2

    def forward(self, spec: OptimizerSpec, step: int, rate: Rate, before: State, grad: Tensor, after: State) -> None:
        """See `Elementwise`."""
        c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
        # u = (√c2 / c1) m' / (√(v' + c2 ε_root) + √c2 ε): two passes fewer than dividing m' and v' themselves
        eps, eps_root, scale = spec.eps * c2**0.5, spec.eps_root * c2, rate.lr * c2**0.5 / c1
        torch.lerp(before.m, grad, 1 - spec.beta1, out=after.m)
        torch.mul(before.v, spec.beta2, out=after.v).addcmul_(grad, grad, value=1 - spec.beta2)
        denominator = torch.add(after.v, eps_root).sqrt_()
        if eps:
            denominator.add_(eps)
        else:  # 0/0: nothing has ever moved this parameter, so nothing moves it now
            denominator.masked_fill_(denominator == 0, 1.0)
        torch.mul(before.theta, 1 - rate.lr * rate.weight_decay, out=after.theta)
        after.theta.addcdiv_(after.m, denominator, value=-scale)

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
        c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
        m_after = torch.lerp(before.m, grad, 1 - spec.beta1)
        root = torch.mul(before.v, spec.beta2 / c2).addcmul_(grad, grad, value=(1 - spec.beta2) / c2)
        root = root.add_(spec.eps_root).sqrt_()
        denominator = torch.add(root, spec.eps)
        slope = torch.div(after_bar.theta, denominator)  # ∂/∂(m'/c1), but for the factor -lr, which is applied below
        through_root = m_after.mul_(slope).div_(denominator).div_(root)
        if spec.eps_root == 0:
            through_root.masked_fill_(root == 0, 0.0)
            if spec.eps == 0:
                slope.masked_fill_(root == 0, 0.0)
        m_to, v_to = (None, None) if before_bar is None else (before_bar.m, before_bar.v)
        v_before = torch.add(after_bar.v, through_root, alpha=0.5 * rate.lr / (c1 * c2), out=v_to)
        m_before = torch.add(after_bar.m, slope, alpha=-rate.lr / c1, out=m_to)
        torch.mul(v_before, grad, out=grad_bar).mul_(2 * (1 - spec.beta2)).add_(m_before, alpha=1 - spec.beta1)
        if before_bar is not None:
            m_before.mul_(spec.beta1)
            v_before.mul_(spec.beta2)
            torch.mul(after_bar.theta, 1 - rate.lr * rate.weight_decay, out=before_bar.theta)

    def elasticity(self, spec: OptimizerSpec, grad: Tensor) -> Tensor:
        """With fresh state u = g / (r + ε), r = √(g² + ε_root), so that the elasticity is 1 - g² / (r (r + ε))."""
        square = grad.double().square()
        root = (square + spec.eps_root).sqrt()
        # (r² - g² + r ε) / (r (r + ε)): the same without cancellation
        share = (spec.eps_root + root * spec.eps) / (root * (root + spec.eps))
        return torch.where(grad == 0, 1.0, share).to(grad.dtype)
