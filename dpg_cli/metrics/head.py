"""The LM head of a target: its name among the parameters, and the picture of what fine-tuning did to it."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from dpg_cli.render import render_matrix


def head_name(model: PreTrainedModel) -> str:
    """Name of the LM head's weight among the model's parameters; the embedding's name when they are tied."""
    head = model.get_output_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is head)


class HeadChange:
    """Base of metrics whose picture is the change of the whole head.

    Args:
        model: the target before fine-tuning.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.head = head_name(model)
        self.head_before = model.get_parameter(self.head).detach().clone()

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head before and after, (V, width) each."""
        return {"before": self.head_before, "after": parameters[self.head].detach()}

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """The change of the whole head."""
        change = parameters[self.head].detach() - self.head_before
        return render_matrix(change.float().cpu().numpy(), title="Change of the LM head by fine-tuning")
