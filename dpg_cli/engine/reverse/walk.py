"""The reverse pass over an inner run, from ∂Φ/∂θ_T to the credit of each token.

    (θ̄, m̄, v̄)_{t+1}  --adjoint of U_t and of the clip-->  ḡ_t and direct parts of (θ̄, m̄, v̄)_t
    τ_is = mask_is <ḡ_t, ∇ℓ_is(θ_t)> / Z_t,        θ̄_t += ∇_θ <ḡ_t, ∇L_t(θ_t)>   (not at t = 0)

An example's credit is the sum over its visits. Source: DESIGN §2, step 4. Adjoints are written over the states that they
replace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpg_cli.engine.detect import regime
from dpg_cli.engine.inner.optimizers import State, no_vector
from dpg_cli.engine.inner.recipe.stepper import Stepper
from dpg_cli.engine.inner.remembered import Remembered
from dpg_cli.engine.inner.run import InnerRun, Progress, all_finite, weights_of
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.double_pass import double_pass
from dpg_cli.engine.reverse.dual_pass import DualResult, dual_pass
from dpg_cli.engine.soft import LabelSink
from dpg_cli.errors import DegenerateError

WORST_PRECISION = 0.25  # relative error of token credits, beyond which mixed precision is refused


@dataclass(frozen=True)
class Reversed:
    """What the reverse pass gives.

    Attributes:
        token_N_S: τ_is, summed over the visits of each example.
        label_N_S_V: τ_is(y), or None.
        visit_M: the credit of each example at each of its visits, in the order of the plan; None unless asked for.
        stats: how far the first update is from sign(g), and further figures.
    """

    token_N_S: Tensor
    label_N_S_V: Tensor | None
    visit_M: Tensor | None
    stats: dict[str, float]


def reverse(
    run: TargetRun,
    trace: InnerRun,
    examples: Examples,
    weights_N: Tensor,
    theta_bar: Tensor,
    labels: bool = False,
    progress: Progress | None = None,
    sink: LabelSink | None = None,
    visits: bool = False,
) -> Reversed:
    """Walk the inner run backwards from ∂Φ/∂θ_T.

    Args:
        trace: the inner run; its tape is used up.
        theta_bar: ∂Φ/∂θ_T, shape (n,); used up.
        labels: also return the credit of every label.
        sink: is given the credit of every label chunk by chunk, by each rank those of its own rows.
        visits: also return the credit of every visit.

    Raises:
        DegenerateError: if a metagradient is not finite.
    """
    tokens = theta_bar.new_zeros(examples.ids_N_S.shape)
    every: Tensor | None = None
    total, stepper = len(trace.plan), trace.stepper
    nothing = no_vector(theta_bar)
    bar = State(theta_bar, nothing, nothing)
    del theta_bar
    stats: dict[str, float] = {}
    exact: Tensor | None = None
    each: list[Tensor] = []
    for number in reversed(range(total)):
        before, grad, remembered = trace.tape.pop()
        rows = trace.plan.rows[number]
        batch, weights = examples.at(rows), weights_of(weights_N, rows)
        if number == 0:
            stats = regime(stepper.spec, grad, bar.theta)
            if run.precision != "float32":
                exact = exact_first_credits(run, stepper, bar, before, batch, weights)
        grad_bar, bar = stepper.adjoint(bar, before, grad, trace.norms[number], number, consume=True, first=number == 0)
        theta = before.theta
        del before, grad
        width = batch.ids_N_S.shape[1]
        dual = second_pass(
            run,
            theta,
            grad_bar,
            batch,
            weights,
            need_hvp=number > 0,
            need_labels=labels,
            hvp_into=bar.theta if number else None,
            remembered=remembered,
            sink=sink,
        )
        del theta, grad_bar, remembered  # before the tape makes the next state
        add_rows(tokens[:, :width], rows, dual.token_B_S)
        if visits:
            each.append(dual.token_B_S.sum(1))
        if exact is not None:
            stats["precision_error"] = precision_error(*map(run.ranks.sum_, (dual.token_B_S.clone(), exact)))
        made = dual.label_B_S_V
        if made is not None and total == 1 and isinstance(rows, slice) and made.shape[:2] == tokens.shape:
            every = made  # of every example at once: no second copy of N · S · V numbers
        elif made is not None:
            if every is None:
                every = tokens.new_zeros(*tokens.shape, made.shape[-1])
            add_rows(every[:, :width], rows, made)
        del dual, made
        if progress is not None:
            progress("reverse", total - number, total)
    run.ranks.sum_(tokens)
    if labels and run.ranks.world > 1:
        size = run.ranks.largest(0 if every is None else every.shape[-1])  # a rank without rows knows no vocabulary
        every = run.ranks.sum_(tokens.new_zeros(*tokens.shape, size) if every is None else every.contiguous())
    if not all_finite(tokens):
        raise DegenerateError(
            "Metagradients are not finite.",
            "Lower inner.lr or raise inner.eps_root; with inner.eps = 0 the update has no derivative at zero.",
        )
    if stepper.limit:
        stats["clipped_share"] = sum(map(stepper.bites, trace.norms)) / total
    return Reversed(tokens, every, run.ranks.sum_(torch.cat(each[::-1])) if visits else None, stats)


def add_rows(total: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """Add values (B, ...) to the rows of a total (N, ...); a row that comes twice gets both."""
    if isinstance(rows, slice):
        total[rows] += values
    else:
        total.index_add_(0, rows.to(total.device), values)


def second_pass(run: TargetRun, *args: Any, remembered: Remembered | None = None, **options: Any) -> DualResult:
    """`dual_pass`, or `double_pass` where the target's self-check chose that."""
    if run.second_order == "double":
        return double_pass(run, *args, **options)
    return dual_pass(run, *args, remembered=remembered, **options)


def exact_first_credits(
    run: TargetRun, stepper: Stepper, bar: State, before: State, batch: Examples, weights_B: Tensor
) -> Tensor:
    """Token credits of the first inner step in float32, its gradient and adjoint included: with a small ε the update is
    nearly sign(g), and the rounding of g, harmless to the training, changes the derivative most.

    Args:
        bar: the adjoints of the state after the first step.
        before: the state before it.
    """
    exact = replace(run, precision="float32")
    grad, _ = loss_gradient(exact, before.theta, batch, weights_B)
    norm = stepper.clip_(grad)
    direction, _ = stepper.adjoint(bar, before, grad, norm, 0, first=True)
    return second_pass(exact, before.theta, direction, batch, weights_B, need_hvp=False, need_labels=False).token_B_S


def precision_error(token_B_S: Tensor, exact_B_S: Tensor) -> float:
    """Relative error of token credits.

    Raises:
        DegenerateError: if it is more than `WORST_PRECISION`.
    """
    size = float(exact_B_S.norm())
    error = float((token_B_S - exact_B_S).norm()) / size if size else 0.0
    if not error <= WORST_PRECISION:
        raise DegenerateError(
            f"In bf16 the credits of the first inner step are {error:.0%} off those of float32: they mean little.",
            "Set inner.precision = 'float32', or raise inner.eps.",
        )
    return error
