"""One table of inner runs on which the fast metagradient is judged by the reference. A capability joins with a row.

Architecture, tied or not x optimiser x elements of the recipe x packing, adapters, padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import pytest
import torch
from builders import make_adapted, make_examples, make_target, make_uneven
from optimizers_table import OPTIMIZERS
from torch import Tensor, nn

from dpg_cli.engine import Batches, Examples, Group, Groups, Metagradient, Recipe, Schedule, metagradient
from dpg_cli.engine.inner.target import Normalization
from dpg_cli.engine.reverse.reference import reference_metagradient
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.models.lora import Lora

SIZES = {
    1: (5, 5),
    3: (11, 4),
    8: (15, 2),
}  # T, where a recipe does not say it: (examples, batch); B divides N in the first
Rows = Literal["ragged", "even", "uneven", "left"]  # uneven: mostly short, one long; left: ragged, padded on the left
PADDING = 5  # a token that occurs in the rows


@dataclass(frozen=True)
class Case:
    """An inner run.

    Attributes:
        optimizer: a row of the table of optimisers.
        steps: T, where the elements have no batches of their own.
        architecture, tied: of the target.
        normalization: of the loss.
        rows: what the sequences are like.
        label: what pytest calls the rest.
        elements: of the recipe, besides optimiser, batch size and normalisation.
        packing: examples share rows.
        lora: adapters are trained beside a frozen base; `moved`: their B is not zero.
        padding: the embedding has a `padding_idx`, a token of the rows.
    """

    optimizer: str = "adamw-eps_root"
    steps: int = 3
    architecture: str = "gpt2"
    tied: bool = True
    normalization: Normalization = "token"
    rows: Rows = "ragged"
    label: str = ""
    elements: Mapping[str, Any] = field(default_factory=dict)
    packing: bool = False
    lora: Lora | None = None
    moved: bool = True
    padding: bool = False

    @property
    def name(self) -> str:
        """As pytest shows it."""
        tied = "tied" if self.tied else "untied"
        name = f"{self.architecture}-{tied}-{self.optimizer}-T{self.steps}-{self.normalization}-{self.rows}"
        return f"{name}-{self.label}" if self.label else name

    @property
    def recipe(self) -> Recipe:
        """All of its settings."""
        spec = OPTIMIZERS[self.optimizer].spec
        settings = {"batches": Batches(SIZES[self.steps][1]), "normalization": self.normalization, **self.elements}
        return Recipe(spec, **settings)

    def model(self) -> nn.Module:
        """θ_0, in float64."""
        if self.lora is not None:
            pytest.importorskip("peft")
            return make_adapted(self.architecture, self.lora, moved=self.moved)
        model: Any = make_target(self.architecture, tied=self.tied)
        if self.padding:
            model.get_input_embeddings().padding_idx = PADDING
        return model

    def examples(self) -> Examples:
        """N of them."""
        count = SIZES[self.steps][0]
        if self.rows == "even":
            return make_examples(count, shortest=7, longest=7)
        made = make_uneven(count) if self.rows == "uneven" else make_examples(count)
        if self.rows != "left":
            return made
        places = torch.arange(made.ids_N_S.shape[1]) + made.attention_N_S.sum(
            1, keepdim=True
        )  # each row's end comes last
        parts = (made.ids_N_S, made.attention_N_S, made.label_N_S)
        return Examples(*(part.gather(1, places % part.shape[1]) for part in parts))

    def weights(self) -> Tensor:
        """Data weights, none of them 1."""
        count = SIZES[self.steps][0]
        return 1.1 + 0.3 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(self.steps))

    def fast(self, metric: TargetMetric, weights_N: Tensor | None = None, **more: Any) -> Metagradient:
        """By the engine."""
        weights = self.weights() if weights_N is None else weights_N
        return metagradient(
            self.model(), self.examples(), self.recipe, metric, weights_N=weights, packing=self.packing, **more
        )

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
        "groups": Groups(
            (
                Group(("*mlp*",), lr=0.005),
                Group(("*.1.*attn*",), frozen=True),
                Group(("*.1.*",), lr=0.015, weight_decay=0.2),
            ),
            ("biases", "norms"),
        )
    },
    "epochs": {"batches": Batches(4, epochs=1.5, order="shuffled", seed=5)},
    "accumulation": {"batches": Batches(2, accumulation=2, epochs=2, order="shuffled")},  # 11 examples: 4, 4, 3
}
ELEMENTS["ema"] = {"ema": 0.6}
ELEMENTS["all"] = {key: value for elements in ELEMENTS.values() for key, value in elements.items()}
ALL = ELEMENTS["all"]
WHOLE = {key: value for key, value in ALL.items() if key != "groups"}  # whose globs name no adapters
OTHERS: dict[str, dict[str, Any]] = {
    "clip-idle": {"max_grad_norm": 1e3},
    "no-decay": {
        "groups": Groups(no_decay=("biases", "norms", "embeddings")),
        "schedule": Schedule("linear", warmup=0.1),
    },
    "capped": {"batches": Batches(2, max_steps=4, drop_last=True), "normalization": "example"},
    "trl-rows": {"batches": Batches(2, pack=20, epochs=2, order="shuffled")},
}
PACKED = {
    "batches": Batches(6, epochs=2, order="shuffled"),
    "max_grad_norm": 0.5,
    "schedule": Schedule("cosine", warmup=1),
}


def adapters(architecture: str) -> dict[str, Lora]:
    """Kinds of adapters, by the label of their row."""
    some = {"gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}[architecture]
    return {
        "lora": Lora(2, 4.0),
        "lora-some-rs": Lora(3, 6.0, some, rslora=True),
        "lora-head-whole": Lora(2, 4.0, save=("lm_head",)),
        "lora-in-the-head": Lora(2, 4.0, ("lm_head",)),
    }


CASES = [
    *(Case(optimizer, 3, *target) for optimizer, target in product(OPTIMIZERS, TARGETS)),
    *(Case(optimizer, steps) for optimizer, steps in product(OPTIMIZERS, (1, 8))),
    *(Case("adamw", steps, *target) for steps, target in product((1, 8), TARGETS[1:])),
    *(Case("sgd-momentum", steps, *target, "example") for steps, target in product(SIZES, TARGETS)),
    *(Case("adamw-eps_root", steps, *TARGETS[2], "example", "even") for steps in SIZES),
    *(
        Case(optimizer, 3, *target, label=label, elements=elements)
        for (label, elements), optimizer, target in product(
            ELEMENTS.items(), ("adamw-eps_root", "sgd-nesterov", "muon"), (TARGETS[0], TARGETS[3])
        )
    ),
    Case("adamw-eps_root", 1, *TARGETS[3], label="clip", elements=ELEMENTS["clip"]),
    *(
        Case(optimizer, 8, *target, rows="uneven", label=label, elements=elements)
        for (label, elements), optimizer, target in zip(
            OTHERS.items(), ("adamw-eps_root", "sgd-momentum") * 2, TARGETS, strict=True
        )
    ),
    *(
        Case("adamw-eps_root", 8, *target, rows="uneven", label="packed", elements=PACKED, packing=True)
        for target in TARGETS
    ),
    Case("muon", 8, *TARGETS[2], rows="uneven", label="packed-all", elements=ALL, packing=True),
    *(
        Case(
            steps=3, architecture=name, tied=False, rows="uneven", label=label, elements=WHOLE, packing=True, lora=lora
        )
        for name in ("gpt2", "llama")
        for label, lora in adapters(name).items()
    ),
    Case("adamw-eps_root", 3, "llama", False, label="lora-fresh", lora=Lora(2, 4.0), moved=False),
    *(Case("adamw", 3, *target, label="padding", padding=True) for target in TARGETS),
    Case("sgd-nesterov", 3, *TARGETS[2], rows="left", label="padding", padding=True),
]
