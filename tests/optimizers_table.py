"""One table of inner optimisers, that several test files go over. A new optimiser joins with a row."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dpg_cli.engine import OptimizerSpec
from dpg_cli.engine.inner.optimizers import Rate, Rates, by_matrix
from dpg_cli.engine.reverse.reference import At, Moments, PlainStep

SIZE = 50  # of the vectors that single steps are tried on
Stock = Callable[[list[nn.Parameter], OptimizerSpec], torch.optim.Optimizer]


@dataclass(frozen=True)
class Row:
    """An optimiser with settings that make each of its terms felt.

    Attributes:
        spec: the settings.
        stock: the same from torch, where torch has it.
        plain: its step as differentiable PyTorch, where the reference has none of its name.
        h: step of finite differences. With ε_root = 0 an update has kinks of width |g| ~ h at g = 0: small ones keep clear.
    """

    spec: OptimizerSpec
    stock: Stock | None = None
    plain: PlainStep | None = None
    h: float = 1e-4


def ranges(spec: OptimizerSpec) -> Rates | None:
    """The ranges of a vector of `SIZE`: matrices of three forms and a rest, for an optimiser that treats them as such."""
    if not by_matrix(spec):
        return None
    forms = ((12, (3, 4)), (32, (5, 4)), (41, (3, 3)), (SIZE, None))
    return tuple(Rate(stop, spec.lr, spec.weight_decay, matrix) for stop, matrix in forms)


def stock_adamw(parameters: list[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return torch.optim.AdamW(parameters, lr=spec.lr, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay)


def stock_adam(parameters: list[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return torch.optim.Adam(parameters, lr=spec.lr, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay)


def stock_sgd(parameters: list[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov
    )


def plain_smooth_sign(
    spec: OptimizerSpec, at: At, theta: Tensor, grad: Tensor, moments: Moments
) -> tuple[Tensor, Moments]:
    """The worked example of CONTRIBUTING, as a page would have it."""
    (m,) = moments or (torch.zeros_like(theta),)
    m = spec.momentum * m + (1 - spec.momentum) * grad
    return theta - at.lr * (m / (m**2 + spec.eps**2).sqrt() + at.decay * theta), (m,)


runpy.run_path(str(Path(__file__).parents[1] / "docs" / "examples" / "smooth_sign.py"))  # registers itself

ADAM = {"beta1": 0.8, "beta2": 0.99, "weight_decay": 0.1}
OPTIMIZERS = {
    "adamw": Row(OptimizerSpec("adamw", lr=0.05, eps=1e-2, **ADAM), stock_adamw, h=2e-6),
    "adamw-eps_root": Row(OptimizerSpec("adamw", lr=0.01, eps=1e-8, eps_root=1e-5, **ADAM)),
    "adamw-no-memory": Row(OptimizerSpec("adamw", lr=0.01, beta1=0.0, beta2=0.0, eps=1e-2), stock_adamw, h=2e-6),
    "adam": Row(OptimizerSpec("adam", lr=0.05, eps=1e-2, **ADAM), stock_adam, h=2e-6),
    "adam-eps_root": Row(OptimizerSpec("adam", lr=0.01, eps=1e-8, eps_root=1e-5, **ADAM)),
    "sgd": Row(OptimizerSpec("sgd", lr=0.1), stock_sgd),
    "sgd-momentum": Row(OptimizerSpec("sgd", lr=0.1, momentum=0.5, weight_decay=0.01), stock_sgd),
    "sgd-nesterov": Row(OptimizerSpec("sgd", lr=0.1, momentum=0.5, weight_decay=0.01, nesterov=True), stock_sgd),
    "muon": Row(OptimizerSpec("muon", lr=0.02, momentum=0.5, nesterov=True, eps=1e-2, ns_steps=2, **ADAM), h=2e-6),
    "muon-rms": Row(
        OptimizerSpec("muon", lr=0.02, momentum=0.5, eps=1e-2, ns_steps=5, adjust_lr="match_rms_adamw", **ADAM), h=2e-6
    ),
    "smooth-sign": Row(
        OptimizerSpec("smooth-sign", lr=0.02, momentum=0.5, eps=1e-2, weight_decay=0.1), plain=plain_smooth_sign
    ),
}
