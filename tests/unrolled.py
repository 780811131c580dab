"""A fine-tuning run as anybody would write it, unrolled by autograd through every step: what the engine is judged by.

Nothing of the engine but its records: torch's own cross-entropy, transformers' own schedules, clipping and groups by their
definitions, one graph over all steps. Slow, and of the size of the whole run; for tiny models in float64.
"""

from __future__ import annotations

import fnmatch
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import get_scheduler

from dpg_cli.engine import Examples, Recipe

NAMES = {  # ours: transformers'
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine_with_min_lr",
    "restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "inverse-sqrt": "inverse_sqrt",
    "stable-decay": "warmup_stable_decay",
}


def stock_rates(recipe: Recipe, total: int) -> list[float]:
    """The learning rates of a run by `transformers.get_scheduler`."""
    schedule, lr = recipe.schedule, recipe.optimizer.lr
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    warmup = int(schedule.warmup) if schedule.warmup >= 1 else math.ceil(total * schedule.warmup)
    special: dict[str, object] = {
        "cosine": {"num_cycles": schedule.cycles or 0.5, "min_lr_rate": schedule.floor},
        "restarts": {"num_cycles": schedule.cycles or 1},
        "polynomial": {"lr_end": schedule.end, "power": schedule.power},
        "inverse-sqrt": {"timescale": schedule.timescale or None},
        "stable-decay": {
            "num_decay_steps": schedule.decay_steps,
            "decay_type": schedule.decay,
            "min_lr_ratio": schedule.floor,
        },
    }.get(schedule.name, {})
    scheduler = get_scheduler(
        NAMES[schedule.name],
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=special,
    )
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(total - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def stock_steps(recipe: Recipe, count: int) -> list[list[int]]:
    """The examples of each step, by the data loader's own rules."""
    batches = recipe.batches
    size, steps, epoch = batches.size or count, list[list[int]](), 0
    while True:
        order = list(range(count))
        if batches.order == "shuffled":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(batches.seed + epoch)).tolist()
        loader = [order[at : at + size] for at in range(0, count, size)]
        if batches.drop_last and len(loader[-1]) < size:
            loader.pop()
        groups = [loader[at : at + batches.accumulation] for at in range(0, len(loader), batches.accumulation)]
        made = [[row for batch in group for row in batch] for group in groups]
        total = batches.max_steps or math.ceil(batches.epochs * len(made))
        steps, epoch = steps + made, epoch + 1
        if len(steps) >= total:
            return steps[:total]


def group_settings(recipe: Recipe, model: nn.Module, name: str) -> tuple[float, float]:
    """Peak learning rate and decay of a parameter."""
    lr, decay = recipe.optimizer.lr, recipe.optimizer.weight_decay
    owner, _, leaf = name.rpartition(".")
    words = recipe.groups.no_decay
    norm = "Norm" in type(model.get_submodule(owner)).__name__
    if (
        ("biases" in words and leaf == "bias")
        or ("norms" in words and norm)
        or ("embeddings" in words and isinstance(model.get_submodule(owner), nn.Embedding))
        or any(fnmatch.fnmatch(name, word) for word in words)
    ):
        decay = 0.0
    for group in recipe.groups.own:
        if any(fnmatch.fnmatch(name, glob) for glob in group.names):
            if group.frozen:
                return math.nan, math.nan
            return lr if group.lr is None else group.lr, decay if group.weight_decay is None else group.weight_decay
    return lr, decay


def unrolled(model: nn.Module, examples: Examples, recipe: Recipe, weights_N_S: Tensor) -> dict[str, Tensor]:
    """θ_T by parameter name, differentiable by the weights of the tokens, (N, S)."""
    start = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    settings = {name: group_settings(recipe, model, name) for name in start}
    trained = [name for name in start if not math.isnan(settings[name][0])]
    theta = {name: value.clone().requires_grad_(name in trained) for name, value in start.items()}
    m = {name: torch.zeros_like(theta[name]) for name in trained}
    v = {name: torch.zeros_like(theta[name]) for name in trained}
    steps, spec = stock_steps(recipe, len(examples)), recipe.optimizer
    rates = stock_rates(recipe, len(steps))
    for number, rows in enumerate(steps):
        ids, label = examples.ids_N_S[rows], examples.label_N_S[rows]
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative; eager ones round to float32
            logits = functional_call(model, theta, (), {"input_ids": ids, "use_cache": False}).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * label[:, 1:]
        total = label.sum() if recipe.normalization == "token" else ids.numel()
        loss = (losses * weights_N_S[rows][:, 1:]).sum() / total
        grads = torch.autograd.grad(loss, [theta[name] for name in trained], create_graph=True)
        if recipe.max_grad_norm:
            norm = torch.stack([(grad**2).sum() for grad in grads]).sum().sqrt()
            factor = torch.clamp(recipe.max_grad_norm / (norm + 1e-6), max=1.0)
            grads = tuple(grad * factor for grad in grads)
        after = dict(theta)
        for name, grad in zip(trained, grads, strict=True):
            lr, decay = settings[name][0] * (rates[number] / spec.lr), settings[name][1]
            if spec.name == "sgd":
                m[name] = spec.momentum * m[name] + grad + decay * theta[name]
                after[name] = theta[name] - lr * m[name]
                continue
            m[name] = spec.beta1 * m[name] + (1 - spec.beta1) * grad
            v[name] = spec.beta2 * v[name] + (1 - spec.beta2) * grad**2
            c1, c2 = 1 - spec.beta1 ** (number + 1), 1 - spec.beta2 ** (number + 1)
            move = (m[name] / c1) / ((v[name] / c2 + spec.eps_root).sqrt() + spec.eps)
            after[name] = theta[name] - lr * (move + decay * theta[name])
        theta = after
    return theta


def twin(
    model: nn.Module, examples: Examples, recipe: Recipe, metric: object, weights_N: Tensor
) -> tuple[float, Tensor]:
    """Φ and τ_is, (N, S), of the unrolled run."""
    weights = weights_N[:, None].expand(examples.ids_N_S.shape).clone().requires_grad_()
    value = metric(unrolled(model, examples, recipe, weights), model)  # type: ignore[operator]
    return float(value.detach()), torch.autograd.grad(value, weights)[0]
