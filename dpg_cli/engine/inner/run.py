"""The inner run: an ordinary fine-tuning run of T optimiser steps, with what its reverse needs kept on a tape.

    L_t = Σ_{i in batch t} w_i Σ_s mask_is ℓ_is(θ_t) / Z_t,   g_t = ∇L_t,   (θ, m, v)_{t+1} = U(g_t, (θ, m, v)_t)

Source: DESIGN §2, step 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers import OptimizerSpec, initial_state, update
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
        tape: the T steps; `reverse` uses it up.
        batches: the rows (start, stop) of each step.
        theta: θ_T.
        losses: of each step.
        gradient_median: median |g_0| over parameters with a gradient (of an even sample).
    """

    tape: Tape
    batches: list[tuple[int, int]]
    theta: Tensor
    losses: list[float]
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
    spec: OptimizerSpec,
    weights_N: Tensor,
    batch_size: int,
    progress: Progress | None = None,
    memory: Memory = "keep",
    origin: Callable[[], Tensor] | None = None,
    remember: bool = False,
    tape: Tape | None = None,
) -> InnerRun:
    """Fine-tune from θ_0 with fresh optimiser state, each example used once, in order.

    Args:
        run: the target and its settings; the model's own parameters stay as they are.
        theta: θ_0, shape (n,).
        examples: N sequences.
        spec: the inner optimiser.
        weights_N: data weights.
        batch_size: B; the last batch may be smaller. T = ceil(N / B).
        memory: which states are kept, see `tape.py`.
        origin: gives θ_0 again, so that it need not be kept.
        remember: keep products for the dual passes of `reverse`, where the states are kept too.
        tape: takes the steps in place of that for `memory`.
    """
    batches = [(start, min(start + batch_size, len(examples))) for start in range(0, len(examples), batch_size)]
    total = len(batches)

    def gradient(number: int, at: Tensor, remembered: Remembered | None = None) -> tuple[Tensor, float]:
        start, stop = batches[number]
        return loss_gradient(run, at, examples.rows(start, stop), weights_N[start:stop], remembered)

    tape = tape or make_tape(
        memory,
        total,
        theta,
        lambda number, at: gradient(number, at if len(at) or origin is None else origin())[0],
        lambda number, state, grad: update(
            spec, state if len(state.theta) or origin is None else state._replace(theta=origin()), grad, number
        ),
    )
    if origin is not None:
        tape = OriginTape(tape, origin)
    state = initial_state(spec, theta)
    del theta
    losses, median = [], 0.0
    for number in range(total):
        remembered = Remembered() if remember and memory == "keep" else None
        grad, loss = gradient(number, state.theta, remembered)
        tape.record(number, Step(state, grad, remembered))
        losses.append(loss)
        if number == 0:
            median = gradient_median(grad)
        state = update(spec, state, grad, number, last=number == total - 1)
        del grad
        if progress is not None:
            progress("forward", number + 1, total)
    return InnerRun(tape, batches, state.theta, losses, median)


def gradient_median(grad: Tensor) -> float:
    """Median of |g| over entries that are not zero, of at most about a million evenly spaced ones."""
    sample = grad[:: max(1, len(grad) // SAMPLE)].abs()
    moved = sample[sample > 0]
    return float(moved.median()) if moved.numel() else 0.0


def all_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite, without a mask of the tensor's size."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
