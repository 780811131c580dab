"""Pools of texts, addressed by number: in memory, lines of a file, a parquet column, a dataset.

Files stay on disk: a line file keeps one number a line in memory, parquet keeps its column when that is under `KEEP`
bytes and else reads the row groups it needs, `datasets` maps its files into memory.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.errors import UsageError

KEEP = 1 << 30  # bytes of a parquet column that are kept in memory
BATCH = 1024  # rows read at once where all are walked through


class Texts(Sequence[str]):
    """A pool of texts, perhaps a large one that lies on disk."""

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abstractmethod
    def take(self, places: Sequence[int]) -> list[str]:
        """The texts at these places, in their order."""

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return self.take(range(*place.indices(len(self))))
        return self.take([range(len(self))[place]])[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), BATCH):
            yield from self.take(range(start, min(start + BATCH, len(self))))


class ListedTexts(Texts):
    """Texts in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        return [self.texts[place] for place in places]


class Part(Texts):
    """Rows `start` … `stop` - 1 of another pool."""

    def __init__(self, whole: Texts, start: int, stop: int) -> None:
        self.whole = whole
        self.places = range(start, stop)

    def __len__(self) -> int:
        return len(self.places)

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        return self.whole.take([self.places[place] for place in places])


class LineTexts(Texts):
    """Lines of a UTF-8 file that are not blank; of a JSON-lines file, one string field of each.

    Args:
        path: the file; it is read once through, to check every line and to learn where each begins.
        keys: fields to look for, in this order; empty for plain text.

    Raises:
        UsageError: naming the line that is not UTF-8, not JSON or has no such field.
    """

    def __init__(self, path: Path, keys: Sequence[str] = ()) -> None:
        self.path = path
        self.keys = keys
        starts, place = [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._text(line, number)
                    starts.append(place)
                place += len(line)
        self.starts = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        found: dict[int, str] = {}
        with self.path.open("rb") as file:
            for place in sorted(set(places)):
                file.seek(int(self.starts[place]))
                found[place] = self._text(file.readline(), place + 1)
        return [found[place] for place in places]

    def _text(self, line: bytes, number: int) -> str:
        """The text of one line."""
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            reason = f"{self.path}, line {number}: not UTF-8 ({error.reason})."
            raise UsageError(reason, "Save the file as UTF-8.") from None
        if not self.keys:
            return text
        try:
            row = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            row = None
        value = next((row[key] for key in self.keys if key in row), None) if isinstance(row, dict) else None
        if not isinstance(value, str):
            wanted = " or ".join(f"`{key}`" for key in self.keys)
            raise UsageError(
                f"{self.path}, line {number}: no JSON object with a {wanted} string.",
                "Correct that line, or name the column: FILE:COLUMN.",
            )
        return value


class ParquetTexts(Texts):
    """One string column of a parquet file.

    Args:
        path: the file.
        keys: columns to look for, in this order.
        keep: bytes up to which the column is kept in memory.

    Raises:
        UsageError: if it is no parquet file, or has no such column of strings.
    """

    def __init__(self, path: Path, keys: Sequence[str], keep: int = KEEP) -> None:
        try:
            self.file = pq.ParquetFile(path, memory_map=True)
        except (pa.ArrowException, OSError) as error:
            raise UsageError(f"{path} is no readable parquet file: {error}.", "Name another file.") from None
        schema = self.file.schema_arrow
        self.path, self.column = path, choose_column(str(path), keys, schema.names)
        kind = schema.field(self.column).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UsageError(
                f"The column {self.column!r} of {path} holds {kind}, not text.", "Name another: FILE:COLUMN."
            )
        groups = [self.file.metadata.row_group(group) for group in range(self.file.num_row_groups)]
        self.ends = np.cumsum([group.num_rows for group in groups])
        chunks = (group.column(place) for group in groups for place in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == self.column)
        self.kept = self.file.read(columns=[self.column])[self.column] if size <= keep else None
        self.recent: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self.file.metadata.num_rows

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        if self.kept is not None:
            return self._texts([self.kept[place].as_py() for place in places])
        found: dict[int, Any] = {}
        for place in sorted(set(places)):
            group = int(np.searchsorted(self.ends, place, side="right"))
            if self.recent[0] != group:
                self.recent = (group, self.file.read_row_group(group, columns=[self.column])[self.column])
            start = int(self.ends[group - 1]) if group else 0
            found[place] = self.recent[1][place - start].as_py()
        return self._texts([found[place] for place in places])

    def _texts(self, values: list[Any]) -> list[str]:
        if any(value is None for value in values):
            raise UsageError(f"The column {self.column!r} of {self.path} has rows without text.", "Leave them out.")
        return values


class DatasetTexts(Texts):
    """One string column of a map-style dataset of the `datasets` library, which keeps it on disk."""

    def __init__(self, rows: Any, name: str, keys: Sequence[str]) -> None:
        self.column = choose_column(name, keys, rows.column_names)
        self.rows, self.name = rows.select_columns([self.column]), name

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        return require_texts(list(self.rows[list(places)][self.column]), self.name, self.column)


def choose_column(name: str, keys: Sequence[str], columns: Sequence[str]) -> str:
    """The first of `keys` that is a column.

    Raises:
        UsageError: naming the columns there are.
    """
    for key in keys:
        if key in columns:
            return key
    wanted = " or ".join(repr(key) for key in keys)
    there = ", ".join(list(columns)[:12])
    raise UsageError(f"{name} has no column {wanted}; it has {there}.", f"Name one: {name}:COLUMN.")


def require_texts(values: list[Any], name: str, column: str) -> list[str]:
    """The values, if all are strings.

    Raises:
        UsageError: otherwise.
    """
    wrong = next((value for value in values if not isinstance(value, str)), "")
    if wrong != "":
        kind = "nothing" if wrong is None else f"a {type(wrong).__name__}"
        raise UsageError(
            f"The column {column!r} of {name} holds {kind} where text is needed.", "Name another: NAME:COLUMN."
        )
    return values
