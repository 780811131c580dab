"""An optimiser step as the recipe has it, and its adjoint: clipping, the step's learning rate, and groups around the optimiser.

    g' = clip(g)        (θ, m, v)_{t+1} = U_t(g', (θ, m, v)_t)        with lr_t, and lr and λ by ranges of the flat vector

`engine/inner/optimizers/` has U and its adjoint, `clipping.py` the clip and its.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers import Rates, State, adjoint, ranges_of, update
from dpg_cli.engine.inner.recipe.average import shares
from dpg_cli.engine.inner.recipe.clipping import clip_, clip_adjoint_, coefficient
from dpg_cli.engine.inner.recipe.spec import Recipe
from dpg_cli.engine.inner.target import TargetRun


class Stepper:
    """The steps of one run.

    Args:
        run: the target; its space says where each parameter is.
        recipe: of the run.
        total: T.
    """

    def __init__(self, run: TargetRun, recipe: Recipe, total: int) -> None:
        self.spec, self.limit = recipe.optimizer, recipe.max_grad_norm
        self.factors = recipe.schedule.factors(total, recipe.optimizer.lr)
        self.shares = shares(recipe.ema, total)  # of θ_1 … θ_T in the weights that Φ reads
        self.peaks = ranges_of(recipe.optimizer, run.space, run.model, recipe.settings(run.model))

    def rates(self, number: int) -> Rates:
        """lr and λ of a step."""
        factor = self.factors[number]
        return tuple(rate._replace(lr=rate.lr * factor) for rate in self.peaks)

    def clip_(self, grad: Tensor) -> float:
        """Clip a step's gradient in place; its norm before, or 0 without clipping."""
        return clip_(grad, self.limit)

    def bites(self, norm: float) -> bool:
        """Whether a gradient of this norm is clipped."""
        return coefficient(norm, self.limit) < 1

    def update(self, state: State, grad: Tensor, number: int, *, last: bool = False) -> State:
        """The state after a step, from the clipped gradient; see `optimizers.update`."""
        return update(self.spec, state, grad, number, rates=self.rates(number), last=last)

    def adjoint(
        self,
        after: State,
        before: State,
        grad: Tensor,
        norm: float,
        number: int,
        *,
        consume: bool = False,
        first: bool = False,
        grad_into: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The adjoint of a step; see `optimizers.adjoint`.

        Args:
            after: adjoints of the state after it.
            before: the state before it.
            grad: its clipped gradient.
            norm: of the gradient before clipping.
            number: t.
            consume, first, grad_into: as there.
        """
        rates = self.rates(number)
        if not self.bites(norm):
            return adjoint(
                self.spec, after, before, grad, number, rates=rates, consume=consume, first=first, grad_into=grad_into
            )
        spare = (
            grad_into is None and consume and after.m.stride(0) != 0 and before.m.stride(0) != 0
        )  # ḡ can take the place of m
        into = grad_into if grad_into is not None else before.m if spare else torch.empty_like(grad)
        grad_bar, bar = adjoint(
            self.spec, after, before, grad, number, rates=rates, consume=consume, first=first, grad_into=into
        )
        return clip_adjoint_(grad_bar, grad, norm, self.limit), bar
