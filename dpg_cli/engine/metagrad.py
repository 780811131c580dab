"""The exact metagradient: ∂Φ(θ_T)/∂w_i through every optimiser step of an ordinary fine-tuning run.

    forward   L_t = Σ_{i in batch t} w_i Σ_s mask_is ℓ_is(θ_t) / Z_t,   g_t = ∇L_t,   (θ, m, v)_{t+1} = U(g_t, (θ, m, v)_t)
    reverse   (θ̄, m̄, v̄)_{t+1}  --adjoint of U-->  ḡ_t and direct parts of (θ̄, m̄, v̄)_t
              τ_is = mask_is <ḡ_t, ∇ℓ_is(θ_t)> / Z_t,        θ̄_t += ∇_θ <ḡ_t, ∇L_t(θ_t)>   (not at t = 0)

Source: paper §3 for the reward, DESIGN §2 for the reverse pass. No graph spans two inner steps: memory is four vectors
(θ_t, m_t, v_t, g_t) a step plus one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpg_cli.engine.optim import OptimizerSpec, State, adjoint, initial_state, update
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.engine.target import Normalization, TargetRun, dual_pass, loss_gradient
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric

RUNAWAY = 1e3  # fine-tuning moves weights by far less than their own size
Progress = Callable[[str, int, int], None]  # phase, done, total


@dataclass(frozen=True)
class InnerStep:
    """One stored step of an inner run: the state before it, its gradient, its rows of the examples."""

    before: State
    grad: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class InnerRun:
    """A finished inner run: the T stored steps, θ_T, and the loss of each step."""

    steps: list[InnerStep]
    theta: Tensor
    losses: list[float]


def inner_run(
    run: TargetRun,
    theta: Tensor,
    examples: Examples,
    spec: OptimizerSpec,
    weights_N: Tensor,
    batch_size: int,
    progress: Progress | None = None,
) -> InnerRun:
    """Fine-tune from θ_0 with fresh optimiser state, each example used once, in order.

    Args:
        run: the target and its settings; the model's own parameters stay as they are.
        theta: θ_0, shape (n,).
        examples: N sequences.
        spec: the inner optimiser.
        weights_N: data weights.
        batch_size: B; the last batch may be smaller. T = ceil(N / B).
    """
    state = initial_state(spec, theta)
    steps, losses = [], []
    for step, start in enumerate(range(0, len(examples), batch_size)):
        stop = min(start + batch_size, len(examples))
        grad, loss = loss_gradient(run, state.theta, examples.rows(start, stop), weights_N[start:stop])
        steps.append(InnerStep(state, grad, start, stop))
        losses.append(loss)
        state = update(spec, state, grad, step)
        if progress is not None:
            progress("forward", step + 1, -(-len(examples) // batch_size))
    return InnerRun(steps, state.theta, losses)


def metric_gradient(run: TargetRun, theta: Tensor, metric: TargetMetric) -> tuple[float, Tensor]:
    """Φ and ∂Φ/∂θ at θ_T.

    Raises:
        DegenerateError: if Φ is no finite scalar, its gradient is not finite, or Φ does not depend on the parameters.
    """
    leaves = {name: view.detach().requires_grad_() for name, view in run.space.views(theta).items()}
    value = metric(leaves, run.model)
    if value.ndim != 0 or not torch.isfinite(value):
        raise DegenerateError(
            f"The target metric gave {value.detach().reshape(-1)[:3].tolist()} of shape {tuple(value.shape)} "
            "where one finite scalar is needed.",
            "Lower inner.lr, or correct the metric.",
        )
    if not value.requires_grad:
        raise DegenerateError("The target metric does not depend on the target's parameters.", "Correct the metric.")
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    flat = run.space.flatten(grads, theta)
    if not torch.isfinite(flat).all():
        raise DegenerateError("The target metric's gradient is not finite.", "Correct the metric, or lower inner.lr.")
    return float(value.detach()), flat


def metagradient(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec,
    metric: TargetMetric,
    *,
    batch_size: int = 0,
    weights_N: Tensor | None = None,
    normalization: Normalization = "token",
    micro_batch: int = 0,
    labels: bool = False,
    progress: Progress | None = None,
) -> Metagradient:
    """Fine-tune a copy of `model` on `examples` and attribute the metric to each example and token.

    Args:
        model: a Hugging Face causal LM; θ_0. It is left unchanged, dropout is off.
        examples: N token sequences, used once each, in order.
        optimizer: the inner optimiser.
        metric: Φ, larger is better.
        batch_size: B; 0 takes all examples in one step (T = 1).
        weights_N: data weights w, all 1 when None.
        normalization: Z_t, see `TargetRun`.
        micro_batch: rows in memory at once; changes nothing beyond rounding.
        labels: also return the credit of every label, (N, S, V) numbers.
        progress: called as progress(phase, done, total) with phase "forward" or "reverse" after each inner step.

    Returns:
        Φ, its measures, τ for each example and token, and θ_T.

    Raises:
        DegenerateError: if anything becomes non-finite.

    Example:
        >>> result = metagradient(model, Examples.from_sequences(ids), OptimizerSpec(lr=1e-4), metric, batch_size=32)
        >>> most_helpful = result.example_N.argsort(descending=True)
    """
    training = model.training
    model.eval()
    try:
        run = TargetRun(model, ParameterSpace(model), normalization, examples.ids_N_S.shape[1], micro_batch)
        theta = run.space.read(model)
        weights = theta.new_ones(len(examples)) if weights_N is None else weights_N.to(theta)
        trace = inner_run(run, theta, examples, optimizer, weights, batch_size or len(examples), progress)
        if not torch.isfinite(trace.theta).all():
            raise DegenerateError("The inner run diverged: the target's weights are not finite.", "Lower inner.lr.")
        refuse_divergence(theta, trace.theta)
        value, theta_bar = metric_gradient(run, trace.theta, metric)
        token_N_S, label_N_S_V = reverse(run, trace, examples, optimizer, weights, theta_bar, labels, progress)
        final = {name: view.detach() for name, view in run.space.views(trace.theta).items()}
        first = trace.steps[0].grad.abs()
        moved = first[first > 0]
        return Metagradient(
            value=value,
            measures=metric.measures(final, model),
            example_N=token_N_S.sum(1),
            token_N_S=token_N_S,
            label_N_S_V=label_N_S_V,
            final=final,
            gradient_median=float(moved.median()) if moved.numel() else 0.0,
        )
    finally:
        model.train(training)


def refuse_divergence(before: Tensor, after: Tensor) -> None:
    """Stop where fine-tuning left nothing of the target, though all numbers are still finite.

    A single inner step never evaluates the weights that it makes, so an absurd learning rate gives finite nonsense.

    Raises:
        DegenerateError: if θ moved by `RUNAWAY` times its own size (root mean squares over all weights).
    """
    size, moved = (float(vector.double().square().mean().sqrt()) for vector in (before, after - before))
    if moved > RUNAWAY * size > 0:
        raise DegenerateError(
            f"The inner run diverged: it moved the target's weights by {moved / size:.1e} times their own size.",
            "Lower inner.lr.",
        )


def reverse(
    run: TargetRun,
    trace: InnerRun,
    examples: Examples,
    optimizer: OptimizerSpec,
    weights_N: Tensor,
    theta_bar: Tensor,
    labels: bool = False,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Walk the inner run backwards from ∂Φ/∂θ_T.

    Args:
        theta_bar: ∂Φ/∂θ_T, shape (n,).
        labels: also return the credit of every label.

    Returns:
        τ_is, shape (N, S), and τ_is(y), shape (N, S, V), or None.

    Raises:
        DegenerateError: if a metagradient is not finite.
    """
    tokens = theta_bar.new_zeros(examples.ids_N_S.shape)
    every: Tensor | None = None
    bar = State(theta_bar, torch.zeros_like(theta_bar), torch.zeros_like(trace.steps[0].before.v))
    for number in reversed(range(len(trace.steps))):
        step = trace.steps[number]
        grad_bar, bar = adjoint(optimizer, bar, step.before, step.grad, number)
        batch = examples.rows(step.start, step.stop)
        rows, width = slice(step.start, step.stop), batch.ids_N_S.shape[1]
        dual = dual_pass(
            run,
            step.before.theta,
            grad_bar,
            batch,
            weights_N[rows],
            need_hvp=number > 0,
            need_labels=labels,
        )
        tokens[rows, :width] = dual.token_B_S
        if dual.label_B_S_V is not None:
            if every is None:
                every = tokens.new_zeros(*tokens.shape, dual.label_B_S_V.shape[-1])
            every[rows, :width] = dual.label_B_S_V
        if dual.hvp is not None:
            bar = State(bar.theta + dual.hvp, bar.m, bar.v)
        if progress is not None:
            progress("reverse", len(trace.steps) - number, len(trace.steps))
    if not torch.isfinite(tokens).all():
        raise DegenerateError(
            "Metagradients are not finite.",
            "Lower inner.lr or raise inner.eps_root; with inner.eps = 0 the update has no derivative at zero.",
        )
    return tokens, every
