"""What a generator's head can do to a rectangle of the target's head, and the cheapest change that does what is asked (DESIGN §9).

Let h be the generator's hidden state at a token and x what the target's head reads there, on the rectangle's columns; q the
generator's distribution on the rectangle's rows, J = diag q - q qᵀ, τ its temperature. A change a of those rows of the generator's
head changes minus the target's gradient, and costs,

    R a = E[J (a h) xᵀ] / τ        ½ <a, F a> nats a token,   F a = E[J (a h) hᵀ] / τ²

and the cheapest a with R a = m is

    a = F⁻¹ Rᵀ w,   (R F⁻¹ Rᵀ) w = m        Rᵀ w = E[J (w x) hᵀ] / τ

Where the two models are one, a is w on the rectangle's columns and R F⁻¹ Rᵀ the Fisher of the rectangle, C. Where they are not, R F⁻¹ Rᵀ
is smaller: what h says little of is hard to reach. Other rows of the head stay as they are: a change of theirs is of second order in q.

Both equations are solved by conjugate gradients, one inside the other. Rows hardly depend on each other, since q is small, and each has
contexts of its own: so F's diagonal blocks B_r = E[q_r (1 - q_r) h hᵀ] / τ², solved exactly, precondition F, and
G_r B_r⁻¹ G_rᵀ, G_r = E[q_r (1 - q_r) x hᵀ] / τ, precondition R F⁻¹ Rᵀ.

One model as both needs neither: a is w itself, and C is solved with a share of the Kronecker product that stands near it, which
also holds where the tokens of a step are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dpg_cli.engine.inner.head import chunks
from dpg_cli.engine.natural.fisher import Solution, TokenFisher, conjugate_gradients

DAMPING = 1e-3  # of R F⁻¹ Rᵀ, by the diagonal of C: what is hardly within reach is not asked for; of C, by the Kronecker product
RIDGE = 1e-5  # of each block's mean square, added to F
EXACT, MOST, MOST_ONE = 1e-2, 100, 200  # relative residual and products of the solve with R F⁻¹ Rᵀ, or with C
CLOSE, FEW = 1e-3, 50  # the same of each solve with F


@dataclass(frozen=True)
class Reach:
    """R and F of some tokens.

    Attributes:
        hidden_M_D: h, a column of ones included where the generator's head has a bias.
        read_M_C: x.
        likely_M_R: q.
        column: the rectangle's first; where the models are one, x is h from there on.
        temperature: τ.
        one_model: generator and target are one: x is h.
    """

    hidden_M_D: Tensor
    read_M_C: Tensor
    likely_M_R: Tensor
    column: int = 0
    temperature: float = 1.0
    one_model: bool = False

    @property
    def tokens(self) -> int:
        """M."""
        return len(self.read_M_C)

    def done(self, change_R_D: Tensor) -> Tensor:
        """R a, (R, C)."""
        return self._mean(change_R_D, self.hidden_M_D, self.read_M_C).div_(self.temperature)

    def pulled(self, pull_R_C: Tensor) -> Tensor:
        """Rᵀ w, (R, D)."""
        return self._mean(pull_R_C, self.read_M_C, self.hidden_M_D).div_(self.temperature)

    def cost(self, change_R_D: Tensor) -> Tensor:
        """(F + ridge) a, (R, D)."""
        found = self._mean(change_R_D, self.hidden_M_D, self.hidden_M_D).div_(self.temperature**2)
        return found.addcmul_(change_R_D, self.blocks.ridge_R[:, None])

    @torch.no_grad()
    def _mean(self, vector: Tensor, tilts: Tensor, reads: Tensor) -> Tensor:
        """E[J (v tilt) readᵀ]."""
        total = vector.new_zeros(len(vector), reads.shape[1])
        for part in chunks(self.tokens, len(vector)):
            q = self.likely_M_R[part]
            moved = tilts[part] @ vector.mT
            moved.sub_(torch.linalg.vecdot(q, moved)[:, None]).mul_(q)
            total.addmm_(moved.mT, reads[part])
        return total.div_(self.tokens)

    @cached_property
    def blocks(self) -> Blocks:
        """Of the preconditioners."""
        return Blocks.of(self)

    def tilt(self, pull_R_C: Tensor) -> Solution:
        """F⁻¹ Rᵀ w: the change of the head that a natural step along an adjoint w makes, (R, D)."""
        width, stop = self.hidden_M_D.shape[1], self.column + pull_R_C.shape[1]
        start = None
        if stop <= width and bool(pull_R_C.any()):
            start = pull_R_C.new_zeros(len(pull_R_C), width)
            start[:, self.column : stop] = pull_R_C * self.temperature
        if self.one_model and start is not None:
            return Solution(start, 0, 0.0)
        return conjugate_gradients(
            lambda vector, out: out.copy_(self.cost(vector)),
            lambda vector, out: out.copy_((self.blocks.inverse_R_D_D @ vector[:, :, None])[:, :, 0]),
            self.pulled(pull_R_C),
            iterations=FEW,
            tolerance=CLOSE,
            start=start,
        )

    def pull(self, asked_R_C: Tensor) -> Solution:
        """w with (R F⁻¹ Rᵀ + damping) w = m, (R, C)."""
        if self.one_model:
            fisher = TokenFisher(self.read_M_C, self.likely_M_R.__getitem__, len(asked_R_C))
            kronecker = fisher.kronecker()
            return conjugate_gradients(
                lambda vector, out: kronecker.add_product(fisher.product(vector, out), vector, DAMPING),
                kronecker.solve,
                asked_R_C.clone(),
                iterations=MOST_ONE,
                tolerance=EXACT,
            )
        damping = DAMPING * self.blocks.square_R_C
        whole = self.blocks.reach_R_C_C + torch.diag_embed(damping.double())
        inverse = torch.linalg.inv(whole).to(asked_R_C)
        return conjugate_gradients(
            lambda vector, out: out.copy_(self.done(self.tilt(vector).x)).addcmul_(damping, vector),
            lambda vector, out: out.copy_((inverse @ vector[:, :, None])[:, :, 0]),
            asked_R_C.clone(),
            iterations=MOST,
            tolerance=EXACT,
        )


@dataclass(frozen=True)
class Blocks:
    """The rows' own parts, as if no row depended on another.

    Attributes:
        ridge_R: what is added to the diagonal of each row's F.
        inverse_R_D_D: B_r⁻¹.
        reach_R_C_C: G_r B_r⁻¹ G_rᵀ, in float64.
        square_R_C: E[q_r (1 - q_r) x²], the diagonal of C.
    """

    ridge_R: Tensor
    inverse_R_D_D: Tensor
    reach_R_C_C: Tensor
    square_R_C: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, reach: Reach) -> Blocks:
        """In float64, row by row."""
        hidden, read, q = reach.hidden_M_D, reach.read_M_C, reach.likely_M_R
        rows, width, count = q.shape[1], hidden.shape[1], reach.tokens
        own = torch.zeros(rows, width, width, dtype=torch.float64, device=q.device)
        cross = own.new_zeros(rows, read.shape[1], width)
        square = own.new_zeros(rows, read.shape[1])
        for part in chunks(count, width):
            h, x, likely = hidden[part].double(), read[part].double(), q[part].double()
            weight_R_M = (likely * (1 - likely)).mT / count
            square += weight_R_M @ x.square()
            for row, weight in enumerate(weight_R_M):
                weighted = weight[:, None] * h
                own[row].addmm_(weighted.mT, h)
                cross[row].addmm_(x.mT, weighted)
        own /= reach.temperature**2
        cross /= reach.temperature
        tiny = torch.finfo(q.dtype).tiny  # a row that never occurs
        ridge = RIDGE * own.diagonal(dim1=1, dim2=2).mean(1).clamp_min(tiny)
        own.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(own))
        within = cross @ inverse @ cross.mT
        floor = torch.finfo(q.dtype).eps * square.max().clamp_min(tiny)
        return cls(ridge.to(q), inverse.to(q), within, square.clamp_min(floor).to(q))
