"""The inner run: an ordinary fine-tuning run of T optimiser steps, with what its reverse needs kept on a tape.

    L_t = Σ_{i in batch t} w_i Σ_s mask_is ℓ_is(θ_t) / Z_t,   g_t = clip(∇L_t),   (θ, m, v)_{t+1} = U_t(g_t, (θ, m, v)_t)

Source: DESIGN §2, step 2; what a recipe adds, §7 (`recipe/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpg_cli.engine.inner.journal import Course, Journal
from dpg_cli.engine.inner.optimizers import OptimizerSpec, initial_state
from dpg_cli.engine.inner.recipe.average import averaged
from dpg_cli.engine.inner.recipe.plan import Plan
from dpg_cli.engine.inner.recipe.spec import Recipe
from dpg_cli.engine.inner.recipe.stepper import Stepper
from dpg_cli.engine.inner.remembered import Remembered
from dpg_cli.engine.inner.start import Start
from dpg_cli.engine.inner.tape import KeepTape, Memory, OriginTape, Step, Tape, make_tape
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError

Progress = Callable[[str, int, int], None]  # phase, done, total
SAMPLE = 1 << 20  # gradient entries that the median is taken of


@dataclass(frozen=True)
class InnerRun:
    """A finished inner run.

    Attributes:
        tape: the steps that were made; `reverse` uses it up. Its gradients are the clipped ones.
        plan: the examples of each of T steps.
        stepper: the recipe's optimiser step.
        theta: θ_T, or the average of the weights over the steps where the recipe has one.
        losses: of each step that was made.
        norms: |g_t| of each before clipping; 0 without clipping.
        gradient_median: median |g| of the first over parameters with a gradient (of an even sample), after clipping.
        start: the first step of the plan that was made; 0 but for a warm start.
        token_losses: ℓ_is of steps by their number, (B, S) in float64, for one-sided differences alone; not of steps that an
            earlier process made.
    """

    tape: Tape
    plan: Plan
    stepper: Stepper
    theta: Tensor
    losses: list[float]
    norms: list[float]
    gradient_median: float
    start: int = 0
    token_losses: dict[int, Tensor] = field(default_factory=dict)

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
    start: Start | None = None,
    journal: Journal | None = None,
) -> InnerRun:
    """Fine-tune from θ_0, with fresh optimiser state or from a checkpoint.

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
        start: the run goes on from there.
        journal: keeps progress, and has what an earlier process kept.

    Raises:
        UsageError: if the start does not fit the run.
    """
    recipe = Recipe.of(recipe, batch_size)
    plan = recipe.plan(examples) if plan is None else plan
    total = len(plan)
    stepper = Stepper(run, recipe, total)

    token_losses: dict[int, Tensor] = {}

    def gradient(number: int, at: Tensor, remembered: Remembered | None = None) -> tuple[Tensor, float, float]:
        rows = plan.rows[number]
        batch, into = examples.at(rows), None
        if run.second_order == "one-sided":
            into = token_losses[number] = at.new_empty(batch.ids_N_S.shape, dtype=torch.float64)
        grad, loss = loss_gradient(run, at, batch, weights_of(weights_N, rows), remembered, into)
        return grad, loss, stepper.clip_(grad)

    begin = 0 if start is None else start.step
    if not begin < total:
        raise UsageError(
            f"The checkpoint is of step {begin}, and the run has {total} steps in all: none is left to attribute.",
            "Give the recipe of the whole run, or an earlier checkpoint.",
        )
    make = make_tape if journal is None else journal.tape
    tape = tape or make(
        memory,
        total - begin,
        theta,
        lambda place, at: gradient(begin + place, at if len(at) or origin is None else origin())[0],
        lambda place, state, grad: stepper.update(
            state if len(state.theta) or origin is None else state._replace(theta=origin()), grad, begin + place
        ),
    )
    course, known = Course(), None if journal is None else journal.begun(theta)
    if origin is not None:
        tape = OriginTape(tape, origin)
    if known is not None:
        state, course = known.state, known.course
    elif start is not None:
        state = start.state(recipe.optimizer, run.space, theta)
    else:
        state = initial_state(recipe.optimizer, theta)
    del theta
    average: Tensor | None = None
    for number in range(begin + (0 if known is None else known.done), total):
        remembered = Remembered() if remember and memory == "keep" else None
        grad, loss, norm = gradient(number, state.theta, remembered)
        tape.record(number - begin, Step(state, grad, remembered))
        if journal is not None:
            journal.stepped(number - begin, course)
        course.losses.append(loss)
        course.norms.append(norm)
        if number == begin:
            course.gradient_median = gradient_median(grad)
        state = stepper.update(state, grad, number, last=number == total - 1)
        del grad
        if recipe.ema:
            average = averaged(average, state.theta, recipe.ema)
        if progress is not None:
            progress("forward", number - begin + 1, total - begin)
    final = state.theta if average is None else average
    return InnerRun(
        tape, plan, stepper, final, course.losses, course.norms, course.gradient_median, begin, token_losses
    )


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
