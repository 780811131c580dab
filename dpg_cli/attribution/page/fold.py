"""Rows that say the same: equal but for case and white space, or nearly so. Folded, a ranking shows each once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

SHINGLE = 3  # words
ALIKE = 0.8  # Jaccard similarity of two texts' shingles from which they count as one


def folded(texts: Sequence[str], near: Iterable[int]) -> np.ndarray:
    """The row that stands for each row: the first of those that say the same.

    Args:
        texts: of all rows; equal ones are found among all.
        near: rows among which near-duplicates are looked for too.

    Returns:
        Row numbers, int32 (N,); a row that is alone stands for itself.
    """
    first: dict[str, int] = {}
    stands = np.arange(len(texts), dtype=np.int32)
    for row, text in enumerate(texts):
        stands[row] = first.setdefault(" ".join(text.casefold().split()), row)
    joined = dict(_near(texts, sorted({int(stands[row]) for row in near})))
    if joined:
        stands = np.array([joined.get(int(row), row) for row in stands], dtype=np.int32)
    return stands


def _near(texts: Sequence[str], rows: list[int]) -> Iterable[tuple[int, int]]:
    """(row, the earlier row that stands for it) of the near-duplicates among some rows."""
    shingles = {row: shingles_of(texts[row]) for row in rows}
    holders: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        own = shingles[row]
        shared: dict[int, int] = defaultdict(int)
        for part in own:
            for other in holders[part]:
                shared[other] += 1
        alike = [other for other, both in shared.items() if both >= ALIKE * (len(own) + len(shingles[other]) - both)]
        if alike:
            yield row, min(alike)
            continue
        for part in own:  # only rows that stand for others are compared with
            holders[part].append(row)


def shingles_of(text: str) -> set[str]:
    """Runs of `SHINGLE` words; a shorter text is one run."""
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[at : at + SHINGLE]) for at in range(max(1, len(words) - SHINGLE + 1))} if words else set()
