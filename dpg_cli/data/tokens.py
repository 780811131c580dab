"""From a row written as text to token ids and a mask: the whole is tokenised at once, the mask placed by characters.

A token that holds a character of the completion is trained on. Where it holds one of the context as well, the tokeniser
made a token across the seam that it would not make of the context alone; such rows straddle, and are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpg_cli.data.conversations import Span, common
from dpg_cli.data.shapes import Fault

BATCH = 1024  # rows tokenised at once


@dataclass(frozen=True)
class Written:
    """A row as text.

    Attributes:
        text: all of it.
        spans: characters that are trained on; None for all tokens.
        to_end: the last span goes on through whatever follows it.
        special: the tokeniser adds its special tokens; a chat template has written them already.
        context: what stands before the first span, as it would be tokenised alone; empty where nothing does.
        shown: what is trained on, for people.
    """

    text: str
    spans: list[Span] | None
    to_end: bool
    special: bool
    context: str
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
    contexts = iter(_alone(tokenizer, [row.context for row in rows if row.context], special))
    found = []
    for place, row in enumerate(rows):
        ids, context = read["input_ids"][place], next(contexts) if row.context else None
        if fast:
            label, straddles = by_offsets(row, ids, read["offset_mapping"][place], context)
        else:
            label, straddles = by_prefixes(row, ids, context, tokenizer)
        found.append(Tokens(ids, label, row.shown, straddles))
    return found


def _alone(tokenizer: Any, contexts: list[str], special: bool) -> list[list[int]]:
    """Tokens of contexts by themselves, without special tokens that the tokeniser adds at the end."""
    if not contexts:
        return []
    read = tokenizer(contexts, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast)
    ends, found = set(tokenizer.all_special_ids) if special else set(), []
    for place, ids in enumerate(read["input_ids"]):
        size = len(ids)
        while (
            size
            and ids[size - 1] in ends
            and (not tokenizer.is_fast or read["offset_mapping"][place][size - 1] == (0, 0))
        ):
            size -= 1
        found.append(ids[:size])
    return found


def by_offsets(
    row: Written, ids: list[int], offsets: Sequence[Span], context: list[int] | None
) -> tuple[list[bool], bool]:
    """Mask of a row, and whether it straddles.

    Args:
        row: as it was tokenised.
        ids: its tokens.
        offsets: the characters that each token comes from; (0, 0) for one that the tokeniser added.
        context: the tokens of its context alone, None where there is none.
    """
    if row.spans is None:
        return [True] * len(ids), False
    if row.to_end:
        seam = row.spans[0][0]
        first = next((place for place, (_, end) in enumerate(offsets) if end > seam), len(ids))
        label = [place >= first for place in range(len(ids))]
        return label, context is not None and ids[:first] != context
    # a token of blanks alone may come from no character, at the place where it ends
    label = [any(a < end and (start < b or end <= b) for a, b in row.spans) for start, end in offsets]
    return label, any(start < a < end for a, _ in row.spans for start, end in offsets)


def by_prefixes(row: Written, ids: list[int], context: list[int] | None, tokenizer: Any) -> tuple[list[bool], bool]:
    """The same by a tokeniser that gives no offsets: a place is where the tokens of the text up to it end.

    Args:
        row, ids, context: see `by_offsets`.
        tokenizer: tokenises the beginnings.
    """
    if row.spans is None:
        return [True] * len(ids), False
    if row.to_end:
        first = common(context or [], ids) if row.context else 0
        return [place >= first for place in range(len(ids))], context is not None and ids[:first] != context
    label = [False] * len(ids)
    straddles = False
    for a, b in row.spans:
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
