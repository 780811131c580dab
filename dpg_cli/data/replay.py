"""The rows of a user's own data that a run's target is trained on beside the completions: `inner.replay`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dpg_cli.data.examples import Encoding, RowEncoder
from dpg_cli.data.prepared import Gathered, gather, prepare
from dpg_cli.data.tokens import TokenRows
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel


@dataclass(frozen=True)
class OwnRows:
    """Rows in the order in which steps take them.

    Attributes:
        rows: each with something to train on.
        notes: how the source was understood, a line each.
    """

    rows: TokenRows
    notes: tuple[str, ...]


def own_rows(source: str, target: LanguageModel, max_length: int, seed: int, most: int) -> OwnRows:
    """The rows of a source in a shuffled order, as tokens of the target.

    Args:
        source: see `sources`.
        target: its tokeniser.
        max_length: rows are cut to so many tokens; 0: to the target's context.
        seed: of the order.
        most: how many are needed; further ones are not tokenised.

    Raises:
        UsageError: for what cannot be read, or where no row has anything to train on.
    """
    found = gather(source, what="rows to replay", flag="inner.replay")
    order = torch.randperm(len(found.items), generator=torch.Generator().manual_seed(seed)).tolist()[:most]
    some = Gathered(found.source, found.rows, found.shape, [found.items[place] for place in order], found.empty)
    ready = prepare(some, RowEncoder(target, Encoding(max_length)))
    if not ready.trained:
        raise UsageError(f"No row of {source} has a token to train on.", "Raise inner.max_length, or look at the data.")
    about = ready.understood
    count = f"replay of {len(ready.trained):,} of {len(found.items):,} rows, seed {seed}"
    return OwnRows(
        TokenRows(ready.rows[place] for place in ready.trained), (f"{count}: {about.line()}", *about.notes())
    )
