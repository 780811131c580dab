"""The run as stock PyTorch makes it: `model(...)`, autograd, `torch.optim`. Nothing of the engine is used here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine import Examples, OptimizerSpec

STEPS = (1e-5, 1e-6)  # of the data weights; rounding in Φ is 1e-16 / h of a slope
AGREED = 1e-6  # relative difference of both rules, with which no shorter step is tried


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning run: optimiser by its name in `torch.optim`, its settings, and rows a step."""

    optimizer: str
    options: dict[str, Any]
    batch: int

    def spec(self) -> OptimizerSpec:
        """The same for the engine."""
        options = dict(self.options)
        if "betas" in options:
            options["beta1"], options["beta2"] = options.pop("betas")
        return OptimizerSpec(self.optimizer.lower(), **options)


def token_losses(model: nn.Module, examples: Examples) -> Tensor:
    """Cross-entropy of each trained token, (N, S - 1), zero elsewhere; the call is the one that a trainer makes."""
    output: Any = model(
        input_ids=examples.ids_N_S, attention_mask=examples.attention_N_S.to(torch.int64), use_cache=False
    )
    losses = nn.functional.cross_entropy(output.logits[:, :-1].mT, examples.ids_N_S[:, 1:], reduction="none")
    return losses * examples.label_N_S[:, 1:]


def train(model: nn.Module, examples: Examples, weights_N: Tensor, recipe: Recipe) -> None:
    """Fine-tune the model in place on weighted rows, in order, once; a batch is padded to its longest row."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, recipe.optimizer)(trained, **recipe.options)
    for start in range(0, len(examples), recipe.batch):
        rows = slice(start, start + recipe.batch)
        batch = examples.rows(rows.start, rows.stop)
        optimizer.zero_grad()
        losses = token_losses(model, batch)
        ((losses.sum(1) * weights_N[rows]).sum() / batch.label_N_S.sum()).backward()
        optimizer.step()


def phi(model: nn.Module, held_out: Examples) -> float:
    """Minus the mean token loss."""
    with torch.no_grad():
        return -float(token_losses(model, held_out).sum() / held_out.label_N_S.sum())


class Run:
    """Φ of a stock run as a function of the data weights, from the same θ_0 each time.

    Args:
        model: θ_0; trained in place, and put back by `restore`.
        examples, recipe, held_out: the run and its metric.
    """

    def __init__(self, model: nn.Module, examples: Examples, recipe: Recipe, held_out: Examples) -> None:
        self.model, self.examples, self.recipe, self.held_out = model, examples, recipe, held_out
        self.start = {name: value.clone() for name, value in model.state_dict().items()}

    def restore(self) -> None:
        """θ_0 again."""
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(self.start[name])

    def __call__(self, weights_N: Tensor) -> float:
        """Φ(θ_T)."""
        train(self.model, self.examples, weights_N, self.recipe)
        value = phi(self.model, self.held_out)
        self.restore()
        return value

    def slope(self, weights_N: Tensor, direction_N: Tensor) -> float:
        """d Φ(w + s d) / d s at s = 0, by the five-point rule.

        Where Φ bends so much that the three-point rule says something else at the first step, a shorter one is tried, and
        the step is taken at which both rules agree best.
        """
        best, gap = 0.0, float("inf")
        for h in STEPS:
            a, b, c, d = (self(weights_N + k * h * direction_N) for k in (-2, -1, 1, 2))
            three, five = (c - b) / (2 * h), (a - 8 * b + 8 * c - d) / (12 * h)
            if abs(three - five) < gap:
                best, gap = five, abs(three - five)
            if gap < AGREED * abs(best):
                break
        return best
