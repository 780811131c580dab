"""Prompt sources: the embedded world, or a user's text or JSONL file; drawn in a shuffled order that a seed fixes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Literal

from dpg_cli.errors import UsageError
from dpg_cli.tiny import world

TINY_PROMPTS = 4096


def load_prompts(source: str, *, split: Literal["train", "eval"] = "train") -> list[str]:
    """All prompts of a source.

    Args:
        source: `tiny`; `empty` for one empty prompt (the generator writes unprompted); a `.jsonl` file whose lines have a
            `prompt` string; any other file has a prompt a line.
        split: "train" or "eval", for `tiny` only.

    Raises:
        UsageError: if the file cannot be read, or has no prompt.
    """
    if source == "tiny":
        return world.prompts(split, TINY_PROMPTS if split == "train" else 256, seed=0)
    if source == "empty":
        return [""]
    path = Path(source).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a null character in the path
        raise UsageError(
            f"The prompts {source} cannot be read: {error}.", "Name `tiny`, a text file or a JSONL file."
        ) from None
    if path.suffix == ".jsonl":
        prompts = [_prompt_of(line, source, number) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"The prompts {source} are empty.", "Give at least one prompt.")
    return prompts


def _prompt_of(line: str, source: str, number: int) -> str:
    """The `prompt` string of one JSON line."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UsageError(f"{source}, line {number}: no JSON object with a `prompt` string.", "Correct that line.")
    return prompt


class PromptSampler:
    """Draws prompts without replacement, reshuffled each epoch; a pure function of the seed and the step.

    Args:
        prompts: the pool.
        per_step: P, prompts an outer step; may exceed the pool.
        seed: of the order.
    """

    def __init__(self, prompts: list[str], per_step: int, seed: int) -> None:
        self.prompts = prompts
        self.per_step = per_step
        self.seed = seed

    def at(self, step: int) -> list[str]:
        """The P prompts of an outer step."""
        size = len(self.prompts)
        places = range(step * self.per_step, (step + 1) * self.per_step)
        orders: dict[int, list[int]] = {}
        for epoch in {place // size for place in places}:
            orders[epoch] = random.Random(f"prompts {self.seed} {epoch}").sample(range(size), size)
        return [self.prompts[orders[place // size][place % size]] for place in places]
