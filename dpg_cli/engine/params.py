"""A model's parameters as one flat vector, and back.

The optimiser, its adjoint and the reverse pass are elementwise: on one flat buffer they are a handful of kernels,
whatever the architecture. Tied parameters appear once, so that tied stays tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dpg_cli.errors import BadValueError


class ParameterSpace:
    """Names, shapes and places of a model's trainable parameters in a flat vector θ of length n.

    Args:
        model: any module; parameters with `requires_grad = False` stay out.
        idle: names of others that stay out, because no gradient ever reaches them: `torch.optim` leaves these alone.
        order: the names of the trainable parameters in the order that they have in θ; None takes the model's.

    Raises:
        BadValueError: if there is none, or they differ in dtype or device.
    """

    def __init__(
        self, model: nn.Module, idle: frozenset[str] = frozenset(), order: Sequence[str] | None = None
    ) -> None:
        known = {name: p for name, p in model.named_parameters() if p.requires_grad}
        named = [(name, known[name]) for name in (known if order is None else order) if name not in idle]
        if not named:
            raise BadValueError("The target has no trainable parameter.", "Set requires_grad on what is to be trained.")
        kinds = {(p.dtype, p.device) for _, p in named}
        if len(kinds) > 1:
            raise BadValueError(
                f"The target's trained parameters differ in dtype or device: {', '.join(sorted(map(str, kinds)))}.",
                "Bring them to one dtype, on one device.",
            )
        self.idle = idle
        self.names = [name for name, _ in named]
        self.shapes = [p.shape for _, p in named]
        self.sizes = [p.numel() for _, p in named]
        self.size = sum(self.sizes)

    def read(self, model: nn.Module) -> Tensor:
        """θ of the model as it is, a detached copy of shape (n,)."""
        parameters = dict(model.named_parameters())
        return torch.cat([parameters[name].detach().reshape(-1) for name in self.names])

    @torch.no_grad()
    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Copy θ into the model's own parameters."""
        parameters = dict(model.named_parameters())
        for name, value in self.views(theta).items():
            parameters[name].copy_(value)

    def views(self, theta: Tensor) -> dict[str, Tensor]:
        """θ by parameter name, each in its own shape; views, no copies."""
        pieces = theta.split(self.sizes)
        return {name: piece.view(shape) for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)}

    def final(self, model: nn.Module, theta: Tensor) -> dict[str, Tensor]:
        """θ by parameter name, detached, with what no gradient reaches as it is in the model."""
        values = {name: view.detach() for name, view in self.views(theta).items()}
        if not self.idle:
            return values
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return {name: values[name] if name in values else p.detach().clone() for name, p in named}

    def flatten(self, values: Mapping[str, Tensor] | Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Gradients (in the order of `names`, None for zero) as one (n,) vector."""
        ordered = [values[name] for name in self.names] if isinstance(values, Mapping) else values
        flat = torch.empty_like(like)
        for piece, value in zip(flat.split(self.sizes), ordered, strict=True):
            if value is None:
                piece.zero_()
            else:
                piece.copy_(value.reshape(-1))
        return flat


@contextmanager
def carrying(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the model's own parameters are these values, so that `model(...)` is the model at these weights.

    Args:
        model: any module.
        values: by parameter name; parameters (whose gradients are then theirs) or plain tensors.
    """
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    own = {
        name: value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), requires_grad=False)
        for name, value in values.items()
    }
    places: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and named.get(id(parameter)) in own:
                places.append((module._parameters, key, parameter))
    try:
        for slots, key, parameter in places:
            slots[key] = own[named[id(parameter)]]
        yield
    finally:
        for slots, key, parameter in places:
            slots[key] = parameter
