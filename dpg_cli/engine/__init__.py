"""The DPG engine as a library: exact metagradients, credit, policy steps; `loop.py` has the algorithm on one screen.

Not here: files, settings, messages. Imports none of the rooms that hold them, and of `metrics` the protocol alone.
"""

from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.recipe import Batches, Group, Groups, Plan, Recipe, Replay, Schedule
from dpg_cli.engine.inner.start import Start
from dpg_cli.engine.metagrad import metagradient, metagradients
from dpg_cli.engine.records import Examples, Metagradient, Metagradients
from dpg_cli.engine.reverse.reference import reference_metagradient
from dpg_cli.models import allocator

allocator.settle()

__all__ = [
    "Batches",
    "Examples",
    "Group",
    "Groups",
    "Metagradient",
    "Metagradients",
    "OptimizerSpec",
    "Plan",
    "Recipe",
    "Replay",
    "Schedule",
    "Start",
    "metagradient",
    "metagradients",
    "reference_metagradient",
]
