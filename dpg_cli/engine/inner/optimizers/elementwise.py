"""Optimisers that treat each weight by itself: everything but their equations.

Both passes walk the flat vectors in blocks that stay in the shared cache, so that each vector is read and written once
however many elementwise operations there are, and temporaries stay of a block's size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers.base import (
    OptimizerSpec,
    Rate,
    Rates,
    State,
    no_vector,
    spans,
    writable,
)


class Elementwise(ABC):
    """An optimiser with `vectors` vectors of its own, m or m and v. It says what a step does within a block, and its reverse."""

    vectors: ClassVar[int]
    by_matrix = False

    def check(self, spec: OptimizerSpec) -> None:
        """See `Optimizer`."""
        if spec.nesterov:
            raise ValueError(f"nesterov is a setting of 'muon' and 'sgd', not of {spec.name!r}")

    @abstractmethod
    def forward(self, spec: OptimizerSpec, step: int, rate: Rate, before: State, grad: Tensor, after: State) -> None:
        """Write the state after the step; `before` and `grad` are kept. An optimiser without v gets empty ones."""

    @abstractmethod
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
        """Write ḡ, and the direct parts of the state's adjoints, if `before_bar` asks for them.

        `grad_bar` may be the memory of `grad` or of `before.m`, and each vector of `before_bar` that of `after_bar`'s or
        `before`'s own (but θ): what is read must be read before it is written.
        """

    @abstractmethod
    def elasticity(self, spec: OptimizerSpec, grad: Tensor) -> Tensor:
        """See `Optimizer`."""

    def initial_state(self, theta: Tensor) -> State:
        """See `Optimizer`."""
        return State(theta, no_vector(theta), no_vector(theta) if self.vectors > 1 else theta.new_empty(0))

    def update(self, spec: OptimizerSpec, state: State, grad: Tensor, step: int, *, rates: Rates, last: bool) -> State:
        """See `Optimizer`."""
        nothing = grad.new_empty(0)
        size = len(grad)
        if last:  # no one wants m and v: one block of each, to be written over
            size = max((span.stop - span.start for _, span in spans(rates, grad)), default=0)
        m, v = torch.empty_like(grad[:size]), torch.empty_like(grad[:size]) if self.vectors > 1 else nothing
        after = State(torch.empty_like(grad), m, v)
        for rate, span in spans(rates, grad):
            own = slice(0, span.stop - span.start) if last else span
            part = State(after.theta[span], m[own], v[own])
            self.forward(spec, step, rate, state.part(span), grad[span], part)
        return State(after.theta, nothing, nothing) if last else after

    def adjoint(
        self,
        spec: OptimizerSpec,
        after: State,
        before: State,
        grad: Tensor,
        step: int,
        *,
        rates: Rates,
        consume: bool,
        first: bool,
        grad_into: Tensor | None,
    ) -> tuple[Tensor, State]:
        """See `Optimizer`."""
        nothing = grad.new_empty(0)
        grad_bar = grad_into if grad_into is not None else grad if consume else torch.empty_like(grad)
        bar = State(nothing, nothing, nothing)
        if not first and consume:
            v = writable(after.v, before.v) if self.vectors > 1 else after.v
            bar = State(writable(after.theta), writable(after.m, before.m), v)
        elif not first:
            v = torch.empty_like(grad) if self.vectors > 1 else after.v
            bar = State(torch.empty_like(grad), torch.empty_like(grad), v)
        for rate, span in spans(rates, grad):
            self.reverse(
                spec, step, rate, after.part(span), before.part(span), grad[span], grad_bar[span],
                None if first else bar.part(span),
            )  # fmt: skip
        return grad_bar, bar
