"""The recipe of an inner run: schedule, clipping, parameter groups, batch plan, replay, averaged weights, and the optimiser step that they make.

One file an element, each with its closed adjoint where it has one. Not here: the optimisers themselves.
"""

from dpg_cli.engine.inner.recipe.groups import Group, Groups
from dpg_cli.engine.inner.recipe.plan import Batches, Plan
from dpg_cli.engine.inner.recipe.replay import Replay
from dpg_cli.engine.inner.recipe.schedule import Schedule
from dpg_cli.engine.inner.recipe.spec import Recipe

__all__ = ["Batches", "Group", "Groups", "Plan", "Recipe", "Replay", "Schedule"]
