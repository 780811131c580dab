"""The Fisher information of tokens on the parameters of the LM head that wrote them, as products with vectors (DESIGN §9).

For M tokens with hidden states h_m (M, D) and distributions q_m over V tokens at temperature τ, and V' a change of the head:

    u_m = V' h_m / τ        F V' = 1/M Σ_m (q_m ⊙ (u_m - <q_m, u_m>)) h_mᵀ / τ        KL(q' ‖ q) a token ≈ ½ <V', F V'>

F has V·D rows and is never formed: tokens go by in chunks. A head with a bias is one with a hidden state that is always 1.

What stands near F and can be inverted is K = diag(E q) ⊗ E[h hᵀ] / τ²: it preconditions the conjugate gradients that solve
(F + λ K) d = g. λ is without a unit, the share of that Kronecker product that is added; F itself is singular (a shift of all
logits costs nothing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpg_cli.engine.inner.head import chunks
from dpg_cli.engine.soft import Rows

KEPT = 1 << 25  # probabilities that are kept rather than made anew at every product: 128 MB in float32
RIDGE = 1e-6  # of the mean square of a hidden dimension, added to E[h hᵀ]
THIN_RIDGE = 1e-3  # the same where tokens are few for so many dimensions, or fewer than these
ENOUGH = 8  # tokens a dimension, from which they are not


@dataclass(frozen=True)
class TokenFisher:
    """F of some tokens on the rows of a head.

    Attributes:
        hidden_M_D: h of the tokens, a column of ones included where the head has a bias.
        q: their distributions, chunk by chunk, (m, R): of all tokens of the vocabulary, or of some rows of the head alone.
        rows: R.
        temperature: τ.
    """

    hidden_M_D: Tensor
    q: Rows
    rows: int
    temperature: float = 1.0

    @classmethod
    def of(cls, hidden_M_D: Tensor, q: Rows, rows: int, temperature: float = 1.0) -> TokenFisher:
        """The same, with the distributions kept where they are few."""
        count = len(hidden_M_D)
        if count * rows > KEPT:
            return cls(hidden_M_D, q, rows, temperature)
        kept = hidden_M_D.new_empty(count, rows)
        for part in chunks(count, rows):
            kept[part] = q(part)
        return cls(hidden_M_D, kept.__getitem__, rows, temperature)

    @property
    def tokens(self) -> int:
        """M."""
        return len(self.hidden_M_D)

    @torch.no_grad()
    def product(self, vector_R_D: Tensor, out: Tensor | None = None) -> Tensor:
        """F V', (R, D)."""
        total = torch.zeros_like(vector_R_D) if out is None else out.zero_()
        for part in chunks(self.tokens, self.rows):
            hidden, q = self.hidden_M_D[part], self.q(part)
            moved = hidden @ vector_R_D.mT
            moved.sub_(torch.linalg.vecdot(q, moved)[:, None]).mul_(q)
            total.addmm_(moved.mT, hidden)
        return total.div_(self.tokens * self.temperature**2)

    @torch.no_grad()
    def kronecker(self) -> Kronecker:
        """K, with the mean distribution and the second moment of the hidden states."""
        mean = self.hidden_M_D.new_zeros(self.rows)
        for part in chunks(self.tokens, self.rows):
            mean += self.q(part).sum(0)
        moment = torch.zeros(self.hidden_M_D.shape[1], self.hidden_M_D.shape[1], dtype=torch.float64).to(mean.device)
        for part in chunks(self.tokens, self.rows):
            hidden = self.hidden_M_D[part].double()
            moment.addmm_(hidden.mT, hidden)
        ridge = RIDGE if self.tokens >= ENOUGH * len(moment) else THIN_RIDGE
        return Kronecker.of(mean.div_(self.tokens), moment.div_(self.tokens), self.temperature, ridge)


@dataclass(frozen=True)
class Kronecker:
    """K = diag(r) ⊗ A and its inverse.

    Attributes:
        rows_R: r = E q / τ², every entry positive.
        moment: A = E[h hᵀ] with a small ridge, (D, D).
        inverse: A⁻¹.
    """

    rows_R: Tensor
    moment: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, mean_R: Tensor, moment: Tensor, temperature: float, ridge: float = RIDGE) -> Kronecker:
        """From the mean distribution, which may have zeros, and E[h hᵀ]; `ridge` is a share of its mean diagonal."""
        exact = moment.double()
        exact.diagonal().add_(ridge * float(exact.diagonal().mean()))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(exact))
        floor = torch.finfo(mean_R.dtype).eps * mean_R.max()
        return cls(mean_R.clamp_min(floor) / temperature**2, exact.to(mean_R), inverse.to(mean_R))

    def add_product(self, total: Tensor, vector_R_D: Tensor, factor: float) -> Tensor:
        """Add factor · K V' to `total`, some rows at a time."""
        for part in chunks(len(vector_R_D), vector_R_D.shape[1]):
            total[part].addcmul_(vector_R_D[part] @ self.moment, self.rows_R[part, None], value=factor)
        return total

    def solve(self, vector_R_D: Tensor, out: Tensor | None = None) -> Tensor:
        """K⁻¹ V'."""
        return torch.mm(vector_R_D, self.inverse, out=out).div_(self.rows_R[:, None])


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        x: the solution.
        iterations: products that it took.
        residual: ‖b - A x‖ / ‖b‖ in the preconditioner's inverse norm.
    """

    x: Tensor
    iterations: int
    residual: float


@torch.no_grad()
def conjugate_gradients(
    product: Callable[[Tensor, Tensor], Tensor],
    solve: Callable[[Tensor, Tensor], Tensor],
    residual: Tensor,
    *,
    iterations: int,
    tolerance: float,
    start: Tensor | None = None,
) -> Solution:
    """Solve A x = b for a positive semi-definite A whose range holds b.

    Args:
        product: product(v, out) gives A v; it may be written to `out`.
        solve: solve(v, out) gives the preconditioner's inverse times v; likewise.
        residual: b; used up.
        iterations: most products.
        tolerance: of the relative residual, at which to stop.
        start: a vector whose best multiple is where to begin; used up.

    Memory: the solution, the residual, the direction, and one vector for the product and the preconditioned residual.
    """
    x = torch.zeros_like(residual) if start is None else start
    shared, done = torch.empty_like(residual), 0
    whole = dot(solve(residual, shared), residual)
    if start is not None and whole > 0:
        image = product(x, shared)
        curvature = dot(x, image)
        factor = dot(x, residual) / curvature if curvature > 0 else 0.0
        residual.sub_(image, alpha=factor)
        x.mul_(factor)
        done = 1
    direction = solve(residual, shared).clone()
    size = dot(direction, residual)
    while done < iterations and size > tolerance**2 * whole > 0:
        image = product(direction, shared)
        curvature = dot(direction, image)
        if not curvature > 0:  # nothing but rounding is left
            break
        x.add_(direction, alpha=size / curvature)
        residual.sub_(image, alpha=size / curvature)
        preconditioned = solve(residual, shared)
        before, size = size, dot(preconditioned, residual)
        direction.mul_(size / before).add_(preconditioned)
        done += 1
    return Solution(x, done, (max(size, 0.0) / whole) ** 0.5 if whole > 0 else 0.0)


def dot(first: Tensor, second: Tensor) -> float:
    """<a, b> of two matrices."""
    return float(torch.dot(first.view(-1), second.view(-1)))
