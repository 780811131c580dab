"""Φ and ∂Φ/∂θ at the end of an inner run.

A metric may read the weights from the `parameters` that it is given, or call the `model` that it is given: while it is read,
the model carries these weights. ∂Φ/∂θ is the true derivative, also where the model cuts its own gradient (`inner/cuts.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.cuts import reached_from, true_derivative
from dpg_cli.engine.inner.run import all_finite
from dpg_cli.engine.inner.target import TargetRun, fused_activations
from dpg_cli.engine.params import carrying
from dpg_cli.errors import BadTypeError, DegenerateError
from dpg_cli.metrics.base import TargetMetric

ELSEWHERE = (
    "Compute it from `parameters` (functional_call(model, parameters, ...)) or from the `model` that the metric is given, "
    "not from a copy, and detach nothing."
)


def metric_gradient(run: TargetRun, theta: Tensor, metric: TargetMetric) -> tuple[float, Tensor]:
    """Φ and ∂Φ/∂θ at θ_T.

    Raises:
        BadTypeError: if Φ is no tensor.
        DegenerateError: if Φ is no finite scalar, its gradient is not finite, or Φ does not depend on the parameters.
    """
    flat = torch.zeros_like(theta)
    given, carried = run.leaves(theta, flat), run.leaves(theta, flat)  # one gradient, of both ways to read the weights
    with torch.enable_grad(), fused_activations(run.model), carrying(run.model, carried):
        own = next(iter(carried.values()))
        still = {name: run.model.get_parameter(name).detach() for name in run.space.idle}
        with true_derivative(run.model, lambda: any(one is own for one in run.model.parameters())):
            value = metric({**given, **still}, run.model)
        _check(value)
        if not value.requires_grad:
            raise DegenerateError("The target metric does not depend on the target's parameters.", ELSEWHERE)
        leaves = [*given.values(), *carried.values()]
        torch.autograd.backward(
            value, inputs=leaves
        )  # a checkpoint within is computed again, with what the model carries
    if not all_finite(flat):
        raise DegenerateError("The target metric's gradient is not finite.", "Correct the metric, or lower inner.lr.")
    if not flat.any() and not reached_from(value) & {id(leaf) for leaf in leaves}:
        raise DegenerateError("The target metric does not depend on the weights that it is given.", ELSEWHERE)
    return float(value.detach()), flat


def parameter_gradient(model: nn.Module, final: Mapping[str, Tensor], name: str, metric: TargetMetric) -> Tensor | None:
    """∂Φ/∂θ of one parameter; None where Φ does not depend on it.

    Args:
        model: the target.
        final: θ_T by name.
        name: of the parameter.
        metric: Φ.
    """
    leaf = nn.Parameter(final[name].detach().clone())
    values = {**final, name: leaf}
    with torch.enable_grad(), fused_activations(model), carrying(model, values):
        value = metric(values, model)
    if not value.requires_grad:
        return None
    (found,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return found


def metric_value(run: TargetRun, theta: Tensor, metric: TargetMetric) -> float:
    """Φ at θ_T, without its gradient.

    Raises:
        BadTypeError: if Φ is no tensor.
        DegenerateError: if Φ is no finite scalar.
    """
    final = run.space.final(run.model, theta)
    with torch.no_grad(), carrying(run.model, final):
        value = metric(final, run.model)
    _check(value)
    return float(value)


def metric_measures(run: TargetRun, theta: Tensor, metric: TargetMetric) -> dict[str, float]:
    """The metric's readable measures at θ_T."""
    final = run.space.final(run.model, theta)
    with carrying(run.model, final):
        return metric.measures(final, run.model)


def _check(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise BadTypeError(
            f"The target metric gave a {type(value).__name__}, not a tensor.",
            "Return the tensor itself, without float().",
        )
    if value.ndim != 0 or not torch.isfinite(value):
        raise DegenerateError(
            f"The target metric gave {value.detach().reshape(-1)[:3].tolist()} of shape {tuple(value.shape)} "
            "where one finite scalar is needed.",
            "Lower inner.lr, or correct the metric.",
        )
