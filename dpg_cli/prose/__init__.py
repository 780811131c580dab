"""The embedded world of real prose: two small models of one tokeniser, their prompts, and held-out passages.

Here belong what is shipped (`model/`, `reader/`, `texts/`), the readers of it (this file, free of torch), and the script that
made all of it, `pretrain`, with its parts: `source` (the text), `vocabulary`, `shapes`, `training`, `quality`, `card`.

Not here: names of models and of prompt sources for the whole house (`models/embedded.py`, `data/prompts.py`); the toy
world (`tiny/`), what uses either. Imports nothing of ours but `errors`.
"""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

from dpg_cli.errors import UsageError

MODEL_DIR: Path = Path(__file__).parent / "model"
"""The model called `prose`, generator and target: a GPT-2 96 wide. Loads with `AutoModelForCausalLM` and `AutoTokenizer`."""

READER_DIR: Path = Path(__file__).parent / "reader"
"""The model called `prose-reader`: a Llama 128 wide of another seed, with the same tokeniser."""

TEXTS_DIR: Path = Path(__file__).parent / "texts"
COUNTS = "token_counts.json"  # beside the tokeniser: how often training holds each id

__all__ = ["MODEL_DIR", "READER_DIR", "best_block", "frequent_rows", "heldout", "prompts", "token_counts"]


def prompts(split: Literal["train", "eval"] = "train", limit: int = 0) -> list[str]:
    """Beginnings of verses, four to ten words long, each once, in an order without meaning.

    Args:
        split: "train" for those of the chapters that the models were trained on, "eval" for those of the held-out chapters.
        limit: only the first so many; 0 takes all.

    Raises:
        UsageError: if there is no such split, or it has fewer prompts.
    """
    if split not in ("train", "eval"):
        raise UsageError(f"The prompts of prose have no split {split!r}.", "Splits: train, eval.")
    return _first(_lines(f"prompts-{split}"), limit, f"{split} prompts")


def heldout(limit: int = 0) -> list[str]:
    """Passages of the held-out chapters: whole verses, at least 200 characters, in an order without meaning.

    Args:
        limit: only the first so many; 0 takes all.

    Raises:
        UsageError: if there are fewer.
    """
    return _first(_lines("heldout"), limit, "held-out passages")


def token_counts() -> list[int]:
    """How often the training text holds each of the tokeniser's ids."""
    return [int(count) for count in json.loads((MODEL_DIR / COUNTS).read_text(encoding="utf-8"))]


def frequent_rows(count: int) -> range:
    """The rows of the LM head of either model, `count` of them side by side, whose rarest token is the least rare.

    Raises:
        UsageError: if the vocabulary has fewer rows.
    """
    return best_block(token_counts(), count)


def best_block(counts: list[int], count: int) -> range:
    """The contiguous block of ids whose least frequent one is the most frequent; of equal ones the first.

    Args:
        counts: how often each id occurs, (V,).
        count: ids in the block.

    Raises:
        UsageError: if there are fewer ids.
    """
    if not 1 <= count <= len(counts):
        raise UsageError(
            f"A block of {count} rows does not fit a vocabulary of {len(counts):,}.", "Ask for fewer rows."
        )
    start = max(range(len(counts) - count + 1), key=lambda first: (min(counts[first : first + count]), -first))
    return range(start, start + count)


@lru_cache
def _lines(name: str) -> tuple[str, ...]:
    """The lines of a shipped list."""
    with gzip.open(TEXTS_DIR / f"{name}.txt.gz", "rt", encoding="utf-8", newline="\n") as file:
        return tuple(file.read().split("\n")[:-1])


def _first(lines: tuple[str, ...], limit: int, what: str) -> list[str]:
    """The first lines of a list, or all."""
    if not 0 <= limit <= len(lines):
        raise UsageError(f"The world of prose has {len(lines):,} {what}, not {limit:,}.", "Ask for fewer.")
    return list(lines[:limit] if limit else lines)
