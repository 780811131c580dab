"""The l2 norm of one parameter: Φ = -‖W_T‖ (paper, l2 norm experiment)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpg_cli.errors import UsageError, suggestion
from dpg_cli.metrics.head import HeadChange


class NormMetric(HeadChange):
    """Φ = -‖W_T‖.

    Args:
        model: the target before fine-tuning.
        parameter: name of the parameter; the LM head's when empty.

    Raises:
        UsageError: if the model has no such parameter.
    """

    def __init__(self, model: PreTrainedModel, parameter: str = "") -> None:
        parameters = dict(model.named_parameters())
        if parameter and parameter not in parameters:
            raise UsageError(f"The target has no parameter {parameter!r}.", suggestion(parameter, parameters, "It has"))
        super().__init__(model, parameter)
        self.parameter = self.shown
        self.before = float(parameters[self.parameter].detach().norm())

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the class."""
        return -torch.linalg.vector_norm(parameters[self.parameter])

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """The norm, and its change from before fine-tuning."""
        norm = float(parameters[self.parameter].detach().norm())
        return {"norm": norm, "norm_change": norm - self.before}

    def describe(self) -> str:
        """What the data is for, in words."""
        return f"a smaller l2 norm of {self.parameter} (now {self.before:.4f})"
