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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from dpg_cli.engine.arguments import accepted
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.recipe import Plan, Recipe
from dpg_cli.engine.inner.run import SAMPLE, Progress, all_finite, inner_run
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.inner.target import Normalization, TargetRun, can_pack
from dpg_cli.engine.phi import metric_gradient, metric_measures
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Metagradient, Visits
from dpg_cli.engine.reverse.selfcheck import selfcheck
from dpg_cli.engine.reverse.walk import reverse
from dpg_cli.engine.soft import LabelSink
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric, as_metric

RUNAWAY = 1e3  # fine-tuning moves weights by far less than their own size


def metagradient(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec | Recipe,
    metric: TargetMetric | Callable[..., Tensor],
    *,
    batch_size: int | None = None,
    weights_N: Tensor | None = None,
    normalization: Normalization | None = None,
    micro_batch: int = 0,
    labels: bool = False,
    visits: bool = False,
    plan: Plan | None = None,
    memory: Memory = "keep",
    precision: Precision | None = None,
    packing: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    sink: LabelSink | None = None,
) -> Metagradient:
    """Fine-tune a copy of `model` on `examples` and attribute the metric to each example and token.

    Args:
        model: a Hugging Face causal LM; θ_0. It is left unchanged, dropout is off. Parameters with `requires_grad` are
            trained, so that LoRA and frozen layers work as they are. Compiled and data-parallel wrappers are opened.
        examples: N token sequences.
        optimizer: the recipe of the inner run; an optimiser alone uses each example once, in order, at a constant rate.
        metric: Φ, larger is better: a `TargetMetric`, or a plain function of (parameters, model) or of (model).
        batch_size: B, instead of the recipe's; 0 takes all examples in one step (T = 1), and so does an optimiser alone.
        weights_N: data weights w, all 1 when None.
        normalization: Z_t, see `TargetRun`; instead of the recipe's.
        micro_batch: rows in memory at once; changes nothing beyond rounding. 0: see `TargetRun`.
        labels: also return the credit of every label, (N, S, V) numbers.
        visits: also return the credit of each visit of an example.
        plan: the examples of each step, instead of the recipe's batches.
        memory: "keep" all T states, "sqrt" recomputes them from √T checkpoints, "offload" puts them on disk (from an
            accelerator: into host memory). Changes time and memory, and the result by rounding alone.
        precision: instead of the recipe's; "bf16" rounds the operands of the linear maps, see `product.py`; `stats` then has
            `precision_error`, the relative error of the token credits at the first inner step.
        packing: ragged examples of a step share rows, which saves their padding; changes nothing beyond rounding.
        progress: called as progress(phase, done, total) with phase "forward" or "reverse" after each inner step.
        ranks: the processes that share the work. All call this with the same arguments and get the same result.
        sink: is given the credit of every label chunk by chunk, where the examples have distributions (`soft`).

    Returns:
        Φ, its measures, τ for each example and token (in the places that `examples` has them), and θ_T. `notes` says what
        was chosen for this model: float32 masters, another implementation of its experts, the double backward.

    Raises:
        DegenerateError: if anything becomes non-finite.
        UsageError: if the recipe does not fit the model or the number of examples; for a model that no number here would be
            right for (`inner/prepare.py`, `reverse/selfcheck.py`).
        BadValueError, BadTypeError: for arguments that cannot be meant; they are also ValueError and TypeError.

    Example:
        >>> result = metagradient(model, Examples.from_sequences(ids), OptimizerSpec(lr=1e-4), metric, batch_size=32)
        >>> most_helpful = result.example_N.argsort(descending=True)
    """
    phi = as_metric(metric)
    recipe = Recipe.of(optimizer, batch_size, normalization, precision)
    with recipe.prepared(model) as (target, notes):
        given = accepted(target, examples, optimizer, weights_N)
        examples = given.aligned()
        plan = recipe.plan(examples) if plan is None else plan
        run = TargetRun(
            target,
            recipe.space(target),
            recipe.normalization,
            examples.ids_N_S.shape[1],
            micro_batch,
            precision=recipe.precision,
            ranks=ranks,
            packing=packing,
        )
        finding = selfcheck(run, examples, need_hvp=len(plan) > 1)
        run = finding.apply(run)
        if packing and not can_pack(run, examples):
            run = replace(run, packing=False)
            notes.append("Examples are not packed: this model reads an example otherwise where it shares a row.")
        read = partial(run.space.read, target)
        like = next(parameter for parameter in target.parameters() if parameter.requires_grad)
        weights = torch.ones(len(examples), dtype=like.dtype, device=like.device) if weights_N is None else weights_N
        weights = weights.to(like)
        remember = run.second_order == "dual"
        trace = inner_run(run, read(), examples, recipe, weights, None, progress, memory, read, remember, plan)
        if not all_finite(trace.theta):
            raise DegenerateError("The inner run diverged: the target's weights are not finite.", "Lower inner.lr.")
        refuse_divergence(run, trace.theta)
        value, theta_bar = metric_gradient(run, trace.theta, phi)
        found = reverse(run, trace, examples, weights, theta_bar, labels, progress, sink, visits)
        return Metagradient(
            value=value,
            measures=metric_measures(run, trace.theta, phi),
            example_N=found.token_N_S.sum(1),
            token_N_S=given.as_given(found.token_N_S),
            label_N_S_V=None if found.label_N_S_V is None else given.as_given(found.label_N_S_V),
            final=run.space.final(target, trace.theta),
            gradient_median=trace.gradient_median,
            stats=found.stats,
            notes=(*notes, *finding.notes),
            visits=None if found.visit_M is None else Visits(*plan.flat, found.visit_M),
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
