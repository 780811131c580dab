"""The policy-gradient step on the generator.

Maximised, for each completion i and token s with ratio ρ_is = π(y_is) / π_old(y_is):
    min(ρ A, clip(ρ, 1-c, 1+c) A)  +  [expected credit]  Σ_y π(y | prefix) τ_is(y)  -  [KL] β KL(π ‖ π_start)
summed over tokens and divided by the number of completions, so that long and short ones count alike (no length bias).

Where the generator has a standard LM head, the backbone's hidden states are computed with a graph and the rest in closed form over
chunks of tokens (`step/objective.py`); a group's completions may share their prompt (`step/rows.py`). Other generators go through
their logits, (N, K, V), and `policy_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.generator.step.objective import head_gradients, objective
from dpg_cli.engine.generator.step.rows import Rows, layouts
from dpg_cli.engine.generator.step.sharing import window_of
from dpg_cli.engine.generator.step.spec import PolicySpec as PolicySpec
from dpg_cli.engine.generator.step.spec import computing
from dpg_cli.engine.inner.head import Head, find_head
from dpg_cli.engine.inner.target import fused_activations
from dpg_cli.engine.ranks import ALONE, BUCKET, Ranks
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.errors import DegenerateError


def completion_logits(model: nn.Module, rollout: Rollout) -> Tensor:
    """Logits that predict each completion token, (N, K, V), in one pass over prompt and completion."""
    ids = torch.cat([rollout.prompt_ids_N_Q, rollout.ids_N_K], 1)
    mask = torch.cat([rollout.prompt_mask_N_Q, torch.ones_like(rollout.mask_N_K)], 1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    output = model(
        input_ids=ids,
        attention_mask=None if bool(rollout.prompt_mask_N_Q.all()) else mask.long(),
        position_ids=positions,
        use_cache=False,
        logits_to_keep=rollout.ids_N_K.shape[1] + 1,
    )
    return output.logits[:, :-1]


def policy_loss(
    logits_N_K_V: Tensor,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    reference_N_K_V: Tensor | None = None,
    index: Tensor | None = None,
    whole: tuple[int, int] | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss to minimise, and its statistics.

    Args:
        logits_N_K_V: of the generator at the completion tokens, untempered.
        rollout: the completions of the same rows.
        credit: of the whole rollout, or of the same rows when `index` is None.
        spec: settings.
        reference_N_K_V: log-probabilities of the starting generator, where β > 0.
        index: rows of `credit` that these are.
        whole: completions and tokens of the mini-batch that these rows are a rank's part of; the loss and the
            statistics are then parts of its own, to be summed over ranks.
    """
    examples, tokens = whole or (len(rollout), int(rollout.mask_N_K.sum()))
    advantage = credit.advantage_N_K if index is None else credit.advantage_N_K[index]
    mask = rollout.mask_N_K
    log_pi = spec.log_pi(logits_N_K_V)
    chosen = log_pi.gather(-1, rollout.ids_N_K[..., None])[..., 0]
    ratio = ((chosen - rollout.logprobs_N_K) * mask).exp()
    clipped = ratio.clamp(1 - spec.clip, 1 + spec.clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage) * mask
    pi: Tensor | None = None
    if credit.knows_labels:
        rows = torch.arange(len(rollout), device=mask.device) if index is None else index
        places = rows[:, None] * mask.shape[1] + torch.arange(mask.shape[1], device=mask.device)
        pi = log_pi.exp()
        gain = gain + (pi * credit.labels_at(places.flatten()).view_as(pi)).sum(-1) * mask
    stats = {"clipped": int(((ratio != clipped) & mask).sum()) / tokens}
    if reference_N_K_V is not None:
        pi = log_pi.exp() if pi is None else pi
        divergence = (pi * (log_pi - reference_N_K_V)).sum(-1) * mask
        gain = gain - spec.kl * divergence
        stats["kl"] = float(divergence.sum().detach()) / tokens
    return -gain.sum() / examples, stats


def sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Replace gradients by their sums over the ranks, in messages of many tensors. Where there is none, it counts as zero."""
    if ranks.world == 1:
        return
    bucket: list[nn.Parameter] = []
    for number, parameter in enumerate(parameters, 1):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= BUCKET or number == len(parameters):
            flat = ranks.sum_(torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None]))
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)
            bucket = []


@contextmanager
def passing(model: nn.Module, spec: PolicySpec) -> Iterator[None]:
    """Within this context a generator's passes, and what is computed of them again, are as the settings ask."""
    with fused_activations(model), computing(next(model.parameters()).device.type, spec.precision):
        yield


def base_of(model: nn.Module) -> Any:
    """A context within which a generator with adapters is its base: the generator that it started as."""
    found: Any = model
    if not hasattr(found, "disable_adapter"):
        raise ValueError("a model without adapters cannot be its own reference")
    return found.disable_adapter()


def reference_hidden(model: nn.Module, reference: nn.Module, head: Head, rows: Rows, spec: PolicySpec) -> Tensor:
    """The starting generator's hidden states of the same tokens, (M, D)."""
    with torch.no_grad(), passing(reference, spec), base_of(model) if reference is model else nullcontext():
        return rows.hidden(head.base)


def reference_log_pi(model: nn.Module, reference: nn.Module, rollout: Rollout, spec: PolicySpec) -> Tensor:
    """The starting generator's log-probabilities at the completion tokens, (N, K, V)."""
    with torch.no_grad(), passing(reference, spec), base_of(model) if reference is model else nullcontext():
        return spec.log_pi(completion_logits(reference, rollout).to(rollout.logprobs_N_K.dtype))


def add_gradient(
    model: nn.Module,
    head: Head,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    own: Tensor,
    whole: tuple[int, int],
    reference: tuple[nn.Module, Head] | None,
) -> dict[str, float]:
    """The gradient of some rows of a mini-batch, to the parameters' `.grad`; their part of the statistics.

    Args:
        model, rollout, credit, spec: see `policy_step`.
        head: of the model.
        own: the rows' numbers; at least one.
        whole: completions and tokens of the mini-batch, of all ranks.
        reference: the starting generator and its head, where β > 0; the model itself stands for its base.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=own.device)
    for rows in layouts(rollout, own, spec, head, window_of(head) if spec.share else 0):
        start = None
        if reference is not None:
            start = reference[1], reference_hidden(model, reference[0], reference[1], rows, spec)
        with passing(model, spec):
            with torch.enable_grad():
                hidden = rows.hidden(head.base)
            states = hidden.detach().to(head.layer.weight.dtype)
            with torch.autocast(states.device.type, enabled=False):
                into = head_gradients(head)
                found, bar = objective(head, states, rows.place_M, rollout, credit, spec, whole[0], into, start)
            del states, start
            if hidden.requires_grad:
                torch.autograd.backward([hidden], [bar.to(hidden.dtype)])
        sums += found
    _, clipped, kl = sums.tolist()
    return {"clipped": clipped / whole[1]} | ({"kl": kl / whole[1]} if reference is not None else {})


def add_gradient_of_logits(
    model: nn.Module,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    own: Tensor,
    whole: tuple[int, int],
    reference: nn.Module | None,
) -> dict[str, float]:
    """The same for a model without a standard head, through its logits."""
    sums = {"clipped": 0.0} | ({"kl": 0.0} if reference is not None else {})
    for piece in own.split(spec.micro_batch or len(own)):
        part = len(piece) < len(rollout)
        rows = rollout.rows(piece) if part else rollout
        logprobs = None if reference is None else reference_log_pi(model, reference, rows, spec)
        with passing(model, spec):
            logits = completion_logits(model, rows).to(rows.logprobs_N_K.dtype)
            with torch.autocast(logits.device.type, enabled=False):
                loss, stats = policy_loss(logits, rows, credit, spec, logprobs, piece if part else None, whole)
            loss.backward()
        sums = {name: total + stats[name] for name, total in sums.items()}
    return sums


def order_of(rollout: Rollout, spec: PolicySpec, rng: torch.Generator) -> Tensor:
    """The rows in the order in which mini-batches take them: any; where prompts are shared, whole groups together."""
    groups = rollout.group_size
    if not spec.share or spec.minibatch >= len(rollout) or spec.minibatch % groups:
        return torch.randperm(len(rollout), generator=rng)
    order = torch.randperm(len(rollout) // groups, generator=rng)
    return (order[:, None] * groups + torch.arange(groups)).flatten()


def policy_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    rng: torch.Generator,
    reference: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Update the generator on one rollout.

    Args:
        model: the generator, changed in place.
        optimizer: over its parameters.
        rollout: completions with the log-probabilities under which they were drawn.
        credit: their advantages.
        spec: settings.
        rng: order of the mini-batches (CPU generator).
        reference: the starting generator, needed when `spec.kl` > 0; a model with adapters may be its own: its base is meant.
        ranks: the processes that share each mini-batch; gradients are summed over them, and each makes the same step.

    Returns:
        Means over the optimiser steps: gradient norm before clipping, share of clipped ratios, KL.

    Raises:
        DegenerateError: if a gradient is not finite; the generator keeps its weights.
    """
    if spec.kl > 0 and reference is None:
        raise ValueError("a KL coefficient needs the starting generator as reference")
    head, start = find_head(model), None
    if spec.kl > 0 and reference is not None:
        start = reference, (head if reference is model else find_head(reference))
    model.train()
    sums: dict[str, float] = {}
    steps = 0
    for _ in range(spec.epochs):
        order = order_of(rollout, spec, rng).to(rollout.ids_N_K.device)
        for index in order.split(spec.minibatch):
            optimizer.zero_grad(set_to_none=True)
            own, whole = index[ranks.shard(len(index))], (len(index), int(rollout.mask_N_K[index].sum()))
            stats = {"clipped": 0.0} | ({} if start is None else {"kl": 0.0})
            if not len(own):  # a rank without rows
                pass
            elif head is not None and (start is None or start[1] is not None):
                known = None if start is None or start[1] is None else (start[0], start[1])
                stats = add_gradient(model, head, rollout, credit, spec, own, whole, known)
            else:
                base = None if start is None else start[0]
                stats = add_gradient_of_logits(model, rollout, credit, spec, own, whole, base)
            sum_gradients([parameter for parameter in model.parameters() if parameter.requires_grad], ranks)
            stats = {name: ranks.total(value) for name, value in stats.items()}
            limit = spec.max_grad_norm or float("inf")
            stats["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
            if not math.isfinite(stats["grad_norm"]):  # before it reaches the weights
                raise DegenerateError(
                    "The generator's gradient is not finite.", "Lower policy.lr, or look at the rewards."
                )
            optimizer.step()
            steps += 1
            for key, value in stats.items():
                sums[key] = sums.get(key, 0.0) + value
    model.eval()
    return {key: value / steps for key, value in sums.items()}
