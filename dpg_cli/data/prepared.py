"""A source read to its end for one target: its rows as tokens, and how they were understood."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from dpg_cli.data.examples import RowEncoder, padded
from dpg_cli.data.formats.base import BATCH, ListedRows, Rows
from dpg_cli.data.shapes import (
    EXTRAS,
    Chat,
    Item,
    Shape,
    combined,
    context_reader,
    fault_of,
    is_empty,
    items,
    shape_of,
)
from dpg_cli.data.sources import open_rows, parse
from dpg_cli.data.tokens import TokenRows
from dpg_cli.errors import UsageError
from dpg_cli.models.template import DATE

NAMED = 6  # columns that are named where they are left out


@dataclass(frozen=True)
class Understood:
    """How the rows of a source were understood.

    Attributes:
        source: as it was named.
        kind: of the source, such as "JSON lines".
        shape: of the rows, such as "prompt + completion".
        trained, context: the columns; empty where there is no context.
        left_out: columns that were not read.
        rows: how many were read.
        empty: of those, the numbers of the wholly empty ones, which are left out.
        tokens, trained_tokens: of all rows that are not empty.
        cut: rows that were cut to the longest length.
        untrained: rows that have nothing to train on (any more).
        straddling: rows with a token across the seam of context and completion.
        turns: how the assistant's turns were found: "" for no conversation, "marks", "renderings".
        date: what the chat template takes for today; empty where it does not ask.
    """

    source: str
    kind: str
    shape: str
    trained: str
    context: str
    left_out: tuple[str, ...]
    rows: int
    empty: tuple[int, ...]
    tokens: int
    trained_tokens: int
    cut: int
    untrained: int
    straddling: int
    turns: str
    date: str

    def line(self) -> str:
        """All on one line."""
        context = f", context: {self.context}" if self.context else ""
        rest = ", ".join(self.left_out[:NAMED]) + (", ..." if len(self.left_out) > NAMED else "")
        return (
            f"{self.source}: {self.rows:,} {'row' if self.rows == 1 else 'rows'} ({self.kind}), trained: {self.trained}{context}, "
            f"{self.trained_tokens:,} of {self.tokens:,} tokens count" + (f"; not read: {rest}" if rest else "")
        )

    def notes(self) -> list[str]:
        """What the user should know besides, a line each."""
        said = []
        if self.empty:
            said.append(f"{_rows(len(self.empty), 'is', 'are')} empty and left out; the first is row {self.empty[0]}.")
        if self.cut:
            said.append(f"{_rows(self.cut, 'is', 'are')} cut to the longest length.")
        if self.untrained:
            said.append(f"{_rows(self.untrained, 'has', 'have')} nothing left to train on: no loss, a score of 0.")
        if self.straddling:
            said.append(
                f"{_rows(self.straddling, 'has', 'have')} a token across the seam of context and completion; it is trained "
                "on. End contexts without a blank, and begin completions with it."
            )
        if self.date:
            said.append(f"The chat template asks for today's date and is given {self.date}.")
        return said

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _rows(count: int, one: str, many: str) -> str:
    return f"1 row {one}" if count == 1 else f"{count:,} rows {many}"


@dataclass(frozen=True)
class Prepared:
    """The rows of a source as tokens.

    Attributes:
        rows: those that are not empty, in their order.
        numbers: the number of each in its source.
        understood: how they were understood.
    """

    rows: TokenRows
    numbers: Sequence[int]
    understood: Understood

    @cached_property
    def trained(self) -> Sequence[int]:
        """Places in `rows` of those that have something to train on."""
        return array("q", self.rows.trained.nonzero()[0].tobytes())

    def tensors(self, encoder: RowEncoder) -> tuple[Tensor, Tensor, Tensor]:
        """The rows that have something to train on, as one batch; see `padded`.

        Raises:
            UsageError: if there are none.
        """
        if not self.trained:
            raise UsageError(
                f"No row of {self.understood.source} has a token to train on.",
                "Raise --max-length, or look at the data.",
            )
        return padded(self.rows, encoder.target, self.trained)


@dataclass(frozen=True)
class Gathered:
    """The rows of a source, read and understood, before any tokeniser.

    Attributes:
        source: as it was named.
        rows, shape: of the source.
        items: (number, item) of the rows that are not empty.
        empty: numbers of the others.
    """

    source: str
    rows: Rows
    shape: Shape
    items: list[tuple[int, Item]]
    empty: list[int]


def gather(
    source: str, *, contexts: str = "", limit: int = 0, split: str = "train", what: str = "examples", flag: str = "DATA"
) -> Gathered:
    """Read a source to its end.

    Args:
        source: see `sources`.
        contexts: a source of what stands before each completion; empty where the rows have it themselves.
        limit: only the first so many rows; 0 takes all.
        split, what, flag: see `sources.open_rows`.

    Raises:
        UsageError: naming the first row that cannot be read, or the columns where they are no known shape.
    """
    rows = open_rows(source, split=split, what=what, flag=flag, limit=limit)
    shape = shape_of(rows, parse(source).column, beside=bool(contexts))
    found: Iterable[tuple[int, Item]] = items(rows, shape)
    if contexts:
        before = open_rows(contexts, split=split, what="prompts", flag="--prompts", limit=limit)
        name, found = _beside(rows, shape, before, parse(contexts).column)
        shape = Shape(shape.name, shape.trained, (f"{name} of {before.name}",), shape.read)
    return _sorted(source, rows, shape, found)


def gathered_items(found: Sequence[Item], name: str) -> Gathered:
    """Rows that are understood already, such as the documents of a harness's task."""
    rows = ListedRows([{} for _ in found], name, "documents", [])
    return _sorted(name, rows, Shape("text", ("text",), (), lambda row, fault: found[0]), enumerate(found))


def _sorted(source: str, rows: Rows, shape: Shape, found: Iterable[tuple[int, Item]]) -> Gathered:
    """Empty rows apart from the others.

    Raises:
        UsageError: if all are empty.
    """
    full: list[tuple[int, Item]] = []
    empty: list[int] = []
    for place, item in found:
        if is_empty(item):
            empty.append(place)
        else:
            full.append((place, item))
    if not full:
        raise UsageError(f"All rows of {source} are empty.", "Give at least one with a text.")
    return Gathered(source, rows, shape, full, empty)


def _beside(rows: Rows, shape: Shape, before: Rows, column: str) -> tuple[str, Iterable[tuple[int, Item]]]:
    """Items with their contexts from another source, row by row.

    Returns:
        The column of the contexts, and (number, item).

    Raises:
        UsageError: if one has more rows than the other, naming the first that is doubtful.
    """
    name, read = context_reader(before, column)
    if len(rows) != len(before):
        require_pairs(rows, shape, before, name)
    count = min(len(rows), len(before))
    pairs = zip(items(rows, shape, count), before.walk(count), strict=True)
    paired = (
        (place, combined(item, read(row, fault_of(before, place)), fault_of(rows, place)))
        for (place, item), (_, row) in pairs
    )
    return name, paired


def require_pairs(rows: Rows, shape: Shape, before: Rows, name: str) -> None:
    """Refuse two sources of different length, unless what one has more is blank lines at its end.

    Raises:
        UsageError: naming the first row at which one of the two is blank and the other is not, or else where one ends.
    """
    count = min(len(rows), len(before))
    longer = rows if len(rows) > count else before
    surplus = longer.take(range(count, len(longer)))
    if not longer.named and not any(value for row in surplus for value in row.values()):
        return
    doubtful = next(
        (
            place
            for (place, row), (_, other) in zip(rows.walk(count), before.walk(count), strict=True)
            if _blank(row.get(shape.trained[0])) != _blank(other.get(name))
        ),
        count,
    )
    one, other = (rows, before) if len(rows) > count or doubtful < count else (before, rows)
    where = f"{one.name}, {one.where(doubtful)}"
    against = f"{other.where(doubtful)} of {other.name}" if doubtful < count else f"the end of {other.name}"
    raise UsageError(
        f"{rows.name} has {len(rows):,} rows and {before.name} has {len(before):,}; the first doubtful pair is "
        f"{where} against {against}.",
        "Give one prompt for each row: blank lines count as rows of a text file, not of JSON lines.",
    )


def _blank(value: Any) -> bool:
    return value in (None, "", [])


def prepare(found: Gathered, encoder: RowEncoder) -> Prepared:
    """The rows of a source as tokens, and the account of them.

    Raises:
        UsageError: naming the first row that cannot be encoded.
    """
    tokens = TokenRows()
    for start in range(0, len(found.items), BATCH):
        batch = found.items[start : start + BATCH]
        tokens.extend(encoder([item for _, item in batch], [fault_of(found.rows, place) for place, _ in batch]))
    return Prepared(tokens, array("q", (place for place, _ in found.items)), _account(found, encoder, tokens))


def _account(found: Gathered, encoder: RowEncoder, tokens: TokenRows) -> Understood:
    """How rows were understood."""
    shape, columns = found.shape, found.rows.columns
    talk = any(isinstance(encoder.settled(item), Chat) for _, item in found.items)
    turns = talk and not shape.context and encoder.how.train_on != "all"
    trained, context = ", ".join(shape.trained), ", ".join(shape.context)
    if turns:
        which = "the assistant's last turn" if encoder.how.train_on == "last" else "the assistant's turns"
        trained, context = f"{trained} ({which})", "the other turns"
    elif encoder.how.train_on == "all":
        trained, context = ", ".join([*shape.context, *shape.trained]), ""
    read = {*shape.trained, *shape.context, *(EXTRAS if talk else ())}
    marked = turns and encoder.template is not None and encoder.template.marked
    return Understood(
        source=found.source,
        kind=found.rows.kind,
        shape=shape.name,
        trained=trained,
        context=context,
        left_out=tuple(name for name in columns if name not in read),
        rows=len(found.items) + len(found.empty),
        empty=tuple(found.empty),
        tokens=len(tokens.ids),
        trained_tokens=sum(tokens.label),
        cut=len(tokens.cut),
        untrained=int((tokens.trained == 0).sum()),
        straddling=len(tokens.straddling),
        turns="" if not turns else "marks" if marked else "renderings",
        date=DATE if talk and encoder.template is not None and encoder.template.dated else "",
    )
