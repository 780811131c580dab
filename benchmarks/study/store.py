"""Raw results: one parquet file an experiment, written anew (and renamed into place) after every finished cell."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]


def key_of(settings: Row) -> str:
    """The name of a cell: its settings as JSON, in order."""
    return json.dumps(settings, sort_keys=True)


@dataclass(frozen=True)
class Store:
    """A folder of raw results."""

    folder: Path

    def path(self, experiment: str) -> Path:
        """Where an experiment's rows lie."""
        return self.folder / f"{experiment}.parquet"

    def rows(self, experiment: str) -> list[Row]:
        """All rows, in the order of their cells and within a cell as measured. Each row has its cell's settings."""
        path = self.path(experiment)
        if not path.is_file():
            return []
        stored = pq.read_table(path).to_pylist()
        stored.sort(key=lambda row: (row["cell"], row["row"]))
        return [
            {**json.loads(row["cell"]), **{k: v for k, v in row.items() if k not in ("cell", "row")}} for row in stored
        ]

    def done(self, experiment: str) -> set[str]:
        """The cells that are there."""
        path = self.path(experiment)
        return set(pq.read_table(path, columns=["cell"])["cell"].to_pylist()) if path.is_file() else set()

    def add(self, experiment: str, settings: Row, rows: list[Row]) -> None:
        """Store the rows of one cell, in place of earlier ones of the same settings.

        Raises:
            ValueError: if a cell has no rows, or a row repeats the name of a setting.
        """
        if not rows:
            raise ValueError(f"{experiment}: a cell without rows")
        if clash := set(settings) & set(rows[0]):
            raise ValueError(f"{experiment}: {sorted(clash)} are both settings and results")
        self.folder.mkdir(parents=True, exist_ok=True)
        path, cell = self.path(experiment), key_of(settings)
        before = pq.read_table(path).to_pylist() if path.is_file() else []
        kept = [row for row in before if row["cell"] != cell]
        every = kept + [{"cell": cell, "row": number, **row} for number, row in enumerate(rows)]
        every.sort(key=lambda row: (row["cell"], row["row"]))
        names = list(dict.fromkeys(name for row in every for name in row))
        table = pa.table({name: [row.get(name) for row in every] for name in names})
        partial = path.with_suffix(".partial")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
