"""The inner run: an ordinary fine-tuning run of T optimiser steps, with what its reverse needs kept on a tape.

    L_t = Σ_{i in batch t} w_i Σ_s mask_is ℓ_is(θ_t) / Z_t,   g_t = clip(∇L_t),   (θ, m, v)_{t+1} = U_t(g_t, (θ, m, v)_t)

Source: DESIGN §2, step 2; what a recipe adds, §7 (`recipe/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers import OptimizerSpec, initial_state
from dpg_cli.engine.inner.recipe.plan import Plan
from dpg_cli.engine.inner.recipe.spec import Recipe
from dpg_cli.engine.inner.recipe.stepper import Stepper
from dpg_cli.engine.inner.remembered import Remembered
from dpg_cli.engine.inner.tape import KeepTape, Memory, OriginTape, Step, Tape, make_tape
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.records import Examples

Progress = Callable[[str, int, int], None]  # phase, done, total
SAMPLE = 1 << 20  # gradient entries that the median is taken of


@dataclass(frozen=True)
class InnerRun:
    """A finished inner run.

    Attributes:
        tape: the T steps; `reverse` uses it up. Its gradients are the clipped ones.
        plan: the examples of each step.
        stepper: the recipe's optimiser step.
        theta: θ_T.
        losses: of each step.
        norms: |g_t| of each step before clipping; 0 without clipping.
        gradient_median: median |g_0| over parameters with a gradient (of an even sample), after clipping.
    """

    tape: Tape
    plan: Plan
    stepper: Stepper
    theta: Tensor
    losses: list[float]
    norms: list[float]
    gradient_median: float

    @property
    def steps(self) -> list[Step]:
        """The stored steps, where they are kept in memory."""
        if not isinstance(self.tape, KeepTape):
            raise TypeError("only an inner run with memory='keep' has its steps at hand")
        return list(self.tape.steps)


def inner_run(
    run: TargetRun,
    theta: Tensor,
    examples: Examples,
    recipe: OptimizerSpec | Recipe,
    weights_N: Tensor,
    batch_size: int | None = None,
    progress: Progress | None = None,
    memory: Memory = "keep",
    origin: Callable[[], Tensor] | None = None,
    remember: bool = False,
    plan: Plan | None = None,
    tape: Tape | None = None,
) -> InnerRun:
    """Fine-tune from θ_0 with fresh optimiser state.

    Args:
        run: the target and its settings; the model's own parameters stay as they are.
        theta: θ_0, shape (n,).
        examples: N sequences.
        recipe: of the run; an optimiser alone stands for each example once, in order. Loss normaliser and precision are
            those of `run`.
        weights_N: data weights.
        batch_size: B, instead of the recipe's; 0 takes all.
        memory: which states are kept, see `tape.py`.
        origin: gives θ_0 again, so that it need not be kept.
        remember: keep products for the dual passes of `reverse`, where the states are kept too.
        plan: the examples of each step, instead of the recipe's batches.
        tape: takes the steps in place of that for `memory`.
    """
    recipe = Recipe.of(recipe, batch_size)
    plan = recipe.plan(examples) if plan is None else plan
    total = len(plan)
    stepper = Stepper(run, recipe, total)

    def gradient(number: int, at: Tensor, remembered: Remembered | None = None) -> tuple[Tensor, float, float]:
        rows = plan.rows[number]
        grad, loss = loss_gradient(run, at, examples.at(rows), weights_of(weights_N, rows), remembered)
        return grad, loss, stepper.clip_(grad)

    tape = tape or make_tape(
        memory,
        total,
        theta,
        lambda number, at: gradient(number, at if len(at) or origin is None else origin())[0],
        lambda number, state, grad: stepper.update(
            state if len(state.theta) or origin is None else state._replace(theta=origin()), grad, number
        ),
    )
    if origin is not None:
        tape = OriginTape(tape, origin)
    state = initial_state(recipe.optimizer, theta)
    del theta
    losses, norms, median = list[float](), list[float](), 0.0
    for number in range(total):
        remembered = Remembered() if remember and memory == "keep" else None
        grad, loss, norm = gradient(number, state.theta, remembered)
        tape.record(number, Step(state, grad, remembered))
        losses.append(loss)
        norms.append(norm)
        if number == 0:
            median = gradient_median(grad)
        state = stepper.update(state, grad, number, last=number == total - 1)
        del grad
        if progress is not None:
            progress("forward", number + 1, total)
    return InnerRun(tape, plan, stepper, state.theta, losses, norms, median)


def weights_of(weights_N: Tensor, rows: slice | Tensor) -> Tensor:
    """The data weights of a step's examples."""
    return weights_N[rows] if isinstance(rows, slice) else weights_N[rows.to(weights_N.device)]


def gradient_median(grad: Tensor) -> float:
    """Median of |g| over entries that are not zero, of at most about a million evenly spaced ones."""
    sample = grad[:: max(1, len(grad) // SAMPLE)].abs()
    moved = sample[sample > 0]
    return float(moved.median()) if moved.numel() else 0.0


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite, without a mask of the tensor's size."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
