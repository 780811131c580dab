"""A pattern in the LM head: Φ = -mean softplus(-s · Y ⊙ (W_T - W_0)) over a patch (paper, QR and 67 experiments)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from dpg_cli.metrics.head import head_name
from dpg_cli.patterns.pattern import Pattern, check_fits, decode_qr
from dpg_cli.patterns.render import render_patch


class PatternMetric:
    """Φ of a sign pattern Y at a place in the LM head.

    Args:
        model: the target before fine-tuning; its head is W_0.
        pattern: Y, shape (R, C), entries -1 and +1.
        sharpness: s, per unit of head change. Pixels with s·|ΔW| ≫ 1 that are right stop pulling.
        origin: row and column of the patch's upper-left corner.

    Raises:
        UsageError: if the pattern leaves the head.

    Φ = -ln 2 means that nothing moved; 0 is the supremum.
    """

    def __init__(
        self, model: PreTrainedModel, pattern: Pattern, sharpness: float = 20.0, origin: tuple[int, int] = (0, 0)
    ):
        self.head = head_name(model)
        self.pattern = pattern
        weight = model.get_parameter(self.head)
        check_fits(pattern, weight.shape[0], weight.shape[1], origin)
        self.signs = torch.tensor(pattern.signs, dtype=weight.dtype, device=weight.device)
        self.sharpness = sharpness
        rows, columns = self.signs.shape
        self.window = (slice(origin[0], origin[0] + rows), slice(origin[1], origin[1] + columns))
        self.before = weight.detach()[self.window].clone()

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the class."""
        change = parameters[self.head][self.window] - self.before
        return -softplus(-self.sharpness * self.signs * change).mean()

    def change(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """W_T - W_0 over the patch, detached."""
        return parameters[self.head].detach()[self.window] - self.before

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Pixel accuracy (share of signs equal to Y), mean |ΔW| over the patch, and s · median |ΔW|."""
        change = self.change(parameters)
        return {
            "pixel_accuracy": float((change.sign() == self.signs).double().mean()),
            "mean_change": float(change.abs().mean()),
            "sharpness_times_change": float(change.abs().median()) * self.sharpness,
        }

    def describe(self) -> str:
        """What the data is for, in words."""
        return f"signs of a patch of the LM head that show {self.pattern.source}"

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The patch before and after, (R, C) each."""
        return {"before": self.before, "after": parameters[self.head].detach()[self.window]}

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """The patch before, after, its change and the decoded signs."""
        change = self.change(parameters)
        accuracy = self.measures(parameters, nn.Module())["pixel_accuracy"]
        decoded = decode_qr(change.sign().cpu().numpy()) if self.pattern.kind == "qr" else None
        read = f"read back as \u201c{decoded}\u201d" if decoded else "not readable as a QR code"
        return render_patch(
            self.before.cpu().numpy(),
            (self.before + change).cpu().numpy(),
            self.pattern,
            title=self.pattern.payload or self.pattern.source,
            subtitle=f"pixel accuracy {accuracy:.4f}" + (f", {read}" if self.pattern.kind == "qr" else ""),
        )
