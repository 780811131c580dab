"""Shared prefixes: examples of a step that begin with the same untrained tokens have these once, in a row that they share.

    system prompt | question 1 | answer | answer | question 2 | answer | ...

The rows of a batch are sorted by their untrained beginnings. Each then lays out what it does not have in common with the one
before, so that a row is a tree in the order of a depth-first walk: a token has the place `until` which it is seen, the end of all
examples that go through it, and place i sees place j if j <= i < until_j. Positions are the columns of the examples. All else
in a model is per token, so adjoints at a prefix add up by themselves; its last token predicts the first label of each example
after it. The numbers are those of plain rows, to rounding.

Trees grow as long as that costs fewer multiplications (`Shape`): attention with a mask of one's own grows with the square of a
row. As in packing, several trees then fill a row. How a model comes to see such rows: `attention/served.py`. Source: DESIGN §7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.head import Head
from dpg_cli.engine.inner.packing import WORTH, bins
from dpg_cli.engine.records import Examples, Layout

LEAST = 16  # tokens of a prefix that is worth a mask of its own

Tree = list[tuple[int, int]]  # examples of a row, each with how many of its tokens stand there already


@dataclass(frozen=True)
class Shape:
    """What decides whether sharing is cheaper: the size of a backbone.

    Attributes:
        weights: that each token is multiplied with.
        width: of the hidden states.
        layers: how many.
    """

    weights: int
    width: int
    layers: int

    @classmethod
    def of(cls, head: Head) -> Shape:
        """Of a model's backbone; embeddings are looked up and not counted."""
        looked_up = {id(m.weight) for m in head.base.modules() if isinstance(m, nn.Embedding)}
        config: Any = getattr(head.base, "config", None)
        weights = sum(p.numel() for p in head.base.parameters() if p.ndim > 1 and id(p) not in looked_up)
        return cls(weights, head.layer.in_features, int(getattr(config, "num_hidden_layers", 0) or 1))

    def cost(self, tokens: int, pairs: float) -> float:
        """Multiplications of a forward pass over so many tokens, of which so many pairs attend to each other."""
        return self.weights * tokens + 2.0 * self.width * self.layers * pairs


def alike(examples: Examples) -> bool:
    """Whether two examples have a prefix in common that is worth a mask, and no distributions."""
    if examples.soft is not None or examples.ids_N_S.shape[1] <= LEAST:
        return False
    long = examples.attention_N_S[:, LEAST - 1] & ~examples.label_N_S[:, :LEAST].any(1)
    begins = examples.ids_N_S[long, :LEAST]
    return len(torch.unique(begins, dim=0)) < len(begins)


def share(batch: Examples, shape: Shape, most: int) -> Examples | None:
    """The same examples in rows where common prefixes stand once; None where that saves less than a tenth of the tokens.

    Args:
        batch: padded on the right.
        shape: of the backbone.
        most: tokens of a row.

    Returns:
        Rows with a `layout`, whose labels are those of the batch.
    """
    if not alike(batch):
        return None
    lengths = batch.attention_N_S.sum(1)
    lead = torch.where(
        batch.label_N_S.any(1), batch.label_N_S.long().argmax(1), lengths
    )  # tokens before the first label
    own = lengths.tolist()
    trees = _grown(batch.ids_N_S.cpu(), own, lead.cpu(), shape, most)
    sizes = [sum(own[number] - known for number, known in tree) for tree in trees]
    if sum(sizes) > WORTH * sum(own):
        return None
    rows = bins(sizes, max(batch.ids_N_S.shape[1], *sizes))
    return laid_out(batch, [[trees[place] for place in row] for row in rows])


def neighbours(ids_N_S: Tensor, lead_N: Tensor) -> tuple[list[int], list[int]]:
    """Rows sorted by their untrained beginnings, and how many tokens of it each has in common with the one before.

    Args:
        ids_N_S: token ids on the CPU, int64.
        lead_N: length of these beginnings, on the CPU.
    """
    keys = ids_N_S.numpy().astype(">i8")  # as bytes these are in the order of the numbers
    whole = lead_N.tolist()
    order = sorted(range(len(keys)), key=lambda number: keys[number, : whole[number]].tobytes())
    ids, lead = ids_N_S[order], lead_N[order]
    both = torch.minimum(lead[1:], lead[:-1])
    same = (ids[1:] == ids[:-1]) & (torch.arange(ids.shape[1]) < both[:, None])
    return order, [0, *same.cumprod(1).sum(1).tolist()]


def _grown(ids_N_S: Tensor, lengths: list[int], lead_N: Tensor, shape: Shape, most: int) -> list[Tree]:
    """Trees of examples: a next one joins where that is cheaper than a row of its own, and than what sharing costs each so far."""
    trees: list[Tree] = []
    size, own = 0, 0.0  # of the last tree: tokens, multiplications
    for number, known in zip(*neighbours(ids_N_S, lead_N), strict=True):
        length = lengths[number]
        if not length:
            continue
        alone = shape.cost(length, length * length / 2)  # a causal kernel skips what it does not see
        if trees and known >= LEAST and size + length - known <= most:
            joined = size + length - known
            more = shape.cost(joined, joined * joined) - own
            # beyond the tokens that are theirs alone: of the one that joins, and a mean one's of the tree
            wasted, mean = more - shape.weights * (length - known), own - shape.weights * (size - known)
            if more < alone and wasted * len(trees[-1]) <= mean:
                trees[-1].append((number, known))
                size, own = joined, own + more
                continue
        trees.append([(number, 0)])
        size, own = length, alone
    return trees


def laid_out(batch: Examples, rows: Sequence[Sequence[Tree]]) -> Examples:
    """Trees of a batch's examples in rows."""
    lengths = batch.attention_N_S.sum(1).tolist()
    taken = [sum(lengths[number] - known for tree in row for number, known in tree) for row in rows]
    width = max(taken)
    owner, column, before = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(3))
    until = torch.arange(1, width + 1).repeat(len(rows), 1)  # padding is seen by itself
    real = torch.arange(width) < torch.tensor(taken)[:, None]
    place = torch.empty(max(lengths), dtype=torch.int64)  # of each token of the example at hand
    for row, trees in enumerate(rows):
        end = 0
        for tree in trees:
            last = 0
            for number, known in tree:
                until[row, place[known:last]] = end
                start, last = end, lengths[number]
                end += last - known
                if end == start:
                    continue
                part = slice(start, end)
                owner[row, part], column[row, part] = number, torch.arange(known, last)
                place[known:last] = torch.arange(start, end)
                before[row, part] = torch.arange(start - 1, end - 1)
                before[row, start] = place[known - 1] if known else start
            until[row, place[:last]] = end
    layout = Layout(owner, column, before, until).map(lambda part: part.to(batch.ids_N_S.device))
    real = real.to(batch.ids_N_S.device)
    ids, label = (part[layout.owner_N_S, layout.column_N_S] for part in (batch.ids_N_S, batch.label_N_S))
    return replace(Examples(ids.masked_fill(~real, 0), real, label & real), layout=layout)
