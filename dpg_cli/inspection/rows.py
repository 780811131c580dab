"""The synthetic dataset of a run in a few figures, with the rows that helped and harmed most; read in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpg_cli.artefacts.rows import batches, outline, reward_column

TEXT_LIMIT = 2000  # characters of a sample


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        row: its place in the file.
        prompt, text: cut after `TEXT_LIMIT` characters; not fit for a terminal unescaped.
        reward: ∂Φ/∂w; None where none was taken.
    """

    row: int
    prompt: str
    text: str
    reward: float | None


@dataclass(frozen=True)
class RowsLook:
    """A dataset.

    Attributes:
        rows: how many.
        columns: their types by name.
        rewards: count, mean, standard deviation, least and most of the rewards, and the share that is positive; None
            where there are none.
        highest, lowest: rows by reward; the first rows where there are no rewards.
    """

    rows: int
    columns: dict[str, str]
    rewards: dict[str, float] | None
    highest: tuple[Sample, ...]
    lowest: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        samples = {"highest": [vars(s) for s in self.highest], "lowest": [vars(s) for s in self.lowest]}
        return {"rows": self.rows, "columns": self.columns, "rewards": self.rewards, "samples": samples}


def look_at_rows(path: Path, samples: int) -> RowsLook:
    """Look at a dataset file.

    Args:
        path: parquet.
        samples: rows to show from either end.

    Raises:
        UsageError: if the file is damaged.
    """
    size, schema = outline(path)
    rewards = reward_column(path)
    known = rewards[np.isfinite(rewards)]
    if len(known):
        order = np.argsort(np.where(np.isfinite(rewards), rewards, -np.inf), kind="stable")[::-1][: len(known)].tolist()
        top, bottom = order[:samples], order[samples:][::-1][:samples]
    else:
        top, bottom = list(range(min(samples, size))), []
    found = _samples(path, {*top, *bottom})
    stats = None
    if len(known):
        stats = {
            "count": len(known),
            "mean": float(known.mean()),
            "std": float(known.std()),
            "least": float(known.min()),
            "most": float(known.max()),
            "positive": float((known > 0).mean()),
        }
    return RowsLook(
        rows=size,
        columns={name: str(kind) for name, kind in zip(schema.names, schema.types, strict=True)},
        rewards=stats,
        highest=tuple(found[row] for row in top),
        lowest=tuple(found[row] for row in bottom),
    )


def _samples(path: Path, wanted: set[int]) -> dict[int, Sample]:
    """Some rows by their place, read until the last of them."""
    found: dict[int, Sample] = {}
    start = 0
    for batch in batches(path, ["prompt", "text", "reward"]) if wanted else ():
        for row in sorted(row for row in wanted if start <= row < start + batch.num_rows):
            prompt, text, reward = (batch.column(name)[row - start].as_py() for name in ("prompt", "text", "reward"))
            found[row] = Sample(row, (prompt or "")[:TEXT_LIMIT], (text or "")[:TEXT_LIMIT], reward)
        start += batch.num_rows
        if len(found) == len(wanted):
            break
    return found
