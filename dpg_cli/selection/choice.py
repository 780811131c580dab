"""Which rows of some scores stay, or what they weigh, and what the scores predict of it.

To first order Φ changes by Σ_i (w_i - 1) τ_i when example i weighs w_i instead of 1: by -τ_i where it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpg_cli.attribution.reading import Asked, Table
from dpg_cli.errors import UsageError, suggestion

Side = Literal["harmful", "helpful"]


@dataclass(frozen=True)
class Wish:
    """What is asked for; one of the three is not 0.

    Attributes:
        drop: leave out so many examples of one side.
        keep: keep so many of the other side, and nothing else.
        weight: a; example i weighs max(0, 1 + a τ_i / max |τ|), or with 1 - a on the other side.
        side: which examples go first: the "harmful" ones, or the "helpful" ones.
        query: whose scores count; empty where there is one.
    """

    drop: int = 0
    keep: int = 0
    weight: float = 0.0
    side: Side = "harmful"
    query: str = ""


@dataclass(frozen=True)
class Choice:
    """Rows and their weights.

    Attributes:
        query: what it was made by.
        dropped: numbers of the rows in their source that go, in order.
        weights: of each scored row by its number, where rows are weighed; else None.
        only: whether a row that has no score goes too.
        predicted: by query, the first-order change of Φ.
    """

    query: Asked
    dropped: tuple[int, ...]
    weights: dict[int, float] | None
    only: bool
    predicted: dict[str, float]


def choose(table: Table, wish: Wish) -> Choice:
    """Rows by their scores; of equal scores the later row goes first.

    Raises:
        UsageError: if nothing or too much is asked for, or of several queries none is named.
    """
    asked = [name for name, value in (("--drop", wish.drop), ("--keep", wish.keep), ("--weight", wish.weight)) if value]
    if len(asked) != 1:
        raise UsageError("Give one of --drop, --keep and --weight.", "For example: --drop 50")
    number = number_of(table, wish.query)
    scores_N = table.scores_Q_N[number] * (1 if wish.side == "harmful" else -1)
    count = len(scores_N)
    for flag, many in (("--drop", wish.drop), ("--keep", wish.keep)):
        if many >= count or many < 0:
            raise UsageError(
                f"{flag} {many:,} of {count:,} examples leaves nothing to choose.", "Give a smaller number."
            )
    scale = float(np.abs(scores_N).max())
    if not scale > 0:
        raise UsageError("All scores are 0: there is nothing to choose by.", "See the notes beside the scores.")
    weights_N = np.ones(count)
    if wish.weight:
        weights_N = np.maximum(0.0, 1.0 + wish.weight * scores_N / scale)
    else:
        gone = wish.drop or count - wish.keep
        weights_N[np.lexsort((-np.arange(count), scores_N))[:gone]] = 0.0
    change_Q = table.scores_Q_N @ (weights_N - 1.0)
    return Choice(
        query=table.queries[number],
        dropped=() if wish.weight else tuple(sorted(table.ids_N[weights_N == 0].tolist())),
        weights=dict(zip(table.ids_N.tolist(), weights_N.tolist(), strict=True)) if wish.weight else None,
        only=bool(wish.keep),
        predicted={query.name: float(change) for query, change in zip(table.queries, change_Q, strict=True)},
    )


def number_of(table: Table, name: str) -> int:
    """The place of a query.

    Raises:
        UsageError: if it is not there, or of several none is named.
    """
    names = [query.name for query in table.queries]
    if not name and len(names) == 1:
        return 0
    if name not in names:
        cause = f"There is no query {name!r}." if name else f"The scores are of {len(names)} queries."
        raise UsageError(cause, suggestion(name, names, "Give --query one of"))
    return names.index(name)
