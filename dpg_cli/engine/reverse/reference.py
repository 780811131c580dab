"""Read this first: the metagradient as one would write it on a page. Slow, and the judge of the fast one.

Fine-tune θ by T ordinary optimiser steps, all of them left in one graph, read Φ, and ask autograd for ∂Φ/∂w:

    L_t(θ, w) = Σ_i Σ_s w_is mask_is ℓ_is(θ) / Z_t,   g_t = ∇L_t(θ_t),   θ_{t+1} = U(g_t, θ_t),   τ_is = ∂Φ(θ_T)/∂w_is

Nothing of the fast engine's mathematics is here: the optimisers are written once more, as plain PyTorch that can be
differentiated. (Which examples a step takes, at what rate, is asked of the recipe.) It takes the memory of T graphs of a
second-order pass, and PyTorch's own kernels must have a second derivative (so attention is the MATH kernel). What a model
detaches from its own graph is a constant here. Source: paper §3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpg_cli.engine.inner.optimizers import OptimizerSpec, hidden_matrices
from dpg_cli.engine.inner.recipe import Plan, Recipe
from dpg_cli.engine.inner.target import Normalization
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.metrics.base import TargetMetric

Moments = tuple[Tensor, ...]


class At(NamedTuple):
    """Where a step is: t, counted from 0, and its learning rate and weight decay."""

    step: int
    lr: float
    decay: float


PlainStep = Callable[[OptimizerSpec, At, Tensor, Tensor, Moments], tuple[Tensor, Moments]]  # θ, g, moments


def adamw(spec: OptimizerSpec, at: At, theta: Tensor, grad: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """`torch.optim.AdamW`, with ε_root."""
    m, v = moments or (torch.zeros_like(theta), torch.zeros_like(theta))
    m = spec.beta1 * m + (1 - spec.beta1) * grad
    v = spec.beta2 * v + (1 - spec.beta2) * grad**2
    square = v / (1 - spec.beta2 ** (at.step + 1)) + spec.eps_root
    moved = square > 0  # elsewhere the root's derivative is infinite, its numerator 0, and the limit 0
    denominator = square.where(moved, torch.ones_like(v)).sqrt() * moved + spec.eps
    denominator = denominator.masked_fill(denominator == 0, torch.inf)
    update = m / (1 - spec.beta1 ** (at.step + 1)) / denominator
    return theta - at.lr * (update + at.decay * theta), (m, v)


def adam(spec: OptimizerSpec, at: At, theta: Tensor, grad: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """`torch.optim.Adam`, with ε_root: the decay is a part of the gradient."""
    decayed = grad + at.decay * theta
    return adamw(spec, at._replace(decay=0.0), theta, decayed, moments)


def sgd(spec: OptimizerSpec, at: At, theta: Tensor, grad: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """`torch.optim.SGD` without dampening."""
    (b,) = moments or (torch.zeros_like(theta),)
    decayed = grad + at.decay * theta
    b = spec.momentum * b + decayed
    return theta - at.lr * (decayed + spec.momentum * b if spec.nesterov else b), (b,)


def muon(spec: OptimizerSpec, at: At, theta: Tensor, grad: Tensor, moments: Moments) -> tuple[Tensor, Moments]:
    """`torch.optim.Muon` of a matrix, without its rounding to bfloat16."""
    (m,) = moments or (torch.zeros_like(theta),)
    m = spec.momentum * m + (1 - spec.momentum) * grad
    update = (1 - spec.momentum) * grad + spec.momentum * m if spec.nesterov else m
    x = update / update.square().sum().clamp(min=1e-30).sqrt().clamp(min=1e-7)
    for _ in range(spec.ns_steps):  # singular values towards 1
        x = 3.4445 * x - 4.7750 * x @ x.mT @ x + 2.0315 * x @ x.mT @ x @ x.mT @ x
    rows, columns = theta.shape
    ratio = 0.2 * max(rows, columns) ** 0.5 if spec.adjust_lr == "match_rms_adamw" else max(1, rows / columns) ** 0.5
    return theta - at.lr * (ratio * x + at.decay * theta), (m,)


STEPS: dict[str, PlainStep] = {"adam": adam, "adamw": adamw, "muon": muon, "sgd": sgd}


def reference_metagradient(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec | Recipe,
    metric: TargetMetric,
    *,
    batch_size: int | None = None,
    weights_N: Tensor | None = None,
    normalization: Normalization | None = None,
    labels: bool = False,
    plan: Plan | None = None,
    step: PlainStep | None = None,
) -> Metagradient:
    """What `metagradient` gives, by plain autograd over the whole unrolled run.

    Args:
        model: a Hugging Face causal LM; θ_0. It is left unchanged, dropout is off.
        examples: N token sequences.
        optimizer: the recipe of the inner run; an optimiser alone uses each example once, in order, at a constant rate.
        metric: Φ, larger is better.
        batch_size: B, instead of the recipe's; 0 takes all examples in one step (T = 1).
        weights_N: data weights w, all 1 when None.
        normalization: Z_t, instead of the recipe's.
        labels: also return the credit of every label, (N, S, V) numbers.
        plan: the examples of each step, instead of the recipe's batches.
        step: the optimiser's step, where `STEPS` has none of its name.

    Returns:
        Φ, its measures, τ for each example and token, and θ_T.
    """
    recipe = Recipe.of(optimizer, batch_size, normalization)
    training = model.training
    model.eval()
    try:
        with recipe.groups.freezing(model):
            take = step or STEPS[recipe.optimizer.name]
            return _unrolled(model, examples, recipe, metric, weights_N, labels, plan, take)
    finally:
        model.train(training)


def _unrolled(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    metric: TargetMetric,
    weights_N: Tensor | None,
    labels: bool,
    plan: Plan | None,
    take: PlainStep,
) -> Metagradient:
    """The whole of it."""
    theta = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    moments: dict[str, Moments] = dict.fromkeys(theta, ())
    like = next(iter(theta.values()))
    ids, mask, config = examples.ids_N_S, examples.label_N_S.to(like), cast(Any, model.config)
    w_N = like.new_ones(len(examples)) if weights_N is None else weights_N.to(like)
    # one weight a token; with `labels` one for every label that could stand there, of which only one is not 0
    given = nn.functional.one_hot(ids, config.vocab_size) if labels else torch.ones_like(ids)[..., None]
    w = (w_N[:, None, None] * given).requires_grad_()

    spec, gradients, matrices = recipe.optimizer, [], hidden_matrices(model)
    steps = (plan or recipe.batches.plan(len(examples))).rows
    peaks = recipe.settings(model) or {}  # lr and λ by parameter name, where they differ
    average: dict[str, Tensor] = {}
    factors = recipe.schedule.factors(len(steps), spec.lr)
    for t, rows in enumerate(steps):
        loss_B_S_V = token_losses(model, theta, ids[rows], examples.attention_N_S[rows], labels)
        normalizer = mask[rows].sum().clamp(min=1) if recipe.normalization == "token" else mask[rows].numel()
        loss = (w[rows] * mask[rows, :, None] * loss_B_S_V).sum() / normalizer
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, materialize_grads=True)
        if recipe.max_grad_norm:
            norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
            grads = tuple(grad * (recipe.max_grad_norm / (norm + 1e-6)).clamp(max=1) for grad in grads)
        gradients.append(grads)
        for name, grad in zip(list(theta), grads, strict=True):
            own = adamw if spec.name == "muon" and name not in matrices else take
            lr, decay = peaks.get(name, (spec.lr, spec.weight_decay))
            at = At(t, lr * factors[t], decay)
            theta[name], moments[name] = own(spec, at, theta[name], grad, moments[name])
            average[name] = (  # begins at θ_1
                recipe.ema * average[name] + (1 - recipe.ema) * theta[name] if recipe.ema and t else theta[name]
            )
    theta = average
    value = metric(theta, model)
    (tau,) = torch.autograd.grad(value, w)

    final = {name: parameter.detach() for name, parameter in theta.items()}
    first = torch.cat([grad.detach().reshape(-1).abs() for grad in gradients[0]])
    token_N_S = (tau * given).sum(-1)
    return Metagradient(
        value=float(value.detach()),
        measures=metric.measures(final, model),
        example_N=token_N_S.sum(1),
        token_N_S=token_N_S,
        label_N_S_V=tau if labels else None,
        final=final,
        gradient_median=float(first[first > 0].median()),
    )


def token_losses(model: nn.Module, theta: Mapping[str, Tensor], ids: Tensor, attention: Tensor, labels: bool) -> Tensor:
    """-log p of each token given those before it, (B, S, 1), or of each label, (B, S, V); 0 at the first place."""
    with sdpa_kernel(SDPBackend.MATH):
        inputs = {"input_ids": ids, "attention_mask": attention.long(), "use_cache": False}
        logits = functional_call(model, dict(theta), (), inputs).logits
    log_p = torch.log_softmax(logits[:, :-1], -1)
    losses = -log_p if labels else -log_p.gather(-1, ids[:, 1:, None])
    return nn.functional.pad(losses, (0, 0, 1, 0))
