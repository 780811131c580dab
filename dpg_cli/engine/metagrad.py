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

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dpg_cli.engine.arguments import accepted
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.prepare import prepared
from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.run import SAMPLE, Progress, all_finite, inner_run
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.inner.target import Normalization, TargetRun
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.phi import metric_gradient, metric_measures
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.engine.reverse.selfcheck import selfcheck
from dpg_cli.engine.reverse.walk import reverse
from dpg_cli.engine.soft import LabelSink
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric, as_metric

RUNAWAY = 1e3  # fine-tuning moves weights by far less than their own size


def metagradient(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec,
    metric: TargetMetric | Callable[..., Tensor],
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
    sink: LabelSink | None = None,
) -> Metagradient:
    """Fine-tune a copy of `model` on `examples` and attribute the metric to each example and token.

    Args:
        model: a Hugging Face causal LM; θ_0. It is left unchanged, dropout is off. Parameters with `requires_grad` are
            trained, so that LoRA and frozen layers work as they are. Compiled and data-parallel wrappers are opened.
        examples: N token sequences, used once each, in order.
        optimizer: the inner optimiser.
        metric: Φ, larger is better: a `TargetMetric`, or a plain function of (parameters, model) or of (model).
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
        sink: is given the credit of every label chunk by chunk, where the examples have distributions (`soft`).

    Returns:
        Φ, its measures, τ for each example and token (in the places that `examples` has them), and θ_T. `notes` says what
        was chosen for this model: float32 masters, another implementation of its experts, the double backward.

    Raises:
        DegenerateError: if anything becomes non-finite.
        UsageError: for a model that no number here would be right for (`inner/prepare.py`, `reverse/selfcheck.py`).
        BadValueError, BadTypeError: for arguments that cannot be meant; they are also ValueError and TypeError.

    Example:
        >>> result = metagradient(model, Examples.from_sequences(ids), OptimizerSpec(lr=1e-4), metric, batch_size=32)
        >>> most_helpful = result.example_N.argsort(descending=True)
    """
    phi = as_metric(metric)
    with prepared(model) as (target, notes):
        given = accepted(target, examples, optimizer, weights_N)
        examples = given.aligned()
        space = ParameterSpace(target)
        run = TargetRun(
            target, space, normalization, examples.ids_N_S.shape[1], micro_batch, precision=precision, ranks=ranks
        )
        batch = batch_size or len(examples)
        finding = selfcheck(run, examples, need_hvp=len(examples) > batch)
        run = finding.apply(run)
        read = partial(run.space.read, target)
        like = next(parameter for parameter in target.parameters() if parameter.requires_grad)
        weights = torch.ones(len(examples), dtype=like.dtype, device=like.device) if weights_N is None else weights_N
        weights = weights.to(like)
        trace = inner_run(run, read(), examples, optimizer, weights, batch, progress, memory, read, True)
        if not all_finite(trace.theta):
            raise DegenerateError("The inner run diverged: the target's weights are not finite.", "Lower inner.lr.")
        refuse_divergence(run, trace.theta)
        value, theta_bar = metric_gradient(run, trace.theta, phi)
        token_N_S, label_N_S_V, stats = reverse(
            run, trace, examples, optimizer, weights, theta_bar, labels, progress, sink
        )
        return Metagradient(
            value=value,
            measures=metric_measures(run, trace.theta, phi),
            example_N=token_N_S.sum(1),
            token_N_S=given.as_given(token_N_S),
            label_N_S_V=None if label_N_S_V is None else given.as_given(label_N_S_V),
            final=run.space.final(target, trace.theta),
            gradient_median=trace.gradient_median,
            stats=stats,
            notes=(*notes, *([finding.note] if finding.note else [])),
        )


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
