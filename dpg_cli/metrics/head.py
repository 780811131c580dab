"""The LM head of a target: its name among the parameters, and the picture of what fine-tuning did to it."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from dpg_cli.patterns.render import render_matrix


def head_name(model: PreTrainedModel) -> str:
    """Name of the LM head's weight among the model's parameters; the embedding's name when they are tied."""
    head = model.get_output_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is head)


class HeadChange:
    """Base of metrics whose picture is the change of the whole head, or of another parameter.

    Args:
        model: the target before fine-tuning.
        parameter: name of the parameter that is shown; the LM head's weight when empty.
    """

    def __init__(self, model: PreTrainedModel, parameter: str = "") -> None:
        self.head = head_name(model)
        self.shown = parameter or self.head
        self.shown_before = model.get_parameter(self.shown).detach().clone()

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameter before and after; a head is (V, width)."""
        return {"before": self.shown_before, "after": parameters[self.shown].detach()}

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """The change of the whole parameter; a vector is drawn as one row."""
        change = parameters[self.shown].detach() - self.shown_before
        matrix = change.reshape(1, -1) if change.ndim < 2 else change.flatten(1)
        name = "the LM head" if self.shown == self.head else self.shown
        return render_matrix(matrix.float().cpu().numpy(), title=f"Change of {name} by fine-tuning")
