"""From metagradients to advantages: three estimators of one policy gradient (DESIGN §3).

    sequence   A_is = R_i  - mean of the group's R,         R_i = Σ_r τ_ir                            (the paper)
    token      A_is = G_is - mean of the group's G_s,       G_is = Σ_{r>=s} γ^(r-s) τ_ir
    expected   Σ_y ∇π(y | prefix) τ_is(y)  exactly, and the token form with G_is = Σ_{r>s} γ^(r-s) τ_ir for the future

With γ = 1 all three have the same expected gradient. The future part is sampled, and for metrics that mostly see each
token by itself (a pattern in the head) it is nearly all noise: γ < 1 trades a little bias for much of that variance.

A baseline that leaves the own row out keeps the estimate unbiased; it equals G/(G-1) times the deviation from the
group's mean. Rewards may be of any size: each scale below is relative, and nothing absolute is added to it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dpg_cli.engine.records import Credit
from dpg_cli.engine.soft import LabelFactors

MODES = ("sequence", "token", "expected")
KEPT = (
    1 << 26
)  # credits of labels that are kept as they are: 256 MB in float32; more are kept in factors where these are fewer


def form_of_labels(tokens: int, vocabulary: int, width: int, steps: int) -> bool | Literal["factors"]:
    """How the credits of labels are best kept: True for all of them, or in factors.

    Args:
        tokens: of all examples, padding included.
        vocabulary, width: V and D of the target's head.
        steps: T, each of which has a head of its own.
    """
    numbers, factors = tokens * vocabulary, 2 * width * (tokens + steps * vocabulary)
    return "factors" if numbers > KEPT and factors < numbers else True


def leave_one_out(values_N: Tensor, group_size: int) -> Tensor:
    """Deviation of each row from the mean of the other rows of its group; zero if the group has one row.

    Args:
        values_N: N = P·G rows, any further axes.
        group_size: G.
    """
    if group_size == 1:
        return torch.zeros_like(values_N)
    grouped = values_N.unflatten(0, (-1, group_size))
    return ((grouped - grouped.mean(1, keepdim=True)) * (group_size / (group_size - 1))).flatten(0, 1)


def returns(token_N_K: Tensor, discount: float = 1.0) -> Tensor:
    """Σ_{r>=s} γ^(r-s) τ_ir for each s."""
    if discount == 1:
        return token_N_K.flip(1).cumsum(1).flip(1)
    if discount == 0:
        return token_N_K.clone()
    result = token_N_K.clone()
    for column in reversed(range(result.shape[1] - 1)):
        result[:, column] += discount * result[:, column + 1]
    return result


def assign(
    mode: str,
    token_N_K: Tensor,
    label_N_K_V: Tensor | LabelFactors | None,
    mask_N_K: Tensor,
    group_size: int,
    *,
    discount: float = 1.0,
    normalize: bool = True,
    across: str = "group",
    elsewhere: bool = False,
) -> Credit:
    """Turn metagradients, aligned with the generator's tokens, into advantages.

    Args:
        mode: "sequence", "token" or "expected".
        token_N_K: τ of each sampled token; zero where there is none.
        label_N_K_V: τ of every label, or its factors; needed by "expected".
        mask_N_K: real completion tokens.
        group_size: G.
        discount: γ, in [0, 1].
        normalize: scale the advantages; off, all three modes have the same expected policy gradient. `sequence` divides
            by the standard deviation of each group, as the paper does; the others by one root mean square of the batch,
            which leaves the direction of the gradient alone.
        across: "group", or "batch": `sequence` compares with the whole batch (naive attribution).
        elsewhere: the credits of labels are taken care of elsewhere; only for "expected" without `normalize`.

    Returns:
        The credit. Rows whose group has no spread get zero.
    """
    token_N_K = token_N_K * mask_N_K
    reward_N = token_N_K.sum(1)
    labels: Tensor | LabelFactors | None = None
    if mode == "sequence":
        compared = len(reward_N) if across == "batch" else group_size
        deviation = leave_one_out(reward_N, compared)
        if normalize and compared > 1:
            spread = reward_N.unflatten(0, (-1, compared)).std(1).repeat_interleave(compared)
            deviation = torch.where(spread > 0, deviation / spread, 0.0)
        advantage = deviation[:, None] * mask_N_K
    elif mode == "token":
        advantage = leave_one_out(returns(token_N_K, discount), group_size) * mask_N_K
        advantage = advantage * _inverse_rms(advantage[mask_N_K]) if normalize else advantage
    elif mode == "expected":
        if label_N_K_V is None and not elsewhere:
            raise ValueError("credit mode 'expected' needs the credit of every label; pass labels=True to metagradient")
        total = returns(token_N_K, discount)
        advantage = leave_one_out(total - token_N_K, group_size) * mask_N_K
        labels = label_N_K_V
        if normalize:
            scale = _inverse_rms(total[mask_N_K])
            advantage = advantage * scale
            labels = label_N_K_V.scaled(scale) if isinstance(label_N_K_V, LabelFactors) else label_N_K_V
            labels = labels * scale if isinstance(labels, Tensor) else labels
    else:
        raise ValueError(f"unknown credit mode {mode!r}; there are {', '.join(MODES)}")
    figures = statistics(reward_N, group_size)
    if isinstance(labels, LabelFactors):
        return Credit(advantage, None, figures, labels)
    return Credit(advantage, labels, figures)


def statistics(reward_N: Tensor, group_size: int) -> dict[str, float]:
    """Mean and spread of the rewards, the share of their variance within groups, and the share of dead groups."""
    grouped = reward_N.double().unflatten(0, (-1, group_size))
    total = float(reward_N.double().var(correction=0))
    within = float(grouped.var(1, correction=0).mean())
    return {
        "reward_mean": float(reward_N.double().mean()),
        "reward_std": total**0.5,
        "reward_within_groups": within / total if total > 0 else 0.0,
        "dead_groups": float((grouped.amax(1) == grouped.amin(1)).double().mean()) if group_size > 1 else 0.0,
    }


def _inverse_rms(values: Tensor) -> Tensor:
    """1 / root mean square; 0 where all are zero."""
    rms = values.double().square().mean().sqrt().to(values.dtype) if values.numel() else values.new_zeros(())
    return torch.where(rms > 0, 1 / rms, 0.0)
