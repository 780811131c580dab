"""Prompt pools: the embedded world, or a user's own source; drawn in a shuffled order that a seed fixes."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from dpg_cli import prose
from dpg_cli.data.shapes import prompt_reader
from dpg_cli.data.sources import open_rows, parse
from dpg_cli.data.texts import ListedTexts, Part, RowTexts, Texts
from dpg_cli.errors import UsageError
from dpg_cli.tiny import world

TINY_PROMPTS = 4096
PROBED = 1024  # texts that tell one pool of prompts from another


def load_prompts(
    source: str, *, split: Literal["train", "eval"] = "train", limit: int = 0, holdout: int = 0
) -> Sequence[str]:
    """The prompts of a source.

    Args:
        source: `tiny`; `prose`; `empty` for one empty prompt (the generator writes unprompted); else see `sources`.
        split: "train" or "eval". `tiny` and `prose` have evaluation prompts of their own; of another source they are the
            last `holdout` prompts, or the same prompts where none are held out.
        limit: only the first so many prompts of the source; 0 takes all.
        holdout: prompts at the end of the source that training leaves alone.

    Raises:
        UsageError: if the source cannot be read, or has too few prompts.
    """
    if source == "tiny":
        return world.prompts(split, TINY_PROMPTS if split == "train" else 256, seed=0)
    if source == "prose":
        return prose.prompts(split)
    if source == "empty":
        return [""]
    rows = open_rows(source, split="train", what="prompts", flag="--prompts tiny, prose, empty,", limit=limit)
    texts = RowTexts(rows, *prompt_reader(rows, parse(source).column))
    if not len(texts):
        raise UsageError(f"The prompts {source} are all blank.", "Give at least one.")
    if not holdout:
        return texts
    if holdout >= len(texts):
        raise UsageError(
            f"The prompts {source} are {len(texts):,}; prompts.holdout = {holdout:,} leaves none to train on.",
            "Give more prompts, or lower it with --set prompts.holdout=N.",
        )
    kept = len(texts) - holdout
    return Part(texts, 0, kept) if split == "train" else Part(texts, kept, len(texts))


class PromptSampler:
    """Draws prompts without replacement, reshuffled each epoch; a pure function of the seed and the step.

    Args:
        prompts: the pool.
        per_step: P, prompts an outer step; may exceed the pool.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[str], per_step: int, seed: int) -> None:
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed
        self._orders: dict[int, array[int]] = {}  # by epoch, of the last steps asked for

    def at(self, step: int) -> list[str]:
        """The P prompts of an outer step."""
        size = len(self.prompts)
        places = range(step * self.per_step, (step + 1) * self.per_step)
        epochs = {place // size for place in places}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        pool = self.prompts if isinstance(self.prompts, Texts) else ListedTexts(self.prompts)
        return pool.take([self._orders[place // size][place % size] for place in places])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the pool's size and of up to `PROBED` of its texts, evenly spaced: all of a small pool."""
        size = len(self.prompts)
        count = min(size, PROBED)
        pool = self.prompts if isinstance(self.prompts, Texts) else ListedTexts(self.prompts)
        texts = pool.take([place * size // count for place in range(count)])
        return hashlib.sha256(json.dumps([size, *texts]).encode()).hexdigest()

    def _order(self, epoch: int) -> array[int]:
        """A permutation of the pool."""
        size = len(self.prompts)
        return array("q", random.Random(f"prompts {self.seed} {epoch}").sample(range(size), size))
