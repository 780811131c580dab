"""Our metagradient of a model against central differences of the stock run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpg_cli.engine import Examples, metagradient
from dpg_cli.engine.reverse.choice import SecondOrder

from .exact import Exact
from .stock import Recipe, Run
from .tiny import PAD, VOCAB

ADAMW = Recipe("AdamW", {"lr": 0.02, "betas": (0.8, 0.95), "eps": 0.03, "weight_decay": 0.1}, batch=3)
SGD = Recipe("SGD", {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01}, batch=2)


class HeldOut:
    """Minus the mean token loss of rows."""

    def __init__(self, rows: Examples) -> None:
        self.rows = rows

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        mask = self.rows.attention_N_S.to(torch.int64)
        inputs = {"input_ids": self.rows.ids_N_S, "attention_mask": mask, "use_cache": False}
        logits = functional_call(model, dict(parameters), (), inputs).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.mT, self.rows.ids_N_S[:, 1:], reduction="none")
        mask = self.rows.label_N_S[:, 1:]
        return -(losses * mask).sum() / mask.sum()

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return "held-out rows"


def rows(count: int, seed: int, longest: int = 8) -> Examples:
    """Ragged rows that have the padding token within, at their ends, and as padding."""
    rng = torch.Generator().manual_seed(seed)
    sequences = []
    for number in range(count):
        length = 4 + (number * 3 + seed) % (longest - 4)
        ids = torch.randint(3, VOCAB, (length,), generator=rng).tolist()
        ids[1 + number % 2] = PAD
        sequences.append([*ids, PAD])
    return Examples.from_sequences(sequences, pad_id=PAD)


@dataclass(frozen=True)
class Verdict:
    """How far our number is from the stock run's.

    Attributes:
        error: |ours - differences| over the size of τ, largest of the directions tried.
        phi: |Φ ours - Φ stock|.
        size: |τ|.
        notes: what the engine said that it chose.
    """

    error: float
    phi: float
    size: float
    notes: tuple[str, ...] = ()


def judge(
    model: nn.Module,
    recipe: Recipe = ADAMW,
    *,
    count: int = 6,
    full: bool = False,
    second_order: SecondOrder = "exact",
) -> Verdict:
    """Compare in one random direction of the data weights, or (full) in every weight.

    Args:
        model: θ_0, float64; left as it was.
        second_order: of our run.
    """
    examples, held_out = rows(count, 0), rows(3, 5)
    rng = torch.Generator().manual_seed(7)
    weights = 1 + 0.3 * torch.rand(count, dtype=torch.float64, generator=rng)
    directions = list(torch.eye(count).double()) if full else [torch.randn(count, dtype=torch.float64, generator=rng)]
    experts = hasattr(getattr(model, "config", None), "_experts_implementation_internal")
    with Exact():
        if experts and second_order in ("difference", "one-sided"):
            model.set_experts_implementation("batched_mm")  # the default has no float64
        ours = metagradient(
            model, examples, recipe.spec(), HeldOut(held_out), batch_size=recipe.batch, weights_N=weights,
            second_order=second_order,
        )  # fmt: skip
        if experts:
            model.set_experts_implementation("batched_mm")
        run = Run(model, examples, recipe, held_out)
        size = float(ours.example_N.norm())
        errors = []
        for direction in directions:
            expected = run.slope(weights, direction)
            errors.append(abs(float(ours.example_N @ direction) - expected) / (size * float(direction.norm())))
        difference = abs(ours.value - run(weights))
    return Verdict(max(errors), difference, size, tuple(getattr(ours, "notes", ())))
