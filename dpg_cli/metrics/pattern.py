"""A pattern in the LM head: Φ = -mean softplus(-s · Y ⊙ (W_T - W_0)) over a patch (paper, QR and 67 experiments).

With a margin the change is counted in its own standard errors at the size of the final dataset, z = Y ⊙ (W_T - W_0) / σ:
Φ = -mean softplus(s · (margin - z)). Pixels whose z is beyond the margin stop pulling, and those that noise would turn pull most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from dpg_cli.engine.noise import PatchNoise
from dpg_cli.errors import UsageError
from dpg_cli.metrics.head import head_name
from dpg_cli.metrics.moments import moments_pull
from dpg_cli.patterns.pattern import Pattern, check_fits, decode_qr
from dpg_cli.patterns.render import render_patch

RIGHT = 0.9999  # share of pixels, on average, for which examples are counted


def predictions(scores: Tensor, examples: int, excess: float = 0.0) -> dict[str, float]:
    """What the z of the pixels say of the final dataset.

    Where z itself was measured on drawn tokens, it has noise of its own: of variance `excess`, times that of the dataset.
    What is known of the pixel is then a normal distribution of that variance around z.

    Args:
        scores: z of each pixel at `examples` examples.
        examples: of the final dataset.
        excess: see `PatchNoise`.

    Returns:
        Mean and least z; the expected share of right pixels, `predicted_accuracy`; and how many examples a dataset would need
        for a share of `RIGHT`, `examples_needed`, left out where no number would do.
    """

    def right(factor: float) -> float:
        return float(torch.special.ndtr(scores * (factor / (1 + factor * excess)) ** 0.5).mean())

    found = {"z_mean": float(scores.mean()), "z_least": float(scores.min()), "predicted_accuracy": right(1.0)}
    low, high = 1e-6, 1e6
    if right(high) < RIGHT:
        return found
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if right(middle) >= RIGHT else (middle, high)
    return found | {"examples_needed": float(math.ceil(high * examples))}


class PatternMetric:
    """Φ of a sign pattern Y at a place in the LM head.

    Args:
        model: the target before fine-tuning; its head is W_0.
        pattern: Y, shape (R, C), entries -1 and +1.
        sharpness: s, per unit of head change. Pixels with s·|ΔW| ≫ 1 that are right stop pulling.
        origin: row and column of the patch's upper-left corner.
        margin: in standard errors; 0 leaves noise out of Φ. With it, s is per standard error.
        aims: a policy step is to bring every pixel to the margin (`moments.py`), not to follow Φ's gradient.

    Raises:
        UsageError: if the pattern leaves the head.

    Without a margin, Φ = -ln 2 means that nothing moved; 0 is the supremum.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pattern: Pattern,
        sharpness: float = 20.0,
        origin: tuple[int, int] = (0, 0),
        margin: float = 0.0,
        aims: bool = False,
    ):
        self.head = head_name(model)
        self.pattern = pattern
        weight = model.get_parameter(self.head)
        check_fits(pattern, weight.shape[0], weight.shape[1], origin)
        self.signs = torch.tensor(pattern.signs, dtype=weight.dtype, device=weight.device)
        self.sharpness = sharpness
        self.margin = margin
        self.aims = aims
        self.heard: PatchNoise | None = None
        self.pulled: tuple[Tensor, Tensor] | None = None  # a change, and the pull there
        rows, columns = self.signs.shape
        self.window = (slice(origin[0], origin[0] + rows), slice(origin[1], origin[1] + columns))
        self.before = weight.detach()[self.window].clone()

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the class."""
        change = parameters[self.head][self.window] - self.before
        if not self.margin:
            return -softplus(-self.sharpness * self.signs * change).mean()
        noise = self.noise
        if noise is None and bool((change != 0).any()):
            raise UsageError(
                "metric.margin counts in standard errors of the patch, and these are not known here.",
                "They need an inner run without clipping, a target with a standard LM head whose head is trained; or set "
                "metric.margin = 0.",
            )
        scores = change if noise is None else self.signs * change / noise.to(change)
        return -softplus(self.sharpness * (self.margin - scores)).mean()

    def hear(self, noise: PatchNoise) -> None:
        """Take in what is known of the patch's noise at the final dataset's size."""
        self.heard, self.pulled = noise, None

    @property
    def noise(self) -> Tensor | None:
        """The standard error of each weight's change at the final dataset's size, (R, C); None where it is not known."""
        if self.heard is None:
            return None
        error = self.heard.error_R_C
        floor = torch.finfo(error.dtype).eps * float(error.max())
        return error.clamp_min(floor or torch.finfo(error.dtype).tiny)

    def pull(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """What a policy step follows, (R, C): ∂Φ/∂W, or the adjoint that brings every pixel to the margin."""
        if self.aims and self.heard is not None and self.noise is not None:
            change = self.change(parameters)
            if self.pulled is None or not torch.equal(self.pulled[0], change):  # a policy step asks twice
                self.pulled = change, moments_pull(self.heard, self.margin * self.noise * self.signs - change)
            return self.pulled[1]
        weight = parameters[self.head].detach().requires_grad_()
        with torch.enable_grad():
            (bar,) = torch.autograd.grad(self({self.head: weight}, nn.Module()), weight)
        return bar[self.window]

    def scores(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """z of each pixel, (R, C), float64: positive where it is right; None where the noise is not known."""
        noise = self.noise
        return None if noise is None else (self.signs * self.change(parameters)).double() / noise.double()

    def change(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """W_T - W_0 over the patch, detached."""
        return parameters[self.head].detach()[self.window] - self.before

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Pixel accuracy (share of signs equal to Y), mean |ΔW| over the patch, and s · median |ΔW| or, with a margin,
        s · median |z|; where the noise is known, z and what it predicts (`predictions`)."""
        change = self.change(parameters)
        found = {
            "pixel_accuracy": float((change.sign() == self.signs).double().mean()),
            "mean_change": float(change.abs().mean()),
        }
        scores = self.scores(parameters)
        size = float(change.abs().median()) if not self.margin or scores is None else float(scores.abs().median())
        found["sharpness_times_change"] = size * self.sharpness
        if scores is None or self.heard is None:
            return found
        return found | predictions(scores, self.heard.examples, self.heard.excess)

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
