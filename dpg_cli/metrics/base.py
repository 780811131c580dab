"""The protocol of a target metric: any differentiable function of the target's weights, to be maximised.

`TargetMetric` is what the engine needs; `Metric` is a base class that gives everything but Φ itself (docs/custom-metrics.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from dpg_cli.errors import BadTypeError
from dpg_cli.models.loading import LanguageModel


@runtime_checkable
class TargetMetric(Protocol):
    """Φ: from the target's parameters to one differentiable scalar; larger is better, so losses are negated."""

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ(θ).

        Args:
            parameters: θ by parameter name (tied parameters once), the tensors to differentiate by.
            model: the target; `functional_call(model, parameters, ...)` and `model(...)` are the same: while a metric is
                read, the model carries θ. What needs θ_0 takes it when the metric is made.

        Returns:
            A 0-dimensional tensor with a graph to `parameters`.
        """
        ...

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Readable measures at θ, by name; no gradients needed. The first one is what displays show."""
        ...

    def describe(self) -> str:
        """What data that raises Φ is for, in words, for displays and data cards."""
        ...


@runtime_checkable
class Pictured(Protocol):
    """What a metric may offer besides: a picture of its effect, and the tensors behind it."""

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """What fine-tuning did, drawn for `lm_head.png`."""
        ...

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `target/patch.safetensors` keeps."""
        ...


class Metric:
    """Base of a metric of one's own: a subclass needs `__call__` alone, and `__init__` where it takes options.

    Args:
        target: the target before fine-tuning: model, tokeniser, head, special tokens. Options of the settings come as
            further keyword arguments of the subclass.

    A subclass that adds `picture` gets its picture into the run folder; `tensors` may stay empty.
    """

    def __init__(self, target: LanguageModel) -> None:
        self.target = target

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ(θ), a 0-dimensional tensor; see `TargetMetric`."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Φ itself, for want of anything more readable."""
        return {"phi": float(self(parameters, model))}

    def describe(self) -> str:
        """The first sentence of the class's docstring."""
        return summary_of(type(self)) or type(self).__name__

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing to keep beside the target itself."""
        return {}


class FunctionMetric:
    """A plain function as a metric: Φ is its value, and its only measure.

    Args:
        function: of (parameters, model), or of (model) alone, which carries the weights.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.takes_both = _positional(function) != 1

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ(θ)."""
        return self.function(parameters, model) if self.takes_both else self.function(model)

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Φ itself."""
        return {"phi": float(self(parameters, model))}

    def describe(self) -> str:
        """The first line of its docstring, or its name."""
        return summary_of(self.function) or getattr(self.function, "__name__", type(self.function).__name__)


def _positional(function: Callable[..., Any]) -> int:
    """How many arguments a function must be given by position; 2 where it does not say."""
    try:
        given = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    if any(one.kind is one.VAR_POSITIONAL for one in given):
        return 2
    places = [one for one in given if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    needed = [one for one in places if one.default is one.empty]
    return len(needed) if needed else min(2, len(places))


def as_metric(metric: Any) -> TargetMetric:
    """A metric as the engine takes it: itself where it has measures, a plain function wrapped.

    Raises:
        BadTypeError: if it cannot be called so.
    """
    if isinstance(metric, type) or not callable(metric):
        what = f"the class {metric.__name__}" if isinstance(metric, type) else f"a {type(metric).__name__}"
        raise BadTypeError(f"The metric is {what}, which cannot be called.", "Give an instance, or a plain function.")
    if callable(getattr(metric, "measures", None)):
        return metric
    if _positional(metric) not in (1, 2):
        raise BadTypeError(
            f"The metric {getattr(metric, '__name__', metric)} takes {_positional(metric)} arguments.",
            "Let it take (parameters, model), or (model) alone.",
        )
    return FunctionMetric(metric)


def summary_of(thing: object) -> str:
    """The first line of an object's own docstring without its full stop; empty where it has none."""
    text = (
        inspect.cleandoc(vars(thing).get("__doc__") or "") if isinstance(thing, type) else inspect.getdoc(thing) or ""
    )
    return text.partition("\n")[0].strip().removesuffix(".")
