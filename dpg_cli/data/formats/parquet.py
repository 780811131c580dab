"""Parquet: columns are kept in memory while they are small, else the row groups that are asked for are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.data.formats.base import Format, Row, Rows, picked
from dpg_cli.errors import UsageError

KEEP = 1 << 30  # bytes of columns that are kept in memory
MAGIC = b"PAR1"


class ParquetRows(Rows):
    """The rows of a parquet file, of any of Arrow's types of text (dictionary, large and view included).

    Args:
        path: the file.
        name: see `Rows`.
        keep: bytes up to which the columns that are read are kept in memory.

    Raises:
        UsageError: if it is no parquet file.
    """

    def __init__(self, path: Path, name: str, keep: int = KEEP) -> None:
        self.name, self.kind, self.keep = name, "parquet", keep
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from None
        self.columns = tuple(self.file.schema_arrow.names)
        groups = [self.file.metadata.row_group(group) for group in range(self.file.num_row_groups)]
        self.ends = np.cumsum([group.num_rows for group in groups])
        self.only(self.columns)

    def only(self, columns: Sequence[str]) -> None:
        """See `Rows`."""
        self.read = [name for name in self.columns if name in columns]
        self.kept: Any = None
        self.recent: tuple[int, Any] = (-1, None)
        groups = [self.file.metadata.row_group(group) for group in range(self.file.num_row_groups)]
        chunks = (group.column(place) for group in groups for place in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in self.read)
        self.small = size <= self.keep

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        try:
            if self.small:
                if self.kept is None:
                    self.kept = self.file.read(columns=self.read)
                return picked(self.kept, places)
            found: dict[int, Row] = {}
            for place in sorted(set(places)):
                group = int(np.searchsorted(self.ends, place, side="right"))
                if self.recent[0] != group:
                    self.recent = (group, self.file.read_row_group(group, columns=self.read))
                start = int(self.ends[group - 1]) if group else 0
                found[place] = picked(self.recent[1], [place - start])[0]
            return [found[place] for place in places]
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UsageError:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        return UsageError(f"{self.name} is no readable parquet file: {reason}.", "Name another file.")


def is_parquet(path: Path) -> bool:
    """Whether a file begins as parquet does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


PARQUET = Format("parquet", (".parquet", ".pq"), ParquetRows, is_parquet)
