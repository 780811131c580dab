"""From a row written as text to token ids and a mask: the whole is tokenised at once, the mask placed by characters.

A token that holds a character of the completion is trained on. Where it holds one of the context as well, the tokeniser
made a token across the seam that it would not make of the context alone; such rows straddle, and are counted.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from dpg_cli.data.conversations import Span, common
from dpg_cli.data.shapes import Fault

BATCH = 1024  # rows tokenised at once


@dataclass(frozen=True)
class Written:
    """A row as text.

    Attributes:
        text: all of it.
        spans: characters that are trained on; None for all tokens.
        special: the tokeniser adds its special tokens; a chat template has written them already.
        context: what stands before the one span, which goes on to the end; None where spans are turns among others.
        shown: what is trained on, for people.
    """

    text: str
    spans: list[Span] | None
    special: bool
    context: str | None
    shown: str


@dataclass(frozen=True)
class Tokens:
    """A row as the target reads it.

    Attributes:
        ids: token ids.
        label: which of them are trained on.
        text: what is trained on, as text.
        straddles: a token holds characters of context and completion.
        cut: tokens that were cut away.
    """

    ids: list[int]
    label: list[bool]
    text: str
    straddles: bool = False
    cut: int = 0


class TokenRows(Sequence[Tokens]):
    """Rows as tokens, packed: five bytes a token and the bytes of the text, where lists of numbers take a hundred a token.

    Attributes:
        ids, label: of all rows, one after the other: int32, and 1 where a token is trained on.
        starts: where each row begins in them, and the end.
    """

    def __init__(self, rows: Iterable[Tokens] = ()) -> None:
        self.ids, self.label, self.starts = array("i"), bytearray(), array("q", [0])
        self.texts, self.ends = bytearray(), array("q", [0])
        self.straddling: set[int] = set()
        self.cut: dict[int, int] = {}
        self.extend(rows)

    def extend(self, rows: Iterable[Tokens]) -> None:
        """Append rows."""
        for row in rows:
            place = len(self)
            self.ids.extend(row.ids)
            self.label.extend(row.label)
            self.starts.append(len(self.ids))
            self.texts += row.text.encode("utf-8", "surrogatepass")
            self.ends.append(len(self.texts))
            if row.straddles:
                self.straddling.add(place)
            if row.cut:
                self.cut[place] = row.cut

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, place: int) -> Tokens: ...

    @overload
    def __getitem__(self, place: slice) -> list[Tokens]: ...

    def __getitem__(self, place: int | slice) -> Tokens | list[Tokens]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        tokens, text = slice(*self.starts[place : place + 2]), slice(*self.ends[place : place + 2])
        return Tokens(
            self.ids[tokens].tolist(),
            [bool(bit) for bit in self.label[tokens]],
            self.texts[text].decode("utf-8", "surrogatepass"),
            place in self.straddling,
            self.cut.get(place, 0),
        )

    def __iter__(self) -> Iterator[Tokens]:
        return (self[place] for place in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(np.frombuffer(self.starts, dtype=np.int64))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, those that were cut away included."""
        lengths = self.lengths
        return max(int(lengths.max()), *(int(lengths[place]) + cut for place, cut in self.cut.items()), 0)

    @property
    def trained(self) -> np.ndarray:
        """Tokens of each row that are trained on, int64."""
        counts = np.zeros(len(self.ids) + 1, dtype=np.int64)
        np.cumsum(np.frombuffer(self.label, dtype=np.uint8), out=counts[1:])
        return np.diff(counts[np.frombuffer(self.starts, dtype=np.int64)])


def tokenise(tokenizer: Any, rows: Sequence[Written]) -> list[Tokens]:
    """Rows as tokens, in their order."""
    found: dict[int, Tokens] = {}
    for special in (True, False):
        own = [place for place, row in enumerate(rows) if row.special == special]
        for start in range(0, len(own), BATCH):
            places = own[start : start + BATCH]
            found |= zip(places, _batch(tokenizer, [rows[place] for place in places], special), strict=True)
    return [found[place] for place in range(len(rows))]


def _batch(tokenizer: Any, rows: list[Written], special: bool) -> list[Tokens]:
    """Rows that get special tokens alike."""
    fast = tokenizer.is_fast
    read = tokenizer([row.text for row in rows], add_special_tokens=special, return_offsets_mapping=fast)
    before = [row.context for row in rows if row.context is not None]
    contexts = iter(tokenizer(before, add_special_tokens=special)["input_ids"] if before else [])
    found = []
    for place, row in enumerate(rows):
        ids = read["input_ids"][place]
        offsets = read["offset_mapping"][place] if fast else None
        if row.spans is None:
            label, straddles = [True] * len(ids), False
        elif row.context is not None:
            label, straddles = after_context(row.spans[0][0], ids, offsets, next(contexts), tokenizer)
        else:
            label, straddles = within(row, ids, offsets, tokenizer)
        found.append(Tokens(ids, label, row.shown, straddles))
    return found


def after_context(
    seam: int, ids: list[int], offsets: Sequence[Span] | None, context: list[int], tokenizer: Any
) -> tuple[list[bool], bool]:
    """The mask of a context and its completion, and whether a token straddles the seam between them.

    Args:
        seam: characters of the context.
        ids: tokens of the whole.
        offsets: the characters that each comes from, (0, 0) for one that the tokeniser added; None of a tokeniser without:
            the completion then begins where the tokens of the whole and of the context alone differ.
        context: tokens of the context alone, special tokens included.
        tokenizer: knows the special tokens.
    """
    alike = common(context, ids)
    first = alike
    if offsets is not None:
        first = next((place for place, (_, end) in enumerate(offsets) if end > seam), len(ids))
    added = set(tokenizer.all_special_ids)
    straddles = alike < first or any(token not in added for token in context[first:])
    # Without a straddling token stock fine-tuning goes by the tokens that are alike, special ones after the context included.
    first = first if straddles else max(first, alike)
    return [place >= first for place in range(len(ids))], straddles


def within(row: Written, ids: list[int], offsets: Sequence[Span] | None, tokenizer: Any) -> tuple[list[bool], bool]:
    """The mask of some spans of a row, and whether a token straddles the beginning of one; see `after_context`."""
    spans = row.spans or []
    if offsets is not None:
        # a token of blanks alone may come from no character, at the place where it ends
        label = [any(a < end and (start < b or end <= b) for a, b in spans) for start, end in offsets]
        return label, any(start < a < end for a, _ in spans for start, end in offsets)
    label, straddles = [False] * len(ids), False
    for a, b in spans:
        begin, end = (tokenizer(row.text[:place], add_special_tokens=row.special)["input_ids"] for place in (a, b))
        first, last = common(begin, ids), common(end, ids)
        straddles = straddles or first < len(begin)
        label[first:last] = [True] * (last - first)
    return label, straddles


def check_ids(ids: Sequence[int], rows: int, tokenizer: Any, name: str, fault: Fault) -> None:
    """Refuse token ids that a model has no embedding of.

    Args:
        ids: of a row.
        rows: of the embedding.
        tokenizer: names the token.
        name: of the model.
        fault: makes a refusal.
    """
    if ids and (largest := max(ids)) >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise fault(
            f"the tokeniser of {name!r} gives token id {largest} ({token!r}), and its model embeds ids below {rows}",
            "Give the model that tokeniser's size (model.resize_token_embeddings(len(tokenizer))) and save it.",
        )
