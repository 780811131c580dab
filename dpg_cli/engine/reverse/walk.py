"""The reverse pass over an inner run, from ∂Φ/∂θ_T to the credit of each token.

    (θ̄, m̄, v̄)_{t+1}  --adjoint of U_t and of the clip-->  ḡ_t and direct parts of (θ̄, m̄, v̄)_t
    τ_is = mask_is <ḡ_t, ∇ℓ_is(θ_t)> / Z_t,        θ̄_t += ∇_θ <ḡ_t, ∇L_t(θ_t)>   (not at t = 0)
    where Φ reads an average of the weights, θ̄_t += c_t ∂Φ (`recipe/average.py`)

An example's credit is the sum over its visits. Source: DESIGN §2, step 4. Adjoints are written over the states that they
replace.

Several metrics (*queries*) share one walk: the states, what is computed again of them, and of each dual pass the products
that do not depend on its direction (`remembered.py`). Each has adjoints and a direction of its own: of the eight forward-sized
products of a dual pass and its reverse, six are a query's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dpg_cli.engine.detect import regime
from dpg_cli.engine.inner.journal import Backward, Journal
from dpg_cli.engine.inner.optimizers import State, no_vector
from dpg_cli.engine.inner.recipe.clipping import coefficient
from dpg_cli.engine.inner.recipe.stepper import Stepper
from dpg_cli.engine.inner.remembered import Remembered
from dpg_cli.engine.inner.run import InnerRun, Progress, all_finite, weights_of
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.differences.one_sided import Base
from dpg_cli.engine.reverse.differences.stepping import Differences
from dpg_cli.engine.reverse.double_pass import double_pass
from dpg_cli.engine.reverse.dual_pass import DualResult, dual_pass
from dpg_cli.engine.soft import LabelFactors, LabelSink, StepFactors
from dpg_cli.errors import DegenerateError

WORST_PRECISION = 0.25  # relative error of token credits, beyond which mixed precision is refused


@dataclass(frozen=True)
class Reversed:
    """What the reverse pass gives.

    Attributes:
        token_Q_N_S: τ_is of each query, summed over the visits of each example.
        label_N_S_V: τ_is(y) of the one query, or None.
        factors: the same in factors, or None.
        visit_Q_M: the credit of each example at each of its visits, in the order of the plan; None unless asked for.
        stats: how far the first update is from sign(g), and further figures; of several queries, those of the first.
    """

    token_Q_N_S: Tensor
    label_N_S_V: Tensor | None
    visit_Q_M: Tensor | None
    stats: dict[str, float]
    factors: LabelFactors | None = None


def turning_point(examples: Examples, theta_bars: list[Tensor], values: list[float], measures: Any) -> Backward:
    """Where the reverse begins.

    Args:
        theta_bars: ∂Φ/∂θ_T of each query, shape (n,); used up.
        values, measures: Φ and its measures, of each.
    """
    like = theta_bars[0]
    bars = []
    for theta_bar in theta_bars:
        if len(theta_bars) == 1:
            nothing = no_vector(theta_bar)
            bars.append(State(theta_bar, nothing, nothing))
        else:  # adjoints may not be written over states that other queries need
            bars.append(State(theta_bar, torch.zeros_like(theta_bar), torch.zeros_like(theta_bar)))
    return Backward(-1, bars, like.new_zeros(len(bars), *examples.ids_N_S.shape), [], values, measures)


def reverse(
    run: TargetRun,
    trace: InnerRun,
    examples: Examples,
    weights_N: Tensor,
    point: Backward,
    labels: bool | Literal["factors"] = False,
    progress: Progress | None = None,
    sink: LabelSink | None = None,
    visits: bool = False,
    journal: Journal | None = None,
    remedy: str = "",
) -> Reversed:
    """Walk the inner run backwards from ∂Φ/∂θ_T.

    Args:
        trace: the inner run; its tape is used up.
        point: where to begin, see `turning_point`; used up.
        labels: also return the credit of every label, or its factors; of one query alone.
        sink: is given the credit of every label chunk by chunk, by each rank those of its own rows; of one query alone.
        visits: also return the credit of every visit.
        journal: is told of every step.
        remedy: what to do where differences do not suit the target.

    Raises:
        DegenerateError: if a metagradient is not finite, or differences are too far off.
    """
    tokens, bars, each = point.token_Q_N_S, point.bars, point.visits
    every: Tensor | None = None
    factors: list[StepFactors] = []
    total, stepper, queries = len(trace.plan) - trace.start, trace.stepper, len(point.bars)
    shares = stepper.shares  # of θ_1 … θ_T in what Φ read: each gets its part of ∂Φ once the walk has come to it
    pulls = [] if shares[-1] == 1 else [bar.theta.clone() for bar in bars]
    for bar in bars if pulls else ():
        bar.theta.mul_(shares[-1])
    stats: dict[str, float] = {}
    differences = [Differences(run, remedy) for _ in range(queries)] if run.as_it_runs else []
    beside = run.as_it_runs
    for one, state in zip(differences, point.differences, strict=False):
        one.go_on(state)
    left = total if point.left < 0 else point.left
    errors: list[float] = []
    for place in reversed(range(left)):
        number = trace.start + place
        before, grad, remembered = trace.tape.pop()
        rows = trace.plan.rows[number]
        batch, weights = examples.at(rows), weights_of(weights_N, rows)
        width = batch.ids_N_S.shape[1]
        compared = run.precision != "float32" and place in (0, left - 1)  # where the walk begins, to be refused early
        if queries > 1:
            remembered = remembered or Remembered(recording=run.second_order == "dual")
        if place == 0 and not trace.start:  # the first update of a fresh optimiser
            stats = regime(stepper.spec, grad, bars[0].theta)
        found: list[Tensor] = []
        for query in range(queries):
            exact: Tensor | None = None
            if compared:
                exact = exact_credits(run, stepper, bars[query], before, batch, weights, number, first=place == 0)
            last = query == queries - 1
            grad_bar, bar = stepper.adjoint(
                bars[query], before, grad, trace.norms[place], number, consume=True, first=place == 0,
                grad_into=None if last and not beside else torch.empty_like(grad),
            )  # fmt: skip
            bars[query] = bar
            theta = before.theta
            base: dict[str, Any] = {}
            if beside:
                clip = coefficient(trace.norms[place], stepper.limit)
                base["base"] = Base(trace.token_losses.get(number), grad if place else None, clip)
            if last:
                del grad
                before = State(theta, theta.new_empty(0), theta.new_empty(0))
            if remembered is not None and queries > 1 and (query or not remembered.room.recording):
                remembered.rewind(shared=not last)
            dual = (differences[query] if differences else partial(second_pass, run))(
                theta,
                grad_bar,
                batch,
                weights,
                need_hvp=place > 0,
                need_labels=labels,
                hvp_into=bar.theta if place else None,
                remembered=remembered,
                sink=sink,
                **base,
            )
            base.clear()
            if pulls and place:
                bar.theta.add_(pulls[query], alpha=shares[number - 1])
            if last:
                del before, remembered  # before the tape makes the next state
            if labels == "factors":
                fresh = place == 0 and not trace.start
                factors += step_factors(run, theta, grad_bar, batch, rows, len(examples), dual.factor_B_S_2D, fresh)
            del theta, grad_bar, bar
            add_rows(tokens[query, :, :width], rows, dual.token_B_S)
            if visits:
                found.append(dual.token_B_S.sum(1))
            if exact is not None:
                rounded = run.ranks.sum_(dual.token_B_S.clone())
                errors.append(precision_error(rounded, run.ranks.sum_(exact), number))
            made = dual.label_B_S_V
            if made is not None and total == 1 and isinstance(rows, slice) and made.shape[:2] == tokens.shape[1:]:
                every = made  # of every example at once: no second copy of N · S · V numbers
            elif made is not None:
                if every is None:
                    every = tokens.new_zeros(*tokens.shape[1:], made.shape[-1])
                add_rows(every[:, :width], rows, made)
            del dual, made
        trace.token_losses.pop(number, None)
        if errors:
            stats["precision_error"] = max(errors)
        if visits:
            each.append(torch.stack(found))
        if progress is not None:
            progress("reverse", total - place, total)
        if journal is not None and place:
            point.left = place
            point.differences = [one.state() for one in differences]
            journal.reversed(point)
    run.ranks.sum_(tokens)
    if labels is True and run.ranks.world > 1:
        size = run.ranks.largest(0 if every is None else every.shape[-1])  # a rank without rows knows no vocabulary
        every = run.ranks.sum_(tokens.new_zeros(*tokens.shape[1:], size) if every is None else every.contiguous())
    if not all_finite(tokens):
        raise DegenerateError(
            "Metagradients are not finite.",
            "Lower inner.lr or raise inner.eps_root; with inner.eps = 0 the update has no derivative at zero.",
        )
    if differences:
        stats["difference_error"] = max(one.error for one in differences)
    if stepper.limit:
        stats["clipped_share"] = sum(map(stepper.bites, trace.norms)) / total
    visited = run.ranks.sum_(torch.cat(each[::-1], 1)) if visits else None
    made_of = LabelFactors(tuple(factors), examples.ids_N_S.shape[1]) if labels == "factors" else None
    return Reversed(tokens, every, visited, stats, made_of)


def step_factors(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    batch: Examples,
    rows: slice | Tensor,
    count: int,
    factor_B_S_2D: Tensor | None,
    fresh: bool,
) -> list[StepFactors]:
    """What a step's credits of labels are made of, on every rank; in several parts where an example is trained on twice in it.

    Args:
        theta: θ_t.
        direction: ḡ_t.
        rows: of the batch among all `count` examples.
        factor_B_S_2D: see `DualResult`; None on a rank without rows.
        fresh: θ_t is what the model itself holds, of which no copy is needed.
    """
    head = run.head
    assert head is not None  # `metagrad.py` asks for factors where there is one
    if factor_B_S_2D is None:
        factor_B_S_2D = theta.new_zeros(*batch.ids_N_S.shape, 2 * head.layer.in_features)
    run.ranks.sum_(factor_B_S_2D)
    hidden, tangent = factor_B_S_2D.chunk(2, -1)
    given, ways = run.space.views(theta), run.space.views(direction)
    trained = [name for name in (head.weight, head.bias) if name in given]
    own = {} if fresh else {name: given[name].clone() for name in trained if name is not None}
    weight, bias = head.parameters(own)
    factor = batch.label_N_S / torch.tensor(run.normalizer(batch), dtype=theta.dtype, device=theta.device)
    numbers = torch.arange(count)[rows].to(theta.device)
    weight_t, bias_t = (None if name not in ways else ways[name].clone() for name in (head.weight, head.bias or ""))
    found, left = [], torch.arange(len(numbers), device=theta.device)
    while len(left):
        row_N = torch.full((count,), -1, dtype=torch.int64, device=theta.device)
        row_N[numbers[left]] = left
        found.append(
            StepFactors(
                row_N,
                hidden,
                tangent,
                factor,
                weight.detach(),
                weight_t,
                None if bias is None else bias.detach(),
                bias_t,
            )
        )
        left = left[row_N[numbers[left]] != left]
    return found


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


def exact_credits(
    run: TargetRun, stepper: Stepper, bar: State, before: State, batch: Examples, weights_B: Tensor, number: int, *,
    first: bool,
) -> Tensor:  # fmt: skip
    """Token credits of an inner step in float32, its gradient and adjoint included: with a small ε the update is
    nearly sign(g), and the rounding of g, harmless to the training, changes the derivative most.

    Args:
        bar: the adjoints of the state after the step.
        before: the state before it.
        number: t of that step.
        first: whether no step came before it.
    """
    exact = replace(run, precision="float32")
    grad, _ = loss_gradient(exact, before.theta, batch, weights_B)
    norm = stepper.clip_(grad)
    direction, _ = stepper.adjoint(bar, before, grad, norm, number, first=first)
    return second_pass(exact, before.theta, direction, batch, weights_B, need_hvp=False, need_labels=False).token_B_S


def precision_error(token_B_S: Tensor, exact_B_S: Tensor, number: int) -> float:
    """Relative error of the token credits of inner step `number`.

    Raises:
        DegenerateError: if it is more than `WORST_PRECISION`.
    """
    size = float(exact_B_S.norm())
    error = float((token_B_S - exact_B_S).norm()) / size if size else 0.0
    if not error <= WORST_PRECISION:
        raise DegenerateError(
            f"In bf16 the credits of inner step {number + 1} are {error:.0%} off those of float32: they mean little.",
            "Set inner.precision = 'float32', or raise inner.eps.",
        )
    return error
