"""Pools of texts, addressed by number: in memory, or what is read of a source's rows, which stay on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import numpy as np

from dpg_cli.data.formats.base import BATCH, Row, Rows
from dpg_cli.data.shapes import Fault, fault_of


class Texts(Sequence[str]):
    """A pool of texts, perhaps a large one that lies on disk.

    Attributes:
        about: where they come from and how many there are, on one line; may be empty.
    """

    about: str = ""

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
        self.whole, self.about = whole, whole.about
        self.places = range(start, stop)

    def __len__(self) -> int:
        return len(self.places)

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        return self.whole.take([self.places[place] for place in places])


class RowTexts(Texts):
    """The texts that rows hold. Blank lines of a plain text are left out.

    Args:
        rows: all of them are read once, so that a bad one is refused now and not when it is drawn.
        column: where the texts are, in words.
        read: the text of a row; see `shapes.prompt_reader`.

    Raises:
        UsageError: naming the first row that holds no text.
    """

    def __init__(self, rows: Rows, column: str, read: Callable[[Row, Fault], str]) -> None:
        self.rows, self.read = rows, read
        blank = []
        for place, row in rows.walk():
            if not read(row, fault_of(rows, place)) and not rows.named:
                blank.append(place)
        self.places = None if not blank else np.delete(np.arange(len(rows)), blank)
        left_out = f", {len(blank):,} blank ones left out" if blank else ""
        self.about = f"{rows.name}: {len(rows):,} rows ({rows.kind}), prompt: {column}{left_out}"

    def __len__(self) -> int:
        return len(self.rows) if self.places is None else len(self.places)

    def take(self, places: Sequence[int]) -> list[str]:
        """See `Texts`."""
        numbers: Sequence[int] = places if self.places is None else [int(self.places[place]) for place in places]
        rows = self.rows.take(numbers)
        return [self.read(row, fault_of(self.rows, number)) for number, row in zip(numbers, rows, strict=True)]
