"""Packing: several examples in one row, so that ragged examples cost their tokens and not their padding.

Positions begin anew with each example and attention stays within it (transformers sees both in `position_ids`), so that the
numbers are those of the padded rows, to rounding. Bins are filled by best fit, the longest first; TRL fills its own so
(`bins`, which a batch plan uses too). Source: DESIGN §7.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dpg_cli.engine.records import Examples, Layout

CHUNK = 1000  # examples that TRL packs among themselves
WORTH = 0.9  # share of the padded rows, above which packing is left out


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which examples share a row: best fit, the longest first, equal ones in order.

    Args:
        lengths: tokens of each, at least 1; longer ones than the capacity count as that (they are cut).
        capacity: tokens of a row.
    """
    spaces: list[int] = []  # those of open rows, in order, each once
    open_rows: dict[int, deque[int]] = defaultdict(deque)
    found: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda place: -min(lengths[place], capacity)):
        length = min(lengths[number], capacity)
        place = bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            row = open_rows[space].popleft()
            if not open_rows[space]:
                spaces.pop(place)
        else:
            space, row = capacity, len(found)
            found.append([])
        found[row].append(number)
        left = space - length
        open_rows[left].append(row)
        if left and len(open_rows[left]) == 1:
            insort(spaces, left)
    return found


def bins_of_trl(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The rows that TRL's `packing_strategy="bfd"` makes: bins within each thousand examples that are not empty."""
    found = []
    for start in range(0, len(lengths), CHUNK):
        numbers = [number for number in range(start, min(start + CHUNK, len(lengths))) if lengths[number]]
        rows = bins([lengths[number] for number in numbers], capacity)
        found += [[numbers[place] for place in row] for row in rows]
    return found


def pack(batch: Examples) -> Examples:
    """The same examples in fewer rows of the same width, where that is worth it; else the batch itself.

    Args:
        batch: padded on the right; without distributions.

    Returns:
        Rows with a `layout`, whose labels are those of the batch.
    """
    width = batch.ids_N_S.shape[1]
    lengths = batch.attention_N_S.sum(1).tolist()
    rows = bins([max(1, length) for length in lengths], width)
    if batch.soft is not None or len(rows) > WORTH * len(batch):
        return batch
    start = torch.zeros(len(batch), dtype=torch.int64)  # of each example, on the flat axis of the packed rows
    for row, members in enumerate(rows):
        place = row * width
        for number in members:
            start[number] = place
            place += lengths[number]
    owner, column = batch.attention_N_S.nonzero(as_tuple=True)
    places = start.to(owner.device)[owner] + column
    shape = len(rows), width

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(len(rows) * width).index_copy_(0, places, values).view(shape)

    layout = Layout(spread(owner), spread(column))
    real = batch.attention_N_S
    return replace(
        Examples(spread(batch.ids_N_S[real]), spread(real[real]), spread(batch.label_N_S[real])), layout=layout
    )


def unpack(values: Tensor, packed: Examples, like: Examples) -> Tensor:
    """Values of the tokens of packed rows, (B', S, ...), where the batch has them, (B, S, ...); 0 on padding."""
    layout = packed.layout
    assert layout is not None
    real = packed.attention_N_S
    out = values.new_zeros(*like.ids_N_S.shape, *values.shape[2:])
    out[layout.owner_N_S[real], layout.column_N_S[real]] = values[real]
    return out
