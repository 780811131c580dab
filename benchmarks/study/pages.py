"""What the experiments' sections and figures share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.study.store import Row

Axes = Any  # matplotlib's; it is imported only where something is drawn


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def pick(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def several(values: Iterable[Any]) -> list[Any]:
    """Different values, in order."""
    return sorted(set(values))
