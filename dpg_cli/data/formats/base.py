"""What every source format gives: rows that are addressed by number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError

BATCH = 1024  # rows read at once where all are walked through
SHOWN = 12  # columns named in a message

Row = dict[str, Any]


class Rows(ABC):
    """The rows of a file or dataset, perhaps a large one that lies on disk. A row's number is its place, from 0.

    Attributes:
        name: of the source, for messages.
        kind: of the source, in words, such as "JSON lines".
        columns: names of the columns; of JSON, those of any row.
        named: whether a column can be asked for by name; plain lines have none.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    named: bool = True

    @abstractmethod
    def __len__(self) -> int:
        """How many."""

    @abstractmethod
    def take(self, places: Sequence[int]) -> list[Row]:
        """The rows at these places, in their order."""

    def only(self, columns: Sequence[str]) -> None:  # noqa: B027  nothing to do for a format that reads whole rows
        """Read no other columns from now on."""

    def where(self, place: int) -> str:
        """A row in words, as the user finds it in the file."""
        return f"row {place}"

    def walk(self, stop: int | None = None) -> Iterator[tuple[int, Row]]:
        """(number, row) of the first `stop` rows, or of all, in their order."""
        last = len(self) if stop is None else min(stop, len(self))
        for start in range(0, last, BATCH):
            places = range(start, min(start + BATCH, last))
            yield from zip(places, self.take(places), strict=True)

    def fault(self, place: int, what: str, remedy: str = "Correct or leave out that row.") -> UsageError:
        """The refusal of one row."""
        return UsageError(f"{self.name}, {self.where(place)}: {what}.", remedy)


class ListedRows(Rows):
    """Rows in memory.

    Args:
        rows: each a mapping of columns to values.
        name, kind: see `Rows`.
        columns: see `Rows`; by default those of any row.
    """

    def __init__(self, rows: Sequence[Row], name: str, kind: str, columns: Sequence[str] | None = None) -> None:
        self.rows, self.name, self.kind = rows, name, kind
        self.columns = tuple(dict.fromkeys(key for row in rows for key in row) if columns is None else columns)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        return [self.rows[place] for place in places]


class Head(Rows):
    """The first rows of others.

    Args:
        whole: the others.
        limit: how many at most.
    """

    def __init__(self, whole: Rows, limit: int) -> None:
        self.whole, self.limit = whole, limit
        self.name, self.kind, self.columns, self.named = whole.name, whole.kind, whole.columns, whole.named

    def __len__(self) -> int:
        return min(self.limit, len(self.whole))

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        return self.whole.take(places)

    def only(self, columns: Sequence[str]) -> None:
        """See `Rows`."""
        self.whole.only(columns)

    def where(self, place: int) -> str:
        """See `Rows`."""
        return self.whole.where(place)


@dataclass(frozen=True)
class Format:
    """A source format.

    Attributes:
        name: in words.
        suffixes: what names of such files end in, lower case, with the dot.
        open: the rows of a file, which messages call by a name; raises `UsageError` for what is no such file.
        sniff: whether a file without a telling name is one, by its content; None: such a file never is.
    """

    name: str
    suffixes: tuple[str, ...]
    open: Callable[[Path, str], Rows]
    sniff: Callable[[Path], bool] | None = None


def picked(table: Any, places: Sequence[int]) -> list[Row]:
    """Rows of an Arrow table, in the order of their places, as Python values; neighbours are taken at once."""
    if isinstance(places, range) and places.step == 1:
        return table.slice(places.start, len(places)).to_pylist()
    return [table.slice(place, 1).to_pylist()[0] for place in places]


def decoded(line: bytes, name: str, number: int) -> str:
    """A line of a file as text, without its end and without a byte order mark at the file's beginning.

    Args:
        line: with its end.
        name: of the file.
        number: of the line, from 1.

    Raises:
        UsageError: if it is not UTF-8.
    """
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        utf16 = number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")
        reason = "UTF-16" if utf16 else error.reason
        raise UsageError(f"{name}, line {number}: not UTF-8 ({reason}).", "Save the file as UTF-8.") from None
    return text.removesuffix("\n").removesuffix("\r")


def columns_shown(columns: Sequence[str]) -> str:
    """Columns, for a message."""
    shown = ", ".join(list(columns)[:SHOWN])
    return f"{shown}, ..." if len(columns) > SHOWN else shown or "none"
