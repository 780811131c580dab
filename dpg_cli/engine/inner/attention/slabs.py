"""Slabs: some heads' rows of queries, with all the keys that these see.

    S = scale q kᵀ      C = S, or c tanh(S / c) where scores are capped      P = exp(C - L),  L = log(Σ exp C + exp σ)

(σ: the head's sink, where it has one.) The rows of a slab are whole, so that every sum over keys is taken within it. What is kept
of a slab is L, a number a row; the reverse computes the slab again. A slab has about `NUMBERS` scores, and so every temporary
is of that size, or of `LEAST` rows of keys where the keys alone are more: memory grows linearly with the length. Keys that no row of
a slab sees are left out of it: for causal attention that is nearly half of all scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dpg_cli.engine.inner.attention.seen import Seen

NUMBERS = {"cpu": 1 << 17}  # scores of a slab; elsewhere `DEVICE_NUMBERS`
DEVICE_NUMBERS = 1 << 24
LEAST = 16  # queries of a slab
PART = 4  # slabs that the queries of a head are in, at least: fewer keys for the first ones


@dataclass(frozen=True)
class Shape:
    """An attention's axes.

    Attributes:
        batch: B.
        groups: heads of keys and values.
        repeats: heads of queries that share one of them.
        queries, keys: places.
        width, out: numbers of a query (and key), and of a value.
    """

    batch: int
    groups: int
    repeats: int
    queries: int
    keys: int
    width: int
    out: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        """Of q (B, H, S, D), k (B, G, J, D) and v (B, G, J, E), where G divides H."""
        batch, heads, queries, width = q.shape
        return cls(batch, k.shape[1], heads // k.shape[1], queries, k.shape[2], width, v.shape[3])


@dataclass(frozen=True)
class Slab:
    """A slab.

    Attributes:
        batch: row of the batch.
        groups: heads of keys.
        queries, keys: ranges of places; no keys: the queries see nothing.
        repeats: heads of queries for each head of keys.
    """

    batch: int
    groups: slice
    queries: slice
    keys: slice
    repeats: int

    @property
    def heads(self) -> slice:
        """Heads of queries."""
        return slice(self.groups.start * self.repeats, self.groups.stop * self.repeats)

    def rows(self, tensor: Tensor) -> Tensor:
        """A copy of the slab's part of (B, H, S, X): shape (groups, repeats · queries, X)."""
        part = tensor[self.batch, self.heads, self.queries]
        return part.reshape(self.groups.stop - self.groups.start, -1, tensor.shape[-1])

    def write_(self, tensor: Tensor, rows: Tensor) -> None:
        """Put rows back where they came from."""
        part = tensor[self.batch, self.heads, self.queries]
        part.copy_(rows.view(part.shape))

    def columns(self, tensor: Tensor) -> Tensor:
        """The slab's part of (B, G, J, X), a view: shape (groups, keys, X)."""
        return tensor[self.batch, self.groups, self.keys]

    def sinks(self, tensor: Tensor) -> Tensor:
        """A number a head, (H,), for every row: shape (groups, repeats · queries, 1)."""
        count, length = self.groups.stop - self.groups.start, self.queries.stop - self.queries.start
        return tensor[self.heads].view(count, self.repeats, 1).expand(-1, -1, length).reshape(count, -1, 1)

    def per_head(self, rows: Tensor) -> Tensor:
        """Sums of a number a row, (groups, repeats · queries, 1), over the queries: shape (heads,)."""
        return rows.view(self.heads.stop - self.heads.start, -1).sum(1)


def slabs(shape: Shape, seen: Seen, device: torch.device) -> Iterator[Slab]:
    """The slabs of an attention."""
    numbers = NUMBERS.get(device.type, DEVICE_NUMBERS)
    few = PART if device.type in NUMBERS else 1  # launching a kernel costs more there than hidden scores do
    size = min(numbers // (shape.repeats * shape.keys), -(-shape.queries // few))
    size = max(LEAST, size // LEAST * LEAST)
    for batch in range(shape.batch):
        for start in range(0, shape.queries, size):
            queries = slice(start, min(start + size, shape.queries))
            keys = slice(*seen.reach(batch, queries, shape.keys))
            rows = shape.repeats * (queries.stop - queries.start)
            many = max(1, numbers // (rows * max(1, keys.stop - keys.start)))
            for first in range(0, shape.groups, many):
                groups = slice(first, min(first + many, shape.groups))
                yield Slab(batch, groups, queries, keys, shape.repeats)


def cap_(scores: Tensor, cap: float | None) -> Tensor | None:
    """C from S, in place, and t = tanh(S / c)."""
    if cap is None:
        return None
    turned = torch.tanh(scores / cap)
    torch.mul(turned, cap, out=scores)
    return turned


def slope_of(turned: Tensor) -> Tensor:
    """1 - t²."""
    return torch.mul(turned, turned).neg_().add_(1)


def hide_(scores: Tensor, slab: Slab, seen: Seen) -> None:
    """-inf where nothing is seen, and biases; `scores` is (groups, repeats · queries, keys)."""
    view = scores.view(slab.heads.stop - slab.heads.start, -1, scores.shape[-1])
    seen.hide_(view, slab.batch, slab.heads, slab.queries, slab.keys)


def normalise_(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """P from C, in place, and L, (groups, rows, 1). A row that sees nothing gives zeros, as PyTorch's safe softmax does."""
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    top.masked_fill_(top == -torch.inf, 0.0)
    probs = scores.sub_(top).exp_()
    total = probs.sum(-1, keepdim=True)
    if sinks is not None:
        total += torch.exp(sinks - top)
    total.masked_fill_(total == 0, 1.0)
    return probs.div_(total), top.add_(total.log())
