"""What each query of an attention sees, without a matrix of queries x keys.

    Full        every key
    Causal      the keys up to the query's own place
    Indexed     what a function of places says (transformers builds windows, chunks, packed rows and padding so)
    Given       a mask or bias that exists as a tensor, read where it is needed
    Biased      any of these, and a bias beside that is small (ALiBi: one row a head)

`reach` bounds the keys that some queries see, so that nothing else is computed for them; `hide_` writes -inf over the
scores of what is hidden within these bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Reach = tuple[int, int]


class Seen(Protocol):
    """What queries see. `batch` is a row of the batch, `queries` and `keys` are ranges of places."""

    def reach(self, batch: int, queries: slice, keys: int) -> Reach:
        """The first key that any of the queries sees, and the one after the last; of so many keys."""
        ...

    def hide_(self, scores: Tensor, batch: int, heads: slice, queries: slice, keys: slice) -> None:
        """Write over the scores of what is hidden, or add the bias, in place.

        Args:
            scores: shape (heads, queries, keys).
            batch, heads, queries, keys: what the axes of `scores` are.
        """
        ...


class Full:
    """Every query sees every key."""

    def reach(self, batch: int, queries: slice, keys: int) -> Reach:
        """See `Seen`."""
        return 0, keys

    def hide_(self, scores: Tensor, batch: int, heads: slice, queries: slice, keys: slice) -> None:
        """See `Seen`."""


class Causal:
    """A query sees the keys up to its own place."""

    def reach(self, batch: int, queries: slice, keys: int) -> Reach:
        """See `Seen`."""
        return 0, min(keys, queries.stop)

    def hide_(self, scores: Tensor, batch: int, heads: slice, queries: slice, keys: slice) -> None:
        """See `Seen`."""
        later = scores[..., queries.start - keys.start :]
        if later.shape[-1] > 1:
            hidden = torch.ones(later.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            later.masked_fill_(hidden, -torch.inf)


def _bounds(seen_i_j: Tensor) -> Reach:
    """The first and one past the last column with a True."""
    places = seen_i_j.any(0).nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


class Indexed:
    """What a function of places says: key j is seen by query i of row b where `function(b, h, i, j)` is true.

    Args:
        function: takes tensors that broadcast to (1, 1, queries, keys), and gives booleans.
        vmap: it takes numbers alone (one each), and is mapped over them.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, *, vmap: bool = False) -> None:
        self.function, self.device, self.vmap = function, device, vmap
        self.known: dict[tuple[int, int, int, int], Reach] = {}

    def seen(self, batch: int, queries: slice, keys: slice) -> Tensor:
        """Booleans, shape (queries, keys)."""
        b, h = (torch.tensor([place], device=self.device) for place in (batch, 0))
        i, j = (torch.arange(part.start, part.stop, device=self.device) for part in (queries, keys))
        if not self.vmap:
            found = self.function(b[:, None, None, None], h[None, :, None, None], i[:, None], j)
            return found.expand(1, 1, len(i), len(j))[0, 0]
        over_j = torch.vmap(self.function, in_dims=(None, None, None, 0))
        return torch.vmap(over_j, in_dims=(None, None, 0, None))(b[0], h[0], i, j)

    def reach(self, batch: int, queries: slice, keys: int) -> Reach:
        """See `Seen`."""
        place = batch, queries.start, queries.stop, keys
        if place not in self.known:
            self.known[place] = _bounds(self.seen(batch, queries, slice(0, keys)))
        return self.known[place]

    def hide_(self, scores: Tensor, batch: int, heads: slice, queries: slice, keys: slice) -> None:
        """See `Seen`."""
        seen = self.seen(batch, queries, keys)
        if not seen.all():
            scores.masked_fill_(~seen, -torch.inf)


class Given:
    """A mask (booleans: what is seen) or bias that exists as a tensor.

    Args:
        mask: broadcasts to (batch, heads, queries, keys).
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask[(None,) * (4 - mask.ndim)]

    def _part(self, batch: int, heads: slice, queries: slice, keys: slice) -> Tensor:
        """Shape (heads or 1, queries or 1, keys or 1)."""
        mask = self.mask[batch if len(self.mask) > 1 else 0]
        for axis, part in enumerate((heads, queries, keys)):
            if mask.shape[axis] > 1:
                mask = mask.narrow(axis, part.start, part.stop - part.start)
        return mask

    def reach(self, batch: int, queries: slice, keys: int) -> Reach:
        """See `Seen`."""
        part = self._part(batch, slice(0, self.mask.shape[1]), queries, slice(0, keys))
        seen = part if part.dtype == torch.bool else part != -torch.inf
        seen = seen.expand(-1, -1, keys).any(0)
        return _bounds(seen)

    def hide_(self, scores: Tensor, batch: int, heads: slice, queries: slice, keys: slice) -> None:
        """See `Seen`."""
        part = self._part(batch, heads, queries, keys)
        if part.dtype == torch.bool:
            scores.masked_fill_(~part, -torch.inf)
        else:
            scores.add_(part)


class Biased:
    """What `seen` says, with a bias.

    Args:
        seen: says what is hidden.
        bias: broadcasts to (batch, heads, queries, keys).
    """

    def __init__(self, seen: Seen, bias: Tensor) -> None:
        self.seen, self.bias = seen, Given(bias)

    def reach(self, batch: int, queries: slice, keys: int) -> Reach:
        """See `Seen`."""
        return self.seen.reach(batch, queries, keys)

    def hide_(self, scores: Tensor, batch: int, heads: slice, queries: slice, keys: slice) -> None:
        """See `Seen`."""
        self.bias.hide_(scores, batch, heads, queries, keys)
        self.seen.hide_(scores, batch, heads, queries, keys)
