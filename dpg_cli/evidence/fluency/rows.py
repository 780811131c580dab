"""The rows of a dataset whose text is judged: token ids, prompts and texts of any source that `data/sources.py` opens.

Large datasets are thinned to evenly spaced rows, of two datasets of one size the same ones: row n of the data and of its
control share a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpg_cli.data.formats.base import Rows
from dpg_cli.data.sources import open_rows, parse
from dpg_cli.errors import UsageError

MOST_ROWS = 16_384  # of each dataset
MOST_TOKENS = 1 << 22  # of each dataset
ID_COLUMNS = ("token_ids", "input_ids")
TEXT_COLUMNS = ("text", "completion", "response", "messages")
LARGEST_ID = 2**31 - 1

Tokenize = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]


@dataclass(frozen=True)
class Side:
    """One of two datasets.

    Attributes:
        tokens: of each row, int64.
        texts: of each row; empty strings where there are none.
        prompts: what each was written for; None where the data does not say.
        numbers: of the rows in the file.
        rows: in the file.
    """

    tokens: list[np.ndarray]
    texts: list[str]
    prompts: list[str] | None
    numbers: list[int]
    rows: int

    def take(self, places: list[int]) -> Side:
        """Some of the rows."""
        return Side(
            [self.tokens[place] for place in places],
            [self.texts[place] for place in places],
            None if self.prompts is None else [self.prompts[place] for place in places],
            [self.numbers[place] for place in places],
            self.rows,
        )


def read_pair(one: str, other: str, tokenize: Tokenize | None = None) -> tuple[Side, Side]:
    """Two datasets to be compared.

    Args:
        one, other: files, as FILE or FILE:COLUMN.
        tokenize: from texts to token ids; without it both must hold token ids, under one name.

    Raises:
        UsageError: in one line, for what cannot be read, holds no tokens, or too few rows.
    """
    opened = [open_rows(name, split="train", what="rows", flag="dpg inspect dataset") for name in (one, other)]
    columns = _columns([one, other], opened, tokenize is None)
    sides = [_side(rows, column, tokenize) for rows, column in zip(opened, columns, strict=True)]
    return thinned(*sides)


def thinned(one: Side, other: Side) -> tuple[Side, Side]:
    """Both with so few rows that neither has more than `MOST_TOKENS` tokens."""
    share = max(sum(map(len, side.tokens)) / MOST_TOKENS for side in (one, other))
    if share <= 1:
        return one, other
    kept = [side.take(even(len(side.tokens), int(len(side.tokens) / share))) for side in (one, other)]
    return kept[0], kept[1]


def even(count: int, most: int) -> list[int]:
    """At most so many evenly spaced numbers below `count`."""
    kept = min(count, max(1, most))
    return [place * count // kept for place in range(kept)]


def _columns(names: list[str], opened: list[Rows], ids: bool) -> list[str]:
    """The column of each dataset: the one that its source names, or the first that there is in both."""
    there = [rows.columns for rows in opened]
    asked = [parse(name).column for name in names]
    wanted = ID_COLUMNS if ids else TEXT_COLUMNS
    for name, columns, column in zip(names, there, asked, strict=True):
        if not any(key in columns for key in ([column] if column else wanted)):
            words = " or ".join(repr(key) for key in ([column] if column else wanted))
            remedy = (
                "Give --tokenizer MODEL, to compare texts."
                if ids and any(k in columns for k in TEXT_COLUMNS)
                else ("Name a column: FILE:COLUMN.")
            )
            raise UsageError(f"{name} has no column {words}; it has {', '.join(sorted(columns)[:12])}.", remedy)
    both = [key for key in wanted if all(key in columns for columns in there)]
    found = [
        column or next(iter(both), "") or next(k for k in wanted if k in columns)
        for column, columns in zip(asked, there, strict=True)
    ]
    if ids and found[0] != found[1]:
        raise UsageError(
            f"The two have no column of token ids in common: {names[0]} has {found[0]!r}, {names[1]} has {found[1]!r}.",
            "Give --tokenizer MODEL, to compare texts.",
        )
    return found


def _side(rows: Rows, column: str, tokenize: Tokenize | None) -> Side:
    """Evenly spaced rows of a source."""
    rows.only([name for name in dict.fromkeys([column, "text", "prompt"]) if name in rows.columns])
    chosen = even(len(rows), MOST_ROWS)
    numbers: list[int] = []
    values: list[Any] = []
    texts: list[str] = []
    prompts: list[Any] = []
    for number, record in zip(chosen, rows.take(chosen), strict=True):
        value = record.get(column)
        good = _is_ids(value) if tokenize is None else _text(value) is not None
        if not good:
            kind = "token ids" if tokenize is None else "text"
            raise rows.fault(number, f"{column!r} holds no {kind}")
        numbers.append(number)
        values.append(value)
        texts.append(_text(value if tokenize else record.get("text")) or "")
        prompts.append(record.get("prompt"))
    tokens = [np.array(row, dtype=np.int64) for row in (values if tokenize is None else tokenize(texts))]
    if not sum(map(len, tokens)):
        raise UsageError(f"{rows.name} has no tokens to compare.", "Name another file.")
    known = all(isinstance(prompt, str) for prompt in prompts)
    return Side(tokens, texts, prompts if known else None, numbers, len(rows))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= LARGEST_ID for token in value
    )


def _text(value: Any) -> str | None:
    """A text, or what the assistant says in a conversation."""
    if isinstance(value, list):
        said = [str(m.get("content", "")) for m in value if isinstance(m, dict) and m.get("role") == "assistant"]
        return "\n".join(said) if said else None
    return value if isinstance(value, str) else None
