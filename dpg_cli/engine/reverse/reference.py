"""Read this first: the metagradient as one would write it on a page. Slow, and the judge of the fast one.

Fine-tune θ by T ordinary optimiser steps, all of them left in one graph, read Φ, and ask autograd for ∂Φ/∂w:

    L_t(θ, w) = Σ_i Σ_s w_is mask_is ℓ_is(θ) / Z_t,   g_t = ∇L_t(θ_t),   θ_{t+1} = U(g_t, θ_t),   τ_is = ∂Φ(θ_T)/∂w_is

Nothing of the fast engine's mathematics is here: the optimisers are written once more, as plain PyTorch that can be
differentiated. The rest of a recipe is asked of it: which examples a step takes, at what rate, with what weight decay. It
takes the memory of T graphs of a second-order pass, and PyTorch's own kernels must have a second derivative (so attention is
the MATH kernel). What a model detaches from its own graph is a constant here; an embedding's `padding_idx` alone is followed
(`Lookup`). Source: paper §3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from dpg_cli.engine.arguments import accepted
from dpg_cli.engine.inner.optimizers import OptimizerSpec, hidden_matrices
from dpg_cli.engine.inner.recipe import Plan, Recipe
from dpg_cli.engine.inner.target import Normalization
from dpg_cli.engine.records import Examples, Metagradient, Visits
from dpg_cli.errors import BadValueError
from dpg_cli.metrics.base import TargetMetric, as_metric

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
    metric: TargetMetric | Callable[..., Tensor],
    *,
    batch_size: int | None = None,
    weights_N: Tensor | None = None,
    normalization: Normalization | None = None,
    labels: bool = False,
    visits: bool = False,
    plan: Plan | None = None,
    step: PlainStep | None = None,
) -> Metagradient:
    """What `metagradient` gives, by plain autograd over the whole unrolled run.

    Args:
        model: a Hugging Face causal LM; θ_0. It is left unchanged, dropout is off. Parameters with `requires_grad` are
            trained, so that LoRA and frozen layers work as they are.
        examples: N token sequences. Whether they share rows changes nothing, so there is no packing here.
        optimizer: the recipe of the inner run; an optimiser alone uses each example once, in order, at a constant rate.
            Its precision is left out.
        metric: Φ, larger is better; it reads the weights that it is given, or calls the model, which then has them.
        batch_size: B, instead of the recipe's; 0 takes all examples in one step (T = 1).
        weights_N: data weights w, all 1 when None.
        normalization: Z_t, instead of the recipe's.
        labels: also return the credit of every label, (N, S, V) numbers.
        visits: also return the credit of each visit of an example.
        plan: the examples of each step, instead of the recipe's batches.
        step: the optimiser's step, where `STEPS` has none of its name.

    Returns:
        Φ, its measures, τ for each example and token (in the places that `examples` has them), and θ_T.

    Raises:
        BadValueError, BadTypeError: as `metagradient`; and for examples that are trained on distributions (`soft`).
    """
    if examples.soft is not None and not examples.drawn:
        raise BadValueError("The reference trains on drawn tokens alone.", "Leave the examples' distributions out.")
    recipe = Recipe.of(optimizer, batch_size, normalization)
    take = step or STEPS[recipe.optimizer.name]
    with recipe.prepared(model) as (target, _):
        given = accepted(target, examples, optimizer, weights_N)
        found = _unrolled(target, given.aligned(), recipe, as_metric(metric), weights_N, labels, plan, take)
        every = None if found.label_N_S_V is None else given.as_given(found.label_N_S_V)
        shown = found.visits if visits else None
        return replace(found, token_N_S=given.as_given(found.token_N_S), label_N_S_V=every, visits=shown)


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

    spec, gradients, visited, matrices = recipe.optimizer, [], [], hidden_matrices(model)
    plan = plan or recipe.plan(examples)
    peaks = recipe.settings(model) or {}  # lr and λ by parameter name, where they differ
    average: dict[str, Tensor] = {}
    factors = recipe.schedule.factors(len(plan), spec.lr)
    for t, rows in enumerate(plan.rows):
        visited.append(w[rows])
        p = {name: value.view_as(value) for name, value in theta.items()}  # g is asked by these, see `Lookup`
        with Lookup({id(p[name]): theta[name] for name in p}):
            loss_B_S_V = token_losses(model, p, ids[rows], examples.attention_N_S[rows], labels)
        normalizer = mask[rows].sum().clamp(min=1) if recipe.normalization == "token" else mask[rows].numel()
        loss = (visited[-1] * mask[rows, :, None] * loss_B_S_V).sum() / normalizer
        grads = torch.autograd.grad(loss, list(p.values()), create_graph=True, materialize_grads=True)
        if recipe.max_grad_norm:
            norm = torch.stack([grad.square().sum() for grad in grads]).sum().clamp(min=1e-30).sqrt()
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
    final = {name: value.detach() for name, value in theta.items()}
    value = Reading(model, metric).at(theta)
    tau, *each = torch.autograd.grad(value, [w, *visited])

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
        visits=Visits(
            *plan.flat,
            torch.cat([(credit * given[rows]).sum((1, 2)) for credit, rows in zip(each, plan.rows, strict=True)]),
        ),
    )


def token_losses(model: nn.Module, theta: Mapping[str, Tensor], ids: Tensor, attention: Tensor, labels: bool) -> Tensor:
    """-log p of each token given those before it, (B, S, 1), or of each label, (B, S, V); 0 at the first place."""
    with sdpa_kernel(SDPBackend.MATH):
        inputs = {"input_ids": ids, "attention_mask": attention.long(), "use_cache": False}
        logits = functional_call(model, dict(theta), (), inputs).logits
    log_p = torch.log_softmax(logits[:, :-1], -1)
    losses = -log_p if labels else -log_p.gather(-1, ids[:, 1:, None])
    return nn.functional.pad(losses, (0, 0, 1, 0))


class Lookup(TorchFunctionMode):
    """Embeddings with `padding_idx`, as training sees them: the gradient leaves the padding token's look-ups out.

    The loss is read at p = θ, a view, and g asked by p. A look-up of the padding token takes its row from θ itself, around p: g
    lacks it, and is a function of it all the same.

    Args:
        around: θ by the id of p; without, nothing is left out.
    """

    def __init__(self, around: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.around = around

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any function of torch, of which `embedding` alone is another here."""
        take = self.look_up if func is nn.functional.embedding else func
        return take(*args, **(kwargs or {}))

    def look_up(self, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> Tensor:
        """`embedding`."""
        found, whole = nn.functional.embedding(ids, weight), self.around.get(id(weight))
        if padding_idx is None or whole is None:
            return found
        left_out = (ids == padding_idx % len(weight))[..., None]
        return torch.where(left_out, nn.functional.embedding(ids, whole), found)


class Reading(nn.Module):
    """Φ of weights: the metric is given them by name, and the model has them while it is read."""

    def __init__(self, model: nn.Module, metric: TargetMetric) -> None:
        super().__init__()
        self.model, self.metric = model, metric

    def at(self, theta: Mapping[str, Tensor]) -> Tensor:
        """Φ(θ), differentiable, whatever the model itself leaves out of its embeddings' gradient."""
        with Lookup({}):
            carried = {f"model.{name}": value for name, value in theta.items()}
            return cast(Tensor, functional_call(self, carried, (dict(theta),)))

    def forward(self, theta: dict[str, Tensor]) -> Tensor:
        """Φ."""
        return self.metric(theta, self.model)
