"""The inner optimisers and their closed-form elementwise adjoints (DESIGN §2).

AdamW:  m' = β1 m + (1-β1) g        v' = β2 v + (1-β2) g²
        u  = (m'/c1) / (√(v'/c2 + ε_root) + ε)        θ' = θ - lr (u + λ θ)        c_k = 1 - β_k^(t+1)
SGD:    b' = μ b + (g + λ θ)        θ' = θ - lr b'        (as `torch.optim.SGD`: the decay is coupled)

With ε_root = 0 both are `torch.optim.AdamW` and `torch.optim.SGD`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class OptimizerSpec:
    """An inner optimiser.

    Attributes:
        name: "adamw" or "sgd".
        lr: learning rate, > 0.
        beta1, beta2: AdamW's decay rates, in [0, 1).
        eps: added to the root, outside it; eps_root: inside it. Both ≥ 0. Larger than |g| (eps_root: than g²), they
            make the update nearly linear in g (metasmooth); far smaller, it is nearly sign(g) and metagradients vanish.
        weight_decay: λ, decoupled for AdamW, coupled for SGD.
        momentum: μ, SGD only.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "sgd"):
            raise ValueError(f"unknown inner optimiser {self.name!r}; there are 'adamw' and 'sgd'")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for key in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must lie in [0, 1), got {getattr(self, key)}")
        for key in ("eps", "eps_root", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")


class State(NamedTuple):
    """Parameters and optimiser state before a step, or their adjoints. Flat (n,) vectors; v is empty (0,) for SGD."""

    theta: Tensor
    m: Tensor
    v: Tensor


def initial_state(spec: OptimizerSpec, theta: Tensor) -> State:
    """Fresh optimiser state at θ."""
    zeros = torch.zeros_like(theta)
    return State(theta, zeros, zeros if spec.name == "adamw" else theta.new_empty(0))


@torch.no_grad()
def update(spec: OptimizerSpec, state: State, grad: Tensor, step: int) -> State:
    """One optimiser step.

    Args:
        spec: the optimiser.
        state: before the step.
        grad: g, shape (n,).
        step: t, counted from 0.

    Returns:
        The state after the step; new tensors, so that earlier states can be kept.
    """
    if spec.name == "sgd":
        buffer = state.m * spec.momentum + grad
        if spec.weight_decay:
            buffer.add_(state.theta, alpha=spec.weight_decay)
        return State(state.theta.add(buffer, alpha=-spec.lr), buffer, state.v)
    m = torch.lerp(state.m, grad, 1 - spec.beta1)
    v = (state.v * spec.beta2).addcmul_(grad, grad, value=1 - spec.beta2)
    c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
    denominator = (v / c2 + spec.eps_root).sqrt_().add_(spec.eps)
    direction = (m / c1).div_(denominator)
    if spec.eps == 0:  # 0/0: nothing has ever moved this parameter, so nothing moves it now
        direction.masked_fill_(denominator == 0, 0.0)
    theta = state.theta * (1 - spec.lr * spec.weight_decay)
    return State(theta.add_(direction, alpha=-spec.lr), m, v)


@torch.no_grad()
def adjoint(spec: OptimizerSpec, after: State, before: State, grad: Tensor, step: int) -> tuple[Tensor, State]:
    """Reverse of `update`: from the adjoints of the state after a step to those of its inputs.

    Args:
        spec: the optimiser.
        after: adjoints (θ̄', m̄', v̄') of the state after step t.
        before: the *state* (not adjoint) before step t.
        grad: g_t.
        step: t, counted from 0.

    Returns:
        ḡ_t of shape (n,), and the direct parts of the adjoints (θ̄, m̄, v̄) before the step; what reaches θ̄ through
        g_t(θ_t), the Hessian-vector product, is the caller's.

    Where v' + ε_root = 0 the root's derivative is infinite while its numerator m' is 0: that term's limit is 0.
    """
    if spec.name == "sgd":
        buffer_bar = after.m.add(after.theta, alpha=-spec.lr)
        theta_bar = after.theta.add(buffer_bar, alpha=spec.weight_decay) if spec.weight_decay else after.theta
        return buffer_bar, State(theta_bar, buffer_bar * spec.momentum, after.v)
    c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
    m = torch.lerp(before.m, grad, 1 - spec.beta1)
    root = (before.v * spec.beta2).addcmul_(grad, grad, value=1 - spec.beta2).div_(c2).add_(spec.eps_root).sqrt_()
    denominator = root + spec.eps
    slope = after.theta * (-spec.lr) / denominator  # ∂/∂(m'/c1)
    v_bar = slope * m / denominator / root * (-0.5 / (c1 * c2))
    v_bar.masked_fill_(root == 0, 0.0)
    if spec.eps == 0:
        slope.masked_fill_(denominator == 0, 0.0)
    v_bar.add_(after.v)
    m_bar = slope.div_(c1).add_(after.m)
    grad_bar = (m_bar * (1 - spec.beta1)).addcmul_(v_bar, grad, value=2 * (1 - spec.beta2))
    return grad_bar, State(
        after.theta * (1 - spec.lr * spec.weight_decay), m_bar.mul_(spec.beta1), v_bar.mul_(spec.beta2)
    )


def elasticity(spec: OptimizerSpec, grad: Tensor) -> Tensor:
    """d log|u| / d log|g| of a first update: 1 where it is linear in the gradient, 0 where it is sign(g).

    With fresh state u = g / (r + ε), r = √(g² + ε_root), so that the elasticity is 1 - g² / (r (r + ε)). At T = 1 every
    metagradient carries this factor.

    Args:
        spec: the optimiser.
        grad: g_0; where it is 0 the result is 1.
    """
    if spec.name == "sgd":
        return torch.ones_like(grad)
    square = grad.double().square()
    root = (square + spec.eps_root).sqrt()
    # (r² - g² + r ε) / (r (r + ε)): the same without cancellation
    share = (spec.eps_root + root * spec.eps) / (root * (root + spec.eps))
    return torch.where(grad == 0, 1.0, share).to(grad.dtype)
