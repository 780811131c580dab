"""The DPG engine as a library: exact metagradients, credit, policy steps. Imports neither `cli` nor `runs`."""

from dpg_cli import allocator
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.optim import OptimizerSpec
from dpg_cli.engine.records import Examples, Metagradient

allocator.settle()

__all__ = ["Examples", "Metagradient", "OptimizerSpec", "metagradient"]
