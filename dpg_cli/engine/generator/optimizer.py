"""The policy's AdamW, and its moments by name: torch's own, or bitsandbytes' with states of 8 bits.

bitsandbytes keeps the moments of tensors of at least 4,096 numbers as one byte each, with a scale for every 256 of them, and smaller
ones as float32 (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021). Its states are made here at the beginning, so
that a checkpoint has the same tensors from the first outer step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Bits = Literal["float32", "8bit"]
MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch's AdamW
QUANTISED = ("state1", "state2", "absmax1", "absmax2")  # of bitsandbytes'; the scales only of large tensors


def policy_optimizer(
    parameters: Sequence[nn.Parameter], states: Bits = "float32", **options: Any
) -> torch.optim.Optimizer:
    """AdamW over the generator's trained parameters.

    Args:
        parameters: float32.
        states: what its moments are kept as; "8bit" needs bitsandbytes.
        options: lr, betas, eps, weight_decay.
    """
    if states == "float32":
        return torch.optim.AdamW(parameters, **options)
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit(parameters, **options)
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, number, place)
    return optimizer


def is_quantised(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its moments are bitsandbytes'."""
    return type(optimizer).__module__.partition(".")[0] == "bitsandbytes"


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The moments of a parameter, by their names in its state; zeros where torch's has none yet."""
    known = optimizer.state.get(parameter, {})
    if is_quantised(optimizer):
        return {name: known[name] for name in QUANTISED if name in known}
    return {name: known.get(name, torch.zeros_like(parameter)).detach() for name in MOMENTS}


def step_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Steps that it has taken, a float32 scalar on the CPU."""
    step = optimizer.state.get(parameter, {}).get("step", 0)
    return torch.as_tensor(step, dtype=torch.float32).cpu()


@torch.no_grad()
def put(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, step: Tensor, moments: dict[str, Tensor]) -> None:
    """Set steps and moments of a parameter; the tensors are copied."""
    if is_quantised(optimizer):
        known = optimizer.state[parameter]
        known["step"] = int(step)
        for name, moment in moments.items():
            known[name].copy_(moment)
        return
    copies = {name: moment.to(parameter.device, copy=True) for name, moment in moments.items()}
    optimizer.state[parameter] = {"step": step.clone(), **copies}
