"""The inner optimisers, one file each: settings checked, one step, its adjoint, its elasticity. A new one is registered below.

Not here: what calls them (`../run.py`, `engine/reverse/walk.py`), and what is laid over any of them: schedules, clipping.
"""

from dpg_cli.engine.inner.optimizers.adam import Adam
from dpg_cli.engine.inner.optimizers.adamw import AdamW
from dpg_cli.engine.inner.optimizers.base import (
    Optimizer,
    OptimizerSpec,
    Rate,
    Rates,
    State,
    adjoint,
    blocks,
    by_matrix,
    elasticity,
    initial_state,
    no_vector,
    register,
    registered,
    uniform,
    update,
)
from dpg_cli.engine.inner.optimizers.elementwise import Elementwise
from dpg_cli.engine.inner.optimizers.muon import Muon
from dpg_cli.engine.inner.optimizers.ranges import hidden_matrices, ranges_of
from dpg_cli.engine.inner.optimizers.sgd import SGD

register("adam", Adam())
register("adamw", AdamW())
register("muon", Muon())
register("sgd", SGD())

__all__ = [
    "Elementwise",
    "Optimizer",
    "OptimizerSpec",
    "Rate",
    "Rates",
    "State",
    "adjoint",
    "blocks",
    "by_matrix",
    "elasticity",
    "hidden_matrices",
    "initial_state",
    "no_vector",
    "ranges_of",
    "register",
    "registered",
    "uniform",
    "update",
]
