"""Which rows of a dataset are exported, and into which split: decided before anything is written, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpg_cli.artefacts.rows import outline, reward_column
from dpg_cli.errors import UsageError


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows by their place in the file.

    Attributes:
        keep: bool (rows,), what is exported.
        test: bool (rows,), the held-out part of it; None without a split.
        words: how they were chosen, in sentences, for the card.
    """

    keep: np.ndarray
    test: np.ndarray | None
    words: str

    @property
    def counts(self) -> dict[str, int]:
        """Rows by split."""
        if self.test is None:
            return {"train": int(self.keep.sum())}
        return {"train": int((self.keep & ~self.test).sum()), "test": int(self.test.sum())}

    def masks(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Which of the rows start … stop - 1 belong to each split."""
        keep = self.keep[start:stop]
        if self.test is None:
            return {"train": keep}
        test = self.test[start:stop]
        return {"train": keep & ~test, "test": test}


def check_options(n: int | None, split: float | None, min_reward: float | None, source: str, seed: int) -> None:
    """Refuse what makes no sense for any run.

    Raises:
        UsageError: naming the option.
    """
    if n is not None and not 0 < n <= 10**9:
        raise UsageError(f"--n {n} is no number of examples.", "Give at least 1.")
    if split is not None and not 0 < split < 1:
        raise UsageError(f"--split {split:g} is no share.", "Give the share to hold out, between 0 and 1: --split 0.1.")
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed {seed} is out of range.", "Give a number from 0 to 4294967295.")
    if min_reward is None:
        return
    if not np.isfinite(min_reward):
        raise UsageError(f"--min-reward {min_reward} is no number to compare with.", "For example: --min-reward 0.")
    if n is not None:
        raise UsageError("New examples have no rewards: --n and --min-reward exclude each other.", "Leave one out.")
    if source == "control":
        raise UsageError("The control has no rewards for --min-reward to compare.", "Leave out --min-reward.")


def select(path: Path, min_reward: float | None, split: float | None, seed: int) -> Selection:
    """Choose rows of a dataset file.

    Args:
        path: parquet.
        min_reward: least reward kept.
        split: share of the kept rows that is held out, drawn at random.
        seed: of that draw.

    Raises:
        UsageError: if no row is left, or a split would be empty, or the file is damaged.
    """
    size, _ = outline(path)
    keep, words = np.ones(size, dtype=bool), "All rows of the run's dataset."
    if min_reward is not None:
        rewards = reward_column(path)
        keep = rewards >= min_reward  # a missing reward is NaN, and is dropped
        words = f"Only rows with a reward of at least {min_reward:g}: {int(keep.sum()):,} of {size:,}."
        if not keep.any():
            known = rewards[np.isfinite(rewards)]
            largest = f"; the largest is {known.max():g}" if len(known) else ""
            raise UsageError(f"No row has a reward of at least {min_reward:g}{largest}.", "Lower --min-reward.")
    return split_rows(keep, split, seed, words)


def split_rows(keep: np.ndarray, split: float | None, seed: int, words: str) -> Selection:
    """Hold a share of the kept rows out.

    Raises:
        UsageError: if a split would be empty.
    """
    if not keep.any():
        raise UsageError("The dataset has no rows.", "Run again with dataset.examples of at least 1.")
    if split is None:
        return Selection(keep, None, words)
    places = np.flatnonzero(keep)
    held_out = round(split * len(places))
    if not 0 < held_out < len(places):
        raise UsageError(f"--split {split:g} of {len(places):,} rows leaves one part empty.", "Give another share.")
    test = np.zeros(len(keep), dtype=bool)
    test[np.random.default_rng(seed).permutation(places)[:held_out]] = True
    return Selection(keep, test, f"{words} `test` is a random {split:.4g} of them, seed {seed}.")
