"""The recipe of a fine-tuning run: everything but the data, the target and the metric, frozen and validated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.prepare import prepared
from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.recipe.groups import Groups
from dpg_cli.engine.inner.recipe.plan import Batches, Plan
from dpg_cli.engine.inner.recipe.schedule import Schedule
from dpg_cli.engine.params import ParameterSpace

if TYPE_CHECKING:
    from dpg_cli.engine.inner.target import Normalization
    from dpg_cli.engine.records import Examples


@dataclass(frozen=True)
class Recipe:
    """How a target is fine-tuned.

    Attributes:
        optimizer: with its peak learning rate and weight decay.
        schedule: of the learning rate over the run.
        max_grad_norm: gradients are clipped to this global norm; 0 for never.
        groups: parameters that differ from the rest.
        batches: which examples each step takes.
        normalization: Z_t: valid tokens of the whole step ("token", as transformers), or its examples × length ("example").
        precision: of the backbone's linear maps.
        ema: decay of the running average of the weights that Φ reads (`average.py`); 0 reads the last ones.

    Example:
        >>> Recipe(OptimizerSpec(lr=2e-5), Schedule("cosine", warmup=0.05), max_grad_norm=1.0, batches=Batches(32, epochs=3))
    """

    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: Schedule = field(default_factory=Schedule)
    max_grad_norm: float = 0.0
    groups: Groups = field(default_factory=Groups)
    batches: Batches = field(default_factory=Batches)
    normalization: Normalization = "token"
    precision: Precision = "float32"
    ema: float = 0.0

    def __post_init__(self) -> None:
        if not self.max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm must not be negative, got {self.max_grad_norm}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema}")
        if self.normalization not in ("token", "example"):
            raise ValueError(f"unknown normalization {self.normalization!r}; there are 'token' and 'example'")
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"unknown precision {self.precision!r}; there are 'float32' and 'bf16'")

    @classmethod
    def of(
        cls,
        optimizer: OptimizerSpec | Recipe,
        batch_size: int | None = None,
        normalization: Normalization | None = None,
        precision: Precision | None = None,
    ) -> Recipe:
        """The recipe of an optimiser alone, each example once, in order; or a recipe, with these changed where given."""
        recipe = optimizer if isinstance(optimizer, Recipe) else cls(optimizer)
        if batch_size is not None:
            recipe = replace(recipe, batches=replace(recipe.batches, size=batch_size))
        if normalization is not None:
            recipe = replace(recipe, normalization=normalization)
        return recipe if precision is None else replace(recipe, precision=precision)

    def plan(self, examples: Examples) -> Plan:
        """The examples of every step; see `Batches.plan`."""
        lengths = examples.attention_N_S.sum(1).tolist() if self.batches.pack else None
        return self.batches.plan(len(examples), lengths)

    def settings(self, model: nn.Module) -> dict[str, tuple[float, float]] | None:
        """Peak learning rate and weight decay of each trainable parameter, by name; None where they are all alike."""
        if not self.groups.own and not self.groups.no_decay:
            return None
        return self.groups.settings(model, self.optimizer.lr, self.optimizer.weight_decay)

    def space(self, model: nn.Module) -> ParameterSpace:
        """The trainable parameters as a flat vector, those of one group side by side."""
        settings = self.settings(model)
        if settings is None:
            return ParameterSpace(model)
        return ParameterSpace(model, order=sorted(settings, key=lambda name: settings[name]))

    @contextmanager
    def prepared(self, model: nn.Module, as_it_runs: bool = False) -> Iterator[tuple[nn.Module, list[str]]]:
        """The target ready for the run (`prepare.py`), its frozen parameters asking for no gradients; and what was done to it.

        Args:
            model: as it was given.
            as_it_runs: for a second order by differences.

        Raises:
            UsageError: for a target that no metagradient here is right for, or a glob of the groups that matches nothing.
        """
        with prepared(model, as_it_runs) as (target, notes), self.groups.freezing(target):
            yield target, notes
