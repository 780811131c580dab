"""The DPG engine as a library: exact metagradients, credit, policy steps. Imports neither `cli` nor `runs`."""

from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.models import allocator

allocator.settle()

__all__ = ["Examples", "Metagradient", "OptimizerSpec", "metagradient"]
