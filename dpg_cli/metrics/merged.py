"""Metrics of a LoRA target's *merged* weights: a code in its head, a norm, whatever reads weights by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn

from dpg_cli.metrics.base import Pictured, TargetMetric
from dpg_cli.models.lora import holding, merged_parameters


class MergedMetric:
    """Φ of the merged weights, differentiated by the adapters.

    Args:
        metric: made on the base, before it had adapters.
        shell: the base's modules, see `lora.shell_of`.
        model: the base with its adapters.
    """

    def __init__(self, metric: TargetMetric, shell: nn.Module, model: nn.Module) -> None:
        self.metric, self.shell, self.model = metric, shell, model

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see `TargetMetric`."""
        merged = merged_parameters(model, parameters)
        with holding(self.shell, merged):
            return self.metric(merged, self.shell)

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Those of the metric."""
        merged = {name: value.detach() for name, value in merged_parameters(model, parameters).items()}
        with holding(self.shell, merged):
            return self.metric.measures(merged, self.shell)

    def describe(self) -> str:
        """As the metric says."""
        return self.metric.describe()

    @property
    def change(self) -> Callable[[Mapping[str, Tensor]], Tensor] | None:
        """What fine-tuning did to a pattern's patch, where the metric has one."""
        change = getattr(self.metric, "change", None)
        return None if change is None else lambda parameters: change(self._final(parameters))

    @property
    def notes(self) -> tuple[str, ...]:
        """How the metric understood its own data."""
        return tuple(getattr(self.metric, "notes", ()))

    def _final(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in merged_parameters(self.model, parameters).items()}


class PicturedMergedMetric(MergedMetric):
    """The same of a metric that draws what fine-tuning did."""

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """As the metric draws it."""
        metric: Any = self.metric
        return metric.picture(self._final(parameters))

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the metric keeps them."""
        metric: Any = self.metric
        return metric.tensors(self._final(parameters))


def of_merged(metric: TargetMetric, shell: nn.Module, model: nn.Module) -> MergedMetric:
    """The metric of merged weights; see `MergedMetric`."""
    return (PicturedMergedMetric if isinstance(metric, Pictured) else MergedMetric)(metric, shell, model)


def plain(metric: TargetMetric) -> TargetMetric:
    """The metric itself, whatever weights it is given."""
    return metric.metric if isinstance(metric, MergedMetric) else metric
