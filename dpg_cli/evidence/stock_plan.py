"""Which rows each step of a stock training takes: order, epochs, packed rows, replay. Written anew, nothing of the engine.

A dataset of any size is trained on in as many steps as the run's inner runs have: its rows are split evenly.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dpg_cli.settings.inner import InnerConfig

PACKED_TOGETHER = 1000  # rows that TRL packs among themselves


class Row(NamedTuple):
    """Token ids, and which of them are trained on; None: all but the first."""

    ids: Sequence[int] | np.ndarray
    trained: Sequence[bool] | None = None

    @property
    def tokens(self) -> int:
        """How many are trained on."""
        return max(0, len(self.ids) - 1) if self.trained is None else sum(self.trained[1:])


@dataclass(frozen=True)
class StockPlan:
    """The rows of each step.

    Attributes:
        rows: all of them; those of replay stand last.
        steps: numbers of rows, a list a step.
        units: what a batch is counted in: rows, or packed rows with the numbers of the rows that they hold.
        size: units of a step.
        epochs: passes, as the settings have them.
        replays: steps hold rows of replay besides their units.
    """

    rows: list[Row]
    steps: list[list[int]]
    units: list[list[int]]
    size: int
    epochs: float
    replays: bool = False

    def in_order(self) -> tuple[list[Row], int]:
        """All steps one after the other, each filled up with rows that train nothing, and how many rows each has."""
        size = max(map(len, self.steps))
        blank = Row(self.rows[0].ids[:1], [False])
        return [
            self.rows[step[place]] if place < len(step) else blank for step in self.steps for place in range(size)
        ], size


def stock_plan(
    sequences: Sequence[Sequence[int] | np.ndarray],
    inner: InnerConfig,
    steps_of_epoch: int,
    seed: int,
    drawn: int = 0,
    replay: Sequence[Row] = (),
) -> StockPlan:
    """The plan of a training.

    Args:
        sequences: token ids of the rows; every token after the first is a label.
        inner: the recipe.
        steps_of_epoch: the rows are split into so many batches of equal size.
        seed: of a shuffled order.
        drawn: examples of an inner run of the run; a step of packed rows grows in proportion. 0: as many as there are rows.
        replay: own rows; every step takes some besides, in their order, beginning anew where they end.
    """
    rows = [Row(sequence) for sequence in sequences]
    units = [[number] for number in range(len(rows))]
    size = -(-len(units) // steps_of_epoch)
    if inner.packed_rows:
        units = packed([len(row.ids) for row in rows], inner.packed_rows)
        size = -(-inner.batch_size * inner.accumulation * len(rows) // (drawn or len(rows)))
    each = max(1, -(-len(units) // size))
    total = inner.max_steps or math.ceil(inner.epochs * each)
    steps: list[list[int]] = []
    while len(steps) < total:
        order = stock_order(len(units), inner, seed, len(steps) // each)
        for start in range(0, len(units), size):
            steps.append([number for unit in order[start : start + size] for number in units[unit]])
    steps, count, taken = steps[:total], len(rows), 0
    for step in steps if replay else ():
        more = inner.replayed(len(step))
        step += [count + number % len(replay) for number in range(taken, taken + more)]
        taken += more
    return StockPlan([*rows, *replay[:taken]], steps, units, size, inner.epochs, bool(replay))


def stock_order(count: int, inner: InnerConfig, seed: int, epoch: int) -> list[int]:
    """The order of an epoch: as given, or as the transformers Trainer draws it."""
    if inner.order == "given":
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows that share a packed row of `capacity` tokens: the longest first, each where it leaves the least room (best fit);
    of rows with equal room the one that has had it longest."""
    found: list[list[int]] = []
    for begin in range(0, len(lengths), PACKED_TOGETHER):
        part = [number for number in range(begin, min(begin + PACKED_TOGETHER, len(lengths))) if lengths[number]]
        room: list[tuple[int, int, int]] = []  # (room left, when it came to that, packed row), in order
        for moment, number in enumerate(sorted(part, key=lambda number: -lengths[number])):
            place = bisect.bisect_left(room, (lengths[number], -1, -1))
            if place == len(room):
                found.append([])
                left, row = capacity, len(found) - 1
            else:
                left, _, row = room.pop(place)
            found[row].append(number)
            if left > lengths[number]:
                bisect.insort(room, (left - lengths[number], moment, row))
    return found
