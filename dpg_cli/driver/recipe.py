"""From the settings of the inner run to the engine's recipe."""

from __future__ import annotations

from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.recipe import Batches, Group, Groups, Recipe, Schedule
from dpg_cli.settings.inner import InnerConfig


def inner_recipe(inner: InnerConfig, seed: int) -> Recipe:
    """The recipe that these settings describe.

    Args:
        inner: the settings.
        seed: of a shuffled order.
    """
    return Recipe(
        OptimizerSpec.of(inner),
        Schedule(
            inner.schedule,
            inner.warmup,
            inner.cycles,
            inner.power,
            inner.lr_end,
            inner.lr_floor,
            inner.timescale,
            inner.decay_steps,
            inner.decay,
        ),
        inner.max_grad_norm,
        Groups(tuple(Group(g.names, g.lr, g.weight_decay, g.frozen) for g in inner.groups), inner.no_decay),
        Batches(
            inner.batch_size,
            inner.accumulation,
            inner.epochs,
            inner.max_steps,
            inner.order,
            seed,
            inner.drop_last,
        ),
        normalization=inner.normalization,
        precision=inner.precision,
    )
