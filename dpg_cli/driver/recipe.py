"""From settings to the engine's recipe, and to the target that it trains: whole, or its adapters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dpg_cli.data.examples import padded
from dpg_cli.data.replay import own_rows
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.recipe import Batches, Group, Groups, Recipe, Replay, Schedule
from dpg_cli.engine.records import Examples
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.metrics.merged import of_merged
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.models.lora import Lora, adapt, shell_of
from dpg_cli.settings.config import Config, TextLossOptions
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
            inner.packed_rows,
        ),
        normalization=inner.normalization,
        precision=inner.precision,
        ema=inner.ema,
    )


def replay_of(config: Config, target: LanguageModel) -> tuple[Replay | None, tuple[str, ...]]:
    """The own data that joins the inner steps, and how it was understood; None where the settings ask for none.

    Raises:
        UsageError: for rows that cannot be read.
    """
    inner = config.inner
    if not inner.replay:
        return None, ()
    found = own_rows(inner.replay, target, inner.max_length, config.seed, config.replay_rows)
    return Replay(Examples(*padded(found.rows, target, range(len(found.rows)))), inner.replay_share), found.notes


def trained_target(
    target: LanguageModel, config: Config, named_metric: str | None = None
) -> tuple[LanguageModel, TargetMetric]:
    """The target as it is trained, and the metric of its weights; with adapters, of the merged ones.

    Args:
        target: as it was loaded; its model is changed in place where it gets adapters.
        config: the settings.
        named_metric: what the user gave as --metric; without it no file of a custom metric is run.

    Raises:
        UsageError: if the metric or the adapters do not fit the target.
    """
    asked = config.lora
    if not asked.rank:
        return target, build_metric(config.metric, target, named_metric)
    text = isinstance(config.metric, TextLossOptions)  # reads what the model says, and needs no merged weights
    base = None if text else (build_metric(config.metric, target, named_metric), shell_of(target.model))
    model: Any = adapt(target.model, Lora.of(asked), config.seed)
    adapted = replace(target, model=model.eval())
    if base is None:
        return adapted, build_metric(config.metric, adapted, named_metric)
    return adapted, of_merged(*base, model)
