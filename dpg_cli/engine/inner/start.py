"""A warm start: an inner run that goes on from a checkpoint, with its optimiser state, schedule and order.

The run has T steps in all, of which the first `step` are made; their data has no part in the metagradient. θ is the model's
own. (θ, m, v) at the start are constants, so the reverse ends there as it ends at a fresh start. Source: DESIGN §7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers import OptimizerSpec, State, initial_state
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.errors import UsageError


@dataclass(frozen=True)
class Start:
    """Where a run begins, unless it is fresh.

    Attributes:
        step: optimiser steps that are made.
        m, v: the optimiser's state by parameter name, each of its parameter's shape: AdamW's averages of g and g², SGD's
            momentum buffer as m. A name that is missing stands for zeros.
    """

    step: int
    m: Mapping[str, Tensor] = field(default_factory=dict)
    v: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"a run cannot start at step {self.step}")

    def state(self, spec: OptimizerSpec, space: ParameterSpace, theta: Tensor) -> State:
        """The state before the first step that is made, in flat vectors.

        Args:
            spec: the optimiser.
            space: where each parameter is.
            theta: θ, shape (n,).

        Raises:
            UsageError: for the state of a parameter that is not trained, of another shape, or not finite, or one that the
                optimiser does not have.
        """
        fresh = initial_state(spec, theta)
        vectors = {"m": fresh.m, "v": fresh.v}
        shapes = dict(zip(space.names, space.shapes, strict=True))
        for key, given in (("m", self.m), ("v", self.v)):
            if not given:
                continue
            if not len(vectors[key]):
                raise UsageError(
                    f"The checkpoint has second moments, and {spec.name} keeps none.",
                    "Name the optimiser that it was trained with.",
                )
            for name, value in given.items():
                if name in space.idle:
                    continue
                if name not in shapes or value.shape != shapes[name]:
                    what = "is not trained" if name not in shapes else f"has the shape {tuple(shapes[name])}"
                    raise UsageError(
                        f"The checkpoint has optimiser state of {name!r}, {tuple(value.shape)}; here that parameter {what}.",
                        "Train the same parameters as the checkpoint's run.",
                    )
                if not bool(torch.isfinite(value).all()):
                    raise UsageError(f"The optimiser state of {name!r} is not finite.", "Take an earlier checkpoint.")
            placed = [given[name].to(theta) if name in given else None for name in space.names]
            vectors[key] = space.flatten(placed, theta)
        return State(theta, vectors["m"], vectors["v"])
