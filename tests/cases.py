"""One table of inner runs on which the fast metagradient is judged by the reference. A capability joins with a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from builders import make_examples, make_target
from optimizers_table import OPTIMIZERS
from torch import Tensor, nn

from dpg_cli.engine import Batches, Examples, Group, Groups, Metagradient, Recipe, Schedule, metagradient
from dpg_cli.engine.inner.target import Normalization
from dpg_cli.engine.reverse.reference import reference_metagradient
from dpg_cli.metrics.base import TargetMetric

SIZES = {1: (5, 5), 3: (11, 4), 8: (15, 2)}  # T: (examples, batch); B divides N in none but the first


@dataclass(frozen=True)
class Case:
    """An inner run.

    Attributes:
        optimizer: a row of the table of optimisers.
        steps: T.
        architecture, tied: of the target.
        normalization: of the loss.
        ragged: sequences of several lengths.
        elements: of the recipe, besides optimiser, batch size and normalisation.
        label: what pytest calls them.
    """

    optimizer: str = "adamw-eps_root"
    steps: int = 3
    architecture: str = "gpt2"
    tied: bool = True
    normalization: Normalization = "token"
    ragged: bool = True
    label: str = ""
    elements: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As pytest shows it."""
        tied = "tied" if self.tied else "untied"
        width = "ragged" if self.ragged else "even"
        name = f"{self.architecture}-{tied}-{self.optimizer}-T{self.steps}-{self.normalization}-{width}"
        return f"{name}-{self.label}" if self.label else name

    @property
    def recipe(self) -> Recipe:
        """All of its settings."""
        spec = OPTIMIZERS[self.optimizer].spec
        settings = {"batches": Batches(self.batch), "normalization": self.normalization, **self.elements}
        return Recipe(spec, **settings)

    @property
    def batch(self) -> int:
        """B."""
        return SIZES[self.steps][1]

    def model(self) -> nn.Module:
        """θ_0, in float64."""
        return make_target(self.architecture, tied=self.tied)

    def examples(self) -> Examples:
        """N of them."""
        count = SIZES[self.steps][0]
        if self.ragged:
            return make_examples(count)
        even = make_examples(count, shortest=7, longest=7)
        assert bool(even.attention_N_S.all())
        return even

    def weights(self) -> Tensor:
        """Data weights, none of them 1."""
        count = SIZES[self.steps][0]
        return 1.1 + 0.3 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(self.steps))

    def fast(self, metric: TargetMetric, weights_N: Tensor | None = None, **more: Any) -> Metagradient:
        """By the engine."""
        weights = self.weights() if weights_N is None else weights_N
        return metagradient(self.model(), self.examples(), self.recipe, metric, weights_N=weights, **more)

    def slow(self, metric: TargetMetric, weights_N: Tensor | None = None, **more: Any) -> Metagradient:
        """By the reference."""
        weights, plain = self.weights() if weights_N is None else weights_N, OPTIMIZERS[self.optimizer].plain
        return reference_metagradient(
            self.model(), self.examples(), self.recipe, metric, weights_N=weights, step=plain, **more
        )


TARGETS = [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)]

ELEMENTS: dict[str, dict[str, Any]] = {
    "schedule": {"schedule": Schedule("cosine", warmup=1)},
    "clip": {"max_grad_norm": 0.5},
    "groups": {
        "groups": Groups((Group(("*mlp*",), lr=0.005), Group(("*.1.*attn*",), frozen=True)), ("biases", "norms"))
    },
    "epochs": {"batches": Batches(4, epochs=1.5, order="shuffled", seed=5)},
    "accumulation": {"batches": Batches(2, accumulation=2, epochs=2, order="shuffled")},
}
ELEMENTS["ema"] = {"ema": 0.6}
ELEMENTS["all"] = {key: value for elements in ELEMENTS.values() for key, value in elements.items()}

CASES = [
    *(Case(optimizer, 3, *target) for optimizer, target in product(OPTIMIZERS, TARGETS)),
    *(Case(optimizer, steps) for optimizer, steps in product(OPTIMIZERS, (1, 8))),
    *(Case("adamw", steps, *target) for steps, target in product((1, 8), TARGETS[1:])),
    *(Case("sgd-momentum", steps, *target, "example") for steps, target in product(SIZES, TARGETS)),
    *(Case("adamw-eps_root", steps, *TARGETS[2], "example", ragged=False) for steps in SIZES),
    *(
        Case(optimizer, 3, *target, label=label, elements=elements)
        for (label, elements), optimizer, target in product(
            ELEMENTS.items(), ("adamw-eps_root", "sgd-nesterov", "muon"), (TARGETS[0], TARGETS[3])
        )
    ),
]
