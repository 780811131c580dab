"""The inner optimisers and their closed-form elementwise adjoints (DESIGN §2).

AdamW:  m' = β1 m + (1-β1) g        v' = β2 v + (1-β2) g²
        u  = (m'/c1) / (√(v'/c2 + ε_root) + ε)        θ' = θ - lr (u + λ θ)        c_k = 1 - β_k^(t+1)
SGD:    b' = μ b + (g + λ θ)        θ' = θ - lr b'        (as `torch.optim.SGD`: the decay is coupled)

With ε_root = 0 both are `torch.optim.AdamW` and `torch.optim.SGD`.

Both passes walk the flat vectors in blocks that stay in the shared cache, so that each vector is read and written once
however many elementwise operations there are, and temporaries stay of a block's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements a thread and block on the CPU; far smaller ones cost more in waking threads than they save


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
    """Fresh optimiser state at θ. The zeros take no memory: they are one number, expanded."""
    return State(theta, no_vector(theta), no_vector(theta) if spec.name == "adamw" else theta.new_empty(0))


def no_vector(like: Tensor) -> Tensor:
    """A zero vector of the shape of `like` that takes no memory; not to be written to."""
    return like.new_zeros(1).expand_as(like)


def _writable(*candidates: Tensor) -> Tensor:
    """The first candidate that has memory of its own, else new memory like the first."""
    for tensor in candidates:
        if tensor.stride(0) != 0:
            return tensor
    return torch.empty(candidates[0].shape, dtype=candidates[0].dtype, device=candidates[0].device)


def _blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal-length vectors in blocks: of `BLOCK` elements a thread on the CPU, whole elsewhere."""
    size = BLOCK * torch.get_num_threads() if vectors[0].device.type == "cpu" else max(1, len(vectors[0]))
    return zip(*(vector.split(size) for vector in vectors), strict=True)


@torch.no_grad()
def update(spec: OptimizerSpec, state: State, grad: Tensor, step: int, *, last: bool = False) -> State:
    """One optimiser step.

    Args:
        spec: the optimiser.
        state: before the step.
        grad: g, shape (n,).
        step: t, counted from 0.
        last: no step follows: leave the optimiser's own state out (empty vectors).

    Returns:
        The state after the step; new tensors, so that earlier states can be kept.
    """
    theta_new, nothing = torch.empty_like(grad), grad.new_empty(0)
    m_new = torch.empty_like(grad) if not last else theta_new  # then only to have blocks, never written as m
    if spec.name == "sgd":
        for theta, m, g, theta_out, m_out in _blocks(state.theta, state.m, grad, theta_new, m_new):
            buffer = torch.add(g, m, alpha=spec.momentum, out=None if last else m_out)
            if spec.weight_decay:
                buffer.add_(theta, alpha=spec.weight_decay)
            torch.add(theta, buffer, alpha=-spec.lr, out=theta_out)
        return State(theta_new, nothing if last else m_new, state.v)
    c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
    v_new = torch.empty_like(grad) if not last else theta_new
    # u = (√c2 / c1) m' / (√(v' + c2 ε_root) + √c2 ε): two passes fewer than dividing m' and v' themselves
    eps, eps_root, rate = spec.eps * c2**0.5, spec.eps_root * c2, spec.lr * c2**0.5 / c1
    for theta, m, v, g, theta_out, m_out, v_out in _blocks(
        state.theta, state.m, state.v, grad, theta_new, m_new, v_new
    ):
        m_after = torch.lerp(m, g, 1 - spec.beta1, out=None if last else m_out)
        v_after = torch.mul(v, spec.beta2, out=None if last else v_out).addcmul_(g, g, value=1 - spec.beta2)
        denominator = torch.add(v_after, eps_root).sqrt_()
        if eps:
            denominator.add_(eps)
        else:  # 0/0: nothing has ever moved this parameter, so nothing moves it now
            denominator.masked_fill_(denominator == 0, 1.0)
        torch.mul(theta, 1 - spec.lr * spec.weight_decay, out=theta_out)
        theta_out.addcdiv_(m_after, denominator, value=-rate)
    return State(theta_new, nothing, nothing) if last else State(theta_new, m_new, v_new)


@torch.no_grad()
def adjoint(
    spec: OptimizerSpec,
    after: State,
    before: State,
    grad: Tensor,
    step: int,
    *,
    consume: bool = False,
    first: bool = False,
) -> tuple[Tensor, State]:
    """Reverse of `update`: from the adjoints of the state after a step to those of its inputs.

    Args:
        spec: the optimiser.
        after: adjoints (θ̄', m̄', v̄') of the state after step t.
        before: the *state* (not adjoint) before step t; its θ is not used.
        grad: g_t.
        step: t, counted from 0.
        consume: the results may be written over `after`, `before.m`, `before.v` and `grad`.
        first: no step precedes: leave the adjoints of the state out (empty vectors).

    Returns:
        ḡ_t of shape (n,), and the direct parts of the adjoints (θ̄, m̄, v̄) before the step; what reaches θ̄ through
        g_t(θ_t), the Hessian-vector product, is the caller's.

    Where v' + ε_root = 0 the root's derivative is infinite while its numerator m' is 0: that term's limit is 0.
    """
    grad_out = grad if consume else torch.empty_like(grad)
    nothing = State(*(grad.new_empty(0),) * 3)
    theta_out = m_out = v_out = grad_out  # with `first` only to have blocks, never written
    if not first:
        theta_out = _writable(after.theta) if consume else torch.empty_like(grad)
        m_out = _writable(after.m, before.m) if consume else torch.empty_like(grad)
    if spec.name == "sgd":
        for theta, m, g_to, theta_to, m_to in _blocks(after.theta, after.m, grad_out, theta_out, m_out):
            torch.add(m, theta, alpha=-spec.lr, out=g_to)
            if not first:
                torch.add(theta, g_to, alpha=spec.weight_decay, out=theta_to)
                torch.mul(g_to, spec.momentum, out=m_to)
        return grad_out, nothing if first else State(theta_out, m_out, after.v)
    if not first:
        v_out = _writable(after.v, before.v) if consume else torch.empty_like(grad)
    c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
    for theta, m_bar, v_bar, m, v, g, g_to, theta_to, m_to, v_to in _blocks(
        after.theta, after.m, after.v, before.m, before.v, grad, grad_out, theta_out, m_out, v_out
    ):
        m_after = torch.lerp(m, g, 1 - spec.beta1)
        root = torch.mul(v, spec.beta2 / c2).addcmul_(g, g, value=(1 - spec.beta2) / c2)
        root = root.add_(spec.eps_root).sqrt_()
        denominator = torch.add(root, spec.eps)
        slope = torch.div(theta, denominator)  # ∂/∂(m'/c1), but for the factor -lr, which is applied below
        through_root = m_after.mul_(slope).div_(denominator).div_(root)
        if spec.eps_root == 0:
            through_root.masked_fill_(root == 0, 0.0)
            if spec.eps == 0:
                slope.masked_fill_(root == 0, 0.0)
        v_before = torch.add(v_bar, through_root, alpha=0.5 * spec.lr / (c1 * c2), out=None if first else v_to)
        m_before = torch.add(m_bar, slope, alpha=-spec.lr / c1, out=None if first else m_to)
        torch.mul(v_before, g, out=g_to).mul_(2 * (1 - spec.beta2)).add_(m_before, alpha=1 - spec.beta1)
        if not first:
            m_to.mul_(spec.beta1)
            v_to.mul_(spec.beta2)
            torch.mul(theta, 1 - spec.lr * spec.weight_decay, out=theta_to)
    return grad_out, nothing if first else State(theta_out, m_out, v_out)


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
