"""The protocol of a target metric: any differentiable function of the target's weights, to be maximised.

`TargetMetric` is what the engine needs; `Metric` is a base class that gives everything but Φ itself (docs/custom-metrics.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from dpg_cli.models.loading import LanguageModel


@runtime_checkable
class TargetMetric(Protocol):
    """Φ: from the target's parameters to one differentiable scalar; larger is better, so losses are negated."""

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ(θ).

        Args:
            parameters: θ by parameter name (tied parameters once), the tensors to differentiate by.
            model: the target; call it through `torch.func.functional_call(model, parameters, ...)`. Its own
                parameters are θ_0.

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


def summary_of(thing: object) -> str:
    """The first line of an object's own docstring without its full stop; empty where it has none."""
    text = (
        inspect.cleandoc(vars(thing).get("__doc__") or "") if isinstance(thing, type) else inspect.getdoc(thing) or ""
    )
    return text.partition("\n")[0].strip().removesuffix(".")
