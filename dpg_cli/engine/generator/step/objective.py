"""The policy objective and its gradient from hidden states, over chunks of tokens (DESIGN §2, step 5).

For M sampled tokens with hidden states h (M, D), head W (V, D), bias a and temperature τ, π = softmax((h Wᵀ + a) / τ), and

    J = Σ_m [ min(ρ A, clip(ρ) A)  +  Σ_y π(y) c(y)  -  β KL(π ‖ π_start) ],    ρ = π(y_m) / π_old(y_m)

    ∂J/∂(τ logits) = ρ A [not clipped] (e_y - π)  +  π ⊙ (c - <π, c>)  -  β π ⊙ (log π - log π_start - KL)

Only the logits of a chunk of tokens exist at a time; so do those of the starting generator, made of its own hidden states, and
the credits c of labels, where they are kept in factors (`engine/soft.py`). Nothing of tokens × vocabulary is ever kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dpg_cli.engine.generator.step.spec import NOTHING, PolicySpec
from dpg_cli.engine.inner.head import Head, chunks
from dpg_cli.engine.records import Credit, Rollout


@dataclass(frozen=True)
class HeadMap:
    """A head's linear map, in the precision that it is computed in.

    Attributes:
        weight, bias: W (V, D) and a (V,) or None.
        spec: temperature, silent ids.
    """

    weight: Tensor
    bias: Tensor | None
    spec: PolicySpec

    @classmethod
    def of(cls, head: Head, spec: PolicySpec) -> HeadMap:
        """Of a model, as it is now."""
        weight, bias = head.layer.weight.detach(), head.layer.bias
        weight = weight.bfloat16() if spec.precision == "bf16" else weight
        return cls(weight, None if bias is None else bias.detach(), spec)

    def log_pi(self, hidden_m_D: Tensor, silent: Tensor | None) -> Tensor:
        """log π of a chunk of tokens, (m, V), in full precision."""
        logits = torch.mm(hidden_m_D.to(self.weight.dtype), self.weight.mT)
        logits = logits.float() if logits.dtype == torch.bfloat16 else logits
        if self.bias is not None:
            logits.add_(self.bias)
        if self.spec.temperature != 1:
            logits.div_(self.spec.temperature)
        if silent is not None:
            logits.index_fill_(-1, silent, NOTHING)
        return torch.log_softmax(logits, -1)

    def back(self, pull_m_V: Tensor) -> Tensor:
        """The adjoints of hidden states, (m, D), from those of logits."""
        return torch.mm(pull_m_V.to(self.weight.dtype), self.weight).to(pull_m_V.dtype)


def head_gradients(head: Head) -> tuple[Tensor | None, Tensor | None]:
    """Where the head's gradients are added up: its parameters' `.grad`; None for what is not trained."""
    found: list[Tensor | None] = []
    for parameter in (head.layer.weight, head.layer.bias):
        if parameter is not None and parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad if parameter is not None and parameter.requires_grad else None)
    return found[0], found[1]


@torch.no_grad()
def objective(
    head: Head,
    hidden_M_D: Tensor,
    place_M: Tensor,
    rollout: Rollout,
    credit: Credit,
    spec: PolicySpec,
    examples: int,
    into: tuple[Tensor | None, Tensor | None],
    reference: tuple[Head, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """J of some tokens, and the gradient of -J / examples.

    Args:
        head: of the generator.
        hidden_M_D: the hidden states that predict the tokens.
        place_M: the tokens, on the flat (N · K) axis.
        rollout, credit, spec: see `policy_step`.
        examples: by which the loss is divided.
        into: where the gradients of the head's weight and bias are added; None for what is not trained.
        reference: the head of the starting generator and its hidden states of the same tokens, where β > 0.

    Returns:
        (J, tokens whose ratio was clipped, Σ KL(π ‖ π_start) in nats), float64; and the adjoints of the hidden states, (M, D).
    """
    now, found = HeadMap.of(head, spec), hidden_M_D.new_zeros(3, dtype=torch.float64)
    start = None if reference is None else HeadMap.of(reference[0], spec)
    weight_into, bias_into = into
    silent = torch.tensor(spec.silent_ids, dtype=torch.int64, device=place_M.device) if spec.silent_ids else None
    ids, old = rollout.ids_N_K.flatten()[place_M], rollout.logprobs_N_K.flatten()[place_M]
    advantage, factor = credit.advantage_N_K.flatten()[place_M], -1 / (examples * spec.temperature)
    hidden_bar = torch.empty_like(hidden_M_D)
    for part in chunks(len(place_M), len(now.weight)):
        hidden, label = hidden_M_D[part], ids[part, None]
        logs = now.log_pi(hidden, silent)
        ratio = (logs.gather(-1, label)[:, 0] - old[part]).exp()
        bound = ratio.clamp(1 - spec.clip, 1 + spec.clip)
        raised, held = ratio * advantage[part], bound * advantage[part]
        gain = torch.minimum(raised, held)
        pull = torch.where(raised > held, 0.0, raised)[:, None]  # what is clipped has no slope
        found[1] += (ratio != bound).sum()
        slope: Tensor | None = None  # by π, of what stands under a sum over labels
        if credit.knows_labels:
            slope = credit.labels_at(place_M[part])
        pi: Tensor | None = None
        if start is not None and reference is not None:
            apart = start.log_pi(reference[1][part], silent).neg_().add_(logs)
            pi = logs.exp_()
            kl = torch.linalg.vecdot(pi, apart)
            found[2] += kl.sum()
            # Σ π (c - β apart) has the slope that Σ π c and -β KL have together: Σ π ∂ log π = 0
            slope = apart.mul_(-spec.kl) if slope is None else slope.add_(apart, alpha=-spec.kl)
        pi = logs.exp_() if pi is None else pi
        if slope is None:
            bar = pi.mul_(-pull)
        else:
            mean = torch.linalg.vecdot(pi, slope)
            gain = gain + mean
            bar = pi.mul_(slope.sub_(mean[:, None]).sub_(pull))
        bar.scatter_add_(-1, label, pull)
        if silent is not None:
            bar.index_fill_(-1, silent, 0.0)
        bar.mul_(factor)
        found[0] += gain.sum()
        hidden_bar[part] = now.back(bar)
        if weight_into is not None and spec.precision == "float32":
            weight_into.addmm_(bar.mT, hidden.to(bar.dtype))
        elif weight_into is not None:
            weight_into.add_(torch.mm(bar.to(now.weight.dtype).mT, hidden.to(now.weight.dtype)))
        if bias_into is not None:
            bias_into.add_(bar.sum(0))
    return found, hidden_bar
