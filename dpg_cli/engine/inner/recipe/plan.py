"""Which examples each optimiser step takes: epochs, order, a last smaller batch, accumulation.

An epoch's order is cut into batches of `size` examples, and `accumulation` batches make one optimiser step; what is left of
an epoch is a smaller batch and a step of fewer batches, and no step reaches into the next epoch. Since the loss of a step is
normalised over all its examples (`num_items_in_batch` of transformers), a step is one list of examples here.

A shuffled epoch e is `torch.randperm` under the seed + e: what the transformers Trainer's sampler gives in one process
(accelerate's `SeedableRandomSampler`). Source: DESIGN §7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dpg_cli.engine.inner.packing import bins_of_trl
from dpg_cli.errors import UsageError

Order = Literal["given", "shuffled"]
Rows = slice | Tensor  # of examples: a stretch of them, or an index list, int64 on the CPU


@dataclass(frozen=True)
class Batches:
    """How examples become optimiser steps.

    Attributes:
        size: examples of a batch; 0 takes all.
        accumulation: batches of an optimiser step.
        epochs: passes over the examples; 1.5 ends in the middle of the second.
        max_steps: optimiser steps, whatever `epochs` says; 0 goes by `epochs`.
        order: "given", or "shuffled" anew in each epoch.
        seed: of the shuffling.
        drop_last: leave out what does not fill a batch at the end of an epoch.
        pack: a batch is `size` rows of at most so many tokens, each filled with whole examples as TRL's packing fills it;
            0 for a batch of `size` examples.
    """

    size: int = 0
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = 0
    order: Order = "given"
    seed: int = 0
    drop_last: bool = False
    pack: int = 0

    def __post_init__(self) -> None:
        if self.order not in ("given", "shuffled"):
            raise ValueError(f"unknown order {self.order!r}; there are 'given' and 'shuffled'")
        for key, least in (("size", 0), ("accumulation", 1), ("max_steps", 0), ("seed", 0), ("pack", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be positive, got {self.epochs}")

    def steps_of_epoch(self, count: int) -> int:
        """Optimiser steps of one epoch over `count` examples."""
        size = self.size or max(1, count)
        batches = count // size if self.drop_last else -(-count // size)
        return -(-batches // self.accumulation)

    def rescaled(self, before: int, after: int) -> Batches:
        """Batches with which `after` examples take as many steps an epoch as `before` do with these; none is left out."""
        if self.pack:  # rows of a step in proportion: how many there are depends on the lengths
            size = -(-self.size * self.accumulation * after // before) if self.size else 0
            return replace(self, size=size, accumulation=1, drop_last=False)
        size = -(-after // min(after, max(1, self.steps_of_epoch(before))))
        return replace(self, size=size, accumulation=1, drop_last=False)

    def steps(self, count: int) -> int:
        """T: optimiser steps of a run on `count` examples."""
        return self.max_steps or math.ceil(self.epochs * self.steps_of_epoch(count))

    def plan(self, count: int, lengths: Sequence[int] | None = None) -> Plan:
        """The examples of every step.

        Args:
            count: N.
            lengths: tokens of each example; only `pack` needs them.

        Raises:
            UsageError: if no batch can be filled, or an example does not fit a row.
            ValueError: if lengths are needed and not given.
        """
        if self.pack:
            return self._packed(count, lengths)
        each = self.steps_of_epoch(count)
        if not each:
            raise UsageError(
                f"{count:,} examples fill no batch of {self.size:,}, and what is left over is dropped.",
                "Take smaller batches, or keep the last one.",
            )
        size = self.size or count
        used = count // size * size if self.drop_last else count
        stride, found = size * self.accumulation, list[Rows]()
        while len(found) < self.steps(count):
            epoch = len(found) // each
            starts = range(0, used, stride)[: self.steps(count) - len(found)]
            if self.order == "given":
                found += [slice(start, min(start + stride, used)) for start in starts]
            else:
                order = shuffled(count, self.seed + epoch)
                found += [order[start : min(start + stride, used)] for start in starts]
        return Plan(tuple(found), count)

    def _packed(self, count: int, lengths: Sequence[int] | None) -> Plan:
        """The plan of rows that hold several examples."""
        if lengths is None:
            raise ValueError("a plan of packed rows needs the lengths of the examples")
        longest = max(lengths, default=0)
        if longest > self.pack:
            raise UsageError(
                f"An example of {longest:,} tokens does not fit a packed row of {self.pack:,}.",
                "Cut examples to that length.",
            )
        rows = [torch.tensor(row) for row in bins_of_trl(lengths, self.pack)]
        plan = replace(self, pack=0).plan(len(rows))
        steps = (plan.index(number).tolist() for number in range(len(plan)))
        return Plan(tuple(torch.cat([rows[row] for row in step]) for step in steps), count)


@dataclass(frozen=True)
class Plan:
    """The examples of each of T steps.

    Attributes:
        rows: of each step.
        count: N, of all examples.
    """

    rows: tuple[Rows, ...]
    count: int

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, steps: Sequence[Sequence[int]], count: int) -> Plan:
        """A plan made by hand.

        Args:
            steps: the example numbers of each step; a number may come again, in a step or in several.
            count: N.

        Raises:
            ValueError: if there is no step, an empty one, or a number out of range.
        """
        if not steps or not all(len(step) for step in steps):
            raise ValueError("a plan needs at least one step, and each at least one example")
        if any(not 0 <= number < count for step in steps for number in step):
            raise ValueError(f"a plan names examples that are not among the {count}")
        return cls(tuple(torch.tensor(list(step), dtype=torch.int64) for step in steps), count)

    def index(self, number: int) -> Tensor:
        """The examples of a step as an index list, int64 on the CPU."""
        rows = self.rows[number]
        return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """The step and the example of each of M visits, in order; int64 on the CPU."""
        each = [self.index(number) for number in range(len(self))]
        steps = [torch.full((len(rows),), number) for number, rows in enumerate(each)]
        return torch.cat(steps), torch.cat(each)


def shuffled(count: int, seed: int) -> Tensor:
    """An epoch's order, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))
