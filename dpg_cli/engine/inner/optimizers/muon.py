"""Muon for hidden matrices, AdamW for all else. With `ns_bf16` the matrices' steps are `torch.optim.Muon`'s.

    M' = μ M + (1-μ) G      U = M', with Nesterov (1-μ) G + μ M'
    X_0 = U / max(|U|, ε)   (turned, so that it has no more rows than columns)
    A = X_k X_kᵀ            X_{k+1} = a X_k + (b A + c A²) X_k          k < K: every singular value goes near 1
    θ' = (1 - lr λ) θ - lr r X_K                                        r from the shape, see `scale`

    adjoint, from Y = X̄_{k+1}, with P = b A + c A² and S = Y X_kᵀ + X_k Yᵀ:
    X̄_k = a Y + P Y + (b S + c (S A + A S)) X_k         Ū = (X̄_0 - X_0 <X_0, X̄_0>) / |U|
    M̂ = M̄' + Ū              Ḡ = (1-μ) M̂            M̄ = μ M̂          (Nesterov: M̂ = M̄' + μ Ū, Ḡ = (1-μ) (M̂ + Ū))

torch rounds X_k to bfloat16, an error of about a hundredth of the update; without `ns_bf16` nothing is rounded. Source:
DESIGN §7; Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), for a, b, c.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers.adamw import AdamW
from dpg_cli.engine.inner.optimizers.base import OptimizerSpec, Rate, Rates, State

A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7


def scale(adjust_lr: str, shape: tuple[int, int]) -> float:
    """r: √(rows/columns), at least 1; or 0.2 √(the longer side), so that a step is as long as AdamW's."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, rows / columns))


def lying(matrix: Tensor) -> Tensor:
    """The matrix, turned if it has more rows than columns."""
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonal(update: Tensor, steps: int) -> list[Tensor]:
    """X_0 … X_K of a lying U."""
    x = [update / torch.linalg.vector_norm(update).clamp(min=EPS)]
    for _ in range(steps):
        gram = x[-1] @ x[-1].mT
        x.append(torch.addmm(x[-1], torch.addmm(gram, gram, gram, beta=B, alpha=C), x[-1], beta=A))
    return x


def orthogonal_bf16(update: Tensor, steps: int) -> Tensor:
    """X_K of a lying U, rounded to bfloat16 wherever `torch.optim.Muon` does."""
    return orthogonal(update.bfloat16(), steps)[-1].to(update.dtype)


def orthogonal_adjoint(update: Tensor, steps: int, last_bar: Tensor) -> Tensor:
    """Ū from X̄_K, all lying."""
    x, bar = orthogonal(update, steps), last_bar
    for before in reversed(x[:-1]):
        gram = before @ before.mT
        outer = bar @ before.mT
        outer = outer + outer.mT
        inner = torch.addmm(torch.addmm(outer, outer, gram, beta=B, alpha=C), gram, outer, alpha=C)
        powers = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        bar = torch.addmm(torch.addmm(bar, powers, bar, beta=A), inner, before)
    size = torch.linalg.vector_norm(update)
    along = (x[0] * bar).sum() * (size > EPS)  # below ε the size is a constant
    return (bar - x[0] * along) / size.clamp(min=EPS)


class Muon(AdamW):
    """See the module's header."""

    by_matrix = True

    def check(self, spec: OptimizerSpec) -> None:
        """See `Optimizer`."""
        if spec.nesterov and not spec.momentum > 0:
            raise ValueError("nesterov needs a momentum above 0")
        if spec.adjust_lr not in ("original", "match_rms_adamw"):
            raise ValueError(f"adjust_lr is 'original' or 'match_rms_adamw', got {spec.adjust_lr!r}")
        if not 0 < spec.ns_steps < 100:
            raise ValueError(f"ns_steps must lie in 1 … 99, got {spec.ns_steps}")

    def update(self, spec: OptimizerSpec, state: State, grad: Tensor, step: int, *, rates: Rates, last: bool) -> State:
        """See `Optimizer`.

        Raises:
            ValueError: if no range is a matrix.
        """
        if not any(rate.matrix for rate in rates):
            raise ValueError("muon needs to know which ranges are matrices: give rates with their shapes")
        return super().update(spec, state, grad, step, rates=rates, last=last)

    def forward(self, spec: OptimizerSpec, step: int, rate: Rate, before: State, grad: Tensor, after: State) -> None:
        """See `Elementwise`."""
        if rate.matrix is None:
            super().forward(spec, step, rate, before, grad, after)
            return
        torch.lerp(before.m, grad, 1 - spec.momentum, out=after.m)
        after.v.zero_()
        update = lying(self._ahead(spec, grad, after.m).view(rate.matrix))
        last = orthogonal_bf16(update, spec.ns_steps) if spec.ns_bf16 else orthogonal(update, spec.ns_steps)[-1]
        turned = last if last.shape == rate.matrix else last.mT
        torch.mul(before.theta, 1 - rate.lr * rate.weight_decay, out=after.theta)
        after.theta.view(rate.matrix).add_(turned, alpha=-rate.lr * scale(spec.adjust_lr, rate.matrix))

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
        if rate.matrix is None:
            super().reverse(spec, step, rate, after_bar, before, grad, grad_bar, before_bar)
            return
        m_after = torch.lerp(before.m, grad, 1 - spec.momentum)
        update = lying(self._ahead(spec, grad, m_after).view(rate.matrix))
        factor = -rate.lr * scale(spec.adjust_lr, rate.matrix)
        bar = orthogonal_adjoint(update, spec.ns_steps, lying(after_bar.theta.view(rate.matrix)) * factor)
        flat = (bar if bar.shape == rate.matrix else bar.mT).reshape(-1)
        m_bar = torch.add(after_bar.m, flat, alpha=spec.momentum if spec.nesterov else 1.0)
        torch.mul(m_bar, 1 - spec.momentum, out=grad_bar)
        if spec.nesterov:
            grad_bar.add_(flat, alpha=1 - spec.momentum)
        if before_bar is not None:
            torch.mul(m_bar, spec.momentum, out=before_bar.m)
            before_bar.v.zero_()
            torch.mul(after_bar.theta, 1 - rate.lr * rate.weight_decay, out=before_bar.theta)

    def _ahead(self, spec: OptimizerSpec, grad: Tensor, m_after: Tensor) -> Tensor:
        """U, flat."""
        return torch.lerp(grad, m_after, spec.momentum) if spec.nesterov else m_after

    def elasticity(self, spec: OptimizerSpec, grad: Tensor) -> Tensor:
        """1: a matrix's step depends on all of its entries at once, and none of them acts as a sign."""
        return torch.ones_like(grad)
