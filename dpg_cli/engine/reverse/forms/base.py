"""What the closed forms share: the row that each adds to the table, and primal and tangent of a dual tensor apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

MaybeTensor = Tensor | None


class Form(NamedTuple):
    """One closed form.

    Attributes:
        calls: by torch function that it replaces, the same on dual tensors, with the same arguments.
        with_products: these also take `precision` and `piece`, what the inner step left of the same rows.
    """

    calls: Mapping[Callable[..., Any], Callable[..., Tensor]]
    with_products: bool = False


def split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Primal and tangent of a dual tensor, zeros where it has none."""
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def parts(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Primal and tangent of a dual tensor, None where it has none."""
    if tensor is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, tangent


def rows(tensor: Tensor) -> Tensor:
    """All axes but the last as one."""
    return tensor.reshape(-1, tensor.shape[-1])
