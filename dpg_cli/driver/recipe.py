"""From the settings of the inner run to the engine's recipe."""

from __future__ import annotations

from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.recipe import Batches, Recipe
from dpg_cli.settings.config import InnerConfig


def inner_recipe(inner: InnerConfig) -> Recipe:
    """The recipe that these settings describe."""
    return Recipe(
        OptimizerSpec.of(inner),
        batches=Batches(inner.batch_size),
        normalization=inner.normalization,
        precision=inner.precision,
    )
