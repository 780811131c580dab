"""What all inner optimisers share: settings, state, rates, the trio that each must give, and the register of them.

    state, g  --update-->  state'            adjoints of state'  --adjoint-->  ḡ and the direct parts of the state's

Source: DESIGN §2 and §7. `elementwise.py` carries all but the equations of an optimiser that treats each weight by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

BLOCK = 1 << 18  # elements a thread and block on the CPU; far smaller ones cost more in waking threads than they save


@dataclass(frozen=True)
class OptimizerSpec:
    """An inner optimiser.

    Attributes:
        name: one of `registered()`: "adam", "adamw", "muon", "sgd".
        lr: learning rate, > 0.
        beta1, beta2: Adam's and AdamW's decay rates, in [0, 1). Muon moves what is no hidden matrix by AdamW.
        eps: added to the root, outside it; eps_root: inside it. Both ≥ 0. Larger than |g| (eps_root: than g²), they
            make the update nearly linear in g (metasmooth); far smaller, it is nearly sign(g) and metagradients vanish.
        weight_decay: λ, decoupled for AdamW and Muon, coupled for Adam and SGD.
        momentum: μ, SGD and Muon only.
        nesterov: look ahead along the momentum, SGD and Muon only.
        ns_steps: Newton-Schulz steps of Muon.
        adjust_lr: how Muon's rate depends on a matrix's shape: "original" or "match_rms_adamw", as torch.optim.Muon.
        ns_bf16: round within Muon's Newton-Schulz steps to bfloat16, as torch.optim.Muon does; the derivative is that of
            the steps without rounding.
    """

    name: str = "adamw"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    ns_steps: int = 5
    adjust_lr: str = "original"
    ns_bf16: bool = False

    @classmethod
    def of(cls, settings: Any) -> OptimizerSpec:
        """Of settings with the same names (`optimizer` for the name), such as `[inner]` of a run; the rest by default."""
        own = {name: getattr(settings, name) for field in fields(cls) if hasattr(settings, name := field.name)}
        return cls(**{**own, "name": settings.optimizer})

    def __post_init__(self) -> None:
        if self.name not in _REGISTER:
            *others, last = map(repr, registered())
            raise ValueError(f"unknown inner optimiser {self.name!r}; there are {', '.join(others)} and {last}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for key in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must lie in [0, 1), got {getattr(self, key)}")
        for key in ("eps", "eps_root", "weight_decay"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        _REGISTER[self.name].check(self)


class State(NamedTuple):
    """Parameters and optimiser state before a step, or their adjoints. Flat (n,) vectors; v is empty (0,) for SGD."""

    theta: Tensor
    m: Tensor
    v: Tensor

    def part(self, span: slice) -> State:
        """The same span of each vector, as views; an empty one stays empty."""
        return State(self.theta[span], self.m[span], self.v[span])


class Rate(NamedTuple):
    """Learning rate and weight decay of a range of the flat vectors, in one step.

    Attributes:
        stop: where the range ends; it begins where the one before it ends.
        lr: the step's learning rate, ≥ 0 (a schedule may begin or end at 0).
        weight_decay: λ.
        matrix: shape of the one hidden matrix that the range is, for an optimiser that treats those as such (`by_matrix`).
    """

    stop: int
    lr: float
    weight_decay: float
    matrix: tuple[int, int] | None = None


Rates = tuple[Rate, ...]


def uniform(spec: OptimizerSpec, size: int) -> Rates:
    """The optimiser's own lr and λ, everywhere."""
    return (Rate(size, spec.lr, spec.weight_decay),)


class Optimizer(Protocol):
    """What an optimiser gives. It keeps nothing between calls; see the functions of the same names for the arguments.

    Attributes:
        by_matrix: it treats hidden matrices (`ranges.py`) as such: each is a range of its own, with its shape.
    """

    by_matrix: bool

    def check(self, spec: OptimizerSpec) -> None:
        """Refuse settings that make no sense for it.

        Raises:
            ValueError: naming the setting.
        """

    def initial_state(self, theta: Tensor) -> State:
        """Fresh state at θ."""
        ...

    def update(self, spec: OptimizerSpec, state: State, grad: Tensor, step: int, *, rates: Rates, last: bool) -> State:
        """One step."""
        ...

    def adjoint(
        self,
        spec: OptimizerSpec,
        after: State,
        before: State,
        grad: Tensor,
        step: int,
        *,
        rates: Rates,
        consume: bool,
        first: bool,
        grad_into: Tensor | None,
    ) -> tuple[Tensor, State]:
        """The reverse of a step."""
        ...

    def elasticity(self, spec: OptimizerSpec, grad: Tensor) -> Tensor:
        """d log|u| / d log|g| of a first update."""
        ...


_REGISTER: dict[str, Optimizer] = {}


def register(name: str, optimizer: Optimizer) -> None:
    """Make an optimiser known by a name."""
    _REGISTER[name] = optimizer


def by_matrix(spec: OptimizerSpec) -> bool:
    """Whether `rates` must make each hidden matrix a range of its own, with its shape."""
    return _REGISTER[spec.name].by_matrix


def registered() -> list[str]:
    """The names of all optimisers."""
    return sorted(_REGISTER)


def initial_state(spec: OptimizerSpec, theta: Tensor) -> State:
    """Fresh optimiser state at θ. The zeros take no memory: they are one number, expanded."""
    return _REGISTER[spec.name].initial_state(theta)


@torch.no_grad()
def update(
    spec: OptimizerSpec, state: State, grad: Tensor, step: int, *, rates: Rates | None = None, last: bool = False
) -> State:
    """One optimiser step.

    Args:
        spec: the optimiser.
        state: before the step.
        grad: g, shape (n,).
        step: t, counted from 0.
        rates: this step's lr and λ; None takes the optimiser's own.
        last: no step follows: leave the optimiser's own state out (empty vectors).

    Returns:
        The state after the step; new tensors, so that earlier states can be kept.
    """
    rates = uniform(spec, len(grad)) if rates is None else rates
    return _REGISTER[spec.name].update(spec, state, grad, step, rates=rates, last=last)


@torch.no_grad()
def adjoint(
    spec: OptimizerSpec,
    after: State,
    before: State,
    grad: Tensor,
    step: int,
    *,
    rates: Rates | None = None,
    consume: bool = False,
    first: bool = False,
    grad_into: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Reverse of `update`: from the adjoints of the state after a step to those of its inputs.

    Args:
        spec: the optimiser.
        after: adjoints (θ̄', m̄', v̄') of the state after step t.
        before: the *state* (not adjoint) before step t; its θ is never written to.
        grad: g_t.
        step: t, counted from 0.
        rates: the step's lr and λ; None takes the optimiser's own.
        consume: the results may be written over `after`, `before.m`, `before.v` and `grad`.
        first: no step precedes: leave the adjoints of the state out (empty vectors).
        grad_into: ḡ is written here, and `grad` is kept.

    Returns:
        ḡ_t of shape (n,), and the direct parts of the adjoints (θ̄, m̄, v̄) before the step; what reaches θ̄ through
        g_t(θ_t), the Hessian-vector product, is the caller's.
    """
    rates = uniform(spec, len(grad)) if rates is None else rates
    return _REGISTER[spec.name].adjoint(
        spec, after, before, grad, step, rates=rates, consume=consume, first=first, grad_into=grad_into
    )


def elasticity(spec: OptimizerSpec, grad: Tensor) -> Tensor:
    """d log|u| / d log|g| of a first update: 1 where it is linear in the gradient, 0 where it is sign(g).

    At T = 1 every metagradient carries this factor.

    Args:
        spec: the optimiser.
        grad: g_0; where it is 0 the result is 1.
    """
    return _REGISTER[spec.name].elasticity(spec, grad)


def no_vector(like: Tensor) -> Tensor:
    """A zero vector of the shape of `like` that takes no memory; not to be written to."""
    return like.new_zeros(1).expand_as(like)


def writable(*candidates: Tensor) -> Tensor:
    """The first candidate that has memory of its own, else new memory like the first."""
    for tensor in candidates:
        if tensor.stride(0) != 0:
            return tensor
    return torch.empty(candidates[0].shape, dtype=candidates[0].dtype, device=candidates[0].device)


def block_size(like: Tensor) -> int:
    """Elements of a block: `BLOCK` a thread on the CPU, the whole vector elsewhere."""
    return BLOCK * torch.get_num_threads() if like.device.type == "cpu" else max(1, len(like))


def blocks(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Equal-length vectors in blocks that stay in the shared cache."""
    return zip(*(vector.split(block_size(vectors[0])) for vector in vectors), strict=True)


def spans(rates: Rates, like: Tensor) -> Iterator[tuple[Rate, slice]]:
    """The blocks of a vector as slices, each within one range, with the range's rate. A matrix is one block.

    Raises:
        ValueError: if the ranges do not cover the vector.
    """
    start = 0
    for rate in rates:
        size = block_size(like) if rate.matrix is None else max(1, rate.stop - start)
        for begin in range(start, rate.stop, size):
            yield rate, slice(begin, min(begin + size, rate.stop))
        start = rate.stop
    if start != len(like):
        raise ValueError(f"the ranges of rates end at {start}, the vectors at {len(like)}")
