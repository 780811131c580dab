"""The exact metagradient: ∂Φ(θ_T)/∂w_i through every optimiser step of an ordinary fine-tuning run.

    forward   L_t = Σ_{i in batch t} w_i Σ_s mask_is ℓ_is(θ_t) / Z_t,   g_t = ∇L_t,   (θ, m, v)_{t+1} = U(g_t, (θ, m, v)_t)
    reverse   (θ̄, m̄, v̄)_{t+1}  --adjoint of U-->  ḡ_t and direct parts of (θ̄, m̄, v̄)_t
              τ_is = mask_is <ḡ_t, ∇ℓ_is(θ_t)> / Z_t,        θ̄_t += ∇_θ <ḡ_t, ∇L_t(θ_t)>   (not at t = 0)

Source: paper §3 for the reward, DESIGN §2 for the reverse pass. No graph spans two inner steps: memory is the states
that the tape keeps (`tape.py`) plus one micro-batch. Adjoints are written over the states that they replace.

Processes that share a run (`ranks.py`) take rows of each batch: g_t and the Hessian-vector product are summed over them in
`target.py`, credits once at the end of `reverse`; all else is computed by each, from these sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dpg_cli.engine.detect import regime
from dpg_cli.engine.dual import fused_activations
from dpg_cli.engine.optim import OptimizerSpec, State, adjoint, initial_state, no_vector, update
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.product import Precision
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.engine.remembered import Remembered
from dpg_cli.engine.tape import KeepTape, Memory, OriginTape, Step, Tape, make_tape
from dpg_cli.engine.target import Normalization, TargetRun, dual_pass, loss_gradient
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric

RUNAWAY = 1e3  # fine-tuning moves weights by far less than their own size
Progress = Callable[[str, int, int], None]  # phase, done, total
WORST_PRECISION = 0.25  # relative error of token credits, beyond which mixed precision is refused
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
        """The stored steps, where all are kept in memory."""
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
    """
    batches = [(start, min(start + batch_size, len(examples))) for start in range(0, len(examples), batch_size)]
    total = len(batches)

    def gradient(number: int, at: Tensor, remembered: Remembered | None = None) -> tuple[Tensor, float]:
        start, stop = batches[number]
        return loss_gradient(run, at, examples.rows(start, stop), weights_N[start:stop], remembered)

    tape = make_tape(
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


def metric_gradient(run: TargetRun, theta: Tensor, metric: TargetMetric) -> tuple[float, Tensor]:
    """Φ and ∂Φ/∂θ at θ_T.

    Raises:
        DegenerateError: if Φ is no finite scalar, its gradient is not finite, or Φ does not depend on the parameters.
    """
    flat = torch.zeros_like(theta)
    leaves = run.leaves(theta, flat)
    with torch.enable_grad(), fused_activations(run.model):
        value = metric(leaves, run.model)
    if value.ndim != 0 or not torch.isfinite(value):
        raise DegenerateError(
            f"The target metric gave {value.detach().reshape(-1)[:3].tolist()} of shape {tuple(value.shape)} "
            "where one finite scalar is needed.",
            "Lower inner.lr, or correct the metric.",
        )
    if not value.requires_grad:
        raise DegenerateError("The target metric does not depend on the target's parameters.", "Correct the metric.")
    torch.autograd.backward(value, inputs=list(leaves.values()))
    if not all_finite(flat):
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
    memory: Memory = "keep",
    precision: Precision = "float32",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
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
        micro_batch: rows in memory at once; changes nothing beyond rounding. 0: see `TargetRun`.
        labels: also return the credit of every label, (N, S, V) numbers.
        memory: "keep" all T states, "sqrt" recomputes them from √T checkpoints, "offload" puts them on disk (from an
            accelerator: into host memory). Changes time and memory, and the result by rounding alone.
        precision: "bf16" rounds the operands of the linear maps, see `product.py`; `stats` then has `precision_error`, the
            relative error of the token credits at the first inner step.
        progress: called as progress(phase, done, total) with phase "forward" or "reverse" after each inner step.
        ranks: the processes that share the work. All call this with the same arguments and get the same result.

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
        run = TargetRun(
            model,
            ParameterSpace(model),
            normalization,
            examples.ids_N_S.shape[1],
            micro_batch,
            precision=precision,
            ranks=ranks,
        )
        read = partial(run.space.read, model)
        like = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        weights = torch.ones(len(examples), dtype=like.dtype, device=like.device) if weights_N is None else weights_N
        weights = weights.to(like)
        trace = inner_run(
            run, read(), examples, optimizer, weights, batch_size or len(examples), progress, memory, read, True
        )
        if not all_finite(trace.theta):
            raise DegenerateError("The inner run diverged: the target's weights are not finite.", "Lower inner.lr.")
        refuse_divergence(run, trace.theta)
        value, theta_bar = metric_gradient(run, trace.theta, metric)
        token_N_S, label_N_S_V, stats = reverse(run, trace, examples, optimizer, weights, theta_bar, labels, progress)
        final = {name: view.detach() for name, view in run.space.views(trace.theta).items()}
        return Metagradient(
            value=value,
            measures=metric.measures(final, model),
            example_N=token_N_S.sum(1),
            token_N_S=token_N_S,
            label_N_S_V=label_N_S_V,
            final=final,
            gradient_median=trace.gradient_median,
            stats=stats,
        )
    finally:
        model.train(training)


def exact_first_credits(
    run: TargetRun, spec: OptimizerSpec, bar: State, before: State, batch: Examples, weights_B: Tensor
) -> Tensor:
    """Token credits of the first inner step in float32, its gradient and adjoint included: with a small ε the update is
    nearly sign(g), and the rounding of g, harmless to the training, changes the derivative most.

    Args:
        bar: the adjoints of the state after the first step.
        before: the state before it.
    """
    exact = replace(run, precision="float32")
    grad, _ = loss_gradient(exact, before.theta, batch, weights_B)
    direction, _ = adjoint(spec, bar, before, grad, 0, first=True)
    return dual_pass(exact, before.theta, direction, batch, weights_B, need_hvp=False, need_labels=False).token_B_S


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


def refuse_divergence(run: TargetRun, theta: Tensor) -> None:
    """Stop where fine-tuning left nothing of the target, though all numbers are still finite.

    A single inner step never evaluates the weights that it makes, so an absurd learning rate gives finite nonsense.

    Args:
        run: its model's own parameters are θ_0.
        theta: θ_T, shape (n,).

    Raises:
        DegenerateError: if θ moved by `RUNAWAY` times its own size (root mean squares over all weights).
    """
    parameters = dict(run.model.named_parameters())
    size = moved = 0.0
    for name, after in run.space.views(theta).items():
        before = parameters[name].detach()
        for old, new in zip(before.reshape(-1).split(SAMPLE), after.reshape(-1).split(SAMPLE), strict=True):
            size += float(torch.linalg.vector_norm(old)) ** 2
            moved += float(torch.linalg.vector_norm(new - old)) ** 2
    if moved > RUNAWAY**2 * size > 0:
        raise DegenerateError(
            f"The inner run diverged: it moved the target's weights by {(moved / size) ** 0.5:.1e} times their own size.",
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
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Walk the inner run backwards from ∂Φ/∂θ_T.

    Args:
        trace: the inner run; its tape is used up.
        theta_bar: ∂Φ/∂θ_T, shape (n,); used up.
        labels: also return the credit of every label.

    Returns:
        τ_is, shape (N, S); τ_is(y), shape (N, S, V), or None; how far the first update is from sign(g).

    Raises:
        DegenerateError: if a metagradient is not finite.
    """
    tokens = theta_bar.new_zeros(examples.ids_N_S.shape)
    every: Tensor | None = None
    total = len(trace.batches)
    nothing = no_vector(theta_bar)
    bar = State(theta_bar, nothing, nothing)
    del theta_bar
    stats: dict[str, float] = {}
    exact: Tensor | None = None
    for number in reversed(range(total)):
        before, grad, remembered = trace.tape.pop()
        if number == 0:
            stats = regime(optimizer, grad, bar.theta)
            if run.precision != "float32":
                rows = slice(*trace.batches[0])
                batch = examples.rows(rows.start, rows.stop)
                exact = exact_first_credits(run, optimizer, bar, before, batch, weights_N[rows])
        grad_bar, bar = adjoint(optimizer, bar, before, grad, number, consume=True, first=number == 0)
        theta = before.theta
        del before, grad
        start, stop = trace.batches[number]
        batch, rows = examples.rows(start, stop), slice(start, stop)
        width = batch.ids_N_S.shape[1]
        dual = dual_pass(
            run,
            theta,
            grad_bar,
            batch,
            weights_N[rows],
            need_hvp=number > 0,
            need_labels=labels,
            hvp_into=bar.theta if number else None,
            remembered=remembered,
        )
        del theta, grad_bar, remembered  # before the tape makes the next state
        tokens[rows, :width] = dual.token_B_S
        if exact is not None:
            stats["precision_error"] = precision_error(*map(run.ranks.sum_, (dual.token_B_S.clone(), exact)))
        if dual.label_B_S_V is not None and dual.label_B_S_V.shape[:2] == tokens.shape:
            every = dual.label_B_S_V
        elif dual.label_B_S_V is not None:
            if every is None:
                every = tokens.new_zeros(*tokens.shape, dual.label_B_S_V.shape[-1])
            every[rows, :width] = dual.label_B_S_V
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
    return tokens, every, stats
