"""Write a bitmap into an attention matrix: Φ = -mean softplus(-s · Y ⊙ (W_T - W_0)) over a patch of its weight.

The paper's pattern metric, moved from the LM head to the projection that makes queries, keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus

from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.patterns.pattern import check_fits, pattern_from_rows
from dpg_cli.patterns.render import render_patch

HEART = (".##.##.", "#######", "#######", ".#####.", "..###..", "...#...")
PROJECTIONS = ("c_attn.weight", "q_proj.weight", "query_key_value.weight", "qkv_proj.weight")


class AttentionBitmap(Metric):
    """A bitmap in the signs of an attention matrix's change.

    Args:
        target: before fine-tuning.
        parameter: name of a matrix of the target; by default the first that makes attention's queries.
        rows: the bitmap, # for up and . for down; a heart by default.
        origin: row and column of its upper-left corner.
        sharpness: s, per unit of weight change.

    Raises:
        UsageError: if there is no such matrix, or the bitmap does not fit.
    """

    def __init__(
        self,
        target: LanguageModel,
        parameter: str = "",
        rows: Sequence[str] = HEART,
        origin: Sequence[int] = (0, 0),
        sharpness: float = 5000.0,
    ) -> None:
        super().__init__(target)
        parameters = dict(target.model.named_parameters())
        self.parameter = parameter or next((name for name in parameters if name.endswith(PROJECTIONS)), "")
        weight = parameters.get(self.parameter)
        if weight is None or weight.ndim != 2:
            raise UsageError(f"The target has no matrix {self.parameter!r}.", "Name one with options.parameter.")
        self.pattern = pattern_from_rows(rows)
        check_fits(self.pattern, weight.shape[0], weight.shape[1], (origin[0], origin[1]), self.parameter)
        self.signs = torch.tensor(self.pattern.signs, dtype=weight.dtype, device=weight.device)
        self.window = tuple(slice(at, at + size) for at, size in zip(origin, self.pattern.shape, strict=True))
        self.before = weight.detach()[self.window].clone()
        self.sharpness = sharpness

    def change(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """W_T - W_0 over the patch."""
        return parameters[self.parameter][self.window] - self.before

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        return -softplus(-self.sharpness * self.signs * self.change(parameters)).mean()

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Pixel accuracy, and s · median |ΔW|: a few units let pixels that are already right stop pulling."""
        change = self.change(parameters)
        accuracy = (change.sign() == self.signs).double().mean()
        return {
            "pixel_accuracy": float(accuracy),
            "sharpness_times_change": float(change.abs().median()) * self.sharpness,
        }

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The patch before and after, (R, C) each."""
        return {"before": self.before, "after": parameters[self.parameter].detach()[self.window]}

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """The patch before, after, its change and the signs of it."""
        patches = {name: patch.cpu().numpy() for name, patch in self.tensors(parameters).items()}
        return render_patch(patches["before"], patches["after"], self.pattern, title=self.parameter, subtitle="")
