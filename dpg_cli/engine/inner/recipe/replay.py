"""Replay: a share of each step's examples is the user's own data. It is trained on, counts in Z, and gets no credit.

A step with n examples of the run gets k = n s / (1 - s) more, rounded, at least one: s of the whole. They are taken in their
order, beginning anew where they end; every inner run takes the same ones. To the metagradient they are examples like any
other, of which only the run's own are asked for their credit. Source: DESIGN §7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dpg_cli.engine.inner.recipe.plan import Plan
from dpg_cli.engine.records import Examples
from dpg_cli.errors import BadValueError


@dataclass(frozen=True)
class Replay:
    """Own data beside the examples of a run.

    Attributes:
        examples: R of them, in their order.
        share: s, of each step's examples, in (0, 1).
    """

    examples: Examples
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise BadValueError(f"The share of replay must lie between 0 and 1, got {self.share}.")
        if not len(self.examples):
            raise BadValueError("There is no example to replay.")

    def count(self, own: int) -> int:
        """k: how many join a step with so many examples of the run."""
        return replayed(own, self.share)

    def joined(self, examples: Examples, plan: Plan) -> tuple[Examples, Plan]:
        """The run's examples with those of replay that it takes behind them, and the plan of both.

        Args:
            examples: N, padded on the right; without distributions.
            plan: of the run's own.

        Raises:
            BadValueError: for examples with distributions.
        """
        if examples.soft is not None:
            raise BadValueError(
                "Replay has drawn tokens, and these examples have distributions.", "Leave one of the two out."
            )
        count, taken, steps = len(examples), 0, list[Tensor]()
        for number in range(len(plan)):
            own = plan.index(number)
            more = torch.arange(taken, taken + self.count(len(own))) % len(self.examples)
            taken += len(more)
            steps.append(torch.cat([own, count + more]))
        used = self.examples.aligned().rows(0, min(taken, len(self.examples)))
        return stacked([examples, used]), Plan(tuple(steps), count + len(used))


def replayed(own: int, share: float) -> int:
    """Replayed examples of a step with so many of the run's own."""
    return max(1, round(own * share / (1 - share)))


def stacked(parts: Sequence[Examples]) -> Examples:
    """Examples below each other, at the width of the widest; padded on the right."""
    width = max(part.ids_N_S.shape[1] for part in parts)

    def whole(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    return Examples(
        whole([part.ids_N_S for part in parts]),
        whole([part.attention_N_S for part in parts]),
        whole([part.label_N_S for part in parts]),
    )
