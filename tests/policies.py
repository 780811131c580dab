"""Rollouts, credits and generators for the tests of the policy step, and its slow twin: autograd through all logits at once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from builders import VOCAB
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dpg_cli.engine.generator.policy import PolicySpec, completion_logits, policy_step
from dpg_cli.engine.records import Credit, Rollout

KL = 0.3
SPEC = PolicySpec(temperature=1.3, clip=0.3, minibatch=100, max_grad_norm=0.0, silent_ids=(7, 11))
PROMPTS, COMPLETIONS = (6, 4), (5, 3, 1, 4, 5, 2)  # tokens: two groups of three


def rollout_of(
    vocabulary: int = VOCAB,
    prompts: tuple[int, ...] = PROMPTS,
    completions: tuple[int, ...] = COMPLETIONS,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Rollout:
    """Random completions, group by group, under log-probabilities that no model has."""
    rng = torch.Generator().manual_seed(seed)
    group, long, wide = len(completions) // len(prompts), max(prompts), max(completions)
    ids = torch.randint(0, 7, (len(completions), wide), generator=rng)
    mask = torch.arange(wide) < torch.tensor(completions)[:, None]
    prompt = torch.randint(0, vocabulary, (len(prompts), long), generator=rng)
    real = torch.arange(long) >= long - torch.tensor(prompts)[:, None]
    old = torch.randn(ids.shape, generator=rng, dtype=torch.float64).to(dtype) * 0.5 - 3.4
    return Rollout(
        [""] * len(ids),
        (prompt * real).repeat_interleave(group, 0),
        real.repeat_interleave(group, 0),
        ids * mask,
        mask,
        old * mask,
        group,
        0.0,
    )


def credit_of(rollout: Rollout, labels: bool, vocabulary: int = VOCAB, seed: int = 1) -> Credit:
    """Random advantages, and rewards of labels."""
    rng = torch.Generator().manual_seed(seed)
    advantage = torch.randn(rollout.ids_N_K.shape, generator=rng, dtype=torch.float64).to(rollout.logprobs_N_K)
    each = torch.randn(*rollout.ids_N_K.shape, vocabulary, generator=rng, dtype=torch.float64).to(rollout.logprobs_N_K)
    return Credit(advantage * rollout.mask_N_K, each * rollout.mask_N_K[..., None] if labels else None)


def moved(model: nn.Module, by: float = 0.1) -> Any:
    """The model with its weights changed at random."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=rng, dtype=torch.float64).to(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the trained parameters."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def gradients(
    model: nn.Module, rollout: Rollout, credit: Credit, spec: PolicySpec, reference: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients that a policy step makes, which moves nothing; and its statistics but for the gradient's norm."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    rng = torch.Generator().manual_seed(3)
    stats = policy_step(model, optimizer, rollout, credit, spec, rng, reference)
    found = named_gradients(model)
    model.zero_grad()
    return found, {name: value for name, value in stats.items() if name != "grad_norm"}


def twin_gradients(
    model: nn.Module, rollout: Rollout, credit: Credit, spec: PolicySpec, reference: nn.Module | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same by autograd, written as the equations are."""
    model.zero_grad()
    model.eval()
    log_pi = spec.log_pi(completion_logits(model, rollout))
    mask = rollout.mask_N_K
    ratio = (log_pi.gather(-1, rollout.ids_N_K[..., None])[..., 0] - rollout.logprobs_N_K).exp()
    bound = ratio.clamp(1 - spec.clip, 1 + spec.clip)
    gain = torch.minimum(ratio * credit.advantage_N_K, bound * credit.advantage_N_K)
    if credit.label_N_K_V is not None:
        gain = gain + (log_pi.exp() * credit.label_N_K_V).sum(-1)
    stats = {"clipped": int(((ratio != bound) & mask).sum()) / int(mask.sum())}
    if reference is not None:
        start = copy.deepcopy(reference).eval()
        with torch.no_grad():
            behind = spec.log_pi(completion_logits(start, rollout))
        kl = (log_pi.exp() * (log_pi - behind)).sum(-1)
        gain = gain - spec.kl * kl
        stats["kl"] = float((kl * mask).sum().detach()) / int(mask.sum())
    (-(gain * mask).sum() / len(rollout)).backward()
    found = named_gradients(model)
    model.zero_grad()
    return found, stats


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made within this context, but for those of parameters' size."""

    def __init__(self, besides: set[int]) -> None:
        super().__init__()
        self.found, self.besides = 0, besides

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() not in self.besides:
                self.found = max(self.found, tensor.numel())
        return out
