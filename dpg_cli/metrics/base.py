"""The protocol of a target metric: any differentiable function of the target's weights, to be maximised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from PIL import Image
from torch import Tensor, nn


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
