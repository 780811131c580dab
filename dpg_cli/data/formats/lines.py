"""Plain text: a line of UTF-8 is a row. Blank lines are empty rows, so that a row's number is its line's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpg_cli.data.formats.base import Format, Row, Rows, decoded

TEXT = "text"  # the one column of plain lines


class LineRows(Rows):
    """The lines of a text file; one number a line is kept in memory.

    Args:
        path: the file; it is read once through, to learn where each line begins and whether all is UTF-8.
        name: see `Rows`.

    Raises:
        UsageError: naming the line that is not UTF-8.
    """

    named = False

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.kind, self.columns = path, name, "lines of text", (TEXT,)
        starts, place = [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                decoded(line, self.name, number)
                starts.append(place)
                place += len(line)
        self.starts = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        found: dict[int, Row] = {}
        with self.path.open("rb") as file:
            for place in sorted(set(places)):
                file.seek(int(self.starts[place]))
                text = decoded(file.readline(), self.name, place + 1)
                found[place] = {TEXT: text if text.strip() else ""}
        return [found[place] for place in places]

    def where(self, place: int) -> str:
        """See `Rows`."""
        return f"line {place + 1}"


LINES = Format("lines of text", (".txt", ".text", ".md"), LineRows)
