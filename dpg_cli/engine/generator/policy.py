"""The policy-gradient step on the generator.

Maximised, for each completion i and token s with ratio ρ_is = π(y_is) / π_old(y_is):
    min(ρ A, clip(ρ, 1-c, 1+c) A)  +  [expected credit]  Σ_y π(y | prefix) τ_is(y)  -  [KL] β KL(π ‖ π_start)
summed over tokens and divided by the number of completions, so that long and short ones count alike (no length bias).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpg_cli.engine.ranks import ALONE, BUCKET, Ranks
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.errors import DegenerateError

NOTHING = -1e9  # a logit of probability 0, finite so that differences of log-probabilities are


@dataclass(frozen=True)
class PolicySpec:
    """Settings of the policy step.

    Attributes:
        temperature: of sampling; π is the tempered distribution.
        clip: c, the ratio's clipping range.
        kl: β, coefficient of the KL to the starting generator.
        epochs: passes over the rollout.
        minibatch: completions an optimiser step.
        micro_batch: completions in memory at once; 0 for the whole mini-batch. Changes nothing beyond rounding.
        max_grad_norm: gradient clipping, 0 for none.
        silent_ids: ids that sampling never draws; π gives them nothing either.
    """

    temperature: float = 1.0
    clip: float = 0.2
    kl: float = 0.0
    epochs: int = 1
    minibatch: int = 256
    micro_batch: int = 0
    max_grad_norm: float = 1.0
    silent_ids: tuple[int, ...] = ()

    def log_pi(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the distribution that completions are drawn from, from the generator's logits (..., V)."""
        logits = logits / self.temperature
        if self.silent_ids:
            silent = torch.tensor(self.silent_ids, dtype=torch.int64, device=logits.device)
            logits.index_fill_(-1, silent, NOTHING)  # of the quotient, not of what was given
        return torch.log_softmax(logits, -1)


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
    if credit.label_N_K_V is not None:
        labels = credit.label_N_K_V if index is None else credit.label_N_K_V[index]
        pi = log_pi.exp()
        gain = gain + (pi * labels).sum(-1) * mask
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


def add_gradient(
    model: nn.Module,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    index: Tensor,
    reference: nn.Module | None,
    ranks: Ranks,
) -> dict[str, float]:
    """The gradient of this rank's rows of a mini-batch, to the parameters' `.grad`; its part of the statistics.

    Args:
        model, rollout, credit, spec, reference, ranks: see `policy_step`.
        index: the mini-batch's rows of the rollout, of all ranks.
    """
    own = index[ranks.shard(len(index))]
    whole = len(index), int(rollout.mask_N_K[index].sum())
    sums = {"clipped": 0.0} | ({"kl": 0.0} if spec.kl > 0 else {})
    for piece in own.split(spec.micro_batch or max(1, len(own))):
        if not len(piece):  # a rank without rows
            break
        part = len(piece) < len(rollout)
        rows = rollout.rows(piece) if part else rollout
        reference_logprobs = None
        if spec.kl > 0:
            if reference is None:
                raise ValueError("a KL coefficient needs the starting generator as reference")
            with torch.no_grad():
                reference_logprobs = spec.log_pi(completion_logits(reference, rows))
        logits = completion_logits(model, rows)
        loss, stats = policy_loss(logits, rows, credit, spec, reference_logprobs, piece if part else None, whole)
        loss.backward()
        sums = {name: total + stats[name] for name, total in sums.items()}
    return sums


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
        reference: the starting generator, needed when `spec.kl` > 0.
        ranks: the processes that share each mini-batch; gradients are summed over them, and each makes the same step.

    Returns:
        Means over the optimiser steps: gradient norm before clipping, share of clipped ratios, KL.

    Raises:
        DegenerateError: if a gradient is not finite; the generator keeps its weights.
    """
    model.train()
    sums: dict[str, float] = {}
    steps = 0
    for _ in range(spec.epochs):
        order = torch.randperm(len(rollout), generator=rng).to(rollout.ids_N_K.device)
        for index in order.split(spec.minibatch):
            optimizer.zero_grad(set_to_none=True)
            stats = add_gradient(model, rollout, credit, spec, index, reference, ranks)
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
