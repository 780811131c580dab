"""The ranges of a run: where the flat vector has a rate or decay of its own, and where it is a matrix that is moved as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from dpg_cli.engine.inner.optimizers.base import OptimizerSpec, Rate, Rates, by_matrix
from dpg_cli.engine.params import ParameterSpace


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the trainable matrices that are neither an embedding's nor the LM head's.

    What torch.optim.Muon is meant for ("2D parameters of neural network hidden layers"); all else goes to AdamW.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(parameter) for parameter in cast(Any, head).parameters()} if head is not None else set()
    named = model.named_parameters()
    return {name for name, p in named if p.requires_grad and p.ndim == 2 and id(p) not in outer}


def ranges_of(
    spec: OptimizerSpec,
    space: ParameterSpace,
    model: nn.Module,
    settings: Mapping[str, tuple[float, float]] | None = None,
) -> Rates:
    """The ranges of a model's flat vector, as few as there can be: neighbours that are alike are one.

    Args:
        spec: the optimiser.
        space: which parameters the vector has, in which order.
        model: tells hidden matrices from others.
        settings: lr and λ by parameter name, where they are not the optimiser's.
    """
    whole = hidden_matrices(model) if by_matrix(spec) else set()
    found: list[Rate] = []
    stop = 0
    for name, shape, size in zip(space.names, space.shapes, space.sizes, strict=True):
        stop += size
        lr, decay = (settings or {}).get(name, (spec.lr, spec.weight_decay))
        rate = Rate(stop, lr, decay, (shape[0], shape[1]) if name in whole else None)
        if found and rate.matrix is None and found[-1][1:] == rate[1:]:
            found.pop()
        found.append(rate)
    return tuple(found)
